# bn_prelu: y = z for z > 0, else slope * z; z = pre + residual, pre = (x - mean) * weight * rstd + bias, the residual
# optional. Backward: batch_norm_backward.py, with g = dy for z > 0, else slope * dy, and dresidual = g. dslope is the
# sum of dy * min(z, 0) over a channel, or over all of x for a single slope: a third sum of the first pass. z is
# computed again from x and the residual, which alone are saved.
# Traffic in tensors read or written: 3 forward, 5 backward (2 and 3 in eval), with a residual 4 and 8, less what the L2
# cache holds.
"""bn_prelu and bn_prelu_backward of csrc/ops.cpp in Triton."""

import torch
import triton
import triton.language as tl
from cnnkern.triton_kernels import check
from cnnkern.triton_kernels.activations import act_value
from cnnkern.triton_kernels.batch_norm import affine, program, statistics, tile
from cnnkern.triton_kernels.batch_norm_backward import backward
from cnnkern.triton_kernels.layout import (
    Cut,
    dense,
    in_batch_norm_layout,
    in_layout_of,
    laid_out,
    on_device_of,
    strides_of_sum,
    with_strides,
)
from cnnkern.triton_kernels.tuning import Tunable
from torch import Tensor


@Tunable
@triton.jit(do_not_specialize=["outer", "C", "units", "steps", "chunk"])
def bn_prelu_apply_kernel(
    x,
    residual,
    y,
    mean,
    rstd,
    weight,
    bias,
    slopes,
    outer,
    C,
    units,
    steps,
    chunk,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
):
    S: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    k, first, c = program(tl.num_programs(0) - 1 - tl.program_id(0), C, ROWS, B)
    center, scale, offset = affine(mean, rstd, weight, bias, c, c < C, S)
    slope = tl.load(slopes + c, c < C, other=0.0).to(S)
    for step in range(k * chunk, tl.minimum(k * chunk + chunk, steps)):
        _, at, mask, _ = tile(step, first, outer, C, units, UNIT, ROWS, R, B)
        z = tl.fma(tl.load(x + at, mask, other=0.0).to(S) - center, scale, offset)
        if residual is not None:
            z += tl.load(residual + at, mask, other=0.0).to(S)
        tl.store(y + at, act_value(z, slope, "prelu").to(y.dtype.element_ty), mask)


def bn_prelu(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y and the float64 vectors (C,) mean and rstd, as the schema in csrc/ops.cpp has it."""
    op = "cnnkern::bn_prelu"
    check.batch_norm(op, x, weight, bias, running_mean, running_var, training, eps)
    check.slope(op, slope, x)
    if residual is not None:
        check.same_shape(op, "residual", residual, x)
    x = in_batch_norm_layout(x)
    y = torch.empty_like(x)
    strides = y.stride() if residual is None else strides_of_sum(x, residual, "prelu")
    if x.numel() == 0:
        mean = x.new_zeros(x.shape[1], dtype=torch.float64)
        return with_strides(y, strides), mean, torch.ones_like(mean)
    cut = Cut.of(x)
    residual = None if residual is None else in_layout_of(residual, x)
    with on_device_of(x):
        mean, rstd = statistics(x, cut, running_mean, running_var, training, momentum, eps)
        vectors = (mean, rstd, dense(weight), dense(bias), slope.expand(x.shape[1]).contiguous())
        bn_prelu_apply_kernel[cut.grid](x, residual, y, *vectors, *cut.sizes, **cut.constants)
    return with_strides(y, strides), mean, rstd


def bn_prelu_backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: Tensor,
    mean: Tensor,
    rstd: Tensor,
    channels_last: bool,
    training: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dresidual, dweight, dbias and dslope as csrc/ops.cpp has them; empty where `output_mask` is False."""
    op = "cnnkern::bn_prelu_backward"
    check.bn_prelu_backward(op, dy, x, residual, weight, bias, slope, mean, rstd, channels_last, output_mask)
    wanted = output_mask[4]
    dslopes = x.new_zeros(x.shape[1], dtype=torch.float64) if wanted else None
    grads = backward(
        *(dy, laid_out(x, channels_last), None, weight, bias, mean, rstd, training, "prelu", output_mask[:4], residual),
        slopes=slope.expand(x.shape[1]).contiguous(),
        dslopes=dslopes,
    )
    if dslopes is None:
        return *grads, x.new_empty(0)
    dslope = dslopes if slope.numel() == x.shape[1] else dslopes.sum()
    return *grads, dslope.view(slope.shape).to(slope.dtype)
