"""Batch norm of numerically difficult inputs: offsets, constants, extremes, NaN. Compared with float64 and eager."""

import itertools
import os

import emulator
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from cnnkern import functional, reference, testing
from cnnkern.testing import CASES

CASE = CASES["bn_act"]
KINDS = ("plain", "constant", 1e30, 1e-41, float("nan"), float("inf"))  # of one channel
LAYOUTS = ("contiguous", "channels_last")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def arguments(x, training=True, act="relu", eps=1e-5, generator=None):
    channels = x.shape[1]
    g = generator or torch.Generator().manual_seed(7)
    return {
        "input": x,
        "running_mean": torch.zeros(channels, dtype=x.dtype),
        "running_var": torch.ones(channels, dtype=x.dtype),
        "weight": testing.randn((channels,), g, x.dtype),
        "bias": testing.randn((channels,), g, x.dtype),
        "training": training,
        "momentum": 0.1,
        "eps": eps,
        "act": act,
    }


def added(case, arguments, generator):
    """The arguments, with a residual where the operator adds one."""
    x = arguments["input"]
    residual = torch.empty_like(x).copy_(testing.randn(x.shape, generator, x.dtype))
    return arguments | ({"residual": residual} if case.name == "bn_add_act" else {})


def with_a_channel(x, kind):
    """The first channel constant, scaled to 1e30 or to denormals, or with one NaN or infinity."""
    if kind == "constant":
        x[:, 0] = x[:1, :1, :1, :1].reshape(())
    elif kind in (1e30, 1e-41):
        x[:, 0] *= kind / x[:, 0].abs().max()
    elif kind != "plain":
        x[0, 0, 0, 0] = kind
    return x


def float64_can_tell(x, kind):
    """A constant channel at 1e30 has a deviation of 1e14 in float64, by rounding: the reference is no truth there.
    test_constant_channels holds it to the truth itself, the bias."""
    return kind != 1e30 or bool((x[:, 0] != x[0, 0, 0, 0]).any())


@pytest.fixture(params=["cpu", pytest.param("emulator", marks=pytest.mark.slow)])
def on(request):
    """Whose kernels answer: the CPU's, or the emulated CUDA kernels."""
    if request.param == "cpu":
        yield
    else:
        with emulator.Emulator("float32"):
            yield


both_norms = pytest.mark.parametrize("case", [CASES["bn_act"], CASES["bn_add_act"]], ids=lambda case: case.name)


# In CI the draws are the same every time: whether a change lands must not hang on one.
@settings(max_examples=150, deadline=None, derandomize="CI" in os.environ, suppress_health_check=list(HealthCheck))
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 20), st.integers(1, 20)),
    log_scale=st.floats(-6, 6),
    offset=st.floats(-1e6, 1e6),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    act=st.sampled_from(["relu", "none"]),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**31),
)
def test_any_scale_and_offset(shape, log_scale, offset, kind, dtype, act, layout, seed):
    assume(shape[0] * shape[2] * shape[3] >= 3)
    g = torch.Generator().manual_seed(seed)
    x = (testing.randn(shape, g, torch.float64) + offset) * 10**log_scale
    x = testing.with_layout(with_a_channel(x, kind).to(dtype), layout)
    assume(float64_can_tell(x, kind))
    # With the ReLU a pre-activation within rounding of zero may fall on either side, in eager as here. Below an offset
    # of 100 the mean itself is a sum that cancels.
    dy = testing.randn(shape, g, dtype) if act == "none" else None
    testing.check(CASE, arguments(x, act=act), dy, slack=abs(offset) < 100)


@both_norms
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6])
@pytest.mark.usefixtures("on")
def test_mean_far_above_the_deviation(case, ratio, layout, generator):
    for shape in ((8, 5, 31, 33), (32, 40, 7, 7)):
        x = (testing.randn(shape, generator, torch.float64) + ratio).float()
        x = testing.with_layout(x, layout)
        dy = testing.randn(shape, generator, torch.float32)
        testing.check(case, added(case, arguments(x, act="none"), generator), dy, slack=False)


@both_norms
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("on")
def test_digits_that_eager_loses(case, layout, generator):
    """The mean is between two numbers of float32 that are a tenth of the deviation apart: judged by float64 alone."""
    x = (testing.randn((4, 5, 9, 11), generator, torch.float64) * 1e-2 + 1e4).float()
    a = added(case, arguments(testing.with_layout(x, layout), act="none"), generator)
    ours, ref = testing.run(case.function, case, a), testing.run(case.reference, case, testing.to_float64(a))
    error = (ours["output"].double() - ref["output"]).abs().max()
    assert error <= 1e-5 * ref["output"].abs().max(), f"{error:.1e}"


@both_norms
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("outlier", [1e3, 1e6, 1e12, 1e30])
@pytest.mark.usefixtures("on")
def test_one_outlier_where_the_shift_is_sampled(case, outlier, layout, generator):
    x = testing.randn((4, 3, 64, 64), generator, torch.float32)
    x[0, :, 0, 0] = outlier
    x = testing.with_layout(x, layout)
    dy = testing.randn(x.shape, generator, torch.float32)
    testing.check(case, added(case, arguments(x, act="none"), generator), dy, slack=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e-3, 1e4, 16777217.0, -1e30])
def test_constant_channels(value, layout):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = testing.with_layout(torch.full((3, 4, 9, 11), value, dtype=dtype), layout)
        a = arguments(x, act="none")
        y = functional.batch_norm_act(**a)
        torch.testing.assert_close(y, a["bias"].view(1, -1, 1, 1).expand_as(y), rtol=0, atol=1e-6)


@both_norms
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [1e30, 1e18, 1e-18, 1e-30, 1e-42])
@pytest.mark.usefixtures("on")
def test_extreme_scales(case, scale, layout, generator):
    x = testing.with_layout((testing.randn((4, 5, 9, 11), generator, torch.float64) * scale).float(), layout)
    for eps in (1e-5, 1e-30):
        a = added(case, arguments(x, act="none", eps=eps), generator)
        ours, eager = (testing.run(f, case, a) for f in (case.function, case.reference))
        ref = testing.run(case.reference, case, testing.to_float64(a))
        testing.assert_as_good_as(ours, eager, ref)


@both_norms
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_stay_in_their_channel(case, bad, training, generator):
    for dtype, layout, shape in itertools.product(DTYPES, LAYOUTS, ((3, 5, 6, 7), (2, 40, 7, 7))):
        x = testing.with_layout(testing.randn(shape, generator, dtype), layout)
        clean = added(case, arguments(x.clone(), training), generator)
        x[1, 2, 3, 4] = bad
        a, dy = clean | arguments(x, training), testing.randn(shape, generator, dtype)
        ours, eager = (testing.run(f, case, a, dy) for f in (case.function, case.reference))
        others = [c for c in range(shape[1]) if c != 2]
        without = testing.run(case.function, case, clean, dy)
        for name, value in ours.items():
            assert torch.equal(value.isnan(), eager[name].isnan()), f"{name} {dtype} {layout}"
            per_channel = value.movedim(1, 0) if value.dim() > 1 else value
            expected = without[name].movedim(1, 0) if value.dim() > 1 else without[name]
            assert torch.equal(per_channel[others], expected[others]), name


def test_relu_passes_nan_and_its_gradient():
    x = torch.tensor([[1.0], [float("nan")], [3.0]], requires_grad=True)
    y = functional.batch_norm_relu(x, torch.zeros(1), torch.ones(1))
    assert y.isnan().tolist() == [[False], [True], [False]]


@pytest.mark.parametrize("act", reference.ACTIVATIONS)
def test_activations_and_their_gradients_everywhere(act):
    """Kinks, overflow, underflow, infinities and NaN, several times so that vectors and their tails meet them."""
    hard = [float("inf"), -float("inf"), float("nan"), 200.0, -200.0, 88.5, -88.5, -103.0, -110.0, 0.0, -0.0, 1e-40]
    values = torch.tensor([*hard, 3.0, -3.0, 6.0, *(i / 10 for i in range(-100, 100))] * 7)
    for dtype in (torch.float32, torch.float64):
        results = []
        # In float64, for eager's gelu of infinity is NaN in float32.
        for function, kind in ((functional.batch_norm_act, dtype), (reference.batch_norm_act, torch.float64)):
            x = values.to(kind).view(1, 1, -1).clone().requires_grad_()
            zero, one = torch.zeros(1, dtype=kind), torch.ones(1, dtype=kind)
            y = function(x, zero, one, eps=0.0, act=act)
            results.append((y.detach(), *torch.autograd.grad(y, x, torch.ones_like(y))))
        eps = torch.finfo(dtype).eps
        # Of gelu eager's digits cancel below 0 in float64, and vectors of float32 have erfc within 1.5e-7, as eager's.
        units = 1 if not act.startswith("gelu") else 32 if dtype == torch.float64 else 4
        for ours, eager in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager.to(dtype), rtol=16 * eps, atol=units * eps, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *DTYPES[1:]], ids=str)
def test_backward_s_mask_is_the_forward_s_bit_for_bit(dtype, generator):
    """The gradient passes exactly where the output is not zero, whatever rounds to zero on the way out."""
    operator, gradient = torch.ops.cnnkern.bn_act, torch.ops.cnnkern.bn_act_backward
    for layout, training in itertools.product(LAYOUTS, (True, False)):
        x = testing.with_layout(testing.randn((5, 37, 13, 11), generator, dtype), layout)
        weight = torch.full((37,), 1e-7 if dtype == torch.float16 else 1e-3, dtype=dtype)
        bias, rm, rv = torch.zeros(37, dtype=dtype), torch.zeros(37, dtype=dtype), torch.ones(37, dtype=dtype)
        y, mean, rstd = operator(x, weight, bias, rm, rv, training, 0.1, 1e-5, "relu")
        # dbias counts the elements whose gradient passes; as if in eval mode, dx is weight * rstd where it does.
        wide = bias.float() if dtype in DTYPES[1:] else bias
        dx, _, dbias = gradient(torch.ones_like(x), x, weight, wide, mean, rstd, False, "relu", [True, False, True])
        assert torch.equal(dbias.long(), (y != 0).sum((0, 2, 3)))
        if dtype == torch.float16:
            assert ((y == 0) & (x > 0)).any(), "no positive value rounded to zero: the test tests nothing"
        else:
            assert torch.equal(dx != 0, y != 0)


@settings(max_examples=100, deadline=None, derandomize="CI" in os.environ, suppress_health_check=list(HealthCheck))
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 20), st.integers(1, 20)),
    log_scale=st.floats(-6, 6),
    log_residual=st.floats(-6, 6),
    offset=st.floats(-1e6, 1e6),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    act=st.sampled_from(["relu", "none"]),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**31),
)
def test_additions_at_any_scale_and_offset(shape, log_scale, log_residual, offset, kind, dtype, act, layout, seed):
    assume(shape[0] * shape[2] * shape[3] >= 3)
    g = torch.Generator().manual_seed(seed)
    x = (testing.randn(shape, g, torch.float64) + offset) * 10**log_scale
    x = testing.with_layout(with_a_channel(x, kind).to(dtype), layout)
    assume(float64_can_tell(x, kind))
    r = testing.with_layout((testing.randn(shape, g, torch.float64) * 10**log_residual).to(dtype), layout)
    dy = testing.randn(shape, g, dtype) if act == "none" else None
    testing.check(CASES["bn_add_act"], arguments(x, act=act) | {"residual": r}, dy, slack=abs(offset) < 100)
    testing.check(CASES["add_relu"], {"input": x, "other": r})


@pytest.mark.parametrize("operator", ["bn_add_act", "add_relu"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_additions_of_extremes(operator, layout, dtype, generator):
    """Infinities, NaN, the largest and the smallest numbers in the residual of a few elements."""
    case = CASES[operator]
    second = case.differentiable[1]
    inputs = case.inputs((4, 5, 9, 11), dtype, generator=generator)
    info = torch.finfo(dtype)
    extremes = [float("inf"), -float("inf"), float("nan"), info.max, -info.max, info.tiny, info.smallest_normal / 4]
    flat = inputs[second].reshape(-1)
    flat[: 3 * len(extremes) : 3] = torch.tensor(extremes, dtype=torch.float64).to(dtype)
    inputs = {n: testing.with_layout(v, layout) if n in ("input", second) else v for n, v in inputs.items()}
    testing.check(case, inputs, slack=False)
