"""What is peculiar to grouped convolution: the arguments of F.conv2d, its errors, the module, long sums."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnkern
from cnnkern import functional, testing
from cnnkern.nn import GroupedConv2d, LazyGroupedConv2d
from cnnkern.testing import CASES

CASE = CASES["grouped_conv2d"]


def arguments(shape, generator, dtype=torch.float32, layout="contiguous", **variant):
    inputs = CASE.inputs(shape, dtype, generator=generator, **variant)
    inputs["input"] = testing.with_layout(inputs["input"], layout)
    return inputs, testing.randn(CASE.reference(**inputs).shape, generator, dtype)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("width", [1, 2, 4, 8, 12, 16, 24, 32, 48])
def test_every_width_kernel_and_stride(width, layout, generator):
    for kernel, stride in itertools.product((1, 2, 3, 5, 7) if width == 1 else (1, 2, 3, 5), (1, 2)):
        channels = 3 * width if width > 4 else 21 * width
        variant = {"width": width, "kernel": kernel, "stride": stride, "padding": kernel // 2}
        testing.check(CASE, *arguments((2, channels, 9, 18), generator, layout=layout, **variant))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large_and_uneven_kernels_and_paddings(layout, generator):
    for kernel, padding, stride in (
        (7, 0, 2),
        (9, 4, 1),
        (11, 5, 2),
        (31, 15, 1),
        ((1, 7), (0, 3), 1),
        ((7, 1), (9, 2), 2),
        ((3, 2), (5, 0), 1),
    ):
        variant = {"kernel": kernel, "padding": padding, "stride": stride}
        testing.check(CASE, *arguments((2, 19, 33, 35), generator, layout=layout, **variant))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_results_that_go_past_the_caches(dtype, layout, generator):
    """Streaming stores write whole cache lines, and planes of 23x25 or 161x163 end within them."""
    wide = 1 if dtype == torch.float32 else 2
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
    ((2, 64, 7, 8), {}, "channels_last", ALL_OURS),
    ((2, 64, 14, 14), {"stride": 2}, "channels_last", (OURS, OURS, LIBRARY, OURS)),
    ((2, 64, 7, 7), {"kernel": 5, "padding": 2}, "channels_last", ALL_OURS),
    ((2, 64, 7, 7), {"width": 8}, "channels_last", ALL_OURS),
    ((1, 64, 16, 16), {"width": 8}, "channels_last", ALL_OURS),
    ((1, 64, 16, 16), {"width": 8, "stride": 2}, "channels_last", (OURS, LIBRARY, OURS, OURS)),
    ((2, 64, 16, 16), {"width": 8, "stride": 2}, "channels_last", ALL_OURS),
    ((2, 64, 7, 7), {"width": 16}, "channels_last", ALL_LIBRARY),
    ((2, 64, 7, 8), {"width": 16}, "channels_last", ALL_OURS),
    ((2, 64, 14, 14), {"width": 16, "stride": 2}, "channels_last", (LIBRARY, OURS, LIBRARY, OURS)),
    ((1, 64, 14, 14), {"width": 16}, "channels_last", (OURS, LIBRARY, OURS, OURS)),
    ((1, 64, 7, 7), {"width": 16}, "contiguous", ALL_OURS),
    ((2, 64, 7, 7), {"width": 32}, "channels_last", ALL_OURS),
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


@pytest.mark.parametrize(("shape", "settings", "layout", "answers"), RULE, ids=str)
def test_the_rule_of_dispatch(shape, settings, layout, answers, generator):
    inputs = CASE.inputs(shape, generator=generator, **settings, bias=False)
    inputs["input"] = testing.with_layout(inputs["input"], layout)
    forward, arguments = CASE.forward_call(inputs)
    backward, given = CASE.backward_call(inputs, testing.with_layout(forward(*arguments), layout))
    masks = ((True, False), (False, True), (True, True))
    gradients = [who_answers(backward, *given[:-1], [*mask, False]) for mask in masks]
    assert (who_answers(forward, *arguments), *gradients) == answers
    wide = {n: v.bfloat16() if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
    forward, arguments = CASE.forward_call(wide)
    assert who_answers(forward, *arguments) == OURS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 17, 1, 1), (3, 200, 2, 3), (1, 400, 9, 33), (2, 32, 40, 2)], ids=str)
def test_depthwise_in_place(shape, dtype, generator):
    """Channels that are no multiple of a vector or a piece, rows shorter than a kernel, runs of every length."""
    for stride, padding in itertools.product((1, 2), ((1, 1), (1, 4), (3, 2))):
        inputs, dy = arguments(shape, generator, dtype, stride=stride, padding=padding)
        for name in ("input", "weight"):
            inputs[name] = testing.with_layout(inputs[name], "channels_last")
        testing.check(CASE, inputs, testing.with_layout(dy, "channels_last"))


def test_dense_convolution_is_pytorch_s(generator):
    x, weight = (
        testing.randn((2, 6, 9, 8), generator, torch.float32),
        testing.randn((5, 6, 3, 3), generator, torch.float32),
    )
    inputs = {"input": x, "weight": weight, "bias": testing.randn((5,), generator, torch.float32), "padding": 1}
    testing.check(CASE, inputs, testing.randn((2, 5, 9, 8), generator, torch.float32))


def test_any_subset_of_gradients(generator):
    for width in (1, 4, 16):
        inputs, dy = arguments((2, 16, 12, 11), generator, width=width)
        operator, call = CASE.backward_call(inputs, dy)
        whole = operator(*call)
        for mask in itertools.product((True, False), repeat=3):
            got = operator(*call[:-1], list(mask))
            for wanted, some, full in zip(mask, got, whole, strict=True):
                assert torch.equal(some, full) if wanted else some.numel() == 0


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's own
def test_arguments_of_every_form(generator):
    x, w = testing.randn((2, 6, 9, 8), generator, torch.float32), testing.randn((6, 1, 3, 3), generator, torch.float32)
    for keywords in (
        {"stride": (2,), "padding": [1, 0]},
        {"stride": (1, 2), "padding": (1, 1)},
        {"padding": "same"},
        {"padding": "valid", "stride": 2},
        {"padding": "same", "dilation": 2},
        {"dilation": (1, 2)},
    ):
        torch.testing.assert_close(functional.conv2d(x, w, groups=6, **keywords), F.conv2d(x, w, groups=6, **keywords))
    even = testing.randn((6, 1, 4, 2), generator, torch.float32)
    torch.testing.assert_close(
        functional.conv2d(x, even, padding="same", groups=6), F.conv2d(x, even, padding="same", groups=6)
    )
    torch.testing.assert_close(functional.conv2d(x[0], w, groups=6), F.conv2d(x[0], w, groups=6))


@pytest.mark.parametrize(
    ("shape", "weight", "keywords"),
    [
        ((2, 6, 5, 5), (6, 1, 3, 3), {"groups": 4}),
        ((2, 6, 5, 5), (6, 1, 3, 3), {"groups": 3}),
        ((2, 5, 5, 5), (6, 1, 3, 3), {"groups": 6}),
        ((2, 6, 5, 5), (6, 1, 7, 7), {"groups": 6}),
        ((2, 6, 5, 5), (6, 1, 3), {"groups": 6}),
        ((6, 5), (6, 1, 3, 3), {"groups": 6}),
        ((2, 6, 5, 5), (6, 1, 3, 3), {"groups": 6, "stride": 0}),
        ((2, 6, 5, 5), (6, 1, 3, 3), {"groups": 6, "padding": -1}),
        ((2, 6, 5, 5), (6, 1, 3, 3), {"groups": 6, "stride": (1, 1, 1)}),
        ((2, 6, 5, 5), (6, 1, 3, 3), {"groups": 6, "padding": "same", "stride": 2}),
        ((2, 6, 5, 5), (6, 1, 3, 3), {"groups": 6, "padding": "some"}),
        ((2, 6, 5, 5), (6, 1, 3, 3), {"groups": 0}),
    ],
)
def test_the_same_errors_as_torch(shape, weight, keywords):
    x, w = torch.randn(shape), torch.randn(weight)
    with pytest.raises((RuntimeError, ValueError)) as theirs:
        F.conv2d(x, w, **keywords)
    with pytest.raises(theirs.type):
        functional.conv2d(x, w, **keywords)


def test_a_bias_or_a_dtype_that_does_not_fit():
    x, w = torch.randn(2, 6, 5, 5), torch.randn(6, 1, 3, 3)
    for arguments in ((x, w, torch.randn(5)), (x, w.double()), (x.double(), w), (x, w, torch.randn(6).double())):
        with pytest.raises(RuntimeError):
            F.conv2d(*arguments, groups=6)
        with pytest.raises(RuntimeError):
            functional.conv2d(*arguments, groups=6)
    with pytest.raises(RuntimeError, match="dy must be"):
        torch.ops.cnnkern.grouped_conv2d_backward(x[:1], x, w, [1, 1], [1, 1], [1, 1], 6, [True] * 3)


def test_weight_gradients_over_a_million_terms(generator):
    for layout, width in (("channels_last", 1), ("contiguous", 4)):
        inputs, dy = arguments((16, 2 * width, 256, 256), generator, layout=layout, width=width)
        testing.check(CASE, inputs | {"input": inputs["input"] + 1}, dy + 0.5)


def test_nan_stays_in_its_image_and_group(generator):
    for width in (1, 4, 8):
        inputs, _ = arguments((2, 32, 6, 6), generator, width=width)
        x = inputs["input"]
        x[1, 9, 3, 3] = float("nan")
        bad = CASE.function(**inputs).isnan()
        assert torch.equal(bad, CASE.reference(**inputs).isnan())


def test_autocast_runs_in_the_lower_precision(generator):
    inputs, _ = arguments((2, 8, 6, 6), generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = functional.conv2d(**inputs), F.conv2d(**inputs)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


SETTINGS = [
    {"kernel_size": 3, "padding": 1, "groups": 8},
    {"kernel_size": 3, "padding": 1, "groups": 2, "stride": 2, "bias": False},
    {"kernel_size": (3, 5), "padding": "same", "groups": 8},
    {"kernel_size": 3, "padding": 1, "groups": 8, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": (2, 1), "groups": 4, "padding_mode": "circular"},
    {"kernel_size": 1},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_module_beside_its_twin(settings):
    torch.manual_seed(0)
    theirs, ours = nn.Conv2d(8, 8, **settings), GroupedConv2d(8, 8, **settings)
    assert isinstance(ours, nn.Conv2d)
    assert repr(ours) == repr(theirs).replace("Conv2d", "GroupedConv2d")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 8, 9, 10)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(ours))(x), theirs(x))
    torch.testing.assert_close(copy.deepcopy(ours).double()(x.double()), theirs.double()(x.double()))
    assert GroupedConv2d(8, 8, device="meta", **settings)(x.to("meta")).shape == theirs(x.double()).shape


def test_lazy_module_learns_its_channels():
    lazy = LazyGroupedConv2d(8, 3, groups=4, padding=1)
    lazy(torch.randn(2, 8, 5, 5))
    assert type(lazy) is GroupedConv2d
    assert lazy.weight.shape == (8, 2, 3, 3)


def test_converter_exchanges_grouped_convolutions_alone():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU())
    converted = cnnkern.convert(model, verify=torch.randn(2, 3, 6, 6))
    assert [type(m) for m in converted][:2] == [nn.Conv2d, GroupedConv2d]
    assert cnnkern.conversion_report(converted).counts == {"BatchNorm + ReLU": 1, "GroupedConv2d": 1}
    assert type(cnnkern.revert(converted)[1]) is nn.Conv2d


def test_only_the_input_and_the_weight_are_saved(generator):
    inputs, _ = arguments((2, 16, 8, 8), generator)
    for name in CASE.differentiable:
        inputs[name].requires_grad_()
    saved = testing.saved_bytes(lambda: CASE.function(**inputs))
    assert saved == inputs["input"].nbytes + inputs["weight"].nbytes
