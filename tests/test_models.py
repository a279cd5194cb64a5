"""The zoo against its facts, its unfused twins and torchvision.

`CNNKERN_ALL_MODELS=1 pytest tests/test_models.py` compares every model with its twin and with torchvision, in 20 GB of
memory and 25 on disk; without it, the ones of QUICK. Facts and state-dict keys are tested for all, on tensors without
memory.
"""

import itertools
import os
import re
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import cnnkern
from cnnkern import models, testing
from cnnkern.models import create_model, get_builder, list_models

OWN = {"alexnet", "googlenet"}  # torchvision's models of these names are others
TORCHVISION = [name for name in list_models() if hasattr(torchvision.models, name) and name not in OWN]

# 10 classes unless a number of classes is given; from the literature, or computed with plain PyTorch.
PARAMETERS = {
    ("lenet", 1): 61_706,
    ("lenet5_tanh", 1): 44_426,
    ("lenet_relu", 1): 61_706,
    ("lenet_wide", 1): 422_026,
    ("alexnet", 1): 46_764_746,
    ("vgg11", 1): 128_806_154,
    ("vgg13", 1): 128_990_666,
    ("vgg16", 1): 134_300_362,
    ("vgg19", 1): 139_610_058,
    ("nin", 1): 1_992_166,
    ("googlenet", 1): 5_977_530,
    ("bn_lenet", 1): 44_878,
    ("bn_lenet_residual", 3): 255_130,
    ("res_lenet", 3): 171_162,
    ("simple_resnet", 1): 56_586,
    ("densenet_small", 1): 758_226,
    ("regnet_x_tiny", 1): 179_290,
}
IMAGENET_PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "densenet121": 7_978_856,
    "densenet169": 14_149_480,
    "densenet201": 20_013_928,
    "regnet_x_400mf": 5_495_976,
    "regnet_y_400mf": 4_344_144,
    "mobilenet_v2": 3_504_872,
    "efficientnet_b0": 5_288_548,
    "shufflenet_v2_x1_0": 2_278_604,
    "convnext_tiny": 28_589_128,
}


@contextmanager
def meta():
    with torch.device("meta"):
        yield


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def shapes(model: nn.Module, *size: int, batch: int = 1) -> dict[str, tuple[int, ...]]:
    """Path of each module -> the shape that it gives for images of this size, without the batch."""
    found = {}
    for path, module in model.named_modules():
        module.register_forward_hook(lambda m, args, y, path=path: found.__setitem__(path, tuple(y.shape[1:])))
    model.eval()(torch.empty(batch, *size, device=next(model.parameters()).device))
    return found


# ---- facts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "in_channels"), PARAMETERS)
def test_parameters_at_ten_classes(name, in_channels):
    with meta():
        model = create_model(name, num_classes=10, in_channels=in_channels)
    assert parameters(model) == PARAMETERS[name, in_channels]


@pytest.mark.parametrize("name", IMAGENET_PARAMETERS)
def test_parameters_for_imagenet(name):
    with meta():
        assert parameters(create_model(name)) == IMAGENET_PARAMETERS[name]


def test_a_quarter_of_vgg11():
    with meta():
        assert parameters(models.vgg11(num_classes=10, in_channels=1, width_mult=0.25)) == 43_093_322


@pytest.mark.parametrize("name", list_models())
def test_one_architecture_and_a_docstring_that_tells_the_truth(name):
    builder = get_builder(name)
    with meta():
        fused, unfused = create_model(name), create_model(name, fused=False)
        described = {n: (v.shape, v.dtype) for n, v in fused.state_dict().items()}
        assert described == {n: (v.shape, v.dtype) for n, v in unfused.state_dict().items()}
        assert list(fused.state_dict()) == list(unfused.state_dict())
        assert not any(type(m).__module__.startswith("cnnkern.nn") for m in unfused.modules())
        smaller = create_model(name, num_classes=7, in_channels=2)
        assert smaller.eval()(torch.empty(1, 2, *builder.input_size[1:])).shape == (1, 7)
    said = re.search(r"Input (\d+)x(\d+)x(\d+),\s+([\d,]+)\s+parameters", builder.__doc__)
    assert tuple(map(int, said.groups()[:3])) == builder.input_size
    assert int(said[4].replace(",", "")) == parameters(fused)
    assert name in models.__all__
    assert getattr(models, name) is builder


def test_shapes_of_alexnet():
    with meta():
        found = shapes(models.alexnet(), 1, 224, 224)
    convs_and_pools = [found[str(i)] for i in (0, 2, 3, 5, 6, 8, 10, 12)]
    assert [s[-1] for s in convs_and_pools] == [54, 26, 26, 12, 12, 12, 12, 5]
    assert found["13"] == (6400,)


def test_shapes_of_vgg11():
    with meta():
        found = shapes(models.vgg11(in_channels=1), 1, 224, 224)
    pools = [s for p, s in found.items() if re.fullmatch(r"features\.(2|5|10|15|20)", p)]
    assert pools == [(64, 112, 112), (128, 56, 56), (256, 28, 28), (512, 14, 14), (512, 7, 7)]
    assert torch.tensor(found["avgpool"]).prod() == 25_088


def test_shapes_of_nin():
    with meta():
        found = shapes(models.nin(), 1, 224, 224)
    assert [found[p] for p in "0247"] == [(96, 54, 54), (256, 26, 26), (384, 12, 12), (10, 5, 5)]


@pytest.mark.parametrize("bn", [False, True])
def test_shapes_of_googlenet(bn):
    with meta():
        found = shapes(models.googlenet(bn=bn), 1, 96, 96)
    assert [found[p] for p in "01234"] == [(64, 24, 24), (192, 12, 12), (480, 6, 6), (832, 3, 3), (1024,)]
    inceptions = [found[f"2.{i}"][0] for i in range(2)] + [found[f"3.{i}"][0] for i in range(5)]
    inceptions += [found[f"4.{i}"][0] for i in range(2)]
    assert inceptions == [256, 480, 512, 512, 512, 528, 832, 832, 1024]


def test_shapes_of_resnet18():
    with meta():
        found = shapes(models.resnet18(in_channels=1), 1, 96, 96)
    stages = [found[p] for p in ("maxpool", "layer1", "layer2", "layer3", "layer4")]
    assert stages == [(64, 24, 24), (64, 24, 24), (128, 12, 12), (256, 6, 6), (512, 3, 3)]


def test_shapes_of_small_networks():
    with meta():
        assert shapes(models.densenet_small(), 1, 96, 96)["10"] == (248, 3, 3)
        assert shapes(models.regnet_x_tiny(), 1, 96, 96)["trunk_output"] == (80, 12, 12)


def test_regnet_widths_are_the_papers():
    """RegNetX-400MF and RegNetY-400MF in tables of the paper: depths 1-2-7-12 and 1-3-6-6."""
    assert models.regnet.quantized_widths(24, 24.48, 2.54, 22, 16) == ([1, 2, 7, 12], [32, 64, 160, 400], [16] * 4)
    assert models.regnet.quantized_widths(48, 27.89, 2.09, 16, 8) == ([1, 3, 6, 6], [48, 104, 208, 440], [8] * 4)


# ---- blocks -----------------------------------------------------------------------------------------------------


def test_shapes_of_blocks():
    x = torch.randn(4, 3, 8, 8)
    y = models.DenseBlock(2, 10)(x)
    assert y.shape == (4, 23, 8, 8)
    assert models.TransitionBlock(10)(y).shape == (4, 10, 4, 4)
    x = torch.randn(4, 32, 96, 96)
    assert models.ResNeXtBlock(32, 16, 1)(x).shape == (4, 32, 96, 96)
    assert models.ResidualBlock(3, 6, stride=2)(torch.randn(4, 3, 6, 6)).shape == (4, 6, 3, 3)


def test_a_bottleneck_of_256_channels_has_69632_weights():
    def weights(block):
        return sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Conv2d))

    assert weights(models.BottleneckBlock(256)) == 69_632
    assert weights(models.ResidualBlock(256)) == 1_179_648
    assert [weights(models.ResidualBlock(8, num_convs=n)) for n in (2, 3, 4)] == [n * 9 * 64 for n in (2, 3, 4)]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("lazy", "eager"),
    [
        (lambda f: models.ResidualBlock(None, 6, 2, fused=f), lambda f: models.ResidualBlock(3, 6, 2, fused=f)),
        (
            lambda f: models.BottleneckBlock(None, 2, 6, projection=True, fused=f),
            lambda f: models.BottleneckBlock(3, 2, 6, fused=f),
        ),
        (
            lambda f: models.ResNeXtBlock(None, 3, 1, 6, 2, fused=f),
            lambda f: models.ResNeXtBlock(3, 3, 1, 6, 2, fused=f),
        ),
        (lambda f: models.DenseBlock(2, 4, fused=f), lambda f: models.DenseBlock(2, 4, 3, fused=f)),
        (lambda f: models.TransitionBlock(4, fused=f), lambda f: models.TransitionBlock(4, 3, fused=f)),
    ],
)
def test_lazy_blocks_learn_their_channels(lazy, eager, fused):
    x, lazy, eager = torch.randn(2, 3, 6, 6), lazy(fused), eager(fused)
    lazy(x)
    assert {n: v.shape for n, v in lazy.state_dict().items()} == {n: v.shape for n, v in eager.state_dict().items()}
    lazy.load_state_dict(eager.state_dict())
    assert torch.equal(lazy(x), eager(x))


@pytest.mark.parametrize("fused", [True, False])
def test_a_residual_block_with_zero_weights_is_relu(fused):
    x = torch.randn(4, 3, 6, 6)
    for block in (models.ResidualBlock(3, fused=fused), models.ResNeXtBlock(3, 3, fused=fused)):
        for m in block.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.zeros_(m.weight)
                nn.init.zeros_(m.bias)
        assert torch.equal(block(x), F.relu(x))


BLOCKS = {
    "ResidualBlock": (lambda f: models.ResidualBlock(4, fused=f), (3, 4, 3, 3)),
    "ResidualBlock, 3 convolutions, projection": (lambda f: models.ResidualBlock(2, 3, 2, 3, fused=f), (3, 2, 4, 4)),
    "BottleneckBlock": (lambda f: models.BottleneckBlock(4, 2, fused=f), (3, 4, 3, 3)),
    "ResNeXtBlock": (lambda f: models.ResNeXtBlock(4, 2, fused=f), (3, 4, 3, 3)),
    "ResNeXtBlock, projection, SE": (lambda f: models.ResNeXtBlock(4, 2, 1, 6, 2, 0.5, fused=f), (3, 4, 4, 4)),
    "DenseBlock": (lambda f: models.DenseBlock(2, 2, 3, fused=f), (3, 3, 3, 3)),
    "TransitionBlock": (lambda f: models.TransitionBlock(2, 3, fused=f), (3, 3, 4, 4)),
    "DenseLayer": (lambda f: models.densenet.DenseLayer(3, 2, fused=f), (3, 3, 3, 3)),
    "BasicBlock": (lambda f: models.BasicBlock(3, 4, 2, fused=f), (3, 3, 4, 4)),
    "Bottleneck": (lambda f: models.Bottleneck(4, 1, fused=f, groups=2, group_width=64), (3, 4, 3, 3)),
    "PreActBasicBlock": (lambda f: models.PreActBasicBlock(3, 4, 2, fused=f), (3, 3, 4, 4)),
    "PreActBottleneck": (lambda f: models.PreActBottleneck(8, 2, fused=f), (2, 8, 3, 3)),
    "Inception": (lambda f: models.Inception(3, 2, (2, 3), (1, 2), 1, bn=True, fused=f), (2, 3, 4, 4)),
    "NiNBlock": (lambda f: models.NiNBlock(3, 4, 3, padding=1), (2, 3, 3, 3)),
    "InvertedResidual": (lambda f: models.InvertedResidual(3, 3, 1, 2, fused=f), (3, 3, 3, 3)),
    "MBConv": (lambda f: models.MBConv(3, 3, expansion=2, fused=f), (3, 3, 3, 3)),
    "ShuffleBlock": (lambda f: models.ShuffleBlock(4, 4, fused=f), (3, 4, 3, 3)),
    "ShuffleBlock, stride 2": (lambda f: models.ShuffleBlock(3, 4, 2, fused=f), (3, 3, 4, 4)),
    "ConvNeXtBlock": (lambda f: models.ConvNeXtBlock(3, layer_scale=0.5, fused=f), (2, 3, 4, 4)),
    "SqueezeExcitation": (lambda f: models.SqueezeExcitation(4, 2), (3, 4, 3, 3)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_of_blocks_by_finite_differences(name):
    build, shape = BLOCKS[name]
    torch.manual_seed(len(name))
    block = build(True).double()
    names, values = zip(*block.named_parameters(), strict=True)

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(names, values, strict=True)), x)

    def run(x, *values):  # the module itself, with these parameters put in
        for parameter, value in zip(block.parameters(), values, strict=True):
            parameter.data = value.detach()
        return function(x, *values)

    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *(v.detach().clone().requires_grad_() for v in values)), fast_mode=True)


def test_blocks_refuse_what_they_cannot_build():
    with pytest.raises(ValueError, match="num_convs must be 2, 3 or 4; got 5"):
        models.ResidualBlock(4, num_convs=5)
    with pytest.raises(ValueError, match="with lazy input channels"):
        models.ResidualBlock(None)
    with pytest.raises(ValueError, match="6 channels cannot be reduced by 4"):
        models.BottleneckBlock(6)
    with pytest.raises(ValueError, match="12 channels do not divide into groups of 5"):
        models.ResNeXtBlock(12, 5)
    with pytest.raises(ValueError, match="share of the input's channels"):
        models.ResNeXtBlock(None, 4, out_channels=8, se_ratio=0.25)
    with pytest.raises(ValueError, match="must be of one length; got 2, 3, 2, 2"):
        models.AnyNet((1, 2), (8, 16, 32), 8)
    with pytest.raises(ValueError, match="multiplier > 1"):
        models.RegNet(24, 24.48, 1.0, 22, 16)
    with pytest.raises(ValueError, match="stride 1 keeps the channels"):
        models.ShuffleBlock(4, 8)


# ---- worked examples --------------------------------------------------------------------------------------------


def test_batch_norm_and_layer_norm_of_a_table():
    x = torch.tensor([[1.0, 2, 3], [10, 20, 30]])
    for layers in (cnnkern.nn, models.unfused):
        y = layers.BatchNormAct1d(3, eps=1e-12, act="none")(x)
        torch.testing.assert_close(y, torch.tensor([[-1.0] * 3, [1.0] * 3]))
        y = layers.LayerNorm(3, eps=1e-12)(x)
        torch.testing.assert_close(y, torch.tensor([[-1.2247, 0, 1.2247]] * 2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("layers", [cnnkern.nn, models.unfused], ids=["fused", "unfused"])
def test_batch_norm_of_two_channels(layers):
    x = torch.stack([torch.arange(1.0, 9).view(2, 2, 2), torch.arange(10.0, 18).view(2, 2, 2)], dim=1)
    norm = layers.BatchNorm2d(2)
    y = norm(x)
    expected = torch.tensor([-1.528, -1.091, -0.655, -0.218, 0.218, 0.655, 1.091, 1.528])
    torch.testing.assert_close(y[:, 0].flatten(), expected, atol=5e-4, rtol=0)
    torch.testing.assert_close(norm.running_mean, torch.tensor([0.45, 1.35]))
    torch.testing.assert_close(norm.running_var, torch.tensor([1.5, 1.5]))


@pytest.mark.parametrize("fused", [True, False])
def test_cross_correlation(fused):
    layers = models.layers.layer_set(fused)
    x, k = torch.arange(9.0).view(1, 1, 3, 3), torch.arange(4.0).view(1, 1, 2, 2)

    def correlate(x, k, groups=1):
        conv = layers.GroupedConv2d(x.shape[1], len(k), 2, bias=False, groups=groups)
        conv.weight.data = k
        return conv(x)

    one = torch.tensor([[19.0, 25], [37, 43]])
    assert torch.equal(correlate(x, k)[0, 0], one)
    two_x, two_k = torch.cat([x, x + 1], 1), torch.cat([k, k + 1], 1)
    assert torch.equal(correlate(two_x, two_k)[0, 0], torch.tensor([[56.0, 72], [104, 120]]))
    assert torch.equal(correlate(two_x, torch.cat([k, k]), groups=2)[0, 0], one)


@pytest.mark.parametrize("fused", [True, False])
def test_in_eval_one_image_or_ten_give_the_same(fused):
    torch.manual_seed(0)
    block = models.ResidualBlock(3, 6, 2, fused=fused).double()
    x = torch.randn(10, 3, 8, 8, dtype=torch.float64)
    block(x)
    ten = block.eval()(x)
    torch.testing.assert_close(torch.cat([block(image[None]) for image in x]), ten)


# ---- fused against unfused, and both against torchvision --------------------------------------------------------


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], what: str) -> None:
    """In float64: all that two orders of rounding may change. A gradient that is zero in exact arithmetic, as of a
    bias before a batch norm, is judged by the largest of the others.
    """
    assert ours.keys() == theirs.keys()
    scale = max(t.abs().max().item() for t in theirs.values())
    for name, expected in theirs.items():
        error = (ours[name] - expected).abs().max().item()
        allowed = 1e-8 * expected.abs().max().item() + 1e-12 * scale
        assert error <= allowed, f"{what}: {name} differs by {error:.2e}, allowed {allowed:.2e}"


def run(model: nn.Module, x: Tensor, target: Tensor, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Logits, gradients and buffers in training, logits in eval; dropout draws from `seed`."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    logits = model.train()(x)
    F.cross_entropy(logits, target).backward()
    gradients = {n: p.grad for n, p in model.named_parameters()} | {"input": x.grad}
    model.zero_grad(set_to_none=True)
    buffers = {n: b.clone() for n, b in model.named_buffers() if b.is_floating_point()}
    with torch.no_grad():
        found = {"logits": {"train": logits.detach(), "eval": model.eval()(x)}, "gradients": gradients}
    return found | ({"buffers": buffers} if buffers else {})


def sgd(model: nn.Module, x: Tensor, target: Tensor, lr: float, steps: int = 5) -> dict[str, Tensor]:
    """State after some steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    model.train()
    for i in range(steps):
        torch.manual_seed(i)
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
    return {n: v for n, v in model.state_dict().items() if v.is_floating_point()}


def calm_rate(model: nn.Module, gradients: dict[str, Tensor], share: float) -> float:
    """A learning rate at which a step moves the weights by this share of their norm. With a larger one, or images of
    which the last batch norms see one pixel, rounding grows by orders of magnitude from step to step. A thousandth
    suits the networks of QUICK; with it the difference came, by way of a ReLU's kink, to 1e-4 in regnet_y_1_6gf, and
    with a ten-thousandth to 2e-9 in resnet101.
    """
    weights = [p.detach().norm() for p in model.parameters()]
    steps = [gradients[n].norm() for n, _ in model.named_parameters()]
    return share * (torch.stack(weights).norm() / torch.stack(steps).norm()).item()


# One of each family, and side of the images.
QUICK = {
    "lenet": 28,
    "lenet5_tanh": 28,
    "lenet_relu": 28,
    "lenet_wide": 28,
    "bn_lenet": 28,
    "bn_lenet_residual": 32,
    "res_lenet": 32,
    "simple_resnet": 12,
    "nin": 67,
    "googlenet": 32,
    "resnet18": 32,
    "resnext50_32x4d": 64,
    "preact_resnet18": 32,
    "densenet_small": 32,
    "regnet_x_tiny": 32,
    "regnet_y_400mf": 64,
    "mobilenet_v2": 64,
    "shufflenet_v2_x1_0": 64,
    "efficientnet_b0": 64,
    "convnext_tiny": 32,
}
ALL = os.environ.get("CNNKERN_ALL_MODELS") == "1"
# In double precision, with gradients and momentum, one twin of these fills the memory: results wait on disk.
LARGE = {"regnet_x_32gf", "regnet_y_32gf", "regnet_y_128gf"}
# alexnet needs its 224 pixels, resnet152 more than 64 for rounding not to grow over its depth; the other sides are
# small, for the larger models have more layers and no other kinds.
SIDES = {"alexnet": 224, "resnet152": 128}
COMPARED = {n: QUICK.get(n, SIDES.get(n, 64)) for n in list_models()} if ALL else QUICK


def narrow(name: str) -> dict[str, float]:
    """Arguments that spare the many weights of the fully connected layers."""
    return {"width_mult": 0.125} if name.startswith(("vgg", "alexnet")) else {}


def batch(name: str, size: int, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return testing.randn((4, get_builder(name).input_size[0], size, size), g, dtype), torch.tensor([1, 0, 3, 2])


def pair(name: str, dtype=torch.float64, **arguments) -> tuple[nn.Module, nn.Module]:
    """A fused model and its unfused twin with one state dict."""
    torch.manual_seed(0)
    unfused = create_model(name, fused=False, num_classes=10, **arguments)
    fused = create_model(name, num_classes=10, **arguments)
    fused.load_state_dict(unfused.state_dict())
    return fused.to(dtype), unfused.to(dtype)


@contextmanager
def put_aside(large: bool):
    """A function that returns what it is given, from a file if `large`, so that the memory can be used again."""
    with tempfile.TemporaryDirectory() as folder:
        count = itertools.count()

        def keep(found):
            if not large:
                return found
            path = Path(folder) / str(next(count))
            torch.save(found, path)
            return torch.load(path, mmap=True)

        yield keep


@pytest.mark.parametrize("name", COMPARED)
def test_fused_is_its_unfused_twin(name):
    x, target = batch(name, COMPARED[name])
    with put_aside(name in LARGE) as keep:
        torch.manual_seed(0)
        state = keep(create_model(name, fused=False, num_classes=10, **narrow(name)).state_dict())
        lr, found = None, []
        for fused in (False, True):
            model = create_model(name, fused=fused, num_classes=10, **narrow(name)).double()
            model.load_state_dict(state)
            results = keep(run(model, x, target))
            lr = lr or calm_rate(model, results["gradients"], share=1e-3 if name in QUICK else 1e-5)
            found.append(results | {"state after five steps": keep(sgd(model, x, target, lr))})
            del model
        theirs, ours = found
        for kind in theirs:
            close(ours[kind], theirs[kind], f"{name}, {kind}")
    # In float32, where activations are not at kinks: as near to float64 as PyTorch's own operators.
    fused, unfused = pair(name, torch.float32, **narrow(name))
    with torch.no_grad():
        ours, theirs = ({"logits": m.eval()(x.float())} for m in (fused, unfused))
        truth = {"logits": unfused.double()(x)}
    testing.assert_as_good_as(ours, theirs, truth)


def test_googlenet_with_batch_norm_is_its_unfused_twin():
    x, target = batch("googlenet", 32)
    fused, unfused = pair("googlenet", bn=True)
    ours, theirs = run(fused, x, target), run(unfused, x, target)
    for kind in theirs:
        close(ours[kind], theirs[kind], kind)


@pytest.fixture
def regnets_on_meta(monkeypatch):
    """torchvision works out a RegNet's widths with tensors, which need memory."""
    from torchvision.models.regnet import BlockParams

    original = BlockParams.from_init_params

    def on_the_cpu(**arguments):
        with torch.device("cpu"):
            return original(**arguments)

    monkeypatch.setattr(BlockParams, "from_init_params", on_the_cpu)


@pytest.mark.parametrize("name", TORCHVISION)
def test_state_dict_is_torchvisions(name, regnets_on_meta):
    with meta():
        ours, theirs = create_model(name).state_dict(), getattr(torchvision.models, name)().state_dict()
    assert [(n, v.shape, v.dtype) for n, v in ours.items()] == [(n, v.shape, v.dtype) for n, v in theirs.items()]


@pytest.mark.parametrize("name", [n for n in TORCHVISION if n in COMPARED and not narrow(n)])
def test_torchvisions_state_dict_gives_torchvisions_results(name):
    x, target = batch(name, COMPARED[name])
    with put_aside(name in LARGE) as keep:
        torch.manual_seed(0)
        model = getattr(torchvision.models, name)(num_classes=10)
        state = keep({n: v.clone() for n, v in model.state_dict().items()})
        theirs = keep(run(model.double(), x, target))
        model = create_model(name, num_classes=10)
        model.load_state_dict(state)
        ours = keep(run(model.double(), x, target))
        for kind in theirs:
            close(ours[kind], theirs[kind], f"{name}, {kind}")


def test_convolutions_of_vgg11_bn_are_torchvisions():
    """Without the classifier of 120 million parameters."""
    torch.manual_seed(0)
    theirs = torchvision.models.vgg11_bn().features
    ours = models.vgg11_bn().features
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    ours, theirs = ours.double(), theirs.double()
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121", "regnet_y_400mf"])
def test_seeds_give_torchvisions_initial_weights(name):
    torch.manual_seed(3)
    ours = create_model(name).state_dict()
    torch.manual_seed(3)
    theirs = getattr(torchvision.models, name)().state_dict()
    assert all(torch.equal(ours[n], v) for n, v in theirs.items())


# ---- create_model -----------------------------------------------------------------------------------------------


def test_create_model_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"no model is called 'resnet81': did you mean resnet18"):
        create_model("resnet81")
    with pytest.raises(ValueError, match=r"list_models\(\) has the names"):
        create_model("transformer")
    with pytest.raises(TypeError, match="depth"):
        create_model("resnet18", depth=3)


def test_every_name_that_the_zoo_promises():
    assert len(list_models()) == len(set(list_models()))
    assert {name for name, _ in PARAMETERS} | set(IMAGENET_PARAMETERS) <= set(list_models())
    assert {f"preact_resnet{n}" for n in (18, 34, 50)} <= set(list_models())
    assert {n for n in torchvision.models.list_models(torchvision.models) if n.startswith("regnet")} <= set(TORCHVISION)


@pytest.mark.parametrize("name", ["bn_lenet_residual", "regnet_x_tiny", "mobilenet_v2"])
def test_models_are_copied_pickled_and_run_channels_last(name):
    import copy
    import pickle

    for fused in (True, False):
        model = create_model(name, fused=fused, num_classes=10).eval()
        x = torch.randn(2, get_builder(name).input_size[0], 32, 32)
        expected = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), expected)
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), expected, rtol=1e-3, atol=1e-4)


def test_code_of_the_documentation_runs():
    text = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, "training.md", "exec"), {})
