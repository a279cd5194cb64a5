"""Saved-tensor hooks that give tensors back in another memory format, by way of another dtype, or from elsewhere, as
offloading and compressing libraries do. What a node saves may not depend on how another saved tensor comes back."""

import copy
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torchvision.models import resnet18

import cnnkern
from cnnkern import testing
from cnnkern.testing import CASES, Case

LAYOUTS = ("contiguous", "channels_last", "sliced", "permuted")


def _through_numpy() -> AbstractContextManager:
    def pack(t: Tensor) -> tuple:
        return t.dtype, t.shape, torch.empty(t.shape, dtype=t.dtype).copy_(t).flatten().view(torch.uint8).numpy()

    def unpack(packed: tuple) -> Tensor:
        dtype, shape, data = packed
        return torch.from_numpy(data).view(dtype).view(shape)

    return saved_tensors_hooks(pack, unpack)


def _through(dtype: torch.dtype) -> AbstractContextManager:
    return saved_tensors_hooks(lambda t: (t.dtype, t.to(dtype)), lambda packed: packed[1].to(packed[0]))


def _placed(t: Tensor, layout: str) -> Tensor:
    if layout == "sliced":  # of integers too
        larger = t.new_ones([n + 2 for n in t.shape])
        return larger[tuple(slice(1, n + 1) for n in t.shape)].copy_(t)
    return testing.with_layout(t, layout)


def _in_layout(layout: str) -> AbstractContextManager:
    return saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: _placed(t, layout))


def _each_in_its_own() -> AbstractContextManager:
    """Every tensor comes back in another layout than the one before it."""
    layouts = itertools.cycle(LAYOUTS)
    return saved_tensors_hooks(lambda t: (t.detach().clone(), next(layouts)), lambda packed: _placed(*packed))


HOOKS: dict[str, Callable[[], AbstractContextManager]] = {
    **{layout: lambda layout=layout: _in_layout(layout) for layout in LAYOUTS},
    "each in a layout of its own": _each_in_its_own,
    "NumPy": _through_numpy,
    "float64 and back": lambda: _through(torch.float64),
    "save_on_cpu": save_on_cpu,
}

hooks = pytest.mark.parametrize("hook", HOOKS)
operators = pytest.mark.parametrize(
    ("case", "variant"),
    [pytest.param(c, v, id=f"{c.name}-{name}") for c in CASES.values() for name, v in c.variants.items()],
)


def drawn(case: Case, layout: str, dtype: torch.dtype, generator, variant) -> tuple[dict[str, Any], Tensor]:
    inputs = case.inputs((3, 16, 6, 7), dtype, generator=generator, **variant)
    shape = inputs["input"].shape
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == shape:
            inputs[name] = testing.with_layout(value, layout)
    output = testing.run(case.reference, case, inputs)["output"]
    return inputs, testing.randn(output.shape, generator, dtype)


@hooks
@operators
def test_gradients_are_right_whatever_comes_back(case, variant, hook, generator):
    for layout, dtype in itertools.product(LAYOUTS[:2], (torch.float32, torch.bfloat16)):
        inputs, dy = drawn(case, layout, dtype, generator, variant)

        def hooked(**arguments):  # ours alone: PyTorch's own layer norm is wrong under some of these hooks
            with HOOKS[hook]():
                return case.function(**arguments)

        testing.check(case, inputs, dy, hooked)


@hooks
@pytest.mark.parametrize("name", ["bn_act", "bn_add_act", "add_relu", "layer_norm", "layer_norm2d"])
def test_second_derivatives_are_right_whatever_comes_back(name, hook, generator):
    case = CASES[name]
    for layout in LAYOUTS[:2]:
        inputs = case.inputs((2, 3, 2, 3), torch.float64, generator=generator, smooth=True)
        names = [n for n in case.differentiable if inputs[n] is not None]
        tensors = [testing.with_layout(inputs[n], layout) if inputs[n].dim() == 4 else inputs[n] for n in names]

        def call(*tensors, inputs=inputs, names=names):
            fixed = {n: inputs[n].clone() for n in case.mutated if inputs[n] is not None}
            return case.function(**{**inputs, **fixed, **dict(zip(names, tensors, strict=True))})

        with HOOKS[hook]():
            # Sums are rounded otherwise in another layout, and what comes back in which changes from run to run.
            assert torch.autograd.gradgradcheck(call, [t.requires_grad_() for t in tensors], nondet_tol=1e-10)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


@hooks
def test_a_converted_network(hook):
    torch.manual_seed(0)
    model = resnet18(num_classes=10).double().to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64).to(memory_format=torch.channels_last)
    wanted = gradients(model, x)
    with HOOKS[hook]():
        found = gradients(cnnkern.convert(model), x)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def _of_channels(name: str) -> bool:
    return "Norm" in name and not name.startswith(("Lazy", "LayerNorm")) and name != "LayerNorm"


SHAPES = {"1d": (3, 4, 30), "2d": (3, 4, 5, 6), "3d": (3, 4, 2, 3, 5)}
MODULES = {  # name -> (module, shape of its inputs)
    **{n: (getattr(cnnkern.nn, n)(4), SHAPES.get(n[-2:], SHAPES["2d"])) for n in cnnkern.nn.__all__ if _of_channels(n)},
    "AddReLU": (cnnkern.nn.AddReLU(), SHAPES["2d"]),
    "LayerNorm": (cnnkern.nn.LayerNorm((5, 6)), SHAPES["2d"]),
    "LayerNorm2d": (cnnkern.nn.LayerNorm2d(4), SHAPES["2d"]),
    "GroupedConv1d": (cnnkern.nn.GroupedConv1d(4, 8, 3, groups=4), SHAPES["1d"]),
    "GroupedConv2d": (cnnkern.nn.GroupedConv2d(4, 8, 3, groups=4), SHAPES["2d"]),
    "GroupedConv3d": (cnnkern.nn.GroupedConv3d(4, 4, 2, groups=4), SHAPES["3d"]),
}


@hooks
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, hook):
    torch.manual_seed(0)
    module, shape = MODULES[name]
    layer = copy.deepcopy(module).double()
    tensors = [torch.randn(shape, dtype=torch.float64).requires_grad_() for _ in range(1 + ("Add" in name))]
    for layout in LAYOUTS[:2]:
        placed = [testing.with_layout(t, layout) for t in tensors]
        dy = torch.randn_like(layer(*placed))
        leaves = [*tensors, *layer.parameters()]
        wanted = torch.autograd.grad(layer(*placed), leaves, dy)
        with HOOKS[hook]():
            found = torch.autograd.grad(layer(*placed), leaves, dy)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)


# ---- a training call that is refused ----------------------------------------------------------------------------


class _Refused(Exception):
    pass


def _refuse_from(number: int) -> AbstractContextManager:
    """Packs so many tensors, and refuses the next."""
    left = itertools.count(number, -1)

    def pack(t: Tensor) -> Tensor:
        if next(left) == 0:
            raise _Refused
        return t

    return saved_tensors_hooks(pack, lambda t: t)


def calls(case: Case, generator) -> dict[str, Any]:
    inputs = case.inputs((3, 4, 5, 6), generator=generator)
    return {
        n: v.requires_grad_() if n in case.differentiable and isinstance(v, Tensor) else v for n, v in inputs.items()
    }


@pytest.mark.parametrize("name", ["bn_act", "bn_add_act"])
def test_a_hook_that_raises_leaves_the_statistics_as_they_were(name, generator):
    case = CASES[name]
    refused: list[bool] = []  # whether the statistics stayed
    while True:  # until nothing is refused
        inputs = calls(case, generator)
        before = [inputs[n].clone() for n in case.mutated]
        with _refuse_from(len(refused)):
            try:
                case.function(**inputs)
            except _Refused:
                refused.append(all(torch.equal(inputs[n], b) for n, b in zip(case.mutated, before, strict=True)))
            else:
                break
    assert len(refused) >= 4, "x, weight and two vectors at least"
    assert all(refused[:-1])
    assert not refused[-1], "as in PyTorch, whose checkpoints end a second forward pass there"
    assert not any(torch.equal(inputs[n], b) for n, b in zip(case.mutated, before, strict=True))


@pytest.mark.parametrize("name", ["bn_act", "bn_add_act"])
def test_statistics_are_the_same_under_a_hook(name, generator):
    case = CASES[name]
    plain = calls(case, generator)
    hooked = {
        n: v.detach().clone().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v for n, v in plain.items()
    }
    versions = [hooked[n]._version for n in case.mutated]
    case.function(**plain)
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        case.function(**hooked)
    for n, version in zip(case.mutated, versions, strict=True):
        assert torch.equal(plain[n], hooked[n])
        assert hooked[n]._version == version, "as PyTorch's batch norm leaves it"


@pytest.mark.parametrize("name", ["bn_act", "bn_add_act"])
def test_inputs_that_cannot_be_saved_leave_the_statistics_as_they_were(name, generator):
    case = CASES[name]
    inputs = calls(case, generator)
    with torch.inference_mode():
        inputs["input"] = torch.randn(3, 4, 5, 6)
    before = [inputs[n].clone() for n in case.mutated]
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        case.function(**inputs)
    assert all(torch.equal(inputs[n], b) for n, b in zip(case.mutated, before, strict=True))


# ---- what is not saved ------------------------------------------------------------------------------------------

DO_NOT_READ_THE_BIAS = [
    ("bn_act", {"act": "none"}),
    ("bn_add_act", {"act": "none"}),
    ("bn_add_act", {"act": "relu"}),
    ("layer_norm", {}),
    ("layer_norm2d", {}),
]


@pytest.mark.parametrize(("name", "variant"), DO_NOT_READ_THE_BIAS, ids=str)
def test_a_bias_may_be_stepped_between_forward_and_backward(name, variant, generator):
    case = CASES[name]
    inputs = case.inputs((3, 4, 5, 6), generator=generator, **variant)
    bias = inputs["bias"].requires_grad_()
    inputs["input"].requires_grad_()
    y = case.function(**inputs)
    dy = torch.randn_like(y)
    wanted = torch.autograd.grad(y, [inputs["input"], bias], dy, retain_graph=True)
    with torch.no_grad():
        bias.add_(1)
    found = torch.autograd.grad(y, [inputs["input"], bias], dy)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_bias_behind_an_activation_may_not(generator):
    case = CASES["bn_act"]
    inputs = case.inputs((3, 4, 5, 6), generator=generator)
    bias = inputs["bias"].requires_grad_()
    y = case.function(**inputs)
    with torch.no_grad():
        bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
