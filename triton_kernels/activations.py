"""Activations and their derivatives, as csrc/activations.h has them."""

from typing import Any

import triton
import triton.language as tl
from cnnkern.triton_kernels.check import PARAMETERS


def constants(act: str, act_param: float | None) -> dict[str, Any]:
    """What a kernel is told of an activation when it is compiled."""
    return {"ACT": act, "PARAM": PARAMETERS.get(act, 0.0) if act_param is None else act_param}


@triton.jit
def clamp6(v):
    return tl.where(v <= 0.0, 0.0, tl.where(v >= 6.0, 6.0, v))  # not minimum and maximum: NaN passes


@triton.jit
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def expm1(v):
    """exp(v) - 1 for v <= 0. Near zero its series, where the difference would cancel."""
    # v (1 + v/2 (1 + v/3 (...))), to the power at which a float64 has no more digits below 1/4
    near = 1.0 + v * (1.0 / 15)
    for k in tl.static_range(14, 1, -1):
        near = 1.0 + v * near * (1.0 / k)
    return tl.where(v > -0.25, v * near, tl.exp(v) - 1.0)


@triton.jit
def normal_cdf(v):
    """0.5 (1 + erf(v / sqrt(2))), the distribution of a standard normal number."""
    return 0.5 + 0.5 * tl.erf(v * 0.70710678118654752440)


@triton.jit
def twice_inner(v):
    """Twice what gelu's tanh form has the tanh of."""
    return v * (1.59576912160573071176 + 0.0713548162726009 * v * v)


@triton.jit
def softplus_parts(v):
    """e, n and 1 / (n + 2): tanh(log(1 + e)), e = exp(v), is n / (n + 2). Beyond v = 20 it is 1."""
    e = tl.exp(tl.where(v > 20.0, 20.0, v))
    n = e * (e + 2.0)
    return e, n, 1.0 / (n + 2.0)


@triton.jit
def act_value(pre, param, ACT: tl.constexpr):
    """The activation of pre. `param` is its number, where it takes one; of "prelu" a slope per channel."""
    if ACT == "relu":
        return tl.where(pre <= 0.0, 0.0, pre)
    elif ACT == "relu6":
        return clamp6(pre)
    elif ACT == "leaky_relu" or ACT == "prelu":
        return tl.where(pre <= 0.0, pre * param, pre)
    elif ACT == "sigmoid":
        return sigmoid(pre)
    elif ACT == "silu":
        return pre / (1.0 + tl.exp(-pre))
    elif ACT == "hardswish":
        return pre * clamp6(pre + 3.0) * (1.0 / 6.0)
    elif ACT == "elu":
        return tl.where(pre > 0.0, pre, param * expm1(tl.where(pre > 0.0, 0.0, pre)))
    elif ACT == "gelu":
        return pre * normal_cdf(pre)
    elif ACT == "gelu_tanh":
        return pre / (1.0 + tl.exp(-twice_inner(pre)))
    elif ACT == "mish":
        _, n, r = softplus_parts(pre)
        return pre * (n * r)
    elif ACT == "hardsigmoid":
        return clamp6(pre + 3.0) * (1.0 / 6.0)
    else:
        return pre


@triton.jit
def rounds_to_zero(dtype: tl.constexpr):
    """The largest value that rounds to 0 in dtype: it has the gradient of that output; see csrc/activations.h."""
    if dtype == tl.float16:
        return tl.full([], 2.0**-25, tl.float32)
    elif dtype == tl.bfloat16:
        return tl.full([], 2.0**-134, tl.float32)
    else:
        return tl.full([], 0.0, dtype)


@triton.jit
def act_grad(dy, pre, param, ACT: tl.constexpr, dtype: tl.constexpr):
    if ACT == "relu" or ACT == "relu6":
        bound = rounds_to_zero(dtype)
        if ACT == "relu6":
            return tl.where((pre > bound) & (pre < 6.0), dy, 0.0)
        else:
            return tl.where(pre <= bound, 0.0, dy)
    elif ACT == "leaky_relu" or ACT == "prelu":
        return tl.where(pre > 0.0, dy, dy * param)
    elif ACT == "sigmoid":
        s = sigmoid(pre)
        return dy * (1.0 - s) * s
    elif ACT == "silu":
        s = sigmoid(pre)
        return dy * s * (1.0 + pre * (1.0 - s))
    elif ACT == "hardswish":
        inner = dy * (pre * (1.0 / 3.0) + 0.5)
        return tl.where(pre <= -3.0, 0.0, tl.where(pre >= 3.0, dy, inner))
    elif ACT == "elu":
        return tl.where(pre > 0.0, dy, dy * param * tl.exp(tl.where(pre > 0.0, 0.0, pre)))
    elif ACT == "gelu":
        density = 0.39894228040143267794 * tl.exp(-0.5 * pre * pre)
        return dy * (normal_cdf(pre) + pre * density)
    elif ACT == "gelu_tanh":
        # s = sigmoid(v) and s (1 - s), by the exponential of a negative number.
        v = twice_inner(pre)
        e = tl.exp(tl.where(v < 0.0, v, -v))
        r = 1.0 / (1.0 + e)
        s = tl.where(v < 0.0, e * r, r)
        return dy * (s + pre * (e * r * r) * (1.59576912160573071176 + 0.2140644488178027 * pre * pre))
    elif ACT == "mish":
        e, n, r = softplus_parts(pre)
        slope = tl.where(pre > 20.0, 0.0, 4.0 * (e * (1.0 + e) * r) * r)
        return dy * (n * r + pre * slope)
    elif ACT == "hardsigmoid":
        # In float64 too PyTorch has a sixth in single precision here.
        return tl.where((pre > -3.0) & (pre < 3.0), dy * 0.1666666716337204, 0.0)
    else:
        return dy
