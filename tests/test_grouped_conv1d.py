"""Grouped convolution of sequences, which the operator for images computes: its numbers, arguments, errors."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cnnkern import functional, testing
from tests.convolution_twins import MIXED, assert_same_error, assert_same_error_for_dtypes

FLOAT, BFLOAT, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float16, torch.float64


def in_float32(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """F.conv1d, of 16-bit tensors computed in float32 and rounded once, as test_grouped_conv2d.py has it."""
    dtype = torch.promote_types(input.dtype, FLOAT)
    bias = None if bias is None else bias.to(dtype)
    return F.conv1d(input.to(dtype), weight.to(dtype), bias, stride, padding, dilation, groups).to(input.dtype)


CASE = dataclasses.replace(testing.CASES["grouped_conv2d"], function=functional.conv1d, reference=in_float32)


def arguments(
    shape, generator, dtype=FLOAT, *, width=1, kernel=3, multiplier=1, layout="contiguous", bias=True, **settings
):
    """(inputs, dy) of a convolution of groups of `width` channels."""
    channels = shape[-2]
    x = testing.randn(shape, generator, dtype)
    weight = testing.randn((channels * multiplier, width, kernel), generator, DOUBLE) * (width * kernel) ** -0.5
    inputs = {
        "input": testing.with_layout(x, layout),
        "weight": weight.to(dtype),
        "bias": testing.randn((channels * multiplier,), generator, dtype) if bias else None,
        "groups": channels // width,
        "padding": kernel // 2,
        **settings,
    }
    dy = testing.randn(CASE.reference(**inputs).shape, generator, dtype)
    return inputs, testing.with_layout(dy, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "permuted"])
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT, HALF, DOUBLE], ids=str)
def test_against_float64(dtype, layout, generator):
    """Conformer's kernel of 31, short and even ones, wider groups, and what is PyTorch's: width 3, longer kernels."""
    for width, kernel, stride in (
        *((1, kernel, stride) for kernel in (1, 2, 3, 5, 31) for stride in (1, 2)),
        *((width, 3, stride) for width in (2, 4, 8, 16, 24) for stride in (1, 2)),
        *((1, 3, 3), (3, 3, 1), (1, 33, 1), (8, 9, 1)),
    ):
        inputs, dy = arguments(
            (2, 6 * width, 45), generator, dtype, width=width, kernel=kernel, stride=stride, layout=layout
        )
        testing.check(CASE, inputs, dy)


VARIANTS = [
    {"dilation": 2},
    {"dilation": (3,), "padding": [4], "stride": (2,)},
    {"stride": np.int64(2), "padding": torch.Size([1])},
    {"padding": 0, "bias": False},
    {"padding": 7},
    {"padding": "same"},
    {"padding": "same", "kernel": 4},
    {"padding": "same", "kernel": 4, "dilation": 3},
    {"padding": "valid", "stride": 2},
    {"multiplier": 2},
    {"kernel": 31, "padding": 15, "stride": 2},
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's own
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_arguments_of_every_form(variant, generator):
    for width, dtype in itertools.product((1, 4), (FLOAT, BFLOAT)):
        for shape in ((2, 8, 19), (8, 19), (0, 8, 19)):
            inputs, dy = arguments(shape, generator, dtype, width=width, **variant)
            testing.check(CASE, inputs, dy)


@pytest.mark.parametrize("shape", [(1, 2, 1), (3, 5, 1), (1, 4, 300), (2, 4, 2), (2, 33, 70), (2, 0, 5)], ids=str)
def test_sizes_of_every_kind(shape, generator):
    for kernel, stride in itertools.product((1, 3, 31), (1, 2)):
        if shape[1]:
            testing.check(CASE, *arguments(shape, generator, kernel=kernel, stride=stride))
    if not shape[1]:
        x, weight = torch.randn(shape), torch.randn(0, 1, 3)
        for conv1d in (functional.conv1d, F.conv1d):
            with pytest.raises(RuntimeError):
                conv1d(x, weight, groups=2)


def test_strides_are_pytorchs(generator):
    layouts = ("contiguous", "channels_last", "sliced", "permuted")
    for shape, of_x, of_weight, of_dy in itertools.product(
        ((2, 8, 9), (1, 2, 1), (3, 4, 1), (8, 9)), layouts, layouts, layouts
    ):
        for width, kernel in itertools.product((1, 2), (1, 3)):
            inputs, dy = arguments(shape, generator, width=width, kernel=kernel)
            inputs["input"] = testing.with_layout(inputs["input"], of_x)
            inputs["weight"] = testing.with_layout(inputs["weight"], of_weight)
            dy = testing.with_layout(dy, of_dy)
            if of_x == of_weight == of_dy:
                testing.check(CASE, inputs, dy)
            mine, theirs = (testing.run(f, CASE, inputs, dy) for f in (functional.conv1d, F.conv1d))
            found = {n: (mine[n].stride(), theirs[n].stride()) for n in mine}
            assert all(a == b for a, b in found.values()), (shape, of_x, of_weight, of_dy, width, kernel, found)


def test_gradients_of_first_and_second_order(generator):
    for width, kernel, stride, shape in ((1, 3, 1, (2, 4, 5)), (2, 2, 2, (2, 4, 6)), (1, 5, 1, (4, 6))):
        inputs, _ = arguments(shape, generator, DOUBLE, width=width, kernel=kernel, stride=stride)
        rest = {n: v for n, v in inputs.items() if not isinstance(v, Tensor)}
        leaves = [inputs[n].requires_grad_() for n in ("input", "weight", "bias")]

        def function(x, weight, bias, rest=rest):
            return functional.conv1d(x, weight, bias, **rest)

        torch.autograd.gradcheck(function, leaves)
        torch.autograd.gradgradcheck(function, leaves)


def test_second_order_in_float32(generator):
    inputs, dy = arguments((2, 8, 20), generator)
    both = []
    for conv1d in (functional.conv1d, F.conv1d):
        leaves = [inputs[n].detach().requires_grad_() for n in ("input", "weight")]
        y = conv1d(*leaves, inputs["bias"], padding=1, groups=8)
        first = torch.autograd.grad(y, leaves, dy, create_graph=True)
        both.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)


def test_whole_and_complex_numbers(generator):
    x, w = (torch.randint(-9, 9, shape, generator=generator) for shape in ((2, 6, 9), (6, 1, 3)))
    assert torch.equal(functional.conv1d(x, w, padding=1, groups=6), F.conv1d(x, w, padding=1, groups=6))
    x, w = torch.complex(x.float(), -x.float()), torch.complex(w.float(), w.float())
    torch.testing.assert_close(functional.conv1d(x, w, padding=1, groups=6), F.conv1d(x, w, padding=1, groups=6))


# (shape of the input, of the weight, other arguments)
ROWS, DEPTHWISE = (2, 6, 5), (6, 1, 3)
ERRORS = [
    (ROWS, DEPTHWISE, {"groups": 4}),
    (ROWS, (7, 3, 3), {"groups": 2}),
    (ROWS, DEPTHWISE, {"groups": 3}),
    ((2, 5, 5), DEPTHWISE, {"groups": 6}),
    ((5, 5), DEPTHWISE, {"groups": 6}),
    (ROWS, (0, 1, 3), {"groups": 6}),
    (ROWS, (6, 0, 3), {"groups": 6}),
    (ROWS, (6, 1, 0), {"groups": 6}),
    (ROWS, (6, 1, 7), {"groups": 6}),
    (ROWS, (6, 1, 8), {"groups": 6, "padding": 1}),
    (ROWS, (6, 1, 8), {"groups": 6, "padding": "valid"}),
    (ROWS, DEPTHWISE, {"groups": 6, "dilation": 3}),
    ((2, 6, 0), DEPTHWISE, {"groups": 6}),
    (ROWS, (6, 1, 3, 3), {"groups": 6}),
    ((6,), DEPTHWISE, {"groups": 6}),
    ((2, 6, 5, 5), DEPTHWISE, {"groups": 6}),
    (ROWS, DEPTHWISE, {"groups": 6, "stride": 0}),
    (ROWS, DEPTHWISE, {"groups": 6, "dilation": 0}),
    (ROWS, DEPTHWISE, {"groups": 6, "padding": -1}),
    (ROWS, DEPTHWISE, {"groups": 6, "stride": (1, 1)}),
    (ROWS, DEPTHWISE, {"groups": 6, "padding": (1, 1)}),
    (ROWS, DEPTHWISE, {"groups": 6, "dilation": ()}),
    (ROWS, DEPTHWISE, {"groups": 6, "stride": 1.5}),
    (ROWS, DEPTHWISE, {"groups": 6, "stride": None}),
    (ROWS, DEPTHWISE, {"groups": 6, "padding": "same", "stride": 2}),
    (ROWS, DEPTHWISE, {"groups": 6, "padding": "some"}),
    (ROWS, DEPTHWISE, {"groups": 0}),
    (ROWS, DEPTHWISE, {"groups": -1}),
    (ROWS, DEPTHWISE, {"groups": 6, "bias": torch.ones(5)}),
    (ROWS, DEPTHWISE, {"groups": 6, "bias": torch.ones(6, 1)}),
    (ROWS, DEPTHWISE, {"groups": 6, "bias": torch.ones(6).double()}),
]


@pytest.mark.parametrize(("shape", "weight", "keywords"), ERRORS, ids=str)
def test_the_same_errors_as_torch(shape, weight, keywords):
    assert_same_error("conv1d", shape, weight, keywords)


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
def test_a_dtype_that_does_not_fit(dtypes):
    assert_same_error_for_dtypes("conv1d", ROWS, DEPTHWISE, dtypes)


class Called(TorchDispatchMode):
    """The operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def called(function) -> set[str]:
    with Called() as mode:
        function()
    return mode.names


# (shape, width, kernel, stride, dtype) -> whether our operator answers
RULE = {
    ((8, 256, 40), 1, 31, 1, FLOAT): True,
    ((256, 40), 1, 31, 1, FLOAT): True,
    ((17, 8, 15), 1, 3, 1, FLOAT): False,  # short rows of many
    ((17, 8, 30), 1, 3, 2, FLOAT): False,
    ((17, 8, 16), 1, 3, 1, FLOAT): True,
    ((16, 8, 15), 1, 3, 1, FLOAT): True,
    ((17, 8, 15), 1, 4, 1, FLOAT): True,
    ((17, 8, 15), 1, 3, 1, BFLOAT): True,
    ((17, 16, 15), 8, 3, 1, FLOAT): True,
    ((8, 32, 63), 16, 3, 1, FLOAT): True,
    ((9, 32, 63), 16, 3, 1, FLOAT): False,
    ((9, 32, 64), 16, 3, 1, FLOAT): True,
    ((2, 40, 64), 20, 3, 1, FLOAT): False,
    ((2, 64, 40), 32, 31, 1, FLOAT): False,
    ((2, 16, 64), 8, 9, 1, BFLOAT): True,
    ((2, 24, 64), 12, 3, 1, BFLOAT): False,
    ((2, 16, 64), 8, 10, 1, HALF): False,
    ((2, 4, 64), 2, 31, 1, HALF): True,
    ((2, 8, 64), 4, 31, 1, HALF): False,
    ((2, 8, 64), 8, 3, 1, FLOAT): False,  # one group
}


@pytest.mark.parametrize("case", RULE, ids=str)
def test_the_rule_of_dispatch(case, generator):
    shape, width, kernel, stride, dtype = case
    inputs, _ = arguments(shape, generator, dtype, width=width, kernel=kernel, stride=stride)
    assert ("cnnkern::grouped_conv2d" in called(lambda: functional.conv1d(**inputs))) == RULE[case]
    elsewhere = {n: v.to("meta") if isinstance(v, Tensor) else v for n, v in inputs.items()}
    on_meta = called(lambda: functional.conv1d(**elsewhere))  # where the rule is that of images
    assert ("cnnkern::grouped_conv2d" in on_meta) == (inputs["groups"] > 1)


def test_autocast_runs_in_the_lower_precision(generator):
    inputs, _ = arguments((2, 8, 30), generator, kernel=31)
    with torch.autocast("cpu", dtype=BFLOAT):
        ours, theirs = functional.conv1d(**inputs), F.conv1d(**inputs)
    assert ours.dtype == theirs.dtype == BFLOAT
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
