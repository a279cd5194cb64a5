"""`cnnkern.convert` on torchvision's models: all of them by count and key, one of each family by numbers."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import detection, segmentation, video
from torchvision.models.video.mvit import MSBlockConfig

import cnnkern
from tests.poolings import with_poolings
from tests.slow import proved
from tests.zoo import small_vgg

ADD, RELU = "BatchNorm + add + ReLU", "BatchNorm + ReLU"
TORCHVISION = {
    "resnet18": {RELU: 9, ADD: 8, "BatchNorm": 3},
    "resnet50": {RELU: 33, ADD: 16, "BatchNorm": 4},
    "vgg11_bn": {RELU: 8},
    "vgg16_bn": {RELU: 13},
    "densenet121": {RELU: 121},
    "resnext50_32x4d": {RELU: 33, ADD: 16, "BatchNorm": 4, "GroupedConv2d": 16},
    "mobilenet_v2": {"BatchNorm + ReLU6": 35, "BatchNorm + add": 10, "BatchNorm": 7, "GroupedConv2d": 17},
    "mobilenet_v3_small": {
        "BatchNorm + Hardswish": 18,
        RELU: 5,
        "BatchNorm + add": 6,
        "BatchNorm": 5,
        "GroupedConv2d": 11,
    },
    "efficientnet_b0": {"BatchNorm + SiLU": 33, "BatchNorm": 16, "GroupedConv2d": 16},
    "regnet_y_400mf": {RELU: 33, ADD: 16, "BatchNorm": 4, "GroupedConv2d": 16},
    "shufflenet_v2_x0_5": {RELU: 37, "BatchNorm": 19, "GroupedConv2d": 19},
    "convnext_tiny": {"GroupedConv2d": 18, "LayerNorm": 18, "LayerNorm2d": 5},
    "googlenet": {RELU: 59},
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_replaces_every_pair_of_a_torchvision_model(name):
    model = torchvision.models.get_model(name, weights=None, **extra_of(name))
    converted = cnnkern.convert(model)
    converted(torch.randn(2, 3, 64, 64))[0].sum().backward()
    assert cnnkern.conversion_report(converted).counts == with_poolings(TORCHVISION[name], model)
    assert list(converted.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(model.parameters(), converted.parameters(), strict=True))
    assert type(converted) is type(model)
    assert not any(isinstance(m, cnnkern.nn.BatchNorm2d | cnnkern.nn.BatchNormReLU2d) for m in model.modules())


def extra_of(name: str) -> dict[str, Any]:
    """Arguments without which a constructor draws weights slowly, warns or downloads some."""
    extra: dict[str, Any] = {"init_weights": False} if "googlenet" in name or "inception" in name else {}
    if name.startswith(("deeplab", "fcn", "lraspp", "faster", "fcos", "keypoint", "mask", "retina", "ssd")):
        extra["weights_backbone"] = None
    return extra


def images(*shape: int) -> Callable[[], tuple]:
    return lambda: (torch.randn(2, *shape, dtype=torch.float64),)


def classifier(name: str, size: int = 64, **arguments) -> tuple[Callable[[], nn.Module], Callable[[], tuple]]:
    extra = extra_of(name) | {"num_classes": 3} | arguments
    return (lambda: torchvision.models.get_model(name, weights=None, **extra)), images(3, size, size)


def scenes(size: int, masks: bool = False, keypoints: bool = False) -> Callable[[], tuple]:
    """Two images, of two sizes, with a box in one and two in the other."""

    def make() -> tuple:
        boxes = [torch.tensor([[5.0, 6, 40, 50]]), torch.tensor([[2.0, 3, 30, 25], [20, 22, 60, 61]])]
        targets: list[dict[str, torch.Tensor]] = [
            {"boxes": b.double(), "labels": torch.ones(len(b), dtype=torch.int64)} for b in boxes
        ]
        for target in targets:
            n = len(target["boxes"])
            if masks:
                target["masks"] = (torch.rand(n, size, size) > 0.5).to(torch.uint8)
            if keypoints:
                target["keypoints"] = torch.tensor([[[22.0, 23, 1], [25, 24, 1]]]).repeat(n, 1, 1)
        return [torch.rand(3, size, size, dtype=torch.float64) for _ in targets], targets

    return make


def detector(name: str, size: int = 64, **arguments) -> tuple[Callable[[], nn.Module], Callable[[], tuple]]:
    resized = {} if name.startswith("ssd") else {"min_size": size, "max_size": size}
    scene = scenes(size, masks=name.startswith("mask"), keypoints=name.startswith("keypoint"))
    few = {"rpn_pre_nms_top_n_train": 40, "rpn_post_nms_top_n_train": 20, "box_batch_size_per_image": 8}
    few |= {"rpn_pre_nms_top_n_test": 40, "rpn_post_nms_top_n_test": 20}
    resized |= few if "rcnn" in name else {}  # else regions take most of the time
    extra = {"weights": None, "weights_backbone": None, "num_classes": 2} | resized | arguments
    return (lambda: getattr(detection, name)(**extra)), scene


def segmenter(name: str, size: int = 64) -> tuple[Callable[[], nn.Module], Callable[[], tuple]]:
    def make() -> nn.Module:
        return getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=3)

    return make, images(3, size, size)


def s3d() -> nn.Module:
    model = video.s3d(num_classes=3)
    model.avgpool = nn.AvgPool3d(2)  # of images of 64, where its own wants 224
    return model


def mvit() -> nn.Module:
    def block(channels: int, heads: int, stride: int) -> MSBlockConfig:
        return MSBlockConfig(heads, channels // 2, channels, [3] * 3, [3] * 3, [1, stride, stride], [1, 2, 2])

    return video.mvit.MViT((32, 32), 4, [block(16, 1, 1), block(32, 2, 2)], False, True, False, False, num_classes=3)


FAMILIES = {
    **{
        name: classifier(name)
        for name in (
            *("resnet18", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5", "shufflenet_v2_x0_5"),
            *("efficientnet_b0", "regnet_x_400mf", "regnet_y_400mf", "resnext50_32x4d"),
            *("convnext_tiny", "swin_t", "swin_v2_t", "quantized_mobilenet_v2"),
        )
    },
    "vgg11_bn": (lambda: small_vgg("vgg11_bn", 3), images(3, 64, 64)),
    "resnet50": classifier("resnet50"),
    "densenet121": classifier("densenet121"),
    "quantized_resnet18": classifier("quantized_resnet18"),
    "googlenet": classifier("googlenet", aux_logits=False),
    "googlenet, auxiliary classifiers": classifier("googlenet"),
    "inception_v3": classifier("inception_v3", 107, aux_logits=False),
    "vision transformer": (
        lambda: torchvision.models.VisionTransformer(32, 16, 2, 2, 32, 64, num_classes=3),
        images(3, 32, 32),
    ),
    "maxvit": (
        lambda: torchvision.models.MaxVit((64, 64), 16, 2, [16, 32], [1, 1], 8, 0.0, num_classes=3),
        images(3, 64, 64),
    ),
    **{name: segmenter(name) for name in ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")},
    **{
        name: detector(name)
        for name in (
            *("fasterrcnn_mobilenet_v3_large_320_fpn", "fcos_resnet50_fpn", "maskrcnn_resnet50_fpn"),
            "retinanet_resnet50_fpn",
        )
    },
    "keypointrcnn_resnet50_fpn": detector("keypointrcnn_resnet50_fpn", num_keypoints=2),
    "ssdlite320_mobilenet_v3_large": detector("ssdlite320_mobilenet_v3_large", 320),
    **{
        name: ((lambda name=name: getattr(video, name)(num_classes=3)), images(3, 4, 32, 32))
        for name in ("r3d_18", "mc3_18", "r2plus1d_18")
    },
    "s3d": (s3d, images(3, 16, 64, 64)),
    "swin3d_t": (lambda: video.swin3d_t(num_classes=3), images(3, 4, 32, 32)),
    "mvit": (mvit, images(3, 4, 32, 32)),
}


def tensors(outputs: Any) -> list[torch.Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor)]


def losses(model: nn.Module, inputs: tuple) -> list[torch.Tensor]:
    """The outputs that have a gradient; a detector's are losses. Whatever it draws, it draws again."""
    torch.manual_seed(1)
    return [t for t in tensors(model(*inputs)) if t.requires_grad]


TESTED = (
    *("resnet18", "vgg11_bn", "mobilenet_v3_small", "mnasnet0_5", "shufflenet_v2_x0_5", "regnet_y_400mf"),
    *("quantized_resnet18", "googlenet", "vision transformer", "maxvit", "mvit"),
    *("lraspp_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"),
)


@pytest.mark.parametrize("name", proved(FAMILIES, TESTED))
@pytest.mark.filterwarnings("ignore:.*(auxiliary heads|torch.ao.quantization is deprecated).*")
def test_two_training_steps_and_eval_are_as_in_the_original(name):
    build, make_inputs = FAMILIES[name]
    torch.manual_seed(0)
    original = build().double()
    for module in original.modules():
        if hasattr(module, "layer_scale"):
            nn.init.ones_(module.layer_scale)  # else nothing of convnext's blocks is seen
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.1)  # a head without which nothing has a gradient
    converted = cnnkern.convert(copy.deepcopy(original))
    assert cnnkern.conversion_report(converted).counts
    inputs = make_inputs()
    for _ in range(2):
        theirs, ours = (losses(m, inputs) for m in (original, converted))
        assert theirs
        for mine, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())
        for outputs in (theirs, ours):
            sum(t.square().mean() for t in outputs).backward()
        named = [
            (n, p.grad, q.grad) for (n, p), q in zip(original.named_parameters(), converted.parameters(), strict=True)
        ]
        scale = max(p.abs().max() for _, p, _ in named if p is not None)
        for parameter, expected, mine in named:
            assert (expected is None) == (mine is None), parameter
            if expected is not None:
                assert (mine - expected).abs().max() <= 1e-8 * scale, parameter
        with torch.no_grad():
            for m in (original, converted):
                for p in m.parameters():
                    if p.grad is not None:
                        p -= 1e-3 / scale * p.grad
                        p.grad = None
    for (n, b), c in zip(original.named_buffers(), converted.named_buffers(), strict=True):
        assert n == c[0]
        torch.testing.assert_close(b, c[1], msg=n)
    with torch.no_grad():
        expected = tensors(original.eval()(*inputs[:1]))
        forms = (  # one at a time, for the sake of memory
            converted.eval,
            lambda: pickle.loads(pickle.dumps(converted)),
            lambda: fresh(build, original.state_dict()),
            lambda: loaded(original, converted.state_dict()),
            lambda: cnnkern.revert(converted),
        )
        for form in forms:
            for mine, t in zip(tensors(form()(*inputs[:1])), expected, strict=True):
                torch.testing.assert_close(mine, t, rtol=1e-7, atol=1e-9)


def fresh(build: Callable[[], nn.Module], state: dict[str, torch.Tensor]) -> nn.Module:
    model = cnnkern.convert(build().double()).eval()
    model.load_state_dict(state)
    return model


def loaded(model: nn.Module, state: dict[str, torch.Tensor]) -> nn.Module:
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("name", torchvision.models.list_models())
def test_every_model_that_torchvision_registers(name, monkeypatch):
    """Without weights: what is replaced, and that keys and modules stay; the numbers are other tests' matter."""
    register = nn.Module.register_parameter

    def register_on_meta(module, name, parameter):
        register(module, name, None if parameter is None else nn.Parameter(parameter.detach().to("meta")))

    if not name.startswith("ssdlite"):  # its constructor runs the backbone
        monkeypatch.setattr(nn.Module, "register_parameter", register_on_meta)
    model = torchvision.models.get_model(name, weights=None, **extra_of(name))
    monkeypatch.undo()
    norms = [m for m in model.modules() if type(m) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)]
    converted = cnnkern.convert(model)
    counts = cnnkern.conversion_report(converted).counts
    assert sum(n for kind, n in counts.items() if kind.startswith("BatchNorm")) == len(norms)
    grouped = [m for m in model.modules() if type(m) is nn.Conv2d and m.groups > 1]
    layer_norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert counts.get("GroupedConv2d", 0) == len(grouped)
    assert counts.get("LayerNorm", 0) + counts.get("LayerNorm2d", 0) == len(layer_norms)
    assert counts.get("MaxPool2d", 0) == sum(type(m) is nn.MaxPool2d for m in model.modules())
    assert "not converted" not in counts
    assert not any(type(m) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) for m in converted.modules())
    assert list(converted.state_dict()) == list(model.state_dict())
    assert [n for n, _ in converted.named_modules()] == [n for n, _ in model.named_modules()]
    reverted = cnnkern.revert(converted)
    assert [type(m) for m in reverted.modules()] == [type(m) for m in model.modules()]
    if "alexnet" in name or "squeezenet" in name or name[:3] == "vgg":
        assert (counts.keys() == {"MaxPool2d"}) == (not norms)
