# bn_act: y = act(pre), pre = (x - mean) * weight * rstd + bias.
# Backward, with g = dy * act'(pre), n elements a channel: dbias = sum(g), dweight = sum(g * (x - mean)) * rstd,
#   dx = weight * rstd * (g - dbias / n - (x - mean) * rstd * dweight / n)   training
#   dx = weight * rstd * g                                                   eval
# act'(pre) is recomputed from x by the same subtraction and fma as in the forward pass, so it is that of the
# output bit for bit, and nothing but x and two vectors of C is saved.
# Traffic in tensors read or written: 3 forward, 5 backward (2 and 3 in eval), less what the L2 cache still holds of
# the first sweep, for which the second runs backwards.
# A program owns a chunk of one channel (planes) or of up to 64 (rows) and brings its sums to scratch memory; one small
# kernel combines them in a fixed order: no atomics, so reruns are bit-equal.
# Accumulators: fp32 (fp64 for fp64) for at most 16 additions a lane, then fp64.
"""bn_act and bn_act_backward of csrc/ops.cpp in Triton."""

import torch
import triton
import triton.language as tl
from cnnkern.triton_kernels import check
from cnnkern.triton_kernels.batch_norm import (
    COMBINE,
    act_grad,
    act_value,
    affine,
    channel_sum,
    dense,
    load_wide,
    lost_of,
    partial_row,
    program,
    statistics,
    store_narrow,
    tile,
)
from cnnkern.triton_kernels.layout import Cut, in_layout, in_layout_of, on_device_of
from torch import Tensor


@triton.jit(do_not_specialize=["outer", "C", "units", "steps", "chunk"])
def bn_act_apply_kernel(
    x,
    y,
    mean,
    rstd,
    weight,
    bias,
    outer,
    C,
    units,
    steps,
    chunk,
    ACT: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
):
    S: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    k, first, c = program(tl.num_programs(0) - 1 - tl.program_id(0), C, ROWS, B)
    center, scale, offset = affine(mean, rstd, weight, bias, c, c < C, S)
    for step in range(k * chunk, tl.minimum(k * chunk + chunk, steps)):
        _, at, mask, _ = tile(step, first, outer, C, units, UNIT, ROWS, R, B)
        v = tl.load(x + at, mask, other=0.0).to(S)
        out = act_value(tl.fma(v - center, scale, offset), ACT)
        tl.store(y + at, out.to(y.dtype.element_ty), mask)


@triton.jit
def gradient(dy, x, at, mask, center, scale, offset, ACT: tl.constexpr, S: tl.constexpr):
    """g = dy * act'(pre) and x - center of a tile, both 0 outside of it."""
    centered = tl.where(mask, tl.load(x + at, mask, other=0.0).to(S) - center, 0.0)
    g = tl.load(dy + at, mask, other=0.0).to(S)
    return act_grad(g, tl.fma(centered, scale, offset), ACT, x.dtype.element_ty), centered


@triton.jit(do_not_specialize=["outer", "C", "units", "steps", "chunk"])
def bn_act_backward_sums_kernel(
    dy,
    x,
    dx,
    partial,
    mean,
    rstd,
    weight,
    bias,
    outer,
    C,
    units,
    steps,
    chunk,
    ACT: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
):
    """partial (2, chunks, C): sums of g and of g * (x - center). In eval dx needs no sums and is written here."""
    S: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    k, first, c = program(tl.program_id(0), C, ROWS, B)
    center, scale, offset = affine(mean, rstd, weight, bias, c, c < C, S)
    s1 = tl.zeros((R, B), S)
    s2 = tl.zeros((R, B), S)
    for step in range(k * chunk, tl.minimum(k * chunk + chunk, steps)):
        _, at, mask, _ = tile(step, first, outer, C, units, UNIT, ROWS, R, B)
        g, centered = gradient(dy, x, at, mask, center, scale, offset, ACT, S)
        s1 += g
        s2 = tl.fma(g, centered, s2)
        if dx is not None:
            tl.store(dx + at, (g * scale).to(dx.dtype.element_ty), mask)
    if partial is not None:
        p = partial + tl.cast(k, tl.int64) * C + c
        tl.store(p, channel_sum(s1.to(tl.float64), ROWS), c < C)
        tl.store(p + partial_row(C, ROWS, B), channel_sum(s2.to(tl.float64), ROWS), c < C)


@triton.jit(do_not_specialize=["count", "C", "chunks"])
def bn_act_backward_finalise_kernel(
    partial,
    mean,
    rstd,
    weight,
    dweight,
    dbias,
    table,
    count,
    C,
    chunks,
    S: tl.constexpr,
    K: tl.constexpr,
    CB: tl.constexpr,
):
    """Chunks of CB channels -> dweight, dbias and, where dx has to come, table (2, C): its slope in x and constant."""
    c = tl.program_id(0) * CB + tl.arange(0, CB)
    mask = c < C
    row = tl.cast(chunks, tl.int64) * C
    s1 = tl.zeros((CB,), tl.float64)
    s2 = tl.zeros((CB,), tl.float64)
    for k0 in range(0, chunks, K):
        k = k0 + tl.arange(0, K)[:, None]
        inside = (k < chunks) & mask[None, :]
        p = partial + k.to(tl.int64) * C + c[None, :]
        s1 += tl.sum(tl.load(p, inside, other=0.0), axis=0)
        s2 += tl.sum(tl.load(p + row, inside, other=0.0), axis=0)
    m = tl.load(mean + c, mask, other=0.0)
    r = tl.load(rstd + c, mask, other=0.0)
    lost = lost_of(m, m.to(S))
    centered_sum = s2 - lost * s1  # of g * (x - mean)
    if dbias is not None:
        store_narrow(dbias, c, s1, mask)
    if dweight is not None:
        store_narrow(dweight, c, centered_sum * r, mask)
    if table is not None:
        n = tl.cast(count, tl.float64)
        scale = r * load_wide(weight, c, mask, 1.0)
        slope = -scale * r * r * centered_sum / n
        tl.store(table + c, slope.to(S), mask)
        tl.store(table + C + c, (-scale * s1 / n - slope * lost).to(S), mask)


@triton.jit(do_not_specialize=["outer", "C", "units", "steps", "chunk"])
def bn_act_backward_apply_kernel(
    dy,
    x,
    dx,
    mean,
    rstd,
    weight,
    bias,
    table,
    outer,
    C,
    units,
    steps,
    chunk,
    ACT: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
):
    S: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    k, first, c = program(tl.num_programs(0) - 1 - tl.program_id(0), C, ROWS, B)
    center, scale, offset = affine(mean, rstd, weight, bias, c, c < C, S)
    slope = tl.load(table + c, c < C, other=0.0)
    constant = tl.load(table + C + c, c < C, other=0.0)
    for step in range(k * chunk, tl.minimum(k * chunk + chunk, steps)):
        _, at, mask, _ = tile(step, first, outer, C, units, UNIT, ROWS, R, B)
        g, centered = gradient(dy, x, at, mask, center, scale, offset, ACT, S)
        out = tl.fma(g, scale, tl.fma(centered, slope, constant))
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask)


def bn_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y and the float64 vectors (C,) mean and rstd, as the schema in csrc/ops.cpp has it."""
    check.batch_norm("cnnkern::bn_act", x, weight, bias, running_mean, running_var, training, eps)
    check.activation("cnnkern::bn_act", act)
    x = in_layout(x)
    y = torch.empty_like(x)
    if x.numel() == 0:
        mean = x.new_zeros(x.shape[1], dtype=torch.float64)
        return y, mean, torch.ones_like(mean)
    cut = Cut.of(x)
    with on_device_of(x):
        mean, rstd = statistics(x, cut, running_mean, running_var, training, momentum, eps)
        bn_act_apply_kernel[cut.grid](
            x, y, mean, rstd, dense(weight), dense(bias), *cut.sizes, ACT=act, **cut.constants
        )
    return y, mean, rstd


def bn_act_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    act: str,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias as the schema in csrc/ops.cpp has it; of no elements where `output_mask` is False."""
    check.batch_norm_backward("cnnkern::bn_act_backward", dy, x, weight, bias, mean, rstd, output_mask)
    check.activation("cnnkern::bn_act_backward", act)
    x = in_layout(x)
    dy = in_layout_of(dy, x)
    C = x.shape[1]
    wants_dx, wants_dweight, wants_dbias = output_mask
    dx = torch.empty_like(x) if wants_dx else x.new_empty(0)
    dweight = torch.empty_like(weight) if wants_dweight else x.new_empty(0)
    dbias = torch.empty_like(bias) if wants_dbias else x.new_empty(0)
    if x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    cut = Cut.of(x)
    applies = training and wants_dx
    sums = applies or wants_dweight or wants_dbias
    weight, bias = dense(weight), dense(bias)
    wide = torch.promote_types(x.dtype, torch.float32)
    partial = x.new_empty((2, cut.chunks, C), dtype=torch.float64) if sums else None
    table = x.new_empty((2, C), dtype=wide) if applies else None
    with on_device_of(x):
        if sums or wants_dx:
            bn_act_backward_sums_kernel[cut.grid](
                dy,
                x,
                dx if wants_dx and not training else None,
                partial,
                mean,
                rstd,
                weight,
                bias,
                *cut.sizes,
                ACT=act,
                **cut.constants,
            )
        if sums:
            bn_act_backward_finalise_kernel[(triton.cdiv(C, COMBINE["CB"]),)](
                partial,
                mean,
                rstd,
                weight,
                dweight if wants_dweight else None,
                dbias if wants_dbias else None,
                table,
                x.numel() // C,
                C,
                cut.chunks,
                S=tl.float64 if wide == torch.float64 else tl.float32,
                **COMBINE,
            )
        if applies:
            bn_act_backward_apply_kernel[cut.grid](
                dy, x, dx, mean, rstd, weight, bias, table, *cut.sizes, ACT=act, **cut.constants
            )
    return dx, dweight, dbias
