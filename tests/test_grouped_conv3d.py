"""Grouped convolution of volumes, frame by frame on the kernels for images: its numbers, arguments, errors."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cnnkern import functional, testing
from tests.convolution_twins import (
    MIXED,
    assert_reruns_are_bit_equal,
    assert_same_error,
    assert_same_error_for_dtypes,
)
from tests.test_grouped_conv1d import called
from tests.test_grouped_conv2d import LIBRARY, OURS, who_answers

FLOAT, BFLOAT, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float16, torch.float64


def in_float32(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """F.conv3d, of 16-bit tensors computed in float32 and rounded once, as test_grouped_conv2d.py has it."""
    dtype = torch.promote_types(input.dtype, FLOAT)
    bias = None if bias is None else bias.to(dtype)
    return F.conv3d(input.to(dtype), weight.to(dtype), bias, stride, padding, dilation, groups).to(input.dtype)


CASE = dataclasses.replace(testing.CASES["grouped_conv2d"], function=functional.conv3d, reference=in_float32)


def arguments(
    shape,
    generator,
    dtype=FLOAT,
    *,
    width=1,
    kernel=(3, 3, 3),
    multiplier=1,
    layout="contiguous",
    bias=True,
    **settings,
):
    """(inputs, dy) of a convolution of groups of `width` channels."""
    channels = shape[-4]
    x = testing.randn(shape, generator, dtype)
    scale = (width * np.prod(kernel)) ** -0.5
    weight = testing.randn((channels * multiplier, width, *kernel), generator, DOUBLE) * scale
    inputs = {
        "input": testing.with_layout(x, layout),
        "weight": weight.to(dtype),
        "bias": testing.randn((channels * multiplier,), generator, dtype) if bias else None,
        "groups": channels // width,
        "padding": tuple(k // 2 for k in kernel),
        **settings,
    }
    dy = testing.randn(CASE.reference(**inputs).shape, generator, dtype)
    return inputs, testing.with_layout(dy, layout)


# (kernel, stride, width of a group): of X3D and CSN, of one frame or of one pixel, strides of frames and of pixels.
KERNELS = (
    ((3, 3, 3), 1, 1),
    ((3, 3, 3), (1, 2, 2), 4),
    ((5, 1, 1), 1, 1),
    ((1, 3, 3), 1, 1),
    ((3, 3, 3), 2, 1),
    ((2, 4, 3), (2, 1, 1), 1),
    ((3, 3, 3), (3, 2, 2), 8),
    ((1, 1, 1), 2, 1),
    ((3, 3, 3), 1, 16),
    ((5, 1, 1), 2, 2),
    ((1, 3, 3), (2, 1, 1), 1),
    ((3, 3, 3), 1, 3),  # from here on PyTorch's
    ((3, 3, 3), (1, 1, 2), 1),
)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "permuted"])
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT, HALF, DOUBLE], ids=str)
def test_against_float64(dtype, layout, generator):
    everything = dtype == FLOAT and layout in ("contiguous", "channels_last")
    for kernel, stride, width in KERNELS if everything else KERNELS[:4]:
        settings = {"width": width, "kernel": kernel, "stride": stride, "layout": layout}
        shape = (2, 17 if width == 1 else 2 * width, 5, 6, 9)
        testing.check(CASE, *arguments(shape, generator, dtype, **settings))


def test_tiles_and_chunks_of_tall_frames(generator):
    """Frames that are cut into tiles, whose rows two tiles read, and batches that are cut into chunks."""
    for layout in ("contiguous", "channels_last"):
        for kernel, stride in (((3, 3, 3), 1), ((2, 5, 5), (1, 2, 2))):
            inputs, dy = arguments((2, 17, 3, 24, 19), generator, kernel=kernel, stride=stride, layout=layout)
            testing.check(CASE, inputs, dy)


VARIANTS = [
    {"dilation": 2, "padding": 2},
    {"stride": (2,), "padding": [1]},
    {"stride": np.int64(2), "padding": torch.Size([1, 0, 1])},
    {"padding": 0, "bias": False},
    {"padding": (2, 4, 3)},
    {"padding": (3, 0, 0)},
    {"padding": "same"},
    {"padding": "same", "kernel": (4, 3, 2)},
    {"padding": "same", "dilation": (1, 2, 2)},
    {"padding": "valid", "stride": 2},
    {"multiplier": 2},
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's own
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_arguments_of_every_form(variant, generator):
    for width, dtype, shape in ((1, FLOAT, (2, 8, 5, 6, 7)), (4, BFLOAT, (8, 5, 6, 7)), (1, FLOAT, (0, 8, 5, 6, 7))):
        testing.check(CASE, *arguments(shape, generator, dtype, width=width, **variant))


def test_only_the_gradients_that_are_wanted(generator):
    inputs, dy = arguments((2, 17, 4, 5, 6), generator)
    for names in (("input",), ("weight",), ("bias",), ("input", "weight")):
        leaves = {n: v.detach().requires_grad_(n in names) for n, v in inputs.items() if isinstance(v, Tensor)}
        truth = {n: v.detach().double().requires_grad_(n in names) for n, v in leaves.items()}
        found, eager, exact = (
            torch.autograd.grad(f(**{**inputs, **made}), [made[n] for n in names], dy.to(made["input"].dtype))
            for f, made in ((functional.conv3d, leaves), (F.conv3d, leaves), (F.conv3d, truth))
        )
        named = [dict(zip(names, gradients, strict=True)) for gradients in (found, eager, exact)]
        testing.assert_as_good_as(*named)


def test_gradients_of_first_and_second_order(generator):
    for width, kernel, stride, shape in ((1, (2, 3, 2), 1, (2, 4, 3, 3, 2)), (2, (2, 2, 2), 2, (4, 3, 4, 3))):
        inputs, _ = arguments(shape, generator, DOUBLE, width=width, kernel=kernel, stride=stride)
        rest = {n: v for n, v in inputs.items() if not isinstance(v, Tensor)}
        leaves = [inputs[n].requires_grad_() for n in ("input", "weight", "bias")]

        def function(x, weight, bias, rest=rest):
            return functional.conv3d(x, weight, bias, **rest)

        torch.autograd.gradcheck(function, leaves)
        torch.autograd.gradgradcheck(function, leaves)


def test_whole_and_complex_numbers(generator):
    x, w = (torch.randint(-9, 9, shape, generator=generator) for shape in ((2, 6, 4, 5, 3), (6, 1, 3, 3, 3)))
    assert torch.equal(functional.conv3d(x, w, padding=1, groups=6), F.conv3d(x, w, padding=1, groups=6))
    x, w = torch.complex(x.float(), -x.float()), torch.complex(w.float(), w.float())
    torch.testing.assert_close(functional.conv3d(x, w, padding=1, groups=6), F.conv3d(x, w, padding=1, groups=6))


# (shape of the input, of the weight, other arguments)
VIDEOS, DEPTHWISE = (2, 6, 4, 5, 5), (6, 1, 3, 3, 3)
ERRORS = [
    (VIDEOS, DEPTHWISE, {"groups": 4}),
    (VIDEOS, (7, 3, 3, 3, 3), {"groups": 2}),
    (VIDEOS, DEPTHWISE, {"groups": 3}),
    ((2, 5, 4, 5, 5), DEPTHWISE, {"groups": 6}),
    ((5, 4, 5, 5), DEPTHWISE, {"groups": 6}),
    (VIDEOS, (0, 1, 3, 3, 3), {"groups": 6}),
    (VIDEOS, (6, 0, 3, 3, 3), {"groups": 6}),
    (VIDEOS, (6, 1, 5, 3, 3), {"groups": 6}),
    (VIDEOS, (6, 1, 3, 8, 3), {"groups": 6, "padding": 1}),
    (VIDEOS, (6, 1, 5, 3, 3), {"groups": 6, "padding": "valid"}),
    (VIDEOS, DEPTHWISE, {"groups": 6, "dilation": 3}),
    ((2, 6, 0, 5, 5), DEPTHWISE, {"groups": 6}),
    (VIDEOS, (6, 1, 3, 3), {"groups": 6}),
    ((6,), DEPTHWISE, {"groups": 6}),
    (VIDEOS, DEPTHWISE, {"groups": 6, "stride": 0}),
    (VIDEOS, DEPTHWISE, {"groups": 6, "dilation": 0}),
    (VIDEOS, DEPTHWISE, {"groups": 6, "padding": -1}),
    (VIDEOS, DEPTHWISE, {"groups": 6, "stride": (1, 1)}),
    (VIDEOS, DEPTHWISE, {"groups": 6, "dilation": ()}),
    (VIDEOS, DEPTHWISE, {"groups": 6, "stride": 1.5}),
    (VIDEOS, DEPTHWISE, {"groups": 6, "stride": None}),
    (VIDEOS, DEPTHWISE, {"groups": 6, "padding": "same", "stride": 2}),
    (VIDEOS, DEPTHWISE, {"groups": 6, "padding": "some"}),
    (VIDEOS, DEPTHWISE, {"groups": 0}),
    (VIDEOS, DEPTHWISE, {"groups": 6, "bias": torch.ones(5)}),
    (VIDEOS, DEPTHWISE, {"groups": 6, "bias": torch.ones(6).double()}),
]


@pytest.mark.parametrize(("shape", "weight", "keywords"), ERRORS, ids=str)
def test_the_same_errors_as_torch(shape, weight, keywords):
    assert_same_error("conv3d", shape, weight, keywords)


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
def test_a_dtype_that_does_not_fit(dtypes):
    assert_same_error_for_dtypes("conv3d", VIDEOS, DEPTHWISE, dtypes)


def test_a_gradient_of_another_shape_is_refused(generator):
    inputs, dy = arguments((2, 6, 4, 5, 5), generator, bias=False)
    settings = ((1, 1, 1), (1, 1, 1), (1, 1, 1), 6, (True, True, False))
    with pytest.raises(RuntimeError, match=r"dy must be Float \[2, 6, 4, 5, 5\].*; got Float \[2, 6, 3, 5, 5\]"):
        torch.ops.cnnkern.grouped_conv2d_backward(dy[:, :, 1:], inputs["input"], inputs["weight"], *settings)


def test_autocast_runs_in_the_lower_precision(generator):
    inputs, _ = arguments((2, 8, 4, 6, 6), generator)
    with torch.autocast("cpu", dtype=BFLOAT):
        ours, theirs = functional.conv3d(**inputs), F.conv3d(**inputs)
    assert ours.dtype == theirs.dtype == BFLOAT
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_reruns_are_bit_equal_for_any_number_of_threads(generator):
    kinds = itertools.product((1, 8), ("contiguous", "channels_last"))
    drawn = (arguments((3, 32, 5, 20, 20), generator, width=width, layout=layout) for width, layout in kinds)
    assert_reruns_are_bit_equal("conv3d", drawn)


def test_the_input_and_the_weight_alone_are_saved(generator):
    inputs, _ = arguments((2, 16, 4, 6, 6), generator)
    for name in CASE.differentiable:
        inputs[name].requires_grad_()
    saved = testing.saved_bytes(lambda: functional.conv3d(**inputs))
    assert saved == inputs["input"].nbytes + inputs["weight"].nbytes


# (width, kernel, layout, dtype) -> who computes the forward pass, and both gradients
VIDEO_KERNEL, OF_TIME, OF_FRAMES = (3, 3, 3), (5, 1, 1), (1, 3, 3)
RULE = {
    (1, VIDEO_KERNEL, "contiguous", FLOAT): (OURS, OURS),
    (1, VIDEO_KERNEL, "channels_last", FLOAT): (LIBRARY, OURS),
    (1, OF_TIME, "channels_last", FLOAT): (OURS, OURS),
    (1, OF_FRAMES, "channels_last", FLOAT): (OURS, OURS),
    (4, VIDEO_KERNEL, "channels_last", FLOAT): (OURS, OURS),
    (16, VIDEO_KERNEL, "channels_last", FLOAT): (OURS, OURS),
    (20, VIDEO_KERNEL, "contiguous", FLOAT): (LIBRARY, LIBRARY),
    (1, VIDEO_KERNEL, "contiguous", BFLOAT): (OURS, OURS),
    (1, OF_TIME, "channels_last", BFLOAT): (LIBRARY, OURS),
    (4, VIDEO_KERNEL, "channels_last", HALF): (OURS, OURS),
    (8, VIDEO_KERNEL, "contiguous", HALF): (OURS, OURS),
    (8, VIDEO_KERNEL, "channels_last", HALF): (LIBRARY, OURS),
    (12, VIDEO_KERNEL, "contiguous", HALF): (LIBRARY, LIBRARY),
}


@pytest.mark.parametrize("case", RULE, ids=str)
def test_the_rule_of_dispatch(case, generator):
    width, kernel, layout, dtype = case
    inputs, dy = arguments((2, 2 * width, 5, 4, 6), generator, dtype, width=width, kernel=kernel, layout=layout)
    ones = (1, 1, 1)
    settings = (inputs["input"], inputs["weight"], ones, inputs["padding"], ones, inputs["groups"], (True,) * 3)
    backward = torch.ops.cnnkern.grouped_conv2d_backward
    answers = who_answers(lambda: functional.conv3d(**inputs)), who_answers(backward, dy, *settings)
    assert answers == RULE[case]


def test_what_is_not_grouped_is_pytorchs(generator):
    inputs, _ = arguments((2, 8, 4, 6, 6), generator, width=8)
    assert "cnnkern::grouped_conv2d" not in called(lambda: functional.conv3d(**inputs))
