# Layer norms: a tensor as lines of C elements, each of which is normalised: rows (layer_norm, and layer_norm2d in
# channels_last), or the pixels of planes (layer_norm2d). y = xhat * weight + bias, xhat = (x - mean) * rstd.
# Backward, with g = dy * weight: dbias = sum of dy over lines, dweight = sum of dy * xhat over lines,
#   dx = rstd * (g - sum(g) / C - xhat * sum(g * xhat) / C).
# A tile is P lines by B elements, lanes along the pixels of planes. Where a line fits into a tile it is read once and
# stays in registers: 2 tensors read or written forward, 3 backward. Longer lines are swept three times forward and
# twice backward, out of the caches for as long as they hold a program's lines.
# Accumulators: fp32 (fp64 for fp64); sums of squares are of x less its mean; dweight and dbias over at most 16 tiles,
# then fp64, chunks in a fixed order: no atomics, so reruns are bit-equal.
"""What layer_norm and layer_norm2d share in Triton."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from cnnkern.triton_kernels import check, layout
from cnnkern.triton_kernels.layout import ceil_power, on_device_of
from cnnkern.triton_kernels.reduce import sum_chunks
from cnnkern.triton_kernels.tuning import Tunable
from torch import Tensor


@triton.jit
def sizes_of(pixels, C, units, UNIT: tl.constexpr, ROWS: tl.constexpr):
    """pixels and C, of which the compiler is told what divides the one that is dense."""
    if ROWS:
        return pixels, units * UNIT
    else:
        return units * UNIT, C


@triton.jit
def lines_of(t, pixels, C, ROWS: tl.constexpr, P: tl.constexpr):
    """Tile t of lines: their numbers (P,), which of them exist, and where they begin; steps from element to element."""
    if ROWS:
        line = tl.cast(t, tl.int64) * P + tl.arange(0, P)
        return line, line < pixels, line * C, 1
    else:
        tiles = (pixels + P - 1) // P
        n = tl.cast(t // tiles, tl.int64)
        p = t % tiles * P + tl.arange(0, P)
        return n * pixels + p, p < pixels, n * C * pixels + p, pixels


@triton.jit
def span(begin, exist, c, step, C):
    """Offsets and mask (P, B) of the elements c of lines."""
    return begin[:, None] + (c.to(tl.int64) * step)[None, :], exist[:, None] & (c < C)[None, :]


@triton.jit
def parameter(p, c, C, default: tl.constexpr, S: tl.constexpr):
    if p is None:
        return tl.full([1, 1], default, S)
    else:
        return tl.load(p + c, c < C, other=0.0).to(S)[None, :]


@Tunable
@triton.jit(do_not_specialize=["pixels", "C", "units"])
def normalize_kernel(
    x,
    y,
    mean,
    rstd,
    weight,
    bias,
    eps: tl.float64,
    pixels,
    C,
    units,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    P: tl.constexpr,
    B: tl.constexpr,
    WHOLE: tl.constexpr,
):
    S: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    pixels, C = sizes_of(pixels, C, units, UNIT, ROWS)
    line, exist, begin, step = lines_of(tl.program_id(0), pixels, C, ROWS, P)
    c = tl.arange(0, B)
    inverse = 1.0 / tl.cast(C, S)
    at, inside = span(begin, exist, c, step, C)
    if WHOLE:
        v = tl.load(x + at, inside, other=0.0).to(S)
        shift = tl.sum(v, axis=1) * inverse
        d = tl.where(inside, v - shift[:, None], 0.0)
        s1 = tl.sum(d, axis=1)
        s2 = tl.sum(d * d, axis=1)
    else:
        total = tl.zeros((P, B), S)
        for j in range(0, C, B):
            at, inside = span(begin, exist, c + j, step, C)
            total += tl.load(x + at, inside, other=0.0).to(S)
        shift = tl.sum(total, axis=1) * inverse
        d1 = tl.zeros((P, B), S)
        d2 = tl.zeros((P, B), S)
        for j in range(0, C, B):
            at, inside = span(begin, exist, c + j, step, C)
            d = tl.where(inside, tl.load(x + at, inside, other=0.0).to(S) - shift[:, None], 0.0)
            d1 += d
            d2 = tl.fma(d, d, d2)
        s1 = tl.sum(d1, axis=1)
        s2 = tl.sum(d2, axis=1)
    # The shift is the mean less what its sum and its product lost in rounding.
    lost = s1 * inverse
    var = (s2 - s1 * lost) * inverse
    var = tl.where(var <= 0.0, 0.0, var)
    r = tl.rsqrt((var + eps).to(S))
    tl.store(mean + line, shift + lost, exist)
    tl.store(rstd + line, r, exist)
    offset = (-lost * r)[:, None]
    if WHOLE:
        xhat = tl.fma(v - shift[:, None], r[:, None], offset)
        out = tl.fma(xhat, parameter(weight, c, C, 1.0, S), parameter(bias, c, C, 0.0, S))
        tl.store(y + at, out.to(y.dtype.element_ty), inside)
    else:
        for j in range(0, C, B):
            at, inside = span(begin, exist, c + j, step, C)
            v = tl.load(x + at, inside, other=0.0).to(S)
            xhat = tl.fma(v - shift[:, None], r[:, None], offset)
            out = tl.fma(xhat, parameter(weight, c + j, C, 1.0, S), parameter(bias, c + j, C, 0.0, S))
            tl.store(y + at, out.to(y.dtype.element_ty), inside)


@triton.jit
def normalized(dy, x, at, inside, m, r, S: tl.constexpr):
    """dy and xhat of a tile, both 0 outside of it."""
    g = tl.load(dy + at, inside, other=0.0).to(S)
    v = tl.load(x + at, inside, other=0.0).to(S)
    return g, tl.where(inside, (v - m[:, None]) * r[:, None], 0.0)


@Tunable
@triton.jit(do_not_specialize=["pixels", "C", "units"])
def gradient_sums_kernel(
    dy,
    x,
    sums,
    mean,
    rstd,
    weight,
    lines,
    pixels,
    C,
    units,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    P: tl.constexpr,
    B: tl.constexpr,
):
    """sums (2, lines): sum(g) and sum(g * xhat) of lines that are longer than a tile."""
    S: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    pixels, C = sizes_of(pixels, C, units, UNIT, ROWS)
    line, exist, begin, step = lines_of(tl.program_id(0), pixels, C, ROWS, P)
    m = tl.load(mean + line, exist, other=0.0)
    r = tl.load(rstd + line, exist, other=0.0)
    s1 = tl.zeros((P, B), S)
    s2 = tl.zeros((P, B), S)
    for j in range(0, C, B):
        c = j + tl.arange(0, B)
        at, inside = span(begin, exist, c, step, C)
        g, xhat = normalized(dy, x, at, inside, m, r, S)
        g = g * parameter(weight, c, C, 1.0, S)
        s1 += g
        s2 = tl.fma(g, xhat, s2)
    tl.store(sums + line, tl.sum(s1, axis=1), exist)
    tl.store(sums + lines + line, tl.sum(s2, axis=1), exist)


@Tunable
@triton.jit(do_not_specialize=["lines", "tiles", "chunk", "pixels", "C", "units"])
def gradient_kernel(
    dy,
    x,
    dx,
    dweight,
    dbias,
    sums,
    mean,
    rstd,
    weight,
    lines,
    tiles,
    chunk,
    pixels,
    C,
    units,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    P: tl.constexpr,
    B: tl.constexpr,
):
    """dx, and dweight and dbias (chunks, C) of each chunk of tiles; sums is None where a line fits into a tile."""
    S: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    pixels, C = sizes_of(pixels, C, units, UNIT, ROWS)
    blocks = (C + B - 1) // B
    k = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * B + tl.arange(0, B)
    w = parameter(weight, c, C, 1.0, S)
    n = tl.cast(C, S)
    dw = tl.zeros((P, B), S)
    db = tl.zeros((P, B), S)
    for t in range(k * chunk, tl.minimum(k * chunk + chunk, tiles)):
        line, exist, begin, step = lines_of(t, pixels, C, ROWS, P)
        m = tl.load(mean + line, exist, other=0.0)
        r = tl.load(rstd + line, exist, other=0.0)
        at, inside = span(begin, exist, c, step, C)
        g, xhat = normalized(dy, x, at, inside, m, r, S)
        dw = tl.fma(g, xhat, dw)
        db += g
        if dx is not None:
            g = g * w
            if sums is None:
                s1 = tl.sum(g, axis=1)
                s2 = tl.sum(g * xhat, axis=1)
            else:
                s1 = tl.load(sums + line, exist, other=0.0)
                s2 = tl.load(sums + lines + line, exist, other=0.0)
            out = (tl.fma(-xhat, (s2 / n)[:, None], g) - (s1 / n)[:, None]) * r[:, None]
            tl.store(dx + at, out.to(dx.dtype.element_ty), inside)
    p = tl.cast(k, tl.int64) * C + c
    if dweight is not None:
        tl.store(dweight + p, tl.sum(dw.to(tl.float64), axis=0), c < C)
    if dbias is not None:
        tl.store(dbias + p, tl.sum(db.to(tl.float64), axis=0), c < C)


class Lines(NamedTuple):
    """How a tensor (images, C, pixels), of planes, or (pixels, C), of rows, is cut into tiles of P lines by B."""

    rows: bool
    images: int
    pixels: int
    C: int
    unit: int  # a power of two that divides the length of what is dense: a constant, which tells the alignment
    P: int
    B: int

    @property
    def whole(self) -> bool:
        return self.B >= self.C

    @property
    def tiles(self) -> int:
        return self.images * triton.cdiv(self.pixels, self.P)

    @property
    def chunk(self) -> int:
        return min(max(self.tiles * triton.cdiv(self.C, self.B) // layout.PROGRAMS, 1), layout.MAX_CHUNK)

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.pixels, self.C, (self.C if self.rows else self.pixels) // self.unit

    @property
    def constants(self) -> dict[str, int | bool]:
        # At most 16 elements of a tensor a thread, of which a gradient has five in registers.
        warps = min(max(self.P * self.B // 512, 4), 16)
        return {"UNIT": self.unit, "ROWS": self.rows, "P": self.P, "B": self.B, "num_warps": warps}

    @classmethod
    def of(cls, images: int, C: int, pixels: int, rows: bool) -> "Lines":
        most = 4 * layout.TILE  # elements of a tile, for the sake of reading a line once
        if rows:
            B = ceil_power(C) if most >= C else layout.TILE
            P = min(max(layout.TILE // B, 1), ceil_power(pixels))
        else:
            P = min(layout.PIXELS, ceil_power(pixels))
            if P * ceil_power(C) > most:
                P = min(layout.PIXELS // 2, P)
            B = ceil_power(C) if P * ceil_power(C) <= most else max(layout.TILE // P, 1)
        dense = C if rows else pixels
        return cls(rows, images, pixels, C, min(dense & -dense, 16), P, B)


def forward(
    x: Tensor,
    lines: Lines,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    shape: Sequence[int],
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and rstd of the given shape."""
    y = torch.empty_like(x, dtype=check.wide_type(x) if wide else x.dtype)
    mean = x.new_empty(shape, dtype=check.wide_type(x))
    rstd = torch.empty_like(mean)
    if x.numel() == 0:
        return y, mean.zero_(), rstd.fill_(1)
    with on_device_of(x):
        normalize_kernel[(lines.tiles,)](
            x, y, mean, rstd, weight, bias, eps, *lines.sizes, WHOLE=lines.whole, **lines.constants
        )
    return y, mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    lines: Lines,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    parameter_shape: Sequence[int],
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias; of no elements where `output_mask` is False."""
    dx = torch.empty_like(x) if output_mask[0] else x.new_empty(0)
    wanted = ((output_mask[1], weight), (output_mask[2], bias))
    parameters = [check.parameter_gradient(wants, v, parameter_shape, x) for wants, v in wanted]
    if x.numel() == 0:
        return dx, *(g.zero_() for g in parameters)
    if not any(output_mask):
        return dx, *parameters
    chunks, C, total = triton.cdiv(lines.tiles, lines.chunk), lines.C, lines.images * lines.pixels
    partial = [x.new_empty((chunks, C), dtype=torch.float64) if wants else None for wants, _ in wanted]
    weight = None if weight is None else weight.contiguous()
    sums = mean.new_empty((2, total)) if output_mask[0] and not lines.whole else None
    with on_device_of(x):
        if sums is not None:
            gradient_sums_kernel[(lines.tiles,)](
                dy, x, sums, mean, rstd, weight, total, *lines.sizes, **lines.constants
            )
        gradient_kernel[(chunks * triton.cdiv(C, lines.B),)](
            dy,
            x,
            dx if output_mask[0] else None,
            *partial,
            sums,
            mean,
            rstd,
            weight,
            total,
            lines.tiles,
            lines.chunk,
            *lines.sizes,
            **lines.constants,
        )
        for part, g in zip(partial, parameters, strict=True):
            if part is not None:
                sum_chunks(part, g)
    return dx, *parameters
