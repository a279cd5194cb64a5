"""Grouped convolution: the numbers of its kernels, which convolutions they compute, and that reruns are bit-equal.

Arguments, errors and the module are in test_grouped_conv2d_module.py.
"""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from cnnkern import testing
from cnnkern.testing import CASES
from tests.slow import proved

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def in_float32(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """F.conv2d, of 16-bit tensors computed in float32 and rounded once.

    It is the judge of 16-bit kernels here: oneDNN's own 16-bit gradients of small grouped weights depend on what its
    memory held before (torch 2.14.1), and twice a large error would allow anything.
    """
    dtype = torch.promote_types(input.dtype, FLOAT)
    bias = None if bias is None else bias.to(dtype)
    return F.conv2d(input.to(dtype), weight.to(dtype), bias, stride, padding, dilation, groups).to(input.dtype)


CASE = dataclasses.replace(CASES["grouped_conv2d"], reference=in_float32)


def arguments(shape, generator, dtype=FLOAT, layout="contiguous", **variant):
    """(inputs, dy) of a convolution, input and dy in `layout`."""
    inputs = CASE.inputs(shape, dtype, generator=generator, **variant)
    inputs["input"] = testing.with_layout(inputs["input"], layout)
    dy = testing.randn(CASE.reference(**inputs).shape, generator, dtype)
    return inputs, testing.with_layout(dy, layout)


KERNELS = {FLOAT: (1, 2, 3, 5, 7), BFLOAT: (3, 5, 7), HALF: (3,)}


@layouts
@pytest.mark.parametrize("width", [1, 2, 4, 8, 12, 16, 24, 32, 48])
@pytest.mark.parametrize("dtype", KERNELS, ids=str)
def test_every_width_kernel_and_stride(dtype, width, layout, generator):
    for kernel, stride in itertools.product(KERNELS[dtype], (1, 2)):
        channels = 3 * width if width > 4 else 21 * width
        variant = {"width": width, "kernel": kernel, "stride": stride, "padding": kernel // 2}
        testing.check(CASE, *arguments((2, channels, 9, 18), generator, dtype, layout, **variant))


LARGE = [
    (1, 7, 0, 2),
    (1, 9, 4, 1),
    (1, 11, 5, 2),
    (1, 31, 15, 1),
    (1, (1, 7), (0, 3), 1),
    (1, (7, 1), (9, 2), 2),
    (1, (3, 2), (5, 0), 1),
    *((width, (9, 7), (4, 0), 1) for width in (4, 8, 16)),
    *((width, 11, 5, 2) for width in (4, 8, 16)),
    *((width, 31, 15, 1) for width in (4, 8)),
]


@layouts
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
def test_large_and_uneven_kernels_and_paddings(dtype, layout, generator):
    for width, kernel, padding, stride in LARGE:
        if dtype == BFLOAT and stride == 1 and kernel != 31:
            continue
        shape = (2, 19, 33, 35) if width == 1 else (1, 2 * width, 17, 19)
        variant = {"width": width, "kernel": kernel, "padding": padding, "stride": stride}
        testing.check(CASE, *arguments(shape, generator, dtype, layout, **variant))


@layouts
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
def test_results_that_go_past_the_caches(dtype, layout, generator):
    """Streaming stores write whole cache lines, and planes of 23x25 or 161x163 end within them."""
    wide = 1 if dtype == FLOAT else 2
    for shape, width in (((17 * wide, 72, 23, 25), 1), ((17 * wide, 72, 23, 25), 8), ((2 * wide, 20, 161, 163), 4)):
        testing.check(CASE, *arguments(shape, generator, dtype, layout, width=width))


def test_input_weight_and_gradient_each_in_any_layout(generator):
    for layouts in itertools.product(("contiguous", "channels_last", "sliced"), repeat=3):
        for width in (1, 4, 8):
            inputs, dy = arguments((2, 24, 8, 9), generator, width=width)
            inputs["input"] = testing.with_layout(inputs["input"], layouts[0])
            inputs["weight"] = testing.with_layout(inputs["weight"], layouts[1])
            testing.check(CASE, inputs, testing.with_layout(dy, layouts[2]))
            ours, eager = CASE.function(**inputs), CASE.reference(**inputs)
            assert ours.stride() == eager.stride()


# (shape, how it differs from depthwise 3x3, layout) -> who answers: forward, dx, dweight, dx with dweight
OURS, LIBRARY = "ours", "library"
ALL_OURS, ALL_LIBRARY = (OURS,) * 4, (LIBRARY,) * 4
RULE = [
    ((2, 64, 7, 7), {}, "channels_last", (OURS, OURS, LIBRARY, OURS)),
    ((2, 64, 7, 7), {}, "contiguous", ALL_OURS),
    ((2, 64, 28, 28), {}, "channels_last", (OURS, OURS, LIBRARY, OURS)),
    ((2, 64, 28, 29), {}, "channels_last", ALL_OURS),
    ((2, 64, 14, 14), {"stride": 2}, "channels_last", (OURS, OURS, LIBRARY, OURS)),
    ((2, 64, 7, 7), {"kernel": 5, "padding": 2}, "channels_last", ALL_OURS),
    ((2, 64, 14, 14), {"kernel": 5, "padding": 2, "stride": 2}, "channels_last", (LIBRARY, OURS, OURS, OURS)),
    ((2, 64, 16, 16), {"kernel": 5, "padding": 2, "stride": 2}, "channels_last", ALL_OURS),
    ((2, 64, 7, 7), {"width": 8}, "channels_last", ALL_OURS),
    ((1, 64, 16, 16), {"width": 8}, "channels_last", ALL_OURS),
    ((1, 64, 16, 16), {"width": 8, "stride": 2}, "channels_last", (OURS, LIBRARY, OURS, OURS)),
    ((2, 64, 16, 16), {"width": 8, "stride": 2}, "channels_last", ALL_OURS),
    ((2, 64, 7, 7), {"width": 16}, "channels_last", ALL_LIBRARY),
    ((2, 64, 28, 28), {"width": 16}, "channels_last", (OURS, OURS, LIBRARY, OURS)),
    ((2, 64, 28, 29), {"width": 16}, "channels_last", ALL_OURS),
    ((2, 64, 14, 14), {"width": 16, "stride": 2}, "channels_last", (LIBRARY, LIBRARY, LIBRARY, OURS)),
    ((2, 64, 16, 16), {"width": 16, "stride": 2}, "channels_last", (OURS, LIBRARY, OURS, OURS)),
    ((1, 64, 14, 14), {"width": 16}, "channels_last", (OURS, LIBRARY, LIBRARY, OURS)),
    ((1, 64, 7, 7), {"width": 16}, "contiguous", ALL_OURS),
    ((2, 80, 14, 14), {"width": 20}, "channels_last", ALL_LIBRARY),
    ((2, 80, 28, 28), {"width": 20, "stride": 2}, "channels_last", (LIBRARY, OURS, OURS, OURS)),
    ((2, 80, 14, 14), {"width": 20}, "contiguous", ALL_OURS),
    ((2, 64, 7, 7), {"width": 32}, "channels_last", (OURS, OURS, LIBRARY, OURS)),
    ((1, 64, 7, 7), {"width": 32}, "channels_last", ALL_LIBRARY),
    ((1, 64, 14, 14), {"width": 32}, "channels_last", ALL_OURS),
    ((1, 64, 7, 7), {"width": 32}, "contiguous", (OURS, LIBRARY, LIBRARY, LIBRARY)),
    ((1, 64, 14, 14), {"width": 32, "stride": 2}, "contiguous", (OURS, OURS, LIBRARY, OURS)),
]


def who_answers(operator, *arguments) -> str:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        operator(*arguments)
    called = {event.key for event in profile.key_averages()}
    return LIBRARY if called & {"aten::convolution", "aten::convolution_backward"} else OURS


def answers_of_all_passes(inputs) -> tuple[str, ...]:
    """Who answers: forward, dx, dweight, dx with dweight."""
    forward, arguments = CASE.forward_call(inputs)
    backward, given = CASE.backward_call(inputs, forward(*arguments))
    masks = ((True, False), (False, True), (True, True))
    gradients = (who_answers(backward, *given[:-1], [*mask, False]) for mask in masks)
    return who_answers(forward, *arguments), *gradients


@pytest.mark.parametrize(("shape", "settings", "layout", "answers"), RULE, ids=str)
def test_the_rule_of_dispatch(shape, settings, layout, answers, generator):
    inputs, _ = arguments(shape, generator, layout=layout, bias=False, **settings)
    assert answers_of_all_passes(inputs) == answers
    for dtype in (BFLOAT, HALF):
        narrow = {n: v.to(dtype) if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
        assert answers_of_all_passes(narrow) == ALL_OURS


# (shape, how it differs from depthwise 3x3) of what our kernels are made for at any speed, up to its bounds ...
COVERED = [
    ((2, 128, 15, 16), {"width": 64}),
    ((2, 8, 40, 41), {"kernel": 31, "padding": 15}),
    ((2, 8, 40, 41), {"kernel": (31, 1), "padding": (0, 4), "stride": 2}),
]
# ... and of what lies beyond them.
BEYOND = [
    ((2, 6, 15, 16), {"width": 3}),
    ((2, 12, 15, 16), {"width": 6}),
    ((2, 136, 15, 16), {"width": 68}),
    ((2, 8, 15, 16), {"stride": 3}),
    ((2, 8, 15, 16), {"stride": (1, 2)}),
    ((2, 8, 15, 16), {"dilation": 2}),
    ((2, 8, 15, 16), {"dilation": (2, 1)}),
    ((2, 8, 40, 41), {"kernel": (32, 3)}),
    ((2, 8, 40, 41), {"kernel": (3, 32)}),
    ((2, 8, 15, 16), {"multiplier": 2}),
    ((0, 8, 15, 16), {}),
    ((2, 8, 15, 16), {"dtype": torch.float64}),
    ((1, 32, 40, 41), {"width": 16, "kernel": 31, "padding": 15}),
]


@layouts
@pytest.mark.parametrize(("shape", "variant"), COVERED + BEYOND, ids=str)
def test_the_bounds_of_our_kernels(shape, variant, layout, generator):
    inputs, _ = arguments(shape, generator, layout=layout, bias=False, **variant)
    assert answers_of_all_passes(inputs) == (ALL_OURS if (shape, variant) in COVERED else ALL_LIBRARY)


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT, HALF], ids=str)
@pytest.mark.parametrize("shape", [(2, 17, 1, 1), (3, 200, 2, 3), (1, 400, 9, 33), (2, 32, 40, 2)], ids=str)
def test_depthwise_in_place(shape, dtype, generator):
    """Channels that are no multiple of a vector or a piece, rows shorter than a kernel, runs of every length."""
    paddings = ((1, 1), (1, 4), (3, 2)) if dtype != HALF else ((1, 1),)
    for stride, padding in itertools.product((1, 2), paddings):
        inputs, dy = arguments(shape, generator, dtype, "channels_last", stride=stride, padding=padding)
        inputs["weight"] = testing.with_layout(inputs["weight"], "channels_last")
        testing.check(CASE, inputs, dy)


def test_dense_convolution_is_pytorch_s(generator):
    weight, bias = testing.randn((5, 6, 3, 3), generator, FLOAT), testing.randn((5,), generator, FLOAT)
    x, dy = testing.randn((2, 6, 9, 8), generator, FLOAT), testing.randn((2, 5, 9, 8), generator, FLOAT)
    inputs = {"input": x, "weight": weight, "bias": bias, "stride": 1, "padding": 1, "dilation": 1, "groups": 1}
    testing.check(CASE, inputs, dy)
    assert answers_of_all_passes(inputs) == ALL_LIBRARY


@layouts
@pytest.mark.parametrize("variant", [{}, {"stride": 2}, {"width": 4}, {"width": 16}], ids=str)
def test_any_subset_of_gradients(variant, layout, generator):
    inputs, dy = arguments((2, 16, 12, 11), generator, layout=layout, **variant)
    operator, call = CASE.backward_call(inputs, dy)
    for mask in itertools.product((True, False), repeat=3):
        wanted = tuple(name for name, w in zip(CASE.differentiable, mask, strict=True) if w)
        if wanted:
            testing.check(dataclasses.replace(CASE, differentiable=wanted), inputs, dy)
        for name, gradient in zip(CASE.differentiable, operator(*call[:-1], list(mask)), strict=True):
            assert gradient.shape == (inputs[name].shape if name in wanted else (0,))


@layouts
@pytest.mark.parametrize("width", [1, 4, 8, 16])
def test_second_derivatives(width, layout, generator):
    """float32, where our kernels compute the first ones: the battery's finite differences are float64."""
    inputs, dy = arguments((2, 16, 9, 10), generator, layout=layout, width=width)
    along = {n: testing.randn(inputs[n].shape, generator, FLOAT) for n in CASE.differentiable}

    def derivatives(function, names, dtype):
        cast = {n: v.to(dtype) if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
        leaves = {n: cast[n].detach().requires_grad_() for n in names} | {"dy": dy.to(dtype).requires_grad_()}
        y = function(**{**cast, **{n: leaves[n] for n in names}})
        first = torch.autograd.grad(y, [leaves[n] for n in names], leaves["dy"], create_graph=True)
        loss = sum((g * g * along[n].to(dtype)).sum() for n, g in zip(names, first, strict=True))
        second = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        return {f"second of {n}": g for n, g in zip(leaves, second, strict=True)}

    for names in (("input", "weight", "bias"), ("input", "weight"), ("input",), ("weight",)):
        ours, eager = derivatives(CASE.function, names, FLOAT), derivatives(CASE.reference, names, FLOAT)
        testing.assert_as_good_as(ours, eager, derivatives(CASE.reference, names, torch.float64))


@pytest.mark.parametrize("width", proved([1, 4, 8, 16], [1, 4]))  # the others take up to 4 GB
def test_weight_gradients_over_a_million_terms(width, generator):
    shape = (16, 2 * width, 256, 256)
    inputs = CASE.inputs(shape, generator=generator, width=width)
    x, dy = torch.randn(shape, generator=generator) + 1, torch.randn(shape, generator=generator) + 0.5

    def of_pytorch(dy, x, weight, stride, padding, dilation, groups, mask):
        settings = ([weight.shape[0]], stride, padding, dilation, False, [0, 0], groups, mask)
        return torch.ops.aten.convolution_backward(dy, x, weight, *settings)

    def named(gradients, dtype=None):
        return {"dweight": gradients[1].to(dtype), "dbias": gradients[2].to(dtype)}

    weights_alone, all_three = [False, True, True], [True, True, True]
    for dtype in (FLOAT, BFLOAT):
        tensors = (dy.to(dtype), x.to(dtype), inputs["weight"].to(dtype))
        settings = CASE.backward_call(inputs, dy)[1][3:-1]
        truth = named(of_pytorch(*(t.double() for t in tensors), *settings, weights_alone))
        for layout in ("contiguous", "channels_last"):
            laid = [*(testing.with_layout(t, layout) for t in tensors[:2]), tensors[2]]
            eager = named(of_pytorch(*(t.float() for t in laid), *settings, weights_alone), dtype)
            for mask in (weights_alone, all_three):
                ours = torch.ops.cnnkern.grouped_conv2d_backward(*laid, *settings, mask)
                testing.assert_as_good_as(named(ours), eager, truth)


@layouts
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
def test_reruns_are_bit_equal(dtype, layout, generator):
    """Whatever the number of threads; the battery's shapes are float32 alone."""
    threads = torch.get_num_threads()
    try:
        for width, shape in itertools.product((1, 4, 8, 16), ((4, 32, 37, 41), (1, 64, 60, 7))):
            inputs, dy = arguments(shape, generator, dtype, layout, width=width)
            runs = []
            for n in (1, 1, 2, 3):
                torch.set_num_threads(n)
                runs.append(testing.run(CASE.function, CASE, inputs, dy))
            for other, (name, value) in itertools.product(runs[1:], runs[0].items()):
                assert torch.equal(value, other[name]), f"{shape} width {width}: {name} differs"
    finally:
        torch.set_num_threads(threads)


UNUSUAL = [
    {"stride": (1, 2)},
    {"stride": (2, 1), "padding": (0, 3)},
    {"dilation": (1, 2)},
    {"dilation": 2, "padding": "same"},
    {"kernel": 5, "padding": "same"},
    {"padding": "valid", "stride": 2},
]


@layouts
@pytest.mark.parametrize("variant", UNUSUAL, ids=str)
def test_unequal_strides_and_dilations_and_images_without_a_batch(variant, layout, generator):
    for width in (1, 4):
        numbers = {n: v for n, v in variant.items() if not isinstance(v, str)}
        inputs, _ = arguments((2, 8, 9, 10), generator, layout=layout, width=width, **numbers)
        inputs["padding"] = variant.get("padding", 1)
        dy = testing.randn(CASE.reference(**inputs).shape, generator, FLOAT)
        testing.check(CASE, inputs, testing.with_layout(dy, layout))
        testing.check(CASE, inputs | {"input": inputs["input"][0]}, dy[0])


def test_nan_stays_in_its_image_and_group(generator):
    for width in (1, 4, 8):
        inputs, _ = arguments((2, 32, 6, 6), generator, width=width)
        x = inputs["input"]
        x[1, 9, 3, 3] = float("nan")
        bad = CASE.function(**inputs).isnan()
        assert torch.equal(bad, CASE.reference(**inputs).isnan())


def test_only_the_input_and_the_weight_are_saved(generator):
    inputs, _ = arguments((2, 16, 8, 8), generator)
    for name in CASE.differentiable:
        inputs[name].requires_grad_()
    saved = testing.saved_bytes(lambda: CASE.function(**inputs))
    assert saved == inputs["input"].nbytes + inputs["weight"].nbytes
