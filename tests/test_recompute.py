"""Recomputed results of norms: the same gradients and errors, less memory."""

import gc
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import cnnkern
from benchmarks.studies import memory
from cnnkern import reference, testing
from cnnkern.measure.steps import Setting
from tests.recomputing import LAYOUTS, C, N, Net, Users, assert_same, gradients, held, image, pair, seeded

SHAPES = ((3, 5, 7, 9), (2, 8, 4, 4), (2, 6), (2, 6, 11), (2, 3, 3, 4, 5), (2, 40, 61, 64), (64, 96, 7, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_map_alone_gives_the_bits_of_the_forward_pass(shape, dtype, device):
    """On whatever --device: what recipes call, beside what they stand for."""
    if math.prod(shape) > device.elements:
        pytest.skip("too large for this device")
    generator, ops = torch.Generator().manual_seed(0), torch.ops.cnnkern
    for layout, training in itertools.product(LAYOUTS, (True, False)):
        x, residual = (
            testing.with_layout(testing.randn(shape, generator, dtype) + 3, layout).to(device.tensors) for _ in range(2)
        )
        w, b, mean, var = (testing.randn(shape[1:2], generator, dtype).abs().to(device.tensors) for _ in range(4))
        for act in reference.ACTIVATIONS:
            y, m, r = ops.bn_act(x, w, b, mean.clone(), var.clone(), training, 0.1, 1e-5, act)
            assert torch.equal(y, ops.sync_bn(x, None, w, b, m, r, act)[0]), (layout, training, act)
        for act in ("relu", "none"):
            y, m, r, _ = ops.bn_add_act(x, residual, w, b, mean.clone(), var.clone(), training, 0.1, 1e-5, act)
            assert torch.equal(y, ops.sync_bn(x, residual, w, b, m, r, act)[0]), (layout, training, act)


ACTS = [
    nn.ReLU(inplace=True),
    nn.ReLU6(),
    nn.SiLU(),
    nn.Sigmoid(),
    nn.Hardswish(),
    nn.LeakyReLU(),
    nn.Identity(),
    nn.GELU(),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("act", ACTS, ids=lambda act: type(act).__name__)
def test_gradients_are_bit_equal_and_memory_is_less(act, dtype, layout):
    plain, again = pair(lambda: Net(act), dtype=dtype, layout=layout)
    x = image(dtype, layout)
    for _ in range(3):  # by then both know what batch norms are fused with
        assert_same(gradients(plain, x), gradients(again, x))
    for a, b in zip(plain.buffers(), again.buffers(), strict=True):
        assert torch.equal(a, b)
    assert held(lambda: again(x)) < held(lambda: plain(x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("threads", [1, 2])
def test_whatever_the_mode_and_the_number_of_threads(training, threads):
    plain, again = pair(Net)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same(gradients(plain.train(training), image()), gradients(again.train(training), image()))
    finally:
        torch.set_num_threads(before)


MODELS = ("resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "convnext_tiny")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_of_whole_models(name, layout):
    def build() -> nn.Module:
        model = torchvision.models.get_model(name, weights=None, num_classes=4)
        for module in model.modules():
            if isinstance(module, nn.Dropout) or type(module).__name__ == "StochasticDepth":
                module.p = 0.0
        return model

    plain, again = pair(build, layout=layout)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        assert_same(gradients(plain, x), gradients(again, x))


def test_modules_of_ours_within_the_context():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, C, 3),
        cnnkern.nn.BatchNormReLU2d(C),
        nn.Conv2d(C, C, 1),
        cnnkern.nn.LayerNorm2d(C),
        nn.Conv2d(C, C, 1),
        nn.Flatten(2),
        cnnkern.nn.LayerNorm(64),
        nn.Linear(64, 3),
    )

    def within(x: Tensor) -> Tensor:
        with cnnkern.recompute():
            return model(x)

    def plain(x: Tensor) -> Tensor:
        return model(x)

    def grads(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(call(image()).square().sum(), list(model.parameters())))

    assert_same(grads(plain), grads(within))
    x = image()
    # The batch norm's result and two layer norms', each an image of 8 channels.
    assert held(lambda: plain(x)) - held(lambda: within(x)) > 2.8 * N * C * 64 * 4


def computations(call: Callable[[], object]) -> int:
    """How many results are computed again in a call: they are the only ones of this operator here."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        call()
    return sum(e.name == "cnnkern::sync_bn" for e in found.events())


def test_several_users_share_one_computation():
    plain, again = pair(Users)
    for _ in range(2):
        assert_same(gradients(plain, image()), gradients(again, image()))
    loss = again(image()).square().mean()
    for _ in range(2):  # nothing is left of the first pass, and nothing twice within one
        assert computations(lambda: loss.backward(retain_graph=True)) == 1
    assert computations(loss.backward) == 1


def test_a_pass_that_ends_before_the_last_user_leaves_nothing():
    _, again = pair(Users)
    again(image())
    loss = again(image()).square().mean()
    one = again.convs[0].weight
    before = held(lambda: None)
    left = held(lambda: torch.autograd.grad(loss, one, retain_graph=True)[0].sum().item())
    assert before == left == 0


def test_retain_graph_and_partial_passes():
    plain, again = pair(Net)
    found = []
    for model in (plain, again):
        loss = model(image()).square().mean()
        first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        part = torch.autograd.grad(loss, [model.conv2.weight], retain_graph=True)
        found.append([*first, *part, *torch.autograd.grad(loss, list(model.parameters()))])
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, list(model.parameters()))
    assert_same(*found)


def test_double_backward():
    plain, again = pair(lambda: Net(nn.SiLU()), dtype=torch.float64)

    def second(model: nn.Module) -> list[Tensor]:
        x = image(torch.float64).requires_grad_()
        first = torch.autograd.grad(model(x).square().mean(), [x, *model.parameters()], create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), [x, *model.parameters()]))

    assert_same(second(plain), second(again))


class WritesTo(nn.Module):
    """Writes to something between or behind the layers."""

    def __init__(self, write: Callable[[dict[str, Tensor]], None]):
        super().__init__()
        self.conv1, self.bn, self.conv2 = nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.Conv2d(C, C, 3)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        t = {"x": self.conv1(x)}
        t["y"] = F.relu(self.bn(t["x"]))
        t["z"] = self.conv2(t["y"])
        self.write(t)
        return t["z"]


def by_name(name: str) -> Callable[[dict[str, Tensor]], None]:
    def write(t: dict[str, Tensor]) -> None:
        with torch.no_grad():
            t[name].mul_(2)

    return write


@pytest.mark.parametrize("name", ["x", "y"])
def test_writes_behind_the_layers_are_noticed_as_without(name):
    for model in (seeded(lambda: WritesTo(by_name(name))), *pair(lambda: WritesTo(by_name(name)))):
        z = model(image())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.sum().backward()


def test_a_tensor_of_others_that_is_written_to_is_noticed():
    x = image().requires_grad_()
    for context in (cnnkern.recompute, saved_tensors_hooks_of_nobody):
        with context():
            y = x * 2
            z = y.exp()
        z.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.sum().backward()


def saved_tensors_hooks_of_nobody() -> Any:
    return torch.enable_grad()


class WritesBetween(nn.Module):
    """The result is written to before it is saved: in the graph, past it, by other memory in its place."""

    def __init__(self, write: Callable[[Tensor], Any]):
        super().__init__()
        self.conv1, self.bn, self.conv2, self.write = nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.Conv2d(C, C, 3), write

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.bn(self.conv1(x)))
        self.write(y)
        return self.conv2(y)


def _past_the_graph(y: Tensor) -> None:
    with torch.no_grad():
        y.mul_(2)


def _other_memory(y: Tensor) -> None:
    y.data = y.detach() * 3


WRITES = {
    "in the graph": lambda y: y.mul_(2),
    "past the graph": _past_the_graph,
    "a part": lambda y: y[:, 1].mul_(2),
    "other memory": _other_memory,
    "other memory's layout": lambda y: setattr(y, "data", y.detach().contiguous(memory_format=torch.channels_last)),
}


@pytest.mark.parametrize("how", WRITES)
def test_writes_before_the_result_is_saved(how):
    plain, again = pair(lambda: WritesBetween(WRITES[how]))
    for _ in range(2):
        assert_same(gradients(plain, image()), gradients(again, image()))


def test_parameters_may_change_where_they_may_without():
    def steps(model: nn.Module) -> list[Tensor]:
        loss = model(image()).square().mean()
        with torch.no_grad():
            for parameter in (model.bn.bias, model.bn.weight):
                parameter.add_(1)
        return list(torch.autograd.grad(loss, [c.weight for c in model.convs]))

    assert_same(*(steps(model) for model in pair(Users)))


def test_graphs_are_freed_without_a_collection():
    _, again = pair(Users)

    def forward() -> None:
        with cnnkern.recompute():
            again(image()).exp().sum()  # exp saves its own result

    def both() -> None:
        again(image()).square().mean().backward()
        again.zero_grad()

    forward()
    gc.collect()
    gc.disable()
    try:
        assert held(forward) == held(both) == 0, "a graph that nobody has is still there"
    finally:
        gc.enable()


class Blocks(nn.Module):
    """Residual blocks, of which each result is the next one's residual."""

    def __init__(self, relu: bool = True):
        super().__init__()
        self.stem = nn.Conv2d(3, C, 3)
        self.convs = nn.ModuleList(nn.Conv2d(C, C, 3, padding=1) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(C) for _ in range(4))
        self.relu, self.last = relu, nn.Conv2d(C, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x)) + x
            x = F.relu(x) if self.relu else x
        return self.last(x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("relu", [True, False])
def test_every_other_residual_block_keeps_no_result(relu, layout):
    plain, again = pair(lambda: Blocks(relu), layout=layout)
    for _ in range(2):
        assert_same(gradients(plain, image(layout=layout)), gradients(again, image(layout=layout)))
    # The first block's residual is kept for its convolution, so its result is not; that of the second is, and so on.
    saved = held(lambda: plain(image(layout=layout))) - held(lambda: again(image(layout=layout)))
    assert round(saved / (N * C * 64 * 4), 1) == 2


def test_a_residual_block_of_ours_keeps_no_result_and_notices_writes():
    torch.manual_seed(0)
    conv, norm, last = nn.Conv2d(3, 3, 3, padding=1), cnnkern.nn.BatchNormAddReLU2d(3), nn.Conv2d(3, 2, 3)
    x = image().requires_grad_()

    def forward() -> Tensor:
        start = x * 1
        found.append(start)
        return last(norm(conv(start), start))

    found: list[Tensor] = []
    grads = []
    for context in (torch.enable_grad, cnnkern.recompute):
        with context():
            loss = forward().square().sum()
        grads.append(list(torch.autograd.grad(loss, [x, *conv.parameters(), *last.parameters()])))
    assert_same(*grads)
    with cnnkern.recompute():
        loss = forward().square().sum()
    with torch.no_grad():
        found[-1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


SHARES = {
    "resnet50": 0.28,
    "resnext50_32x4d": 0.32,
    "vgg16_bn": 0.42,
    "mobilenet_v2": 0.63,
    "efficientnet_b0": 0.56,
    "densenet121": 0.75,
    "convnext_tiny": 0.10,
}
PEAKS = {"densenet121": 0.40}  # of what a step takes at most; of the others anything


@pytest.mark.parametrize(
    "name", [n if n in ("resnet50", "mobilenet_v2") else pytest.param(n, marks=pytest.mark.slow) for n in SHARES]
)
def test_models_keep_less(name):
    assert set(SHARES) == set(memory.MODELS)
    setting = Setting(training=True, device="cpu")
    x = memory.image(112, 2, channels_last=False)
    forms = memory.forms(memory.build(name), setting)
    found = {form: memory.measure(model, x, setting) for form, model in forms.items()}
    eager, again = found[memory.EAGER], found[memory.RECOMPUTE]
    assert again.elements <= (1 - SHARES[name] + 0.005) * eager.elements
    assert again.peak < (1 - PEAKS.get(name, 0)) * eager.peak
    said = memory.line(name, found)
    assert said.startswith(name)
    assert f"{1 - again.elements / eager.elements:.0%}" in said
