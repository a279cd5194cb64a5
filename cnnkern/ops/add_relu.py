"""Residual addition and ReLU in one operator. Kernels: csrc/cpu, csrc/cuda, triton_kernels; autograd: csrc/autograd."""

import torch
from torch import Tensor

from cnnkern.ops import fake, route, tuned
from cnnkern.triton_kernels import check

_add_relu = torch.ops.cnnkern.add_relu.default


def add_relu(input: Tensor, other: Tensor) -> Tensor:
    """``F.relu(input + other)``. Saved for backward: one bit per element, and neither input nor result.

    Shapes: any, the same for both. Dtypes: float32, float64, bfloat16 or float16, the same for both.
    The result has PyTorch's strides.

    Raises RuntimeError for shapes, dtypes or devices that differ: nothing is broadcast or promoted.
    """
    if route.is_pytorchs((input, other), (), fuses=True):
        return route.by_pytorch(add_relu, input, other)
    if tuned.table is not None and tuned.loses("add_relu", input, other, None) and route.alike(input, other):
        return route.by_pytorch(add_relu, input, other)
    return _add_relu(input, other)[0]


@torch.library.register_fake("cnnkern::add_relu")
def _(x, residual):
    if fake.is_meta(x):
        check.floating("cnnkern::add_relu", x)
    fake.check_residual("cnnkern::add_relu", x, residual)
    return fake.sum_of(x, residual, "relu"), fake.mask_of(x)


@torch.library.register_fake("cnnkern::add_relu_backward")
def _(dy, mask, order):
    inverse = sorted(range(dy.dim()), key=lambda d: order[d])
    return torch.empty_like(dy.permute(order), memory_format=torch.contiguous_format).permute(inverse)
