# max_pool2d: y is the maximum of each window of x, and a byte beside each y its position there, counted row by row.
# Backward: dx of a pixel is the sum of dy over the windows whose position is this pixel, in the order of the windows.
# A program owns a stretch of one image of y, or of dx. A contiguous tensor is N * C images of one channel.
# Traffic: x, y and a byte per output forward; dy, that byte and dx backward.
"""max_pool2d and max_pool2d_backward of csrc/ops.cpp in Triton."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from cnnkern.triton_kernels.layout import on_device_of
from cnnkern.triton_kernels.pooling import check_max_pool2d, check_max_pool2d_backward
from cnnkern.triton_kernels.tuning import Tunable
from torch import Tensor

TILE = 512  # elements of a program


@triton.jit
def _stretch(C, columns, lines, TILE: tl.constexpr):
    """The image of a program, and of its elements: number in the image, channel, column, row, whether they exist."""
    tiles = tl.cdiv(lines * columns * C, TILE)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    at = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    pixel = at // C
    return image, at, at % C, pixel % columns, pixel // columns, at < lines * columns * C


@Tunable
@triton.jit
def max_pool2d_kernel(
    x,
    y,
    positions,
    C,
    H,
    W,
    OH,
    OW,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TILE: tl.constexpr,
):
    S: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    image, at, c, ow, oh, inside = _stretch(C, OW, OH, TILE)
    top, left = oh * SH - PH, ow * SW - PW
    largest = tl.full((TILE,), float("-inf"), S)
    position = tl.maximum(-top, 0) * KW + tl.maximum(-left, 0)  # the first that is there
    for ky in range(KH):
        for kx in range(KW):
            h, w = top + ky, left + kx
            there = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            v = tl.load(x + image * H * W * C + (h * W + w) * C + c, there, other=float("-inf")).to(S)
            larger = (v > largest) | (v != v)
            largest = tl.where(larger, v, largest)
            position = tl.where(larger, ky * KW + kx, position)
    out = image * OH * OW * C + at
    tl.store(y + out, largest.to(y.dtype.element_ty), inside)
    tl.store(positions + out, position.to(tl.uint8), inside)


@Tunable
@triton.jit
def max_pool2d_backward_kernel(
    dy,
    positions,
    dx,
    C,
    H,
    W,
    OH,
    OW,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TILE: tl.constexpr,
):
    S: tl.constexpr = tl.float64 if dx.dtype.element_ty == tl.float64 else tl.float32
    DOWN: tl.constexpr = (KH - 1) // SH + 1  # windows along one dimension that a pixel may be in
    ACROSS: tl.constexpr = (KW - 1) // SW + 1
    image, at, c, w, h, inside = _stretch(C, W, H, TILE)
    total = tl.zeros((TILE,), S)
    for down in range(DOWN):
        oh = (h + PH) // SH - (DOWN - 1) + down
        ky = h + PH - oh * SH
        for across in range(ACROSS):
            ow = (w + PW) // SW - (ACROSS - 1) + across
            kx = w + PW - ow * SW
            there = inside & (oh >= 0) & (oh < OH) & (ky < KH) & (ow >= 0) & (ow < OW) & (kx < KW)
            of = image * OH * OW * C + (oh * OW + ow) * C + c
            found = there & (tl.load(positions + of, there, other=0).to(tl.int32) == ky * KW + kx)
            total += tl.load(dy + of, found, other=0.0).to(S)
    tl.store(dx + image * H * W * C + at, total.to(dx.dtype.element_ty), inside)


def max_pool2d(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    """y and the positions, as the schema in csrc/ops.cpp has it."""
    windows = check_max_pool2d("cnnkern::max_pool2d", x, kernel_size, stride, padding, ceil_mode)
    memory_format = torch._prims_common.suggest_memory_format(x)
    shape = (*x.shape[:2], *windows)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
    positions = torch.empty(shape, dtype=torch.uint8, device=x.device, memory_format=memory_format)
    x = x.contiguous(memory_format=memory_format)
    _launch(max_pool2d_kernel, (x, y, positions), y, x, y, kernel_size, stride, padding)
    return y, positions


def max_pool2d_backward(
    dy: Tensor,
    positions: Tensor,
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    channels_last: bool,
) -> Tensor:
    """dx, as the schema in csrc/ops.cpp has it."""
    check_max_pool2d_backward("cnnkern::max_pool2d_backward", dy, positions, size, kernel_size, stride, padding)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    dx = torch.empty((*dy.shape[:2], *size), dtype=dy.dtype, device=dy.device, memory_format=memory_format)
    dy, positions = (t.contiguous(memory_format=memory_format) for t in (dy, positions))
    _launch(max_pool2d_backward_kernel, (dy, positions, dx), dx, dx, dy, kernel_size, stride, padding)
    return dx


def _launch(
    kernel: Tunable,
    tensors: tuple[Tensor, ...],
    written: Tensor,
    x: Tensor,
    y: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> None:
    """x and y: with the sizes of those, in one memory format."""
    if written.numel() == 0:
        return
    images, channels = (x.shape[0] * x.shape[1], 1) if x.is_contiguous() else (x.shape[0], x.shape[1])
    programs = images * triton.cdiv(written.numel() // images, TILE)
    sizes = (channels, *x.shape[2:], *y.shape[2:])
    with on_device_of(written):
        kernel[(programs,)](*tensors, *sizes, *stride, *padding, *kernel_size, TILE=TILE)
