"""`cnnkern.nn.DenseBlock`: one buffer in the place of concatenations, with PyTorch's values, gradients and errors."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import cnnkern
from cnnkern import testing
from cnnkern.extension import extension
from cnnkern.functional import batch_norm_act
from cnnkern.models import unfused
from cnnkern.models.densenet import DenseLayer
from cnnkern.testing import CASES
from tests.recomputing import assert_same, held

needs_extension = pytest.mark.skipif(extension is None, reason="without the extension PyTorch concatenates")
pytestmark = needs_extension

C, GROWTH, DEPTH, SIDE = 6, 4, 3, 7
LAYOUTS = ("contiguous", "channels_last")


def layers(fused: bool = True, last: int = GROWTH) -> dict[str, nn.Module]:
    """`last`: the channels that the last one gives."""
    widths = [*[GROWTH] * (DEPTH - 1), last]
    made: dict[str, nn.Module] = {f"denselayer{i + 1}": DenseLayer(C + i * GROWTH, GROWTH, fused) for i in range(DEPTH)}
    made[f"denselayer{DEPTH}"].conv2 = nn.Conv2d(4 * GROWTH, widths[-1], 3, padding=1, bias=False)
    return made


def pair(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """A block, and the same in PyTorch's operators."""
    torch.manual_seed(0)
    ours = cnnkern.nn.DenseBlock(layers(), GROWTH).to(dtype)
    for m in ours.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight), nn.init.normal_(m.bias)
    theirs = unfused.DenseBlock(layers(fused=False), GROWTH).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def image(layout: str = "contiguous", dtype: torch.dtype = torch.float32, n: int = 3, grad: bool = True) -> Tensor:
    x = testing.randn((n, C, SIDE, SIDE), torch.Generator().manual_seed(1), dtype)
    return testing.with_layout(x, layout).requires_grad_(grad)


def results(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y = block(x)
    dy = testing.randn(y.shape, torch.Generator().manual_seed(2), y.dtype)
    names, parameters = zip(*block.named_parameters(), strict=True)
    grads = torch.autograd.grad(y, [x, *parameters], dy)
    return {"output": y.detach(), "input": grads[0], **dict(zip(names, grads[1:], strict=True)), **buffers(block)}


def buffers(block: nn.Module) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in block.named_buffers() if b.is_floating_point()}


def nodes(y: Tensor) -> Iterator[str]:
    seen, waiting = set(), [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node.name()
            waiting += [n for n, _ in node.next_functions]


def is_buffered(y: Tensor) -> bool:
    found = set(nodes(y))
    assert ("DenseBlockFeatures" in found) != ("CatBackward0" in found)
    return "DenseBlockFeatures" in found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_gradients_and_running_statistics(layout):
    """In float64, where a ReLU's kink is no matter of rounding: what eager's own sums may differ by, and no more."""
    ours, theirs = pair(torch.float64)
    x = image(layout, torch.float64)
    assert is_buffered(ours(x))
    assert not is_buffered(theirs(x))
    for _ in range(2):
        found, truth = results(ours, x), results(theirs, x)
        rounding = x.numel() ** 0.5 * torch.finfo(torch.float64).eps
        allowance = {n: DEPTH * 8 * rounding * t.abs().max().item() for n, t in truth.items()}
        testing.assert_as_good_as(found, truth, truth, allowance)
        assert found["output"].stride() == truth["output"].stride()


def as_features(spare: int, goes_on: bool) -> Callable[..., Tensor]:
    """batch_norm_act of a buffer's features, of which the buffer has room for this many more. If they go on, what uses
    them next has a gradient of zeros, in memory that the norm's gradient is added to."""

    def function(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        half = max(1, input.shape[1] // 2)
        first, *rest = input.split([half, *[1] * (input.shape[1] - half)], 1)
        buffer = extension.feature_buffer(first, len(rest) + spare)
        assert all(buffer.append(t) for t in rest)
        y = batch_norm_act(buffer.features(), *args, **kwargs)
        assert "DenseBlockBnRelu" in set(nodes(y))
        if not goes_on:
            return y
        assert buffer.append(torch.zeros_like(input[:, :1]))
        return y + 0 * buffer.features()[:, :1].sum()

    return function


SHAPES = [(4, 5, 1, 1), (2, 1, 3, 5), (1, 7, 9, 9), (3, 17, 7, 7), (5, 33, 6, 11), (2, 70, 24, 24)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_kernels(dtype, layout, generator):
    """As good as eager on any sizes: planes and rows that end within a vector, few and many channels beside them."""
    case = CASES["bn_act"]
    for shape in SHAPES:
        for spare, goes_on, variant in (
            (1, False, {}),
            (1, True, {}),
            (3, True, {"weight": False, "bias": True}),
            (9, True, {"running": False}),
        ):
            inputs = case.inputs(shape, dtype, generator=generator, act="relu", **variant)
            inputs["input"] = testing.with_layout(inputs["input"], layout)
            dy = testing.with_layout(testing.randn(shape, generator, dtype), layout)
            testing.check(case, inputs, dy, as_features(spare, goes_on))


def test_gradients_of_first_and_second_order(generator):
    torch.manual_seed(3)
    block = cnnkern.nn.DenseBlock(
        {str(i): nn.Sequential(cnnkern.nn.BatchNormReLU2d(2 + i), nn.Conv2d(2 + i, 1, 1)) for i in range(2)}, 1
    ).double()
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    assert is_buffered(block(x))
    parameters = list(block.parameters())

    def function(x: Tensor, *values: Tensor) -> Tensor:
        names = [n for n, _ in block.named_parameters()]
        return torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x,))

    inputs = (x, *(p.detach().clone().requires_grad_() for p in parameters))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


class Sees(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


class SeesFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


def within(context: Callable[[], Any], block: nn.Module, x: Tensor) -> Tensor:
    with context():
        return block(x)


CONCATENATED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "eval mode": lambda block, x: block.eval()(x),
    "an input without gradient": lambda block, x: block(x.detach()),
    "a dispatch mode": partial(within, Sees),
    "a function mode": partial(within, SeesFunctions),
    "saved-tensor hooks": partial(within, lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)),
    "torch.compile": lambda block, x: torch.compile(block, backend="eager")(x),
}


@pytest.mark.parametrize("how", CONCATENATED)
def test_where_pytorch_concatenates(how):
    block, _ = pair()
    y = CONCATENATED[how](block, image())
    assert not is_buffered(y)
    plain = unfused.DenseBlock(dict(pair()[0].train(block.training).items()), GROWTH)
    torch.testing.assert_close(y, plain(image()))


def test_checkpointed():
    ours, theirs = (partial(checkpoint, block, use_reentrant=False) for block in pair(torch.float64))
    x = image(dtype=torch.float64)
    torch.testing.assert_close(
        *(torch.autograd.grad(f(x).square().mean(), x)[0] for f in (ours, theirs)), rtol=1e-9, atol=1e-12
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")
def test_programs_and_transforms_have_concatenations():
    block, _ = pair()
    x = image(grad=False)
    program = torch.export.export(block, (x,))
    assert torch.ops.aten.cat.default in {n.target for n in program.graph.nodes}
    graph = torch.fx.symbolic_trace(block)
    assert any(n.target is torch.cat for n in graph.graph.nodes)
    with torch.no_grad():
        traced = torch.jit.trace(block.eval(), x)
        torch.testing.assert_close(traced(x), block(x))
    tangent = torch.func.jvp(block, (x,), (torch.ones_like(x),))[1]
    h = 1e-3
    with torch.no_grad():
        torch.testing.assert_close(tangent, (block(x + h) - block(x - h)) / (2 * h), rtol=1e-2, atol=1e-2)


def test_layers_that_are_not_as_announced_are_concatenated():
    """Wider than `growth`, so that there is no room; narrower, so that some is left; of another dtype."""
    for growth, last in ((GROWTH, GROWTH + 1), (GROWTH, GROWTH - 1), (GROWTH - 1, GROWTH), (GROWTH + 2, GROWTH)):
        torch.manual_seed(0)
        ours = cnnkern.nn.DenseBlock(layers(last=last), growth).double()
        theirs = unfused.DenseBlock(dict(copy.deepcopy(ours).items()), growth)
        a, b = (results(block, image(dtype=torch.float64)) for block in (ours, theirs))
        assert a["output"].is_contiguous()
        for name in b:
            torch.testing.assert_close(a[name], b[name], rtol=1e-10, atol=1e-12, msg=name)

    class Widened(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.double()

    x = image()
    y = cnnkern.nn.DenseBlock({"a": Widened()}, C)(x)
    assert torch.equal(y, torch.cat([x, x.double()], 1))


class Uses(nn.Module):
    """A layer that uses its input three times, twice by a batch norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.other = cnnkern.nn.BatchNormReLU2d(channels), cnnkern.nn.BatchNormReLU2d(channels)
        self.conv = nn.Conv2d(channels, GROWTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x) + x.sin() + self.other(x))


def test_any_layer_may_be_one():
    torch.manual_seed(0)
    ours = cnnkern.nn.DenseBlock({str(i): Uses(C + i * GROWTH) for i in range(DEPTH)}, GROWTH).double()
    theirs = unfused.DenseBlock(dict(copy.deepcopy(ours).items()), GROWTH)
    x = image(dtype=torch.float64)
    assert is_buffered(ours(x))
    ours.load_state_dict(theirs.state_dict())
    a, b = (results(block, x) for block in (ours, theirs))
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=1e-10, atol=1e-12, msg=name)


def test_hooks_see_what_they_see_in_pytorch():
    """Values, and gradients of a layer's input: of what that layer makes of it, not of what the next ones do."""
    seen: list[dict[str, Any]] = []
    for block in pair(torch.float64):
        found: dict[str, Any] = {}
        seen.append(found)

        def forward_hook(name, found, module, args, output):
            found[f"{name} input"], found[f"{name} output"] = args[0].detach().clone(), output.detach().clone()

        def backward_hook(name, found, module, grad_input, grad_output):
            found[f"{name} grad_input"], found[f"{name} grad_output"] = grad_input[0], grad_output[0]

        def retain(name, found, module, args):
            args[0].register_hook(partial(found.__setitem__, f"{name} grad"))

        for name, module in block.named_modules():
            if name == "denselayer1":
                module.register_forward_pre_hook(partial(retain, name, found))
            if name in ("denselayer2", "denselayer2.norm1", "denselayer1.conv1", "denselayer3.norm1"):
                module.register_forward_hook(partial(forward_hook, name, found))
            if name in ("denselayer2.norm1", "denselayer2.conv2"):
                module.register_full_backward_hook(partial(backward_hook, name, found))
        block(image(dtype=torch.float64)).square().mean().backward()
    ours, theirs = seen
    assert ours.keys() == theirs.keys()
    assert len(ours) == 13
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-12, msg=name)


def test_a_gradient_that_someone_holds_is_not_written_to():
    ours, _ = pair()
    kept: list[tuple[Tensor, Tensor]] = []
    x = image()
    for m in ours.modules():
        if isinstance(m, nn.Conv2d):
            m.register_full_backward_hook(lambda m, i, o: kept.extend((g, g.clone()) for g in (*i, *o)))
    y = ours(x)
    y.register_hook(lambda g: kept.append((g, g.clone())))
    dy = torch.randn_like(y)
    was = dy.clone()
    first = torch.autograd.grad(y, x, dy, retain_graph=True)
    again = torch.autograd.grad(y, x, dy)
    assert torch.equal(dy, was)
    assert_same(list(first), list(again))
    assert len(kept) == 2 * (1 + 4 * DEPTH)  # of two backward passes, the result's, and two of each convolution
    assert all(torch.equal(g, was) for g, was in kept)


def test_writes_in_place_are_noticed():
    block, _ = pair()
    y = block(image())
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()

    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu_()[:, :GROWTH]

    with pytest.raises(RuntimeError, match="has written to its input in place"):
        cnnkern.nn.DenseBlock({"a": InPlace()}, GROWTH)(image())


def test_a_refused_norm_changes_nothing():
    block, _ = pair()
    was = {n: b.clone() for n, b in block.named_buffers()}
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        block(torch.randn(1, C, 1, 1, requires_grad=True))
    assert all(torch.equal(b, was[n]) for n, b in block.named_buffers())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_recomputed_bit_by_bit_with_less_memory(layout):
    torch.manual_seed(0)
    channels = [32 + 8 * i for i in range(8)]
    block = cnnkern.nn.DenseBlock({str(i): DenseLayer(c, 8) for i, c in enumerate(channels)}, 8)
    plain = unfused.DenseBlock(dict(copy.deepcopy(block).items()), 8)
    x = testing.with_layout(torch.randn(2, 32, 16, 16), layout).requires_grad_()

    def again() -> Tensor:
        with cnnkern.recompute():
            return block(x)

    found = [torch.autograd.grad(y.square().mean(), [x, *block.parameters()]) for y in (block(x), again())]
    assert_same(*map(list, found))
    # Once the features, instead of a concatenation per layer; and what norms and convolutions are given.
    pixels, vectors = 4 * 2 * 16 * 16, 50_000
    normed, inner = sum(channels), 8 * 4 * 8
    assert held(lambda: block(x)) <= pixels * (96 + normed + 2 * inner) + vectors
    assert held(again) <= pixels * (96 + inner) + vectors
    assert held(lambda: plain(x)) >= pixels * (2 * normed + 2 * inner)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_and_reruns_agree_to_the_bit(layout, generator):
    case = CASES["bn_act"]
    inputs = case.inputs((8, C, 40, 40), generator=generator)
    inputs["input"] = testing.with_layout(inputs["input"], layout)
    dy = testing.with_layout(testing.randn((8, C, 40, 40), generator, torch.float32), layout)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            found.append(list(testing.run(as_features(3, True), case, inputs, dy).values()))
    finally:
        torch.set_num_threads(threads)
    assert_same(found[0], found[1])
    assert_same(found[1], found[2])


def test_autocast():
    ours, theirs = pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, plain = ours(image()), theirs(image())
    assert y.dtype == plain.dtype
    torch.testing.assert_close(y.float(), plain.float(), rtol=0.05, atol=0.2)
    y.float().sum().backward()


def test_names_are_torchvisions():
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.densenet._DenseBlock(DEPTH, C, 4, GROWTH, 0.0)
    ours = cnnkern.nn.DenseBlock(layers(), GROWTH)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(image()), theirs(image()))
