"""Residual addition with ReLU, by PyTorch's operators."""

from collections.abc import Sequence

import torch

from cnnkern.eager.tensors import packed, unpacked
from cnnkern.triton_kernels import check
from cnnkern.triton_kernels.layout import (
    empty_strided_like,
    mask_bytes,
    strides_in_order,
)


def add_relu(x, residual):
    check.floating("cnnkern::add_relu", x)
    check.same_shape("cnnkern::add_relu", "residual", residual, x)
    y = torch.relu(x + residual)
    return y, packed(y)


def add_relu_backward(dy, mask, order: Sequence[int]):
    check.floating("cnnkern::add_relu_backward", dy)
    check.mask("cnnkern::add_relu_backward", mask, mask_bytes(dy.numel()), dy)
    check.order("cnnkern::add_relu_backward", order, dy)
    strides = strides_in_order(dy.shape, order)
    dx = empty_strided_like(dy, strides)
    return dx.copy_(torch.where(unpacked(mask, dy, strides), dy, 0))
