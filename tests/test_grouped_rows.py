"""Grouped convolutions on tensor cores (csrc/cuda/conv/grouped_rows.cuh), on the emulator, against float64.

Besides what tests/test_emulator.py asks of all kernels: every width, stride and padding, images that fill no tile, and
channels whose last tile is ragged. float32 is in TF32 (tests/tf32.py).
"""

import itertools

import emulator
import pytest
import torch
import torch.nn.functional as F
from test_grouped_conv2d import LIBRARY, OURS, answers_of_all_passes

import cnnkern
from cnnkern import testing
from cnnkern.ops import tuned
from tests import tf32

pytestmark = pytest.mark.slow  # they need all kernels compiled
CASE = testing.CASES["grouped_conv2d"]
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
NARROW = (2, 4, 8, 16, 24, 32)
WIDE = (40, 48, 56, 64, 72, 80, 112, 120, 128)  # of which a block has one group, or a part of it
widths = pytest.mark.parametrize("width", [*NARROW, 40, 56, 72, 120])  # each kernel that is compiled
dtypes = pytest.mark.parametrize("dtype", [*ROUNDING, torch.float32], ids=lambda d: str(d).removeprefix("torch."))

# (N, channels in groups, H, W): images beside each other, with a place left; wider than a tile; one row; one column.
SHAPES = ((3, 4, 7, 7), (5, 9, 5, 13), (1, 4, 4, 45), (2, 12, 3, 16), (2, 4, 29, 3))


def arguments(shape: tuple[int, ...], width: int, dtype: torch.dtype, generator: torch.Generator, **variant) -> tuple:
    """(inputs in channels_last, dy) with C a multiple of eight."""
    n, groups, h, w = shape
    groups = min(groups, 2) if width in WIDE else groups
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


def give_to_our_kernels(kernels: emulator.Emulator, inputs: dict) -> None:
    """As a table of `cnnkern tune` does, also where the rule leaves a pass to cuDNN. On the emulator tensors are a
    CPU's."""
    x, weight = inputs["input"], inputs["weight"]
    pairs = [(v, v) if isinstance(v, int) else v for v in (inputs["stride"], inputs["padding"], inputs["dilation"])]
    settings = (
        *weight.shape,
        *itertools.chain.from_iterable(pairs),
        inputs["groups"],
        x.is_contiguous(memory_format=torch.channels_last),
    )
    call = tuned.describe("conv2d", x, weight, None, settings)
    kernels.gives_to_our_kernels([call._replace(training=training) for training in (True, False)])


def assert_as_good(inputs: dict, dy: torch.Tensor) -> None:
    dtype = inputs["input"].dtype
    if dtype == torch.float32:
        with emulator.Emulator() as kernels:
            give_to_our_kernels(kernels, inputs)
            torch.backends.cudnn.allow_tf32 = True
            testing.check(tf32.CASE, inputs, dy)
        return
    with emulator.Emulator() as kernels:
        rounded = [t.to(dtype) for t in of_library(inputs, dy, torch.float32)]  # at its best
        give_to_our_kernels(kernels, inputs)
        assert answers_of_all_passes(inputs) == (OURS,) * 4
        ours = passes(inputs, dy)
    exact = of_library(inputs, dy, torch.float64)
    for name, mine, theirs, truth in zip(("y", "dx", "dweight", "dbias"), ours, rounded, exact, strict=True):
        error, allowed = (mine.double() - truth).abs(), 2 * (theirs.double() - truth).abs().max()
        excess = (error - allowed - truth.abs() * ROUNDING[dtype]).max()
        assert excess <= 0, f"{name}: {error.max():.3g} off, {excess:.3g} more than allowed"


def test_every_kernel_in_tf32(generator, device):
    if device.kernels != "cuda":
        pytest.skip("tests/test_emulator.py::test_battery runs this with each tool")
    torch.backends.cudnn.allow_tf32 = True
    try:
        for width, stride in itertools.product((2, 4, 8, 16, 24), (1, 2)):
            inputs, dy = arguments((2, 3, 10, 9), width, torch.float32, generator, stride=stride)
            there = {n: v.to(device.tensors) if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
            testing.check(tf32.CASE, there, dy.to(device.tensors))
    finally:
        torch.backends.cudnn.allow_tf32 = False


@dtypes
@pytest.mark.parametrize("stride", [1, 2])
@widths
def test_every_shape_and_padding(width, stride, dtype, generator):
    for i, shape in enumerate(SHAPES):
        padding = ((0, 2), (1, 1), (2, 1), (1, 0), (0, 0))[(i + width) % 5]
        assert_as_good(*arguments(shape, width, dtype, generator, stride=stride, padding=padding))


@pytest.mark.parametrize("stride", [1, 2])
@widths
def test_products_are_in_tf32(width, stride, generator):
    """Not more exact either: who computed them would not be known."""
    inputs, dy = arguments((3, 4, 7, 7), width, torch.float32, generator, stride=stride)
    narrow = inputs | {name: tf32.rounded(inputs[name]) for name in ("input", "weight")}
    with emulator.Emulator():
        torch.backends.cudnn.allow_tf32 = True
        whose = answers_of_all_passes(inputs)
        ours, theirs = passes(inputs, dy), passes(narrow, tf32.rounded(dy))
    assert OURS in whose or width >= 32
    for who, mine, other in zip(whose[:3], ours[:3], theirs[:3], strict=True):  # but for dbias
        assert torch.equal(mine, other) == (who == OURS)


@pytest.mark.parametrize("width", WIDE)
def test_every_width_of_a_whole_group(width, generator):
    for stride in (1, 2):
        assert_as_good(*arguments((2, 3, 9, 6), width, torch.bfloat16, generator, stride=stride, padding=1))


@dtypes
@widths
def test_reruns_are_bit_equal(width, dtype, generator, monkeypatch):
    inputs, dy = arguments((7, 9, 14, 14), width, dtype, generator, stride=1)
    results = []
    with emulator.Emulator():
        torch.backends.cudnn.allow_tf32 = True
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
        (32, 2, "channels_last", (LIBRARY, OURS, LIBRARY, LIBRARY)),
        *((width, stride, "channels_last", (OURS,) * 4) for width in (40, 48, 56, 72, 112, 120) for stride in (1, 2)),
        *((64, stride, "channels_last", (LIBRARY, OURS, LIBRARY, LIBRARY)) for stride in (1, 2)),
        *((width, 1, "channels_last", (LIBRARY,) * 4) for width in (80, 96, 128, 136)),
        (48, 1, "contiguous", (LIBRARY,) * 4),
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


ALL_OURS, ALL_LIBRARY = (OURS,) * 4, (LIBRARY,) * 4


@pytest.mark.parametrize(
    ("width", "stride", "answers"),  # forward, dx, dweight, both
    [
        (2, 1, ALL_OURS),
        (8, 1, ALL_OURS),
        (16, 1, ALL_OURS),
        *((width, 2, (LIBRARY, OURS, OURS, OURS)) for width in (2, 4, 8, 16)),
        (24, 2, ALL_OURS),
        (32, 1, ALL_LIBRARY),
    ],
)
def test_float32_is_ours_where_tf32_is_allowed(width, stride, answers, generator):
    inputs, _ = arguments((2, 2, 9, 8), width, torch.float32, generator, stride=stride)
    with emulator.Emulator():
        assert answers_of_all_passes(inputs) == ALL_LIBRARY
        torch.backends.cudnn.allow_tf32 = True
        assert answers_of_all_passes(inputs) == answers
        torch.use_deterministic_algorithms(True)
        assert answers_of_all_passes(inputs) == answers


@pytest.fixture
def precision():
    """PyTorch's settings of float32 on a GPU, put back as they were."""
    cudnn = torch.backends.cudnn
    before = cudnn.enabled, torch.backends.fp32_precision, cudnn.fp32_precision
    with emulator.Emulator():
        yield
        cudnn.enabled, torch.backends.fp32_precision, cudnn.fp32_precision = before
        cudnn.allow_tf32 = False


SETTINGS = {
    "allow_tf32": lambda: setattr(torch.backends.cudnn, "allow_tf32", True),
    "of convolutions": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "tf32"),
    "of cuDNN": lambda: setattr(torch.backends.cudnn, "fp32_precision", "tf32"),
    "of everything": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


@pytest.mark.parametrize("allow", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_of_pytorch_that_allows_tf32(allow, precision, generator):
    inputs, _ = arguments((2, 2, 9, 8), 8, torch.float32, generator)
    assert answers_of_all_passes(inputs) == ALL_LIBRARY
    allow()
    assert answers_of_all_passes(inputs) == ALL_OURS
    torch.backends.cudnn.enabled = False  # nothing is cuDNN's, whose TF32 it is
    assert answers_of_all_passes(inputs) == ALL_LIBRARY


@pytest.mark.parametrize("then", [True, False])
def test_backward_follows_the_setting_of_its_own_time(then, precision, generator):
    inputs, dy = arguments((2, 2, 9, 8), 8, torch.float32, generator)
    leaves = [inputs[name].requires_grad_() for name in ("input", "weight")]
    results = []
    for now in (then, not then):
        torch.backends.cudnn.allow_tf32 = now
        y = cnnkern.functional.conv2d(**inputs)
        torch.backends.cudnn.allow_tf32 = then
        results.append(torch.autograd.grad(y, leaves, dy))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    torch.backends.cudnn.allow_tf32 = not then
    others = torch.autograd.grad(cnnkern.functional.conv2d(**inputs), leaves, dy)
    assert not any(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize(
    ("width", "stride", "layout"),
    [
        (16, 2, "channels_last"),
        (32, 1, "channels_last"),
        (64, 1, "channels_last"),
        (128, 2, "channels_last"),
        (8, 1, "contiguous"),
    ],
)
def test_a_table_gives_our_kernels_what_the_rule_leaves_to_cudnn(width, stride, layout, generator):
    """What `cnnkern tune` found on a machine."""
    inputs = CASE.inputs(
        (2, 2 * width, 9, 8), torch.bfloat16, generator=generator, width=width, stride=stride, padding=1
    )
    inputs["input"] = testing.with_layout(inputs["input"], layout)
    with emulator.Emulator() as kernels:
        assert answers_of_all_passes(inputs) != (OURS,) * 4
        give_to_our_kernels(kernels, inputs)
        assert answers_of_all_passes(inputs) == (OURS,) * 4
