"""Max pooling, by PyTorch's operators."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cnnkern.triton_kernels import check
from cnnkern.triton_kernels.layout import (
    in_layout_of,
)
from cnnkern.triton_kernels.pooling import check_max_pool2d, check_max_pool2d_backward


def _corners(y: Tensor, stride: Sequence[int], padding: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Row and column where each window begins."""
    rows, columns = (torch.arange(n, device=y.device) for n in y.shape[2:])
    return (rows * stride[0] - padding[0])[:, None], columns * stride[1] - padding[1]


def max_pool2d(x, kernel_size, stride, padding, ceil_mode):
    check_max_pool2d("cnnkern::max_pool2d", x, kernel_size, stride, padding, ceil_mode)
    y, indices = torch.ops.aten.max_pool2d_with_indices(x, kernel_size, stride, padding, 1, ceil_mode)
    top, left = _corners(y, stride, padding)
    positions = (indices // x.shape[3] - top) * kernel_size[1] + indices % x.shape[3] - left
    return y, in_layout_of(positions.to(torch.uint8), y)


def max_pool2d_backward(dy, positions, size, kernel_size, stride, padding, channels_last):
    check_max_pool2d_backward("cnnkern::max_pool2d_backward", dy, positions, size, kernel_size, stride, padding)
    top, left = _corners(dy, stride, padding)
    at = positions.long()
    indices = (top + at // kernel_size[1]) * size[1] + left + at % kernel_size[1]
    dx = dy.new_zeros((*dy.shape[:2], size[0] * size[1]), dtype=check.wide_type(dy))
    dx = dx.scatter_add_(2, indices.flatten(2), dy.to(dx.dtype).flatten(2)).view(*dy.shape[:2], *size)
    return dx.to(dy.dtype).contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
