# Backward of every batch norm, g being the gradient of what follows it, n elements per channel: dbias = sum(g),
#   dweight = sum(g * (x - mean)) * rstd,
#   dx = weight * rstd * (g - dbias / n - (x - mean) * rstd * dweight / n)   training
#   dx = weight * rstd * g                                                   eval
# One kernel brings the sums of a program's chunk to scratch memory, a small one combines them in a fixed order (no
# atomics, so reruns are bit-equal), a third writes dx, backwards, for what the L2 cache still holds of the first pass.
# Accumulators: fp32 (fp64 for fp64) for at most 16 additions per lane, then fp64.
"""The gradients of the batch-norm operators."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from cnnkern.triton_kernels import check
from cnnkern.triton_kernels.activations import act_grad, constants
from cnnkern.triton_kernels.batch_norm import (
    affine,
    arithmetic,
    channel_sum,
    load_wide,
    lost_of,
    partial_row,
    program,
    tile,
)
from cnnkern.triton_kernels.bits import bit_at
from cnnkern.triton_kernels.layout import COMBINE, Cut, dense, in_layout_of, on_device_of
from cnnkern.triton_kernels.reduce import store_rounded
from cnnkern.triton_kernels.tuning import Tunable
from torch import Tensor


@triton.jit
def gradient(dy, x, bits, residual, at, mask, center, scale, offset, param, ACT: tl.constexpr, S: tl.constexpr):
    """g, which is dy * act'(pre), pre with the residual where there is one, or dy * bit; x - center; and, where there
    is an activation, dy * min(pre, 0), of a tile.

    All are 0 outside of it.
    """
    centered = tl.where(mask, tl.load(x + at, mask, other=0.0).to(S) - center, 0.0)
    g = tl.load(dy + at, mask, other=0.0).to(S)
    if bits is None:
        pre = tl.fma(centered, scale, offset)
        if residual is not None:
            pre += tl.load(residual + at, mask, other=0.0).to(S)
        return act_grad(g, pre, param, ACT, x.dtype.element_ty), centered, tl.where(pre > 0.0, 0.0, g * pre)
    else:
        return tl.where(bit_at(bits, at, mask), g, 0.0), centered, g


@Tunable
@triton.jit(do_not_specialize=["outer", "C", "units", "steps", "chunk"])
def backward_sums_kernel(
    dy,
    x,
    bits,
    residual,
    dx,
    dresidual,
    partial,
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
    ACT: tl.constexpr,
    PARAM: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
):
    """partial (2, chunks, C): sums of g and of g * (x - center), and (3, chunks, C) of PReLU, of dy * min(pre, 0) too.
    What needs no sums is written here: dresidual, and dx in eval."""
    S: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    k, first, c = program(tl.program_id(0), C, ROWS, B)
    center, scale, offset = affine(mean, rstd, weight, bias, c, c < C, S)
    if slopes is None:
        param: tl.constexpr = PARAM  # or it would be rounded to float32
    else:
        param = tl.load(slopes + c, c < C, other=0.0).to(S)
    s1 = tl.zeros((R, B), S)
    s2 = tl.zeros((R, B), S)
    s3 = tl.zeros((R, B), S)
    for step in range(k * chunk, tl.minimum(k * chunk + chunk, steps)):
        _, at, mask, _ = tile(step, first, outer, C, units, UNIT, ROWS, R, B)
        g, centered, below = gradient(dy, x, bits, residual, at, mask, center, scale, offset, param, ACT, S)
        s1 += g
        s2 = tl.fma(g, centered, s2)
        if ACT == "prelu":
            s3 += below
        if dresidual is not None:
            tl.store(dresidual + at, g.to(dresidual.dtype.element_ty), mask)
        if dx is not None:
            tl.store(dx + at, (g * scale).to(dx.dtype.element_ty), mask)
    if partial is not None:
        p = partial + tl.cast(k, tl.int64) * C + c
        tl.store(p, channel_sum(s1.to(tl.float64), ROWS), c < C)
        tl.store(p + partial_row(C, ROWS, B), channel_sum(s2.to(tl.float64), ROWS), c < C)
        if ACT == "prelu":
            tl.store(p + 2 * partial_row(C, ROWS, B), channel_sum(s3.to(tl.float64), ROWS), c < C)


@triton.jit(do_not_specialize=["count", "C", "chunks"])
def backward_finalise_kernel(
    partial,
    mean,
    rstd,
    weight,
    dweight,
    dbias,
    dslopes,
    table,
    count,
    C,
    chunks,
    S: tl.constexpr,
    K: tl.constexpr,
    CB: tl.constexpr,
):
    """Chunks of CB channels -> dweight, dbias, those of PReLU's slopes and, where dx has to come, table (2, C): its
    slope in x and constant."""
    c = tl.program_id(0) * CB + tl.arange(0, CB)
    mask = c < C
    row = tl.cast(chunks, tl.int64) * C
    s1 = tl.zeros((CB,), tl.float64)
    s2 = tl.zeros((CB,), tl.float64)
    s3 = tl.zeros((CB,), tl.float64)
    for k0 in range(0, chunks, K):
        k = k0 + tl.arange(0, K)[:, None]
        inside = (k < chunks) & mask[None, :]
        p = partial + k.to(tl.int64) * C + c[None, :]
        s1 += tl.sum(tl.load(p, inside, other=0.0), axis=0)
        s2 += tl.sum(tl.load(p + row, inside, other=0.0), axis=0)
        if dslopes is not None:
            s3 += tl.sum(tl.load(p + 2 * row, inside, other=0.0), axis=0)
    m = tl.load(mean + c, mask, other=0.0)
    r = tl.load(rstd + c, mask, other=0.0)
    lost = lost_of(m, m.to(S))
    centered_sum = s2 - lost * s1  # of g * (x - mean)
    if dbias is not None:
        store_rounded(dbias, c, s1, mask)
    if dweight is not None:
        store_rounded(dweight, c, centered_sum * r, mask)
    if dslopes is not None:
        store_rounded(dslopes, c, s3, mask)
    if table is not None:
        n = tl.cast(count, tl.float64)
        scale = r * load_wide(weight, c, mask, 1.0)
        slope = -scale * r * r * centered_sum / n
        tl.store(table + c, slope.to(S), mask)
        tl.store(table + C + c, (-scale * s1 / n - slope * lost).to(S), mask)


@Tunable
@triton.jit(do_not_specialize=["outer", "C", "units", "steps", "chunk"])
def backward_apply_kernel(
    dy,
    x,
    bits,
    residual,
    dx,
    dresidual,
    mean,
    rstd,
    weight,
    bias,
    slopes,
    table,
    outer,
    C,
    units,
    steps,
    chunk,
    ACT: tl.constexpr,
    PARAM: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
):
    S: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    k, first, c = program(tl.num_programs(0) - 1 - tl.program_id(0), C, ROWS, B)
    center, scale, offset = affine(mean, rstd, weight, bias, c, c < C, S)
    if slopes is None:
        param: tl.constexpr = PARAM  # or it would be rounded to float32
    else:
        param = tl.load(slopes + c, c < C, other=0.0).to(S)
    slope = tl.load(table + c, c < C, other=0.0)
    constant = tl.load(table + C + c, c < C, other=0.0)
    for step in range(k * chunk, tl.minimum(k * chunk + chunk, steps)):
        _, at, mask, _ = tile(step, first, outer, C, units, UNIT, ROWS, R, B)
        g, centered, _ = gradient(dy, x, bits, residual, at, mask, center, scale, offset, param, ACT, S)
        if dx is not None:
            out = tl.fma(g, scale, tl.fma(centered, slope, constant))
            tl.store(dx + at, out.to(dx.dtype.element_ty), mask)
        if dresidual is not None:
            tl.store(dresidual + at, g.to(dresidual.dtype.element_ty), mask)


def finalise(
    partial: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    table: Tensor | None,
    x: Tensor,
    dslopes: Tensor | None = None,
) -> None:
    """What backward_finalise_kernel makes of the sums of chunks."""
    _, chunks, C = partial.shape
    backward_finalise_kernel[(triton.cdiv(C, COMBINE["CB"]),)](
        *(partial, mean, rstd, weight, dweight, dbias, dslopes, table, x.numel() // C, C, chunks),
        S=arithmetic(x),
        **COMBINE,
    )


def backward(
    dy: Tensor,
    x: Tensor,
    bits: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    act: str,
    output_mask: Sequence[bool],
    residual: Tensor | None = None,
    act_param: float | None = None,
    slopes: Tensor | None = None,
    dslopes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dresidual, dweight and dbias, through the mask `bits` where there is one, else through `act`, behind the
    addition of `residual` where that is given. `slopes` (C,) are those of "prelu", whose gradients are written to
    `dslopes` where that is given."""
    dy = in_layout_of(dy, x)
    C = x.shape[1]
    wants_dx, wants_dresidual, wants_dweight, wants_dbias = output_mask
    dx, dresidual = (torch.empty_like(x) if wanted else x.new_empty(0) for wanted in output_mask[:2])
    dweight = torch.empty_like(weight) if wants_dweight else x.new_empty(0)
    dbias = check.parameter_gradient(wants_dbias, bias, x.shape[1:2], x)
    if x.numel() == 0:
        return dx, dresidual, dweight.zero_(), dbias.zero_()
    cut = Cut.of(x)
    residual = None if residual is None else in_layout_of(residual, x)
    chosen = constants(act, act_param)
    applies = training and wants_dx
    sums = applies or wants_dweight or wants_dbias or dslopes is not None
    weight, bias = dense(weight), dense(bias)
    partial = x.new_empty((2 if slopes is None else 3, cut.chunks, C), dtype=torch.float64) if sums else None
    table = x.new_empty((2, C), dtype=torch.promote_types(x.dtype, torch.float32)) if applies else None
    with on_device_of(x):
        if sums or wants_dx or wants_dresidual:
            backward_sums_kernel[cut.grid](
                dy,
                x,
                bits,
                residual,
                dx if wants_dx and not training else None,
                dresidual if wants_dresidual else None,
                partial,
                mean,
                rstd,
                weight,
                bias,
                slopes,
                *cut.sizes,
                **chosen,
                **cut.constants,
            )
        if sums:
            vectors = (dweight if wants_dweight else None, dbias if wants_dbias else None)
            finalise(partial, mean, rstd, weight, *vectors, table, x, dslopes)
        if applies:
            backward_apply_kernel[cut.grid](
                *(dy, x, bits, residual, dx, None, mean, rstd, weight, bias, slopes, table, *cut.sizes),
                **chosen,
                **cut.constants,
            )
    return dx, dresidual, dweight, dbias
