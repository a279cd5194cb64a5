"""Grouped convolutions on tensor cores (csrc/cuda/conv/grouped_rows.cuh), on the emulator, against float64.

Besides what tests/test_emulator.py asks of all kernels: every width, stride and padding, images that fill no tile, and
channels whose last tile is ragged.
"""

import emulator
import pytest
import torch
import torch.nn.functional as F
from test_grouped_conv2d import LIBRARY, OURS, answers_of_all_passes

from cnnkern import testing
from cnnkern.ops import tuned

pytestmark = pytest.mark.slow  # they need all kernels compiled
CASE = testing.CASES["grouped_conv2d"]
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
widths = pytest.mark.parametrize("width", [2, 4, 8, 16, 24, 32])
dtypes = pytest.mark.parametrize("dtype", ROUNDING, ids=lambda d: str(d).removeprefix("torch."))

# (N, channels in groups, H, W): images beside each other, with a place left; wider than a tile; one row; one column.
SHAPES = ((3, 4, 7, 7), (5, 9, 5, 13), (1, 4, 4, 45), (2, 12, 3, 16), (2, 4, 29, 3))


def arguments(shape: tuple[int, ...], width: int, dtype: torch.dtype, generator: torch.Generator, **variant) -> tuple:
    """(inputs in channels_last, dy) with C a multiple of eight."""
    n, groups, h, w = shape
    channels = groups * width if width >= 8 else groups * 8
    inputs = CASE.inputs((n, channels, h, w), dtype, generator=generator, width=width, **variant)
    inputs["input"] = testing.with_layout(inputs["input"], "channels_last")
    dy = testing.randn(CASE.reference(**inputs).shape, generator, dtype)
    return inputs, testing.with_layout(dy, "channels_last")


def passes(inputs: dict, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The output and the three gradients, by our operator."""
    forward, given = CASE.forward_call(inputs)
    backward, of_backward = CASE.backward_call(inputs, dy)
    return (forward(*given), *backward(*of_backward))


def of_library(inputs: dict, dy: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """The same by PyTorch in `dtype`."""
    settings = {name: inputs[name] for name in ("stride", "padding", "groups")}
    leaves = [inputs[name].detach().to(dtype).requires_grad_() for name in ("input", "weight", "bias")]
    y = F.conv2d(*leaves, **settings)
    return (y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype)))


def assert_as_good(inputs: dict, dy: torch.Tensor) -> None:
    dtype = inputs["input"].dtype
    with emulator.Emulator():
        ours = passes(inputs, dy)
        rounded = [t.to(dtype) for t in of_library(inputs, dy, torch.float32)]  # at its best
        y, dx, dweight, _ = answers_of_all_passes(inputs)
    exact = of_library(inputs, dy, torch.float64)
    whose = {"y": y, "dx": dx, "dweight": dweight, "dbias": dweight}
    for (name, who), mine, theirs, truth in zip(whose.items(), ours, rounded, exact, strict=True):
        if who == LIBRARY:
            continue
        error, allowed = (mine.double() - truth).abs(), 2 * (theirs.double() - truth).abs().max()
        excess = (error - allowed - truth.abs() * ROUNDING[dtype]).max()
        assert excess <= 0, f"{name}: {error.max():.3g} off, {excess:.3g} more than allowed"


@dtypes
@pytest.mark.parametrize("stride", [1, 2])
@widths
def test_every_shape_and_padding(width, stride, dtype, generator):
    for i, shape in enumerate(SHAPES):
        padding = ((0, 2), (1, 1), (2, 1), (1, 0), (0, 0))[(i + width) % 5]
        assert_as_good(*arguments(shape, width, dtype, generator, stride=stride, padding=padding))


@widths
def test_reruns_are_bit_equal(width, generator, monkeypatch):
    inputs, dy = arguments((7, 9, 14, 14), width, torch.bfloat16, generator, stride=1)
    results = []
    with emulator.Emulator():
        for order in ("forward", "reverse", "random:3"):
            monkeypatch.setenv("EMULATOR_ORDER", order)
            results.append(passes(inputs, dy))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("stride", [1, 2])
@widths
def test_nan_stays_in_its_image_and_its_eight_channels(width, stride, generator):
    inputs, dy = arguments((5, 4, 7, 7), width, torch.bfloat16, generator, stride=stride)
    together = max(8, width)
    inputs["input"][1, together, 3, 3] = float("nan")
    dy[2, together, 2, 2] = float("nan")
    with emulator.Emulator():
        y, dx, *_ = passes(inputs, dy)
    for result, image in ((y, 1), (dx, 2)):
        spoilt = result.isnan()
        assert spoilt[image, together : 2 * together].any()
        spoilt[image, together : 2 * together] = False
        assert not spoilt.any()


@pytest.mark.parametrize("change", ["bytes", "channels"])
def test_what_vectors_do_not_divide_is_left_to_the_library(change, generator, monkeypatch):
    inputs, dy = arguments((2, 3, 5, 5), 4, torch.bfloat16, generator)
    if change == "bytes":
        x = inputs["input"]
        storage = x.new_empty(x.numel() + 1)[1:]
        inputs["input"] = storage.as_strided(x.shape, x.stride(), storage.storage_offset()).copy_(x)
    else:
        inputs = CASE.inputs((2, 12, 5, 5), torch.bfloat16, generator=generator, width=4)
        inputs["input"] = testing.with_layout(inputs["input"], "channels_last")
        dy = testing.with_layout(testing.randn((2, 12, 5, 5), generator, torch.bfloat16), "channels_last")
    monkeypatch.setenv("EMULATOR_ORDER", "sideways")  # whatever is launched fails
    with emulator.Emulator():
        passes(inputs, dy)


@pytest.mark.parametrize(
    ("width", "stride", "layout", "answers"),  # forward, dx, dweight, both
    [
        (8, 1, "channels_last", (OURS, OURS, OURS, OURS)),
        (16, 2, "channels_last", (LIBRARY, OURS, OURS, OURS)),
        (24, 2, "channels_last", (OURS, OURS, OURS, OURS)),
        (32, 1, "channels_last", (OURS, LIBRARY, LIBRARY, LIBRARY)),
        (32, 2, "channels_last", (LIBRARY, OURS, OURS, OURS)),
        (4, 1, "contiguous", (OURS, OURS, LIBRARY, LIBRARY)),
        (8, 1, "contiguous", (LIBRARY, LIBRARY, LIBRARY, LIBRARY)),
    ],
)
def test_what_cudnn_does_faster_is_left_to_it_pass_by_pass(width, stride, layout, answers, generator):
    """The rule of csrc/cuda/conv/grouped_conv2d.cu. A call of which a part is the library's counts as the library's."""
    inputs = CASE.inputs(
        (2, 2 * width, 9, 8), torch.bfloat16, generator=generator, width=width, stride=stride, padding=1
    )
    inputs["input"] = testing.with_layout(inputs["input"], layout)
    with emulator.Emulator():
        assert answers_of_all_passes(inputs) == answers


@pytest.mark.parametrize(
    ("width", "stride", "layout"), [(16, 2, "channels_last"), (32, 1, "channels_last"), (8, 1, "contiguous")]
)
def test_a_table_gives_our_kernels_what_the_rule_leaves_to_cudnn(width, stride, layout, generator):
    """What `cnnkern tune` found on a machine; on the emulator the tensors are a CPU's."""
    inputs = CASE.inputs(
        (2, 2 * width, 9, 8), torch.bfloat16, generator=generator, width=width, stride=stride, padding=1
    )
    inputs["input"] = testing.with_layout(inputs["input"], layout)
    x, weight = inputs["input"], inputs["weight"]
    settings = (*weight.shape, stride, stride, 1, 1, 1, 1, inputs["groups"], True)
    call = tuned.describe("conv2d", x, weight, None, settings)
    with emulator.Emulator() as kernels:
        kernels.gives_to_our_kernels([call._replace(training=training) for training in (True, False)])
        assert answers_of_all_passes(inputs) == (OURS,) * 4
