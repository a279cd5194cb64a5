"""Convolution in TF32, as tensor cores have it: factors lose 13 bits of float32, sums are in float32."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnkern import testing


def rounded(t: Tensor) -> Tensor:
    """float32 rounded to TF32: to nearest, ties away from zero. Other types as they are."""
    if t.dtype != torch.float32:
        return t
    return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, settings: dict) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings = settings
        return F.conv2d(rounded(x), rounded(weight), bias, **settings)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [rounded(t).detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            y = F.conv2d(*leaves, **ctx.settings)
        dx, dweight = torch.autograd.grad(y, leaves, rounded(dy))
        return dx, dweight, dy.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None, None


def conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None, **settings: object) -> Tensor:
    """F.conv2d of float32 with factors in TF32. The gradient of the bias is a sum of dy, which is no product."""
    return _Convolution.apply(input, weight, bias, settings)


CASE = dataclasses.replace(testing.CASES["grouped_conv2d"], reference=conv2d)
