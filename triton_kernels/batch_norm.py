# What every batch-norm operator shares in Triton: the tiles of a program, the statistics of x (moments of chunks, then
# their combination) and the affine map that follows from them.
# The statistics read x once. Accumulators: fp32 (fp64 for fp64) for at most 16 additions per lane, then fp64.
"""Statistics and device functions of the batch-norm operators."""

import torch
import triton
import triton.language as tl
from cnnkern.triton_kernels.layout import COMBINE, Cut, dense
from cnnkern.triton_kernels.reduce import store_rounded
from cnnkern.triton_kernels.tuning import Tunable
from torch import Tensor


@triton.jit
def program(pid, C, ROWS: tl.constexpr, B: tl.constexpr):
    """A program's chunk, its first channel, and all of its channels: one, or B of them."""
    if ROWS:
        tiles = (C + B - 1) // B
        first = pid % tiles * B
        return pid // tiles, first, first + tl.arange(0, B)
    else:
        return pid // C, pid % C, pid % C


@triton.jit
def tile(
    step,
    first,
    outer,
    C,
    units,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    EVERY: tl.constexpr = 1,
):
    """Tile `step` of the channels from `first`: its start, its offsets and mask (R, B), its elements per channel.

    With EVERY, offsets and mask (R, B / EVERY) are of every so many elements of a line.
    """
    width = units * UNIT
    i = tl.arange(0, R)[:, None]
    j = tl.arange(0, B // EVERY)[None, :] * EVERY
    if ROWS:
        line = tl.cast(step, tl.int64) * R
        column = first
        start = line * width + column
        stride = width
    else:
        blocks = (width + B - 1) // B
        line = tl.cast(step // blocks, tl.int64) * R
        column = step % blocks * B
        start = (line * C + first) * width + column
        stride = tl.cast(width, tl.int64) * C
    lines = tl.minimum(outer - line, R)
    columns = tl.minimum(width - column, B)
    return start, start + i.to(tl.int64) * stride + j, (i < lines) & (j < columns), lines if ROWS else lines * columns


@triton.jit
def partial_row(C, ROWS: tl.constexpr, B: tl.constexpr):
    """chunks * C, the elements of one row of partial sums."""
    if ROWS:
        return tl.cast(tl.num_programs(0) // ((C + B - 1) // B), tl.int64) * C
    else:
        return tl.cast(tl.num_programs(0), tl.int64)


@triton.jit
def channel_sum(v, ROWS: tl.constexpr):
    if ROWS:
        return tl.sum(v, axis=0)
    else:
        return tl.sum(v)


@triton.jit
def load_wide(p, at, mask, default: tl.constexpr):
    """A vector of parameters in fp64, or the default for one that is None."""
    if p is None:
        return default
    else:
        return tl.load(p + at, mask, other=0.0).to(tl.float64)


@triton.jit
def lost_of(m, center):
    """What rounding the mean to the arithmetic type loses."""
    return tl.where(tl.abs(m) < float("inf"), m - center.to(tl.float64), 0.0)


@triton.jit
def affine(mean, rstd, weight, bias, c, mask, S: tl.constexpr):
    """pre = fma(x - center, scale, offset). What the center loses is put into the offset.

    Every operation is spelled out, or the compiler might contract a product differently in another kernel, and the
    backward pass see another mask.
    """
    m = tl.load(mean + c, mask, other=0.0)
    scale = tl.load(rstd + c, mask, other=0.0) * load_wide(weight, c, mask, 1.0)
    center = m.to(S)
    offset = tl.fma(-lost_of(m, center), scale, load_wide(bias, c, mask, 0.0))
    return center, scale.to(S), offset.to(S)


@Tunable
@triton.jit(do_not_specialize=["outer", "C", "units", "steps", "chunk"])
def moments_kernel(
    x, partial, outer, C, units, steps, chunk, UNIT: tl.constexpr, ROWS: tl.constexpr, R: tl.constexpr, B: tl.constexpr
):
    """partial (4, chunks, C) of each chunk: elements, mean, sum of squared deviations, and what that sum has lost.

    Sums are of x - shift. The shift is the mean of the chunk's first tile. Where that is far from the chunk's mean, as
    a border is from an image's inside, the sum is the small difference of two large ones of about the last value.
    """
    S: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    k, first, c = program(tl.program_id(0), C, ROWS, B)
    begin = k * chunk
    end = tl.minimum(begin + chunk, steps)

    start, at, mask, n = tile(begin, first, outer, C, units, UNIT, ROWS, R, B)
    v = tl.load(x + at, mask, other=0.0).to(S)
    one = tl.load(x + start + (c - first), c < C, other=0.0).to(S)
    shift = one + channel_sum(tl.where(mask, v - one, 0.0), ROWS) * (1.0 / n.to(S))
    s1 = tl.where(mask, v - shift, 0.0)
    s2 = s1 * s1
    count = n
    for step in range(begin + 1, end):
        start, at, mask, n = tile(step, first, outer, C, units, UNIT, ROWS, R, B)
        v = tl.load(x + at, mask, other=0.0).to(S)
        d = tl.where(mask, v - shift, 0.0)
        s1 += d
        s2 = tl.fma(d, d, s2)
        count += n

    sum1 = channel_sum(s1.to(tl.float64), ROWS)
    sum2 = channel_sum(s2.to(tl.float64), ROWS)
    n64 = count.to(tl.float64)
    delta = sum1 * (1.0 / n64)
    m2 = sum2 - sum1 * delta
    m2 = tl.where(m2 <= 0.0, 0.0, m2)
    # Squares may have left the range of the arithmetic type. NaN fails too.
    in_range = (sum2 < float("inf")) & (sum2 >= 0.0)
    lost = tl.where(in_range, sum1 * delta, float("nan"))

    row = partial_row(C, ROWS, B)
    p = partial + tl.cast(k, tl.int64) * C + c
    tl.store(p, n64, c < C)
    tl.store(p + row, shift.to(tl.float64) + delta, c < C)
    tl.store(p + 2 * row, m2, c < C)
    tl.store(p + 3 * row, lost, c < C)


@triton.jit
def exact_moments(x, c, mask, count, channel_stride, runs, run_stride, length, step, K: tl.constexpr):
    """Mean and sum of squared deviations in fp64 and two passes, for channels whose partial sums are not sound."""
    k = tl.arange(0, K)[:, None]
    lines = x + c.to(tl.int64)[None, :] * channel_stride
    total = tl.zeros_like(c).to(tl.float64)
    for r in range(runs):
        for j in range(0, length, K):
            inside = (k < length - j) & mask[None, :]
            p = lines + tl.cast(r, tl.int64) * run_stride + (tl.cast(j, tl.int64) + k) * step
            total += tl.sum(tl.load(p, inside, other=0.0).to(tl.float64), axis=0)
    m = total / count
    m2 = tl.zeros_like(total)
    for r in range(runs):
        for j in range(0, length, K):
            inside = (k < length - j) & mask[None, :]
            p = lines + tl.cast(r, tl.int64) * run_stride + (tl.cast(j, tl.int64) + k) * step
            d = tl.where(inside, tl.load(p, inside, other=0.0).to(tl.float64) - m[None, :], 0.0)
            m2 += tl.sum(d * d, axis=0)
    return m, m2


@triton.jit
def combined_moments(
    x, partial, c, mask, count, C, chunks, channel_stride, runs, run_stride, length, step, K: tl.constexpr
):
    """Mean and sum of squared deviations of the channels c (Chan's formula about the first chunk's mean)."""
    row = tl.cast(chunks, tl.int64) * C
    about = tl.load(partial + row + c, mask, other=0.0)
    s1 = tl.zeros_like(about)
    s2 = tl.zeros_like(about)
    lost = tl.zeros_like(about)
    for k0 in range(0, chunks, K):
        k = k0 + tl.arange(0, K)[:, None]
        inside = (k < chunks) & mask[None, :]
        p = partial + k.to(tl.int64) * C + c[None, :]
        n = tl.load(p, inside, other=0.0)
        d = tl.where(inside, tl.load(p + row, inside, other=0.0) - about[None, :], 0.0)
        s1 += tl.sum(n * d, axis=0)
        s2 += tl.sum(tl.load(p + 2 * row, inside, other=0.0) + n * d * d, axis=0)
        lost += tl.sum(tl.load(p + 3 * row, inside, other=0.0), axis=0)
    delta = s1 / count
    m = about + delta
    m2 = s2 - s1 * delta
    m2 = tl.where(m2 <= 0.0, 0.0, m2)
    # Digits are lost of the whole channel's sum, in which a chunk of few deviations counts for little.
    constant = (m2 == 0.0) & (lost == 0.0)
    unsound = ((lost <= 8.0 * m2) & (m2 > 1e-28 * count) | constant) == 0
    unsound = unsound & mask
    if tl.max(unsound.to(tl.int32)) > 0:
        exact_m, exact_m2 = exact_moments(x, c, unsound, count, channel_stride, runs, run_stride, length, step, K)
        m = tl.where(unsound, exact_m, m)
        m2 = tl.where(unsound, exact_m2, m2)
    return m, m2


@triton.jit(do_not_specialize=["count", "C", "chunks", "channel_stride", "runs", "run_stride", "length", "step"])
def moments_finalise_kernel(
    x,
    partial,
    mean,
    rstd,
    running_mean,
    running_var,
    mean_stride,
    var_stride,
    momentum: tl.float64,
    eps: tl.float64,
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
    """Chunks of CB channels -> mean, rstd and running statistics."""
    c = tl.program_id(0) * CB + tl.arange(0, CB)
    mask = c < C
    count = tl.cast(count, tl.float64)
    m, m2 = combined_moments(x, partial, c, mask, count, C, chunks, channel_stride, runs, run_stride, length, step, K)
    tl.store(mean + c, m, mask)
    tl.store(rstd + c, 1.0 / tl.sqrt(m2 / count + eps), mask)
    if running_mean is not None:
        c = c.to(tl.int64)
        old = load_wide(running_mean, c * mean_stride, mask, 0.0)
        store_rounded(running_mean, c * mean_stride, momentum * m + (1.0 - momentum) * old, mask)
        old = load_wide(running_var, c * var_stride, mask, 0.0)
        store_rounded(running_var, c * var_stride, momentum * (m2 / (count - 1.0)) + (1.0 - momentum) * old, mask)


@triton.jit(do_not_specialize=["C"])
def running_statistics_kernel(running_mean, running_var, mean, rstd, eps: tl.float64, C, BLOCK: tl.constexpr):
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(mean + c, load_wide(running_mean, c, c < C, 0.0), c < C)
    tl.store(rstd + c, 1.0 / tl.sqrt(load_wide(running_var, c, c < C, 0.0) + eps), c < C)


def arithmetic(x: Tensor) -> tl.dtype:
    """The type that x is computed in."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def moments_of_chunks(x: Tensor, cut: Cut) -> Tensor:
    """(4, chunks, C), as moments_kernel leaves them for combined_moments."""
    partial = x.new_empty((4, cut.chunks, x.shape[1]), dtype=torch.float64)
    moments_kernel[cut.grid](x, partial, *cut.sizes, **cut.constants)
    return partial


def statistics(
    x: Tensor,
    cut: Cut,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """mean and rstd (C,) in float64: of x, which also updates the running statistics, or in eval of those."""
    C = x.shape[1]
    mean = x.new_empty(C, dtype=torch.float64)
    rstd = torch.empty_like(mean)
    if not training:
        running_statistics_kernel[(triton.cdiv(C, 128),)](
            dense(running_mean), dense(running_var), mean, rstd, eps, C, BLOCK=128
        )
        return mean, rstd
    partial = moments_of_chunks(x, cut)
    strides = (0, 0) if running_mean is None else (running_mean.stride(0), running_var.stride(0))
    moments_finalise_kernel[(triton.cdiv(C, COMBINE["CB"]),)](
        x,
        partial,
        mean,
        rstd,
        running_mean,
        running_var,
        *strides,
        momentum,
        eps,
        x.numel() // C,
        C,
        cut.chunks,
        *cut.channel_view,
        **COMBINE,
    )
    return mean, rstd
