# add_relu: y = relu(x + residual). Backward: dx = dresidual = dy * [y > 0].
# [y > 0] is saved as one bit per element, in the order of memory, and nothing else.
# Traffic in tensors read or written: 3 forward, 2 backward. A program owns a stretch of memory and its bytes of the
# mask.
"""add_relu and add_relu_backward of csrc/ops.cpp in Triton."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from cnnkern.triton_kernels import check, layout
from cnnkern.triton_kernels.activations import act_value, rounds_to_zero
from cnnkern.triton_kernels.bits import above, grid_of, packed, stretch, unpacked
from cnnkern.triton_kernels.layout import (
    densely,
    empty_strided_like,
    mask_bytes,
    on_device_of,
    strides_in_order,
    strides_of_sum,
)
from cnnkern.triton_kernels.tuning import Tunable
from torch import Tensor


@Tunable
@triton.jit
def add_relu_kernel(x, residual, y, mask, numel, size, BYTES: tl.constexpr):
    S: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    byte, at, inside = stretch(numel, BYTES)
    v = tl.load(x + at, inside, other=0.0).to(S) + tl.load(residual + at, inside, other=0.0).to(S)
    tl.store(y + at, act_value(v, 0.0, "relu").to(y.dtype.element_ty), inside)
    tl.store(mask + byte, packed(above(v, rounds_to_zero(x.dtype.element_ty))), byte < size)


@Tunable
@triton.jit
def add_relu_backward_kernel(dy, mask, dx, numel, BYTES: tl.constexpr):
    byte, at, inside = stretch(numel, BYTES)
    bits = tl.load(mask + byte, byte * 8 < numel, other=0).to(tl.int32)
    g = tl.load(dy + at, inside, other=0.0)
    tl.store(dx + at, tl.where(unpacked(bits), g, 0.0), inside)


def add_relu(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """y and the mask, as the schema in csrc/ops.cpp has it."""
    check.floating("cnnkern::add_relu", x)
    check.same_shape("cnnkern::add_relu", "residual", residual, x)
    strides = strides_of_sum(x, residual, "relu")  # in which memory is read from end to end
    x, residual = densely(x, strides), densely(residual, strides)
    y = empty_strided_like(x, strides)
    mask = x.new_empty(mask_bytes(x.numel()), dtype=torch.uint8)
    with on_device_of(x):
        add_relu_kernel[grid_of(x.numel())](x, residual, y, mask, x.numel(), mask.numel(), BYTES=layout.TILE // 8)
    return y, mask


def add_relu_backward(dy: Tensor, mask: Tensor, order: Sequence[int]) -> Tensor:
    """dx, as the schema in csrc/ops.cpp has it."""
    check.floating("cnnkern::add_relu_backward", dy)
    check.mask("cnnkern::add_relu_backward", mask, mask_bytes(dy.numel()), dy)
    check.order("cnnkern::add_relu_backward", order, dy)
    strides = strides_in_order(dy.shape, order)
    dy, dx = densely(dy, strides), empty_strided_like(dy, strides)
    with on_device_of(dy):
        add_relu_backward_kernel[grid_of(dy.numel())](dy, mask, dx, dy.numel(), BYTES=layout.TILE // 8)
    return dx
