"""Deferred activations in converted models, which a grouped convolution computes as it reads its input.

Expected results are those of the same converted model that computes its activations when they are called, and are
bit-equal.
"""

import concurrent.futures
import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cnnkern
from cnnkern import testing
from cnnkern.conversion.deferral import SITE, Site
from cnnkern.measure import profile

pytestmark = pytest.mark.skipif(not cnnkern.extension.extension, reason="deferred results are the extension's")


class Block(nn.Module):
    """The middle of an inverted residual block. `after` is called with the results of activation and convolution."""

    def __init__(self, act: nn.Module, width: int = 1, after=None) -> None:
        super().__init__()
        channels = 32
        self.expand, self.norm, self.act = nn.Conv2d(3, channels, 1), nn.BatchNorm2d(channels), act
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels // width)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        a = self.act(self.norm(self.expand(x)))
        y = self.conv(a)
        return y if self.after is None else self.after(a, y)


def pair(*arguments, **options) -> tuple[nn.Module, nn.Module]:
    """Two equal converted models, of which the second defers no activation."""
    torch.manual_seed(0)
    one = Block(*arguments, **options)
    nn.init.normal_(one.norm.weight), nn.init.normal_(one.norm.bias)
    two = copy.deepcopy(one)
    models = cnnkern.convert(one), cnnkern.convert(two)
    site = models[1].norm.__dict__[SITE] = Site()
    site.compute_activations()
    return models


def image(layout: str = "channels_last", side: int = 64) -> Tensor:
    # The batch norm's input then has 2 MiB. A smaller one is not worth computing again.
    x = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(3))
    return testing.with_layout(x, layout).requires_grad_()


def outcome(model: nn.Module, x: Tensor, step=None) -> dict[str, Tensor]:
    model.zero_grad()
    y = model(x)
    if step is not None:
        found = step(model, x, y)
    else:
        y.square().sum().backward()
        found = {"dx": x.grad}
    found |= {"y": y.detach()} | {n: p.grad for n, p in model.named_parameters()}
    found = {name: value for name, value in found.items() if value is not None}
    return found | {n: b.clone() for n, b in model.named_buffers()}


def compare(models: tuple[nn.Module, nn.Module], step=None, layout: str = "channels_last", times: int = 2) -> None:
    for _ in range(times):
        found, expected = (outcome(model, image(layout), step) for model in models)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


def convolutions(model: nn.Module) -> int:
    return model.norm.__dict__[SITE].convolutions()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("width", [1, 8])
def test_a_convolution_computes_a_deferred_activation(width, inplace):
    models = pair(nn.ReLU6(inplace=inplace), width)
    compare(models)
    assert convolutions(models[0]) == 2
    assert convolutions(models[1]) == 0
    for model in models:
        model.eval()
    compare(models)
    assert convolutions(models[0]) == 4
    with torch.no_grad():
        assert torch.equal(*(model(image(side=8)) for model in models))
    assert convolutions(models[0]) == 5
    assert "ReLU6" in str(cnnkern.conversion_report(models[0]))


def test_where_a_convolution_does_not():
    """Layouts, sizes, dtypes and kernels for which computing the activation twice does not pay, or nothing does it."""

    def contiguous(model: nn.Module) -> Tensor:
        return image("contiguous")

    def small(model: nn.Module) -> Tensor:
        return image(side=32)

    def larger_kernel(model: nn.Module) -> Tensor:
        model.conv = cnnkern.nn.GroupedConv2d(32, 32, 5, padding=2, groups=32)
        return image()

    def float64(model: nn.Module) -> Tensor:
        model.double()
        return image().double()

    for change in (contiguous, small, larger_kernel, float64):
        model = pair(nn.ReLU6())[0]
        x = change(model)
        for _ in range(2):
            model(x).sum().backward()
        assert convolutions(model) == 0, change
    for dtype, width, times in ((torch.bfloat16, 1, 2), (torch.bfloat16, 8, 0)):
        model = pair(nn.ReLU6(), width)[0].to(dtype)
        for _ in range(2):
            model(torch.cat([image(), image()]).to(dtype)).sum().backward()
        assert convolutions(model) == times


@pytest.mark.parametrize("act", [nn.SiLU(), nn.Hardswish(True), nn.GELU(), nn.LeakyReLU(0.2), nn.ELU(0.5)], ids=repr)
def test_any_activation(act):
    models = pair(act)
    compare(models)
    assert convolutions(models[0]) == 2


@pytest.mark.parametrize("recomputes", [False, True])
def test_the_activated_tensor_is_not_saved(recomputes):
    held = []
    for model in pair(nn.ReLU6()):
        with cnnkern.recompute() if recomputes else contextlib.nullcontext():
            held.append(profile.held_bytes(lambda model=model: model(image()), "cpu"))
    vectors = 32 * 4 * 8
    assert abs(held[1] - held[0] - (not recomputes) * 4 * 32 * 64 * 64 * 4) <= vectors


def test_gradients_are_those_of_recompute():
    models = pair(nn.ReLU6())
    with cnnkern.recompute():
        found = outcome(models[0], image())
    assert convolutions(models[0]) == 1
    expected = outcome(models[1], image())
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# What else a model does with the two results: the use ends the deferring.
AFTER = {
    "uses the activation again": lambda a, y: y + a,
    "concatenates": lambda a, y: torch.cat([y, a], 1),
    "reads it in part": lambda a, y: y * a.mean((2, 3), keepdim=True),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", AFTER)
def test_an_activation_with_other_uses(name, inplace):
    models = pair(nn.ReLU(inplace), after=AFTER[name])
    compare(models, times=3)
    assert convolutions(models[0]) == 0


@pytest.mark.parametrize("inplace", [False, True])
def test_an_activation_that_is_kept(inplace):
    kept = []
    models = pair(nn.ReLU(inplace), after=lambda a, y: (kept.append(a), y)[1])
    for model in models:
        model(image()).sum().backward()
    assert convolutions(models[0]) == 0  # materialised when the model returned, with its place in the graph
    assert torch.equal(*kept)
    assert [a.grad_fn.name() for a in kept] == ["BatchNormAct"] * 2
    assert [model.norm.num_batches_tracked.item() for model in models] == [1, 1]
    assert torch.equal(models[0].norm.running_mean, models[1].norm.running_mean)


def test_its_gradient_is_kept():
    kept = []
    models = pair(nn.ReLU(), after=lambda a, y: (a.retain_grad(), kept.append(a), y)[2])
    for model in models:
        model(image()).square().sum().backward()
    assert convolutions(models[0]) == 0
    assert torch.equal(kept[0].grad, kept[1].grad)
    assert torch.equal(models[0].norm.weight.grad, models[1].norm.weight.grad)


def test_a_hook_on_its_gradient_is_called():
    seen = []
    models = pair(nn.ReLU(), after=lambda a, y: (a.register_hook(lambda g: (seen.append(g), 2 * g)[1]), y)[1])
    compare(models, times=1)
    assert convolutions(models[0]) == 1
    assert torch.equal(*seen)


class Bare(Block):
    """With the steps of `forward` given."""

    steps = None

    def forward(self, x: Tensor) -> Tensor:
        return Bare.steps(self, x)


def bare(steps) -> tuple[nn.Module, nn.Module]:
    Bare.steps = staticmethod(steps)
    models = pair(nn.ReLU())
    for model in models:
        model.__class__ = Bare
    return models


def uses_both(m: Block, x: Tensor) -> Tensor:
    before = m.norm(m.expand(x))
    a = F.relu(before)
    return m.conv(a) + before


def uses_the_norm_first(m: Block, x: Tensor) -> Tensor:
    before = m.norm(m.expand(x))
    a = F.relu(before)
    return before.sigmoid() + m.conv(a)


def drops_the_activation(m: Block, x: Tensor) -> Tensor:
    before = m.norm(m.expand(x))
    F.relu(before)
    return m.conv(before)


def drops_both(m: Block, x: Tensor) -> Tensor:
    F.relu(m.norm(m.expand(x)))
    return m.conv(m.expand(x))


def returns_the_activation(m: Block, x: Tensor) -> Tensor:
    return F.relu(m.norm(m.expand(x)))


def activates_twice(m: Block, x: Tensor) -> Tensor:
    return m.conv(F.silu(F.relu(m.norm(m.expand(x)))))


def adds_to_the_activation(m: Block, x: Tensor) -> Tensor:
    e = m.expand(x)
    return m.conv(F.relu(m.norm(e)) + e)


def changes_the_norms_input(m: Block, x: Tensor) -> Tensor:
    with torch.no_grad():
        e = m.expand(x)
        a = F.relu(m.norm(e))
        e.zero_()
    return m.conv(a)


def changes_a_parameter(m: Block, x: Tensor) -> Tensor:
    a = F.relu(m.norm(m.expand(x)))
    with torch.no_grad():
        m.norm.bias.add_(1)
    return m.conv(a)


def reads_a_statistic(m: Block, x: Tensor) -> Tensor:
    a = F.relu(m.norm(m.expand(x)))
    return m.conv(a) + m.norm.running_mean.sum()


def calls_the_norm_again(m: Block, x: Tensor) -> Tensor:
    a = F.relu(m.norm(m.expand(x)))
    return m.conv(a) + m.conv(F.relu(m.norm(a)))


def convolves_twice(m: Block, x: Tensor) -> Tensor:
    a = F.relu(m.norm(m.expand(x)))
    return m.conv(a) * m.conv(a)


def pads_first(m: Block, x: Tensor) -> Tensor:
    return m.conv(F.pad(F.relu(m.norm(m.expand(x))), (1, 1, 1, 1)))


def is_frozen(m: Block, x: Tensor) -> Tensor:
    m.norm.eval().requires_grad_(False)
    with torch.no_grad():
        e = m.expand(x)
    return m.conv(F.relu(m.norm(e)))


def checkpoints(m: Block, x: Tensor) -> Tensor:
    return checkpoint(lambda x: m.conv(F.relu(m.norm(m.expand(x)))), x, use_reentrant=True)


def checkpoints_otherwise(m: Block, x: Tensor) -> Tensor:
    return checkpoint(lambda x: m.conv(F.relu(m.norm(m.expand(x)))), x, use_reentrant=False)


def under_autocast(m: Block, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m.conv(F.relu(m.norm(m.expand(x)))).float()


def in_another_mode(m: Block, x: Tensor) -> Tensor:
    a = F.relu(m.norm(m.expand(x)))
    with torch.no_grad():
        y = m.conv(a)
    return y + a


@pytest.mark.parametrize(
    "steps",
    [
        *(uses_both, uses_the_norm_first, drops_the_activation, drops_both, returns_the_activation, activates_twice),
        *(adds_to_the_activation, changes_the_norms_input, changes_a_parameter, reads_a_statistic),
        *(calls_the_norm_again, convolves_twice, pads_first, is_frozen, checkpoints, checkpoints_otherwise),
        *(under_autocast, in_another_mode),
    ],
    ids=lambda f: f.__name__,
)
def test_models_mean_the_same(steps):
    compare(bare(steps), times=3)


def test_the_gradient_of_one_input_alone():
    def step(which):
        def run(model, x, y):
            wanted = {"weight": model.conv.weight, "x": x, "norm": model.norm.weight}[which]
            return {"found": torch.autograd.grad(y.square().sum(), wanted)[0]}

        return run

    for which in ("weight", "x", "norm"):
        models = pair(nn.ReLU())
        compare(models, step(which), times=1)
        assert convolutions(models[0]) == 1


def test_backward_twice_and_double_backward():
    def twice(model, x, y):
        y.square().sum().backward(retain_graph=True)
        y.sum().backward()
        return {"dx": x.grad}

    compare(pair(nn.ReLU()), twice)

    def second(model, x, y):
        inputs = [x, model.norm.weight, model.conv.weight]
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        return {f"second {i}": g for i, g in enumerate(second)}

    models = pair(nn.SiLU())
    found, expected = (outcome(model, image(), second) for model in models)
    assert convolutions(models[0]) == 1
    for name, value in expected.items():  # the first order is PyTorch's here
        torch.testing.assert_close(found[name], value, rtol=2e-4, atol=2e-4 * float(value.abs().max()))


def test_batched_gradients():
    def batched(model, x, y):
        dy = torch.stack([torch.ones_like(y), y.detach()])
        return {"dx": torch.autograd.grad(y, x, dy, is_grads_batched=True)[0]}

    compare(pair(nn.ReLU()), batched, times=1)


def test_a_gradient_of_an_activation_that_nothing_read():
    """The engine asks for it before its values are computed."""
    found = []
    for model in bare(returns_the_activation):
        x = image()
        a = model(x)
        a.backward(torch.ones(a.shape))
        found.append((x.grad, model.norm.bias.grad, model.norm.running_var))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_the_batch_norms_parameters_may_change_before_the_gradient_of_the_weight():
    """PyTorch's convolution has saved what it read."""
    found = []
    for model in pair(nn.ReLU()):
        y = model(image())
        with torch.no_grad():
            model.norm.bias.add_(1), model.norm.weight.mul_(2)
        found.append(torch.autograd.grad(y.square().sum(), model.conv.weight)[0])
    assert torch.equal(*found)


def test_a_change_of_the_batch_norms_input_is_an_error():
    def step(m: Block, x: Tensor) -> Tensor:
        e = m.expand(x)
        y = m.conv(F.relu(m.norm(e)))
        e.detach().zero_()
        return y

    for model in bare(step):
        y = model(image())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_statistics_are_updated_once():
    for after in (None, lambda a, y: y + a):
        models = pair(nn.ReLU(), after=after)
        for model in models:
            model(image())
        one, two = (model.norm for model in models)
        assert torch.equal(one.running_mean, two.running_mean)
        assert torch.equal(one.running_var, two.running_var)
        assert int(one.num_batches_tracked) == 1


def test_other_threads_may_read_it():
    models = bare(returns_the_activation)
    with torch.no_grad():
        results = [model(image()) for model in models]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        sums = [pool.submit(lambda a=a: a.sum()).result() for a in results]
    assert torch.equal(*sums)


def test_mobilenet_computes_its_activations_in_convolutions():
    torch.manual_seed(0)
    model = cnnkern.convert(torchvision.models.mobilenet_v2(), recompute=True).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    for _ in range(2):
        model(x).square().mean().backward()
    sites = [m.__dict__[SITE] for m in model.modules() if SITE in m.__dict__]
    assert sum(site.convolutions() == 2 for site in sites) == 17  # one in each inverted residual block
