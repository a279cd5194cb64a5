# sync_bn: batch norm over processes, in parts, between which statistics and sums travel from process to process.
#   sync_bn_stats     moments = mean and biased variance of every channel of x, elements per channel
#   sync_bn           y = act(pre + residual), pre = (x - mean) * weight * rstd + bias, from given mean and rstd
#   sync_bn_sums      sum(g) and sum(g * (x - mean)) * rstd, g = dy * act'(pre), pre with the residual, or dy * [y > 0]
#   sync_bn_backward  dx = weight * rstd * (g - sum(g) / n - (x - mean) * rstd * sum(g * (x - mean) * rstd) / n), with
#                     sums and n over all processes, read where they are: nothing waits for the GPU; dresidual = g
# The kernels of bn_act and bn_add_act, one pass per part, each with its own ending. Memory traffic in tensors read or
# written: 1 and 2 (3 with a residual) forward, 2 and 3 (4) backward.
"""The parts of sync_bn of csrc/ops.cpp in Triton."""

import torch
import triton
import triton.language as tl
from cnnkern.triton_kernels import check
from cnnkern.triton_kernels.activations import constants
from cnnkern.triton_kernels.batch_norm import arithmetic, combined_moments, load_wide, lost_of, moments_of_chunks
from cnnkern.triton_kernels.batch_norm_backward import (
    backward_apply_kernel,
    backward_sums_kernel,
    finalise,
)
from cnnkern.triton_kernels.bn_act import bn_act_apply_kernel
from cnnkern.triton_kernels.bn_add_act import apply
from cnnkern.triton_kernels.layout import (
    COMBINE,
    Cut,
    batch_norm_result,
    dense,
    in_batch_norm_layout,
    in_layout,
    in_layout_of,
    laid_out,
    mask_bytes,
    on_device_of,
    strides_of_sum,
    with_strides,
)
from torch import Tensor


@triton.jit(do_not_specialize=["count", "C", "chunks", "channel_stride", "runs", "run_stride", "length", "step"])
def sync_moments_kernel(
    x,
    partial,
    moments,
    count,
    C,
    chunks,
    channel_stride,
    runs,
    run_stride,
    length,
    step,
    K: tl.constexpr,
    CB: tl.constexpr,
):
    """Chunks of CB channels -> moments (2 C + 1)."""
    c = tl.program_id(0) * CB + tl.arange(0, CB)
    mask = c < C
    count = tl.cast(count, tl.float64)
    m, m2 = combined_moments(x, partial, c, mask, count, C, chunks, channel_stride, runs, run_stride, length, step, K)
    tl.store(moments + c, m, mask)
    tl.store(moments + C + c, m2 / count, mask)
    if tl.program_id(0) == 0:
        tl.store(moments + 2 * C, count)


@triton.jit(do_not_specialize=["C"])
def sync_table_kernel(sums, count, mean, rstd, weight, table, C, S: tl.constexpr, BLOCK: tl.constexpr):
    """dx's slope in x and constant, (2, C), from the sums over all processes and their elements per channel."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = c < C
    n = tl.load(count)
    m = tl.load(mean + c, mask, other=0.0)
    r = tl.load(rstd + c, mask, other=0.0)
    scale = r * load_wide(weight, c, mask, 1.0)
    slope = -scale * r * tl.load(sums + C + c, mask, other=0.0) / n
    constant = -scale * tl.load(sums + c, mask, other=0.0) / n - slope * lost_of(m, m.to(S))
    tl.store(table + c, slope.to(S), mask)
    tl.store(table + C + c, constant.to(S), mask)


def sync_bn_stats(x: Tensor) -> Tensor:
    """moments, as the schema in csrc/ops.cpp has them."""
    check.image("cnnkern::sync_bn_stats", x)
    C = x.shape[1]
    if x.numel() == 0:
        return x.new_zeros(2 * C + 1, dtype=torch.float64)
    x = in_layout(x)
    cut = Cut.of(x)
    moments = x.new_empty(2 * C + 1, dtype=torch.float64)
    with on_device_of(x):
        partial = moments_of_chunks(x, cut)
        sync_moments_kernel[(triton.cdiv(C, COMBINE["CB"]),)](
            x, partial, moments, x.numel() // C, C, cut.chunks, *cut.channel_view, **COMBINE
        )
    return moments


def sync_bn(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    act: str,
    act_param: float | None = None,
) -> tuple[Tensor, Tensor]:
    """y and the mask, as the schema in csrc/ops.cpp has them."""
    check.sync_bn("cnnkern::sync_bn", x, residual, weight, bias, mean, rstd, act, act_param)
    x = in_batch_norm_layout(x)
    y = batch_norm_result(x, act) if residual is None else torch.empty_like(x)
    strides = y.stride() if residual is None else strides_of_sum(x, residual, act)
    masked = residual is not None and act == "relu"
    if x.numel() == 0:
        return with_strides(y, strides), x.new_zeros(mask_bytes(0) if masked else 0, dtype=torch.uint8)
    cut = Cut.of(x)
    with on_device_of(x):
        if residual is not None:
            mask = apply(x, in_layout_of(residual, x), y, mean, rstd, weight, bias, act, act_param, cut)
            return with_strides(y, strides), mask
        bn_act_apply_kernel[cut.grid](
            *(x, y, mean, rstd, dense(weight), dense(bias), *cut.sizes), **constants(act, act_param), **cut.constants
        )
    return y, x.new_empty(0, dtype=torch.uint8)


def sync_bn_sums(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    mask: Tensor | None,
    channels_last: bool,
    act: str,
    residual: Tensor | None = None,
    act_param: float | None = None,
) -> Tensor:
    """sums, as the schema in csrc/ops.cpp has them."""
    op = "cnnkern::sync_bn_sums"
    check.sync_bn_sums(op, dy, x, weight, bias, mean, rstd, mask, channels_last, act, residual, act_param)
    C = x.shape[1]
    if x.numel() == 0:
        return x.new_zeros((2, C), dtype=torch.float64)
    x, dy = laid_out(x, channels_last), laid_out(dy, channels_last)
    cut = Cut.of(x)
    partial = x.new_empty((2, cut.chunks, C), dtype=torch.float64)
    sums = x.new_empty((2, C), dtype=torch.float64)
    weight, bias = dense(weight), dense(bias)
    residual = None if residual is None else laid_out(residual, channels_last)
    with on_device_of(x):
        backward_sums_kernel[cut.grid](
            *(dy, x, mask, residual, None, None, partial, mean, rstd, weight, bias, None, *cut.sizes),
            **constants(act if mask is None else "none", act_param),
            **cut.constants,
        )
        finalise(partial, mean, rstd, weight, sums[1], sums[0], None, x)
    return sums


def sync_bn_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    mask: Tensor | None,
    channels_last: bool,
    act: str,
    sums: Tensor,
    count: Tensor,
    output_mask: list[bool],
    residual: Tensor | None = None,
    act_param: float | None = None,
) -> tuple[Tensor, Tensor]:
    """dx and dresidual, as the schema in csrc/ops.cpp has them; of no elements where `output_mask` is False."""
    op = "cnnkern::sync_bn_backward"
    statistics = (weight, bias, mean, rstd, mask)
    check.sync_bn_backward(*(op, dy, x, *statistics, channels_last, act, sums, count, output_mask, residual, act_param))
    C = x.shape[1]
    x, dy = laid_out(x, channels_last), laid_out(dy, channels_last)
    dx, dresidual = (torch.empty_like(x) if wanted else None for wanted in output_mask)
    if x.numel() > 0 and any(output_mask):
        cut = Cut.of(x)
        weight, bias = dense(weight), dense(bias)
        residual = None if residual is None else laid_out(residual, channels_last)
        table = x.new_empty((2, C), dtype=torch.promote_types(x.dtype, torch.float32))
        with on_device_of(x):
            sync_table_kernel[(triton.cdiv(C, 128),)](
                sums, count, mean, rstd, weight, table, C, S=arithmetic(x), BLOCK=128
            )
            backward_apply_kernel[cut.grid](
                *(dy, x, mask, residual, dx, dresidual, mean, rstd, weight, bias, None, table, *cut.sizes),
                **constants(act if mask is None else "none", act_param),
                **cut.constants,
            )
    none = x.new_empty(0)
    return none if dx is None else dx, none if dresidual is None else dresidual
