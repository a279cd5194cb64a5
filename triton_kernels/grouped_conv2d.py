# grouped_conv2d: y = conv2d(x, weight, bias), as many output as input channels per group. Backward: dx, dweight, dbias.
# A tile is P pixels of an image by B channels. Depthwise: fused multiply-adds, tap by tap. Groups of several channels:
# a product of matrices (P, B) x (B, B) a tap, the second block-diagonal, of as many groups as fit into 16 channels, or
# of one group. Both memory layouts by strides; the gradient of the input is the same sum over dy, with the taps'
# positions solved for the pixel of y.
# Traffic in tensors read or written: 2 forward, 4 backward, while the caches hold what neighbouring taps share.
# Accumulators: fp32 (fp64 for fp64). The gradient of the weight is summed over at most 16 tiles, then in fp64 over
# chunks, in their order: no atomics, so reruns are bit-equal.
"""grouped_conv2d and grouped_conv2d_backward of csrc/ops.cpp in Triton."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from cnnkern.triton_kernels import layout
from cnnkern.triton_kernels.layout import ceil_power, dense, in_layout, on_device_of
from cnnkern.triton_kernels.reduce import sum_chunks
from cnnkern.triton_kernels.tuning import Tunable
from torch import Tensor

WIDEST = 64  # channels per group; wider ones are products that cuDNN is made for
LONGEST = 31  # rows or columns of a kernel


@triton.jit
def source(o, tap, size, pad, STRIDE: tl.constexpr, DILATION: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Where the tap of an output lies among `size` inputs, and whether it does. TRANSPOSED: of y, for a pixel of x."""
    if TRANSPOSED:
        p = o + pad - tap * DILATION
        return p // STRIDE, (p >= 0) & (p % STRIDE == 0) & (p // STRIDE < size)
    else:
        p = o * STRIDE - pad + tap * DILATION
        return p, (p >= 0) & (p < size)


@triton.jit
def channels_of(block, C, WIDTH: tl.constexpr, B: tl.constexpr):
    """A block's channels (B,), and which of them exist: whole groups, of one channel each if depthwise."""
    used: tl.constexpr = B // WIDTH * WIDTH
    i = tl.arange(0, B)
    return block * used + i, (i < used) & (block * used + i < C)


@triton.jit
def pixels_of(t, pixels, columns, P: tl.constexpr):
    """Tile t of the images: the image, pixels (P,) by number, row and column, and which of them exist."""
    tiles = (pixels + P - 1) // P
    q = t % tiles * P + tl.arange(0, P)
    return tl.cast(t // tiles, tl.int64), q, q // columns, q % columns, q < pixels


@triton.jit
def offsets(n, q, c, C, pixels, ROWS: tl.constexpr):
    """Of pixels q and channels c of image n, (P, B)."""
    if ROWS:
        return n * pixels * C + q.to(tl.int64)[:, None] * C + c[None, :]
    else:
        return n * pixels * C + c.to(tl.int64)[None, :] * pixels + q[:, None]


@Tunable
@triton.jit(do_not_specialize=["tiles", "H", "W", "OH", "OW", "ph", "pw"])
def convolution_kernel(
    x,
    weight,
    bias,
    y,
    tiles,
    C,
    H,
    W,
    OH,
    OW,
    ph,
    pw,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    WIDTH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    P: tl.constexpr,
    B: tl.constexpr,
):
    """y (N, C, OH, OW) from x (N, C, H, W); TRANSPOSED, x is the gradient of the output and y that of the input."""
    S: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    if ROWS:  # neighbouring programs share lines of the cache: of the same pixels, or of the same plane
        blocks = tl.num_programs(0) // tiles
        t, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    else:
        t, block = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    n, q, oh, ow, exist = pixels_of(t, OH * OW, OW, P)
    c, there = channels_of(block, C, WIDTH, B)
    if WIDTH > 1:
        # Rows are channels of x, columns of y; weight is (C, WIDTH, KH, KW), its first index that of the forward's y.
        i = tl.arange(0, B)
        same = (i[:, None] // WIDTH == i[None, :] // WIDTH) & there[:, None] & there[None, :]
        if TRANSPOSED:
            first = (c[:, None] * WIDTH + (i % WIDTH)[None, :]) * (KH * KW)
        else:
            first = (c[None, :] * WIDTH + (i % WIDTH)[:, None]) * (KH * KW)
    total = tl.zeros((P, B), S)
    for kh in range(KH):
        h, row = source(oh, kh, H, ph, SH, DH, TRANSPOSED)
        for kw in tl.static_range(KW):
            w, column = source(ow, kw, W, pw, SW, DW, TRANSPOSED)
            inside = (exist & row & column)[:, None] & there[None, :]
            v = tl.load(x + offsets(n, h * W + w, c, C, H * W, ROWS), inside, other=0.0)
            if WIDTH == 1:
                tap = tl.load(weight + c * (KH * KW) + kh * KW + kw, there, other=0.0).to(S)
                total = tl.fma(v.to(S), tl.broadcast_to(tap[None, :], (P, B)), total)
            else:
                tap = tl.load(weight + first + kh * KW + kw, same, other=0.0)
                total = tl.dot(v, tap, total, input_precision="ieee", out_dtype=S)
    if bias is not None:
        total += tl.load(bias + c, there, other=0.0).to(S)[None, :]
    tl.store(y + offsets(n, q, c, C, OH * OW, ROWS), total.to(y.dtype.element_ty), exist[:, None] & there[None, :])


@Tunable
@triton.jit(do_not_specialize=["tiles", "chunk", "H", "W", "OH", "OW", "ph", "pw"])
def weight_gradient_kernel(
    dy,
    x,
    dweight,
    dbias,
    tiles,
    chunk,
    C,
    H,
    W,
    OH,
    OW,
    ph,
    pw,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    P: tl.constexpr,
    B: tl.constexpr,
):
    """dweight (chunks, C * WIDTH * KH * KW) and dbias (chunks, C) of each chunk of tiles, where they are wanted."""
    S: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    blocks = (C + B // WIDTH * WIDTH - 1) // (B // WIDTH * WIDTH)
    k = tl.program_id(0) // blocks
    c, there = channels_of(tl.program_id(0) % blocks, C, WIDTH, B)
    end = tl.minimum(k * chunk + chunk, tiles)
    if dbias is not None:
        of_dy = tl.zeros((P, B), S)
        for t in range(k * chunk, end):
            n, q, _, _, exist = pixels_of(t, OH * OW, OW, P)
            inside = exist[:, None] & there[None, :]
            of_dy += tl.load(dy + offsets(n, q, c, C, OH * OW, ROWS), inside, other=0.0).to(S)
        tl.store(dbias + tl.cast(k, tl.int64) * C + c, tl.sum(of_dy.to(tl.float64), axis=0), there)
    if dweight is not None:
        i = tl.arange(0, B)
        out = dweight + tl.cast(k, tl.int64) * C * (WIDTH * KH * KW)
        for tap in range(KH * KW):
            total = tl.zeros((P if WIDTH == 1 else B, B), S)
            for t in range(k * chunk, end):
                n, q, oh, ow, exist = pixels_of(t, OH * OW, OW, P)
                h, row = source(oh, tap // KW, H, ph, SH, DH, False)
                w, column = source(ow, tap % KW, W, pw, SW, DW, False)
                inside = (exist & row & column)[:, None] & there[None, :]
                g = tl.load(dy + offsets(n, q, c, C, OH * OW, ROWS), inside, other=0.0)
                v = tl.load(x + offsets(n, h * W + w, c, C, H * W, ROWS), inside, other=0.0)
                if WIDTH == 1:
                    total = tl.fma(g.to(S), v.to(S), total)
                else:
                    total = tl.dot(tl.trans(g), v, total, input_precision="ieee", out_dtype=S)
            if WIDTH == 1:
                tl.store(out + c * (KH * KW) + tap, tl.sum(total.to(tl.float64), axis=0), there)
            else:
                same = (i[:, None] // WIDTH == i[None, :] // WIDTH) & there[:, None] & there[None, :]
                at = (c[:, None] * WIDTH + (i % WIDTH)[None, :]) * (KH * KW) + tap
                tl.store(out + at, total.to(tl.float64), same)


class Geometry(NamedTuple):
    """A convolution of N images."""

    N: int
    C: int
    H: int
    W: int
    OH: int
    OW: int
    padding: tuple[int, int]
    taps: dict[str, int]  # kernel, stride, dilation and width: constants of the kernels

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, stride, padding, dilation) -> "Geometry":
        N, C, H, W = x.shape
        _, width, KH, KW = weight.shape
        out = [
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, p, d, k, s in zip((H, W), padding, dilation, (KH, KW), stride, strict=True)
        ]
        names = ("KH", "KW", "SH", "SW", "DH", "DW", "WIDTH")
        taps = dict(zip(names, (KH, KW, *stride, *dilation, width), strict=True))
        return cls(N, C, H, W, *out, tuple(padding), taps)

    def tile(self, pixels: int, rows: bool) -> dict[str, int | bool]:
        """P pixels by B channels. Depthwise: whole cache lines of channels in rows, of pixels in planes first."""
        width, wanted = self.taps["WIDTH"], ceil_power(pixels)
        if width > 1:
            B = max(16, ceil_power(width))
            P = max(min(layout.TILE // 32, wanted), 16)
        elif rows:
            B = min(ceil_power(self.C), layout.CHANNELS)
            P = min(max(layout.TILE // 2 // B, 1), wanted)
        else:
            P = min(layout.TILE // 2, wanted)
            B = min(ceil_power(self.C), layout.TILE // 2 // P)
        return {"ROWS": rows, "P": P, "B": B}

    def blocks(self, B: int) -> int:
        width = self.taps["WIDTH"]
        return triton.cdiv(self.C, B // width * width)


def covered(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups: int) -> bool:
    """Whether the kernels of this file answer; ATen's convolution does for everything else, errors included.

    They do for float32, float64, bfloat16 and float16, all tensors alike; as many output as input channels, at least
    two groups, of up to 64 channels; kernels of up to 31x31; any stride, padding and dilation; images that are not
    empty.
    """
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if x.dim() != 4 or weight.dim() != 4 or {len(stride), len(padding), len(dilation)} != {2}:
        return False
    if x.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return False
    if any(t.dtype != x.dtype or t.device != x.device for t in tensors):
        return False
    C, width, kernel = x.shape[1], weight.shape[1], weight.shape[2:]
    if groups < 2 or x.numel() == 0 or weight.shape[0] != C or width * groups != C or not 1 <= width <= WIDEST:
        return False
    if bias is not None and bias.shape != (C,):
        return False
    if min(kernel) < 1 or max(kernel) > LONGEST or min(*stride, *dilation) < 1 or min(padding) < 0:
        return False
    sizes = zip(x.shape[2:], kernel, padding, dilation, strict=True)
    return all(size + 2 * p >= d * (k - 1) + 1 for size, k, p, d in sizes)


def _format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """Of results, chosen as ATen's convolutions choose it."""
    suggested = torch._prims_common.suggest_memory_format
    either = torch.channels_last in (suggested(x), suggested(weight))
    return torch.channels_last if either else torch.contiguous_format


def _in_rows(t: Tensor) -> bool:
    return not t.is_contiguous()


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, g: Geometry, transposed: bool) -> None:
    """x and y have one memory layout."""
    rows = _in_rows(y)
    tile = g.tile(y.shape[2] * y.shape[3], rows)
    tiles = g.N * triton.cdiv(y.shape[2] * y.shape[3], tile["P"])
    convolution_kernel[(tiles * g.blocks(tile["B"]),)](
        *(x, weight, bias, y, tiles, g.C, *x.shape[2:], *y.shape[2:], *g.padding),
        **g.taps,
        TRANSPOSED=transposed,
        **tile,
    )


def grouped_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """y, as the schema in csrc/ops.cpp has it."""
    if not covered(x, weight, bias, stride, padding, dilation, groups):
        return torch.ops.aten.convolution(x, weight, bias, stride, padding, dilation, False, (0, 0), groups)
    g = Geometry.of(x, weight, stride, padding, dilation)
    y = torch.empty((g.N, g.C, g.OH, g.OW), dtype=x.dtype, device=x.device, memory_format=_format(x, weight))
    with on_device_of(x):
        _convolve(_like(x, y), weight.contiguous(), dense(bias), y, g, transposed=False)
    return y


def _like(x: Tensor, y: Tensor) -> Tensor:
    """x in the memory layout of y, which is its own but for mixed layouts of image and weight."""
    return x.contiguous(memory_format=torch.channels_last if _in_rows(y) else torch.contiguous_format)


def grouped_conv2d_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias as the schema in csrc/ops.cpp has it; of no elements where `output_mask` is False."""
    none = x.new_empty(0)
    if not covered(x, weight, None, stride, padding, dilation, groups):
        grads = torch.ops.aten.convolution_backward(
            dy, x, weight, [weight.shape[0]], stride, padding, dilation, False, (0, 0), groups, list(output_mask)
        )
        return tuple(g if wanted else none for g, wanted in zip(grads, output_mask, strict=True))
    g = Geometry.of(x, weight, stride, padding, dilation)
    if dy.shape != (g.N, g.C, g.OH, g.OW) or dy.dtype != x.dtype or dy.device != x.device:
        raise RuntimeError(
            f"cnnkern::grouped_conv2d_backward: dy must be {x.dtype} {[g.N, g.C, g.OH, g.OW]} on {x.device} like the "
            f"forward pass's output; got {dy.dtype} {list(dy.shape)} on {dy.device}"
        )
    memory_format = _format(x, weight)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format) if output_mask[0] else none
    dweight = torch.empty_like(weight, memory_format=memory_format) if output_mask[1] else none
    dbias = x.new_empty(g.C) if output_mask[2] else none
    with on_device_of(x):
        if output_mask[0]:
            _convolve(_like(dy, dx), weight.contiguous(), None, dx, g, transposed=True)
        if output_mask[1] or output_mask[2]:
            x = in_layout(x)
            _sum_weight_gradient(_like(dy, x), x, dweight, dbias, g, output_mask)
    return dx, dweight, dbias


def _sum_weight_gradient(
    dy: Tensor, x: Tensor, dweight: Tensor, dbias: Tensor, g: Geometry, output_mask: Sequence[bool]
) -> None:
    """x and dy have one memory layout."""
    tile = g.tile(g.OH * g.OW, _in_rows(x))
    tiles, blocks = g.N * triton.cdiv(g.OH * g.OW, tile["P"]), g.blocks(tile["B"])
    chunk = min(max(tiles * blocks // layout.PROGRAMS, 1), layout.MAX_CHUNK)
    chunks = triton.cdiv(tiles, chunk)
    wide = {"dtype": torch.float64, "device": x.device}
    sums = torch.empty((chunks, dweight.numel()), **wide) if output_mask[1] else None
    bias_sums = torch.empty((chunks, g.C), **wide) if output_mask[2] else None
    weight_gradient_kernel[(chunks * blocks,)](
        *(dy, x, sums, bias_sums, tiles, chunk, g.C, g.H, g.W, g.OH, g.OW, *g.padding), **g.taps, **tile
    )
    if sums is not None:
        if dweight.is_contiguous():
            sum_chunks(sums, dweight)
        else:
            contiguous = torch.empty_like(dweight, memory_format=torch.contiguous_format)
            sum_chunks(sums, contiguous)
            dweight.copy_(contiguous)
    if bias_sums is not None:
        sum_chunks(bias_sums, dbias)
