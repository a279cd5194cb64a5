"""Fake kernels return the shapes, dtypes and strides of the real ones, on which torch.compile and torch.export rely."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import cnnkern
from cnnkern import testing
from cnnkern.testing import CASES
from tests.slow import proved

LAYOUTS = ("contiguous", "channels_last", "sliced", "permuted", "expanded")


class Calls(TorchDispatchMode):
    """The operators of cnnkern that are called, with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "cnnkern":
            self.calls.append((func, args, kwargs or {}, result))
        return result


def laid_out(t: Tensor, layout: str) -> Tensor:
    return t[:1].expand(t.shape) if layout == "expanded" else testing.with_layout(t, layout)


def looks(result: Any) -> list[tuple]:
    tensors = result if isinstance(result, tuple) else (result,)
    return [(tuple(t.shape), t.stride(), t.dtype) for t in tensors]


OPERATORS = [getattr(torch.ops.cnnkern, operator).default for case in CASES.values() for operator in case.operators]


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.name())
def test_inductor_may_choose_strides_where_there_is_no_mask(operator):
    """The order of a mask's bits is a number in the graph, or follows from what the forward pass was given. So is that
    of a residual that PReLU's gradient reads."""
    names = [a.name for a in (*operator._schema.arguments, *operator._schema.returns)]
    assert (torch.Tag.flexible_layout in operator.tags) == ("mask" not in names and "slope" not in names)


class Contiguous(nn.Module):
    """What Inductor runs in channels_last: each operator with the tag between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.grouped, self.pool = cnnkern.nn.GroupedConv2d(8, 8, 3, groups=4), cnnkern.nn.MaxPool2d(3, 2)
        self.norm = cnnkern.nn.LayerNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.grouped(self.first(x)))
        bn = torch.ops.cnnkern.bn_act(x, None, None, None, None, True, 0.1, 1e-5, "silu")[0]
        return self.first(self.norm(self.third(self.pool(self.second(bn)))))


@pytest.mark.slow
def test_a_contiguous_model_that_inductor_runs_in_channels_last():
    model = Contiguous().double()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    x = torch.randn(3, 8, 14, 14, dtype=torch.float64)
    results = []
    for m in (compiled, model):
        leaf = x.clone().requires_grad_()
        y = m(leaf)
        y.square().mean().backward()
        results.append([y, leaf.grad, *(p.grad for p in m.parameters())])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
        assert mine.stride() == theirs.stride()


def fakes_of(args: Any) -> Any:
    with FakeTensorMode() as mode:
        return tree_map_only(Tensor, mode.from_tensor, args)


def calls_of(case: testing.Case, inputs: dict[str, Any], dy: Tensor) -> list[tuple[Any, tuple, dict, Any]]:
    with Calls() as mode:
        testing.run(case.function, case, inputs, dy)
    return mode.calls


VARIANTS = [(name, variant) for name, case in CASES.items() for variant in case.variants]
TESTED = [(name, next(iter(case.variants))) for name, case in CASES.items()]


@pytest.mark.parametrize("row", proved(VARIANTS, TESTED), ids=" ".join)
def test_fakes_have_the_strides_of_the_kernels(row, generator):
    """Of forward and backward operators, whatever layouts the image, the residual and the gradient have."""
    name, variant = row
    case, seen = CASES[name], set()
    for i, shape in enumerate(case.shapes[::3]):
        inputs = case.inputs(shape, torch.float32, generator=generator, **case.variants[variant])
        images = [n for n, v in inputs.items() if isinstance(v, Tensor) and v.shape == inputs["input"].shape]
        dy = torch.ones_like(testing.run(case.reference, case, inputs)["output"])
        for turn, layouts in enumerate(itertools.product(LAYOUTS, repeat=len(images))):
            placed = inputs | {n: laid_out(inputs[n], layout) for n, layout in zip(images, layouts, strict=True)}
            for func, args, kwargs, result in calls_of(case, placed, laid_out(dy, LAYOUTS[(turn + i) % len(LAYOUTS)])):
                fakes = fakes_of((args, kwargs))
                given = [(n, t.stride()) for n, t in zip(["dy", "x"], args, strict=False) if isinstance(t, Tensor)]
                with torch.no_grad():  # parts of synchronised batch norms have no derivatives of their own
                    assert looks(func(*fakes[0], **fakes[1])) == looks(result), f"{func} {shape} {given}"
                seen.add(func.name().removeprefix("cnnkern::"))
    assert len(seen) >= 2  # forward and backward
