"""The requirements on max pooling's inputs, and its sizes, as csrc/pooling.h has them."""

from collections.abc import Sequence

import torch
from cnnkern.triton_kernels.check import floating, type_name
from torch import Tensor

WINDOW = 256  # elements of a window of max_pool2d at most, whose positions fit a byte


def _image(op: str, sizes: Sequence[int]) -> None:
    if len(sizes) != 4 or 0 in sizes[1:]:
        raise RuntimeError(
            f"{op}: expected an input of 4 dimensions (N, C, H, W), of which only the first may be 0; got {list(sizes)}"
        )
    if sizes[1] * sizes[2] * sizes[3] >= 2**31:
        raise RuntimeError(f"{op}: expected images of fewer than 2^31 elements; got {list(sizes)}")


def _window(op: str, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> None:
    if not len(kernel) == len(stride) == len(padding) == 2:
        raise RuntimeError(
            f"{op}: kernel_size, stride and padding must be two numbers each; "
            f"got {list(kernel)}, {list(stride)} and {list(padding)}"
        )
    if min(kernel) < 1 or kernel[0] * kernel[1] > WINDOW:
        raise RuntimeError(
            f"{op}: kernel_size must be greater than zero, and a window have at most {WINDOW} elements; "
            f"got kernel_size {list(kernel)}"
        )
    if not 1 <= min(stride) <= max(stride) <= 2**30:
        raise RuntimeError(f"{op}: stride must be from 1 to 2^30; got stride {list(stride)}")
    if any(not 0 <= p <= k // 2 for p, k in zip(padding, kernel, strict=True)):
        raise RuntimeError(
            f"{op}: padding must be from 0 to half of the kernel; got padding {list(padding)} "
            f"and kernel_size {list(kernel)}"
        )


def _windows(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """Along one dimension. The last begins within the input or the padding before it."""
    windows = (size + 2 * padding - kernel + (stride - 1 if ceil_mode else 0)) // stride + 1
    return max(windows - 1 if ceil_mode and (windows - 1) * stride >= size + padding else windows, 0)


def check_max_pool2d(
    op: str, x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool
) -> tuple[int, ...]:
    """Height and width of the output."""
    floating(op, x)
    _image(op, x.shape)
    _window(op, kernel, stride, padding)
    along = zip(x.shape[2:], kernel, stride, padding, strict=True)
    windows = tuple(_windows(*dimension, ceil_mode) for dimension in along)
    if 0 in windows:
        raise RuntimeError(
            f"{op}: output size is too small: an input of {list(x.shape)} with kernel_size {list(kernel)}, stride "
            f"{list(stride)} and padding {list(padding)} has no window; the padded input must have room for one"
        )
    return windows


def check_max_pool2d_backward(
    op: str,
    dy: Tensor,
    positions: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> None:
    floating(op, dy)
    _window(op, kernel, stride, padding)
    if dy.dim() != 4 or len(size) != 2:
        raise RuntimeError(
            f"{op}: expected dy of 4 dimensions (N, C, H, W), and of x two sizes; got {list(dy.shape)} and {list(size)}"
        )
    _image(op, (*dy.shape[:2], *size))
    along = zip(size, kernel, stride, padding, strict=True)
    fit = [(_windows(*dimension, False), _windows(*dimension, True)) for dimension in along]
    if any(n not in both for n, both in zip(dy.shape[2:], fit, strict=True)):
        raise RuntimeError(
            f"{op}: dy must have the output's shape for an input of {list(size)}, kernel_size {list(kernel)}, stride "
            f"{list(stride)} and padding {list(padding)}; got {list(dy.shape)}"
        )
    if positions.shape != dy.shape or positions.dtype != torch.uint8 or positions.device != dy.device:
        raise RuntimeError(
            f"{op}: positions must be those that the forward operator returned: uint8 {list(dy.shape)} on {dy.device}; "
            f"got {type_name(positions)} {list(positions.shape)} on {positions.device}"
        )
