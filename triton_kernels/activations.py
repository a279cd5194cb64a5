"""Activations and their derivatives, as csrc/activations.h has them."""

import triton
import triton.language as tl


@triton.jit
def clamp6(v):
    return tl.where(v <= 0.0, 0.0, tl.where(v >= 6.0, 6.0, v))  # not minimum and maximum: NaN passes


@triton.jit
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def act_value(pre, ACT: tl.constexpr):
    if ACT == "relu":
        return tl.where(pre <= 0.0, 0.0, pre)
    elif ACT == "relu6":
        return clamp6(pre)
    elif ACT == "leaky_relu":
        return tl.where(pre <= 0.0, pre * 0.01, pre)
    elif ACT == "sigmoid":
        return sigmoid(pre)
    elif ACT == "silu":
        return pre / (1.0 + tl.exp(-pre))
    elif ACT == "hardswish":
        return pre * clamp6(pre + 3.0) * (1.0 / 6.0)
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
def act_grad(dy, pre, ACT: tl.constexpr, dtype: tl.constexpr):
    if ACT == "relu" or ACT == "relu6":
        bound = rounds_to_zero(dtype)
        if ACT == "relu6":
            return tl.where((pre > bound) & (pre < 6.0), dy, 0.0)
        else:
            return tl.where(pre <= bound, 0.0, dy)
    elif ACT == "leaky_relu":
        return tl.where(pre > 0.0, dy, dy * 0.01)
    elif ACT == "sigmoid":
        s = sigmoid(pre)
        return dy * (1.0 - s) * s
    elif ACT == "silu":
        s = sigmoid(pre)
        return dy * s * (1.0 + pre * (1.0 - s))
    elif ACT == "hardswish":
        inner = dy * (pre * (1.0 / 3.0) + 0.5)
        return tl.where(pre <= -3.0, 0.0, tl.where(pre >= 3.0, dy, inner))
    else:
        return dy
