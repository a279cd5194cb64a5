"""`cnnkern.fold`: what it folds, that results stay, and what does not change."""

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import cnnkern
from cnnkern import testing
from cnnkern.conversion.folding_conv import FoldingConv
from cnnkern.nn.folded_conv import prefers_own
from tests.poolings import with_poolings
from tests.zoo import small_vgg

CONV, RELU, ADD = "Conv + BatchNorm", "Conv + BatchNorm + ReLU", "Conv + BatchNorm + add + ReLU"
LAYOUTS = (torch.contiguous_format, torch.channels_last)
FAMILIES = {
    "alexnet": {"Conv + ReLU": 5, "Linear + ReLU": 2, "Linear": 1},
    "vgg11": {"Conv + ReLU": 8, "Linear + ReLU": 2, "Linear": 1},
    "vgg11_bn": {RELU: 8, "Linear + ReLU": 2, "Linear": 1},
    "squeezenet1_1": {"Conv + ReLU": 26},
    "resnet18": {RELU: 9, ADD: 8, CONV: 3, "Linear": 1},
    "resnet50": {RELU: 33, ADD: 16, CONV: 4, "Linear": 1},
    "resnext50_32x4d": {RELU: 33, ADD: 16, CONV: 4, "Linear": 1},
    "densenet121": {RELU: 59, "BatchNorm + ReLU": 62, "Conv": 61, "Linear": 1},
    "googlenet": {RELU: 57, "Linear": 1},
    "inception_v3": {RELU: 94, "Linear": 1},
    "mnasnet0_5": {RELU: 35, "Conv + BatchNorm + add": 10, CONV: 7, "Linear": 1},
    "mobilenet_v2": {"Conv + BatchNorm + ReLU6": 35, "Conv + BatchNorm + add": 10, CONV: 7, "Linear": 1},
    "mobilenet_v3_small": {
        "Conv + BatchNorm + Hardswish": 18,
        "Conv + BatchNorm + add": 6,
        RELU: 5,
        CONV: 5,
        "Conv + ReLU": 9,
        "Conv + Hardsigmoid": 9,
        "Linear + Hardswish": 1,
        "Linear": 1,
    },
    "efficientnet_b0": {
        "Conv + BatchNorm + SiLU": 33,
        "Conv + BatchNorm + add": 9,
        CONV: 7,
        "Conv + SiLU": 16,
        "Conv + Sigmoid": 16,
        "Linear": 1,
    },
    "regnet_y_400mf": {RELU: 33, ADD: 16, CONV: 4, "Conv + ReLU": 16, "Conv + Sigmoid": 16, "Linear": 1},
    "shufflenet_v2_x0_5": {RELU: 37, CONV: 19, "Linear": 1},
    "convnext_tiny": {"Conv": 22, "Linear + GELU": 18, "Linear": 19, "LayerNorm": 18, "LayerNorm2d": 5},
    "swin_t": {"Conv": 1, "Linear + GELU": 12, "Linear + add": 12, "Linear": 28, "LayerNorm": 29},
    "vit_b_16": {"Conv": 1, "Linear + GELU": 12, "Linear + add": 12, "Linear": 1, "LayerNorm": 25},
}
SIZES = {"inception_v3": 96, "alexnet": 64}


def build(name: str) -> nn.Module:
    """In eval mode, with random statistics."""
    torch.manual_seed(0)
    extra: dict = {"init_weights": False, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    if name == "vit_b_16":
        extra["image_size"] = 64
    if name.startswith("vgg"):
        return randomised(small_vgg(name, 10))
    return randomised(torchvision.models.get_model(name, weights=None, num_classes=10, **extra))


def randomised(model: nn.Module) -> nn.Module:
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
            if m.affine:
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias, 0, 0.1)
    return model.eval()


def judged(folded: nn.Module, model: nn.Module, *inputs: torch.Tensor, layouts=(torch.preserve_format,)) -> None:
    """The folded model is as good as its original at the dtype of the inputs."""

    def run(m: nn.Module, dtype: torch.dtype, layout=torch.preserve_format) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return {"output": m(*(x.to(dtype, memory_format=layout) for x in inputs))}

    dtype, exact = inputs[0].dtype, run(copy.deepcopy(model).double(), torch.float64)
    for layout in layouts:
        testing.assert_as_good_as(run(folded, dtype, layout), run(model, dtype, layout), exact)


def counts(model: nn.Module, *inputs: torch.Tensor) -> dict[str, int]:
    """What a folded model's layers became; after it has run, on these inputs."""
    if inputs:
        with torch.no_grad():
            model(*inputs)
    return cnnkern.conversion_report(model).counts


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_as_good_as_eager_in_both_layouts(name):
    model = build(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folded = cnnkern.fold(model)
    x = torch.randn(2, 3, *[SIZES.get(name, 64)] * 2)
    judged(folded, model, x, layouts=LAYOUTS)
    assert counts(folded) == with_poolings(FAMILIES[name], model)
    assert list(folded.state_dict()) == list(model.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(isinstance(m, FoldingConv) for m in model.modules())
    theirs = {p.data_ptr() for p in (*model.parameters(), *model.buffers()) if p.numel()}
    assert not theirs & {p.data_ptr() for p in (*folded.parameters(), *folded.buffers()) if p.numel()}


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_b0", "resnext50_32x4d"])
def test_bfloat16(name):
    model = build(name).to(torch.bfloat16)
    folded = cnnkern.fold(model)
    x = torch.randn(4, 3, 64, 64, dtype=torch.bfloat16)
    judged(folded, model, x, layouts=LAYOUTS)
    judged(cnnkern.fold(build(name)).to(torch.bfloat16), model, x)  # cast afterwards


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "googlenet", "shufflenet_v2_x0_5"])
def test_copies_pickles_and_state(name):
    folded = cnnkern.fold(build(name))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        y = folded(x)
        assert torch.equal(copy.deepcopy(folded)(x), y)
        assert torch.equal(pickle.loads(pickle.dumps(folded))(x), y)
        file = io.BytesIO()
        torch.save(folded.state_dict(), file)
        file.seek(0)
        other = build(name)
        for p in other.parameters():
            p.data.mul_(1.1)
        other = cnnkern.fold(other)
        assert not torch.equal(other(x), y)  # and weights have been packed
        other.load_state_dict(torch.load(file))
        assert torch.equal(other(x), y)
    assert not any(p.requires_grad for p in folded.parameters())


def test_a_result_does_not_depend_on_what_was_computed_before():
    model = build("resnet18")
    x = torch.randn(8, 3, 64, 64)
    with torch.no_grad():
        alone = {n: cnnkern.fold(model)(x[:n]) for n in (1, 3, 8)}
        folded = cnnkern.fold(model)
        for n in (8, 1, 3, 8):
            assert torch.equal(folded(x[:n]), alone[n])
        for size in range(33, 65):  # more shapes than packed weights are kept for
            folded(x[:1, :, :size, :size])
        assert torch.equal(folded(x[:1]), alone[1])
        assert folded(x[:0]).shape == (0, 10)


CHANGES = {
    "in place": lambda conv: conv.weight.mul_(2),
    "through .data": lambda conv: conv.weight.data.mul_(2),
    "through a view": lambda conv: conv.weight.detach()[0].mul_(2),
    "another tensor's data": lambda conv: setattr(conv.weight, "data", conv.weight.data * 2),
    "another parameter": lambda conv: setattr(conv, "weight", nn.Parameter(torch.ones_like(conv.weight))),
    "NumPy": lambda conv: conv.weight.detach().numpy().__imul__(2),
    "foreach": lambda conv: torch._foreach_mul_([conv.weight, conv.bias], 2),
    "a checkpoint": lambda conv: conv.load_state_dict({k: 2 * v for k, v in conv.state_dict().items()}),
    "stride": lambda conv: setattr(conv, "stride", (2, 2)),
    "padding": lambda conv: conv.__dict__.update(padding=(1, 1), _reversed_padding_repeated_twice=(1, 1, 1, 1)),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_after_folding_is_seen(name, mode):
    model = randomised(nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()))
    folded, x = cnnkern.fold(model), torch.randn(2, 3, 9, 9)
    with mode():
        kept = folded[0].weight.detach().numpy() if name == "NumPy" else None
        for _ in range(2):
            before = folded(x)
        CHANGES[name](folded[0])
        CHANGES[name](model[0])
        changed = folded(x)
        torch.testing.assert_close(changed, model(x))
        assert changed.shape != before.shape or not torch.equal(changed, before)
        folded[1].running_mean.add_(1)
        model[1].running_mean.add_(1)
        folded[1].eps = model[1].eps = 1.0
        torch.testing.assert_close(folded(x), model(x))
    del kept


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # of eager's
@pytest.mark.parametrize(
    "act",
    [
        *(nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(), nn.LeakyReLU(0.2), nn.Sigmoid(), nn.SiLU(), nn.Hardswish()),
        *(nn.ELU(0.7), nn.GELU(), nn.Mish(), nn.Hardsigmoid()),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(8, 16, 3, padding=1),
        nn.Conv3d(8, 16, (1, 3, 3), stride=2, padding=(0, 1, 1), bias=False),
        nn.Conv2d(8, 16, (3, 5), padding=(2, 0), dilation=(2, 1)),
        nn.Conv2d(8, 16, 4, padding="same"),
        nn.Conv2d(8, 16, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(8, 8, 3, stride=2, groups=4),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.Conv2d(8, 16, 3, groups=2),
    ],
    ids=str,
)
def test_every_kind_of_convolution(conv, act):
    torch.manual_seed(0)  # bfloat16's error is a draw of rounding errors, eager's too
    conv = copy.deepcopy(conv)
    conv.reset_parameters()
    dims = conv.weight.dim() - 2
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](conv.out_channels)
    model = randomised(nn.Sequential(conv, norm, act))
    folded = cnnkern.fold(model)
    x = torch.randn(2, 8, *(11, 12, 9)[:dims])
    judged(folded, model, x)
    assert counts(folded) == {f"Conv + BatchNorm + {type(act).__name__}": 1}
    judged(folded, model, x.flip(-1)[..., ::2])
    judged(cnnkern.fold(copy.deepcopy(model).double()), copy.deepcopy(model).double(), x.double())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        mine, theirs = folded(x), model(x)
    testing.assert_as_good_as(
        {"output": mine.float()}, {"output": theirs.float()}, {"output": copy.deepcopy(model).double()(x.double())}
    )


def test_our_layers_and_converted_models_fold_as_their_originals():
    for model in (
        cnnkern.convert(build("resnet18")),
        randomised(cnnkern.models.create_model("resnet18")),
        randomised(cnnkern.nn.convert_sync_batchnorm(cnnkern.models.create_model("resnet18"))),
        nn.SyncBatchNorm.convert_sync_batchnorm(build("resnet18")),
    ):
        folded, x = cnnkern.fold(model), torch.randn(2, 3, 64, 64)
        judged(folded, model, x)
        found = counts(folded)
        found.pop("MaxPool2d", None)  # converted, or of the zoo itself
        assert found == FAMILIES["resnet18"]
    again = cnnkern.fold(folded)
    judged(again, model, x)
    assert counts(again) == counts(folded)
    assert counts(cnnkern.convert(folded), x) == counts(folded)
    plain = cnnkern.revert(cnnkern.fold(build("resnet18")))
    assert [type(m) for m in plain.modules()] == [type(m) for m in build("resnet18").modules()]


def test_what_cannot_be_folded_says_so():
    with pytest.raises(TypeError, match=r"cnnkern.fold: expected a torch.nn.Module; got int"):
        cnnkern.fold(3)
    with pytest.raises(ValueError, match=r"cnnkern.fold: the model is in training mode; call eval\(\) first"):
        cnnkern.fold(nn.Conv2d(1, 1, 1))
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).eval()
    model[1].train()
    with pytest.raises(ValueError, match=r"cnnkern.fold: batch norm '1' is in training mode; call eval\(\) first"):
        cnnkern.fold(model)
    norm = nn.Sequential(nn.Bilinear(2, 2, 2), nn.BatchNorm1d(2)).eval()
    same, nothing = cnnkern.fold(norm), "no convolution or linear layer in this model, nothing to fold"
    assert [type(m) for m in same.modules()] == [type(m) for m in norm.modules()]
    assert str(cnnkern.conversion_report(same)) == f"cnnkern.fold: {nothing}"
    batch = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)).eval()
    assert counts(cnnkern.fold(batch)) == {"Conv": 1, "BatchNorm": 1}  # its statistics are the batch's
    judged(cnnkern.fold(batch), batch, torch.randn(2, 2, 3, 3))


def test_hooks_and_parametrizations_see_what_they_saw():
    model = randomised(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)))
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    torch.nn.utils.parametrizations.weight_norm(model[3])
    folded = cnnkern.fold(model)
    x = torch.randn(1, 4, 3, 3)
    judged(folded, model, x)
    assert counts(folded) == {RELU: 1, "Conv": 1}  # what the hook keeps is computed too, when the model returns
    seen.clear()
    with torch.no_grad():
        folded(x)
        ours = seen.pop()
        torch.testing.assert_close(ours, model[0](x))


def test_errors_are_those_of_the_convolution():
    model = randomised(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    folded = cnnkern.fold(model)
    for x in (torch.randn(1, 3, 5, 5), torch.randn(1, 4, 2, 2), torch.randn(1, 4, 5, 5).double()):
        with torch.no_grad(), pytest.raises(RuntimeError) as theirs:
            model(x)
        with torch.no_grad(), pytest.raises(RuntimeError) as ours:
            folded(x)
        assert str(ours.value) == str(theirs.value)


def test_infinities_stay_and_a_fused_relu_makes_zero_of_nan():
    """In oneDNN's kernels; ours pass it on (tests/test_fold_own.py)."""
    model = randomised(nn.Sequential(nn.Conv2d(1, 2, 1, stride=(1, 2)), nn.BatchNorm2d(2), nn.ReLU()))
    x = torch.tensor([float("inf"), -float("inf"), 1.0, float("nan")]).view(1, 1, 1, 4).repeat_interleave(2, -1)
    with torch.no_grad():
        mine, theirs = cnnkern.fold(model)(x), model(x)
    torch.testing.assert_close(mine[..., :3], theirs[..., :3])
    assert (mine[..., 3] == 0).all()
    assert theirs[..., 3].isnan().all()


def test_gradients_and_transforms_of_the_input():
    """Where a gradient with respect to the input is asked for, it is the original's."""
    model = build("resnet18").double()
    folded = cnnkern.fold(build("resnet18"))
    x = torch.randn(1, 3, 64, 64, requires_grad=True)
    (mine,) = torch.autograd.grad(folded(x).square().sum(), x)
    (theirs,) = torch.autograd.grad(model(x.double()).square().sum(), x)
    assert (mine - theirs).abs().max() < 1e-3 * theirs.abs().max()
    batch = torch.randn(2, 1, 64, 5, 5)
    expected = torch.stack([model.layer1[0](b.double()) for b in batch]).detach()
    torch.testing.assert_close(torch.func.vmap(folded.layer1[0])(batch), expected.float(), rtol=1e-4, atol=1e-4)


def test_compiles():
    folded = cnnkern.fold(randomised(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())))
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        y = folded(x)
        compiled = torch.compile(folded, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), y)


def test_folded_convolutions_are_leaves_under_fx():
    folded = cnnkern.fold(build("resnet18"))
    convolutions = {name for name, m in folded.named_modules() if isinstance(m, FoldingConv)}
    traced, x = torch.fx.symbolic_trace(folded), torch.randn(2, 3, 64, 64)
    assert convolutions <= {node.target for node in traced.graph.nodes if node.op == "call_module"}
    with torch.no_grad():
        assert torch.equal(traced(x), folded(x))


def test_tensors_that_onednn_has_nothing_for():
    """They get PyTorch's convolution: fakes, subclasses, what is another device's."""
    folded = cnnkern.fold(randomised(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())))
    x = torch.randn(2, 3, 9, 9)
    two = TwoTensor(x, x + 1)
    with torch.no_grad():
        y = folded(two)
        torch.testing.assert_close(y.a, folded(x))
        torch.testing.assert_close(y.b, folded(x + 1))
        with pytest.raises((RuntimeError, NotImplementedError)) as theirs:
            F.conv2d(x.to_sparse(), folded[1].weight)
        with pytest.raises(theirs.type):
            folded(x.to_sparse())


def test_two_threads_share_a_folded_model():
    folded = cnnkern.fold(build("resnet18"))
    inputs = [torch.randn(n, 3, 64, 64) for n in (1, 2, 3, 4)]
    with torch.no_grad():
        expected = [copy.deepcopy(folded)(x) for x in inputs]
    results: dict[tuple[int, int], torch.Tensor] = {}

    def work(thread: int) -> None:
        with torch.no_grad():
            for i, x in enumerate(inputs):
                results[thread, i] = folded(x)

    threads = [threading.Thread(target=work, args=(t,)) for t in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(results[t, i], expected[i]) for t in range(2) for i in range(4))


def test_the_rule_for_grouped_convolutions():
    def own(width, side, dtype=torch.float32, groups=4):
        channels = groups * width
        return prefers_own(nn.Conv2d(channels, channels, 3, groups=groups), dtype, (2, channels, side, side))

    assert all(own(w, 7) for w in (2, 4, 8))
    assert own(16, 28)
    assert not own(16, 14)
    assert not own(32, 56)
    assert not own(4, 56, torch.bfloat16)
    assert not own(4, 56, groups=1)
