"""Layer norms, by PyTorch's operators."""

from collections.abc import Sequence

import torch

from cnnkern.eager.tensors import asked, to
from cnnkern.triton_kernels import check
from cnnkern.triton_kernels.layout import (
    in_layout,
    in_layout_of,
    with_plain_strides,
)


def layer_norm(x, normalized_shape, weight, bias, eps, wide=False):
    check.layer_norm("cnnkern::layer_norm", x, normalized_shape, weight, bias, wide)
    dtype = check.wide_type(x)
    shape = list(normalized_shape)
    y, mean, rstd = torch.native_layer_norm(x.to(dtype), shape, to(dtype, weight), to(dtype, bias), eps)
    return with_plain_strides(y.to(dtype if wide else x.dtype).contiguous()), mean, rstd


def layer_norm_backward(dy, x, normalized_shape, weight, bias, mean, rstd, output_mask: Sequence[bool]):
    op = "cnnkern::layer_norm_backward"
    check.layer_norm(op, x, normalized_shape, weight, bias, check.is_wide(dy, x))
    shape = list(normalized_shape)
    kept = list(x.shape[: x.dim() - len(shape)]) + [1] * len(shape)
    check.layer_norm_saved(op, dy, x, kept, weight, bias, mean, rstd, output_mask)
    wide = check.wide_type(x)
    inputs = (dy.to(wide).contiguous(), x.to(wide).contiguous())
    # PyTorch's operator needs a bias to give its gradient, but does not read it.
    parameters = (to(wide, weight), x.new_zeros(shape, dtype=wide) if output_mask[2] else None)
    grads = torch.ops.aten.native_layer_norm_backward(*inputs, shape, mean, rstd, *parameters, list(output_mask))
    dx, dweight, dbias = asked(grads, output_mask, (x, weight, bias), x)
    return with_plain_strides(dx), dweight, dbias


def layer_norm2d(x, weight, bias, eps, wide=False):
    check.layer_norm2d("cnnkern::layer_norm2d", x, weight, bias, wide)
    x = in_layout(x)
    y, *statistics = layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], weight, bias, eps, wide)
    return in_layout_of(y.permute(0, 3, 1, 2), x), *(v.permute(0, 3, 1, 2) for v in statistics)


def layer_norm2d_backward(dy, x, weight, bias, mean, rstd, output_mask: Sequence[bool]):
    op = "cnnkern::layer_norm2d_backward"
    check.layer_norm2d(op, x, weight, bias, check.is_wide(dy, x))
    N, _, H, W = x.shape
    check.layer_norm_saved(op, dy, x, (N, 1, H, W), weight, bias, mean, rstd, output_mask)
    x = in_layout(x)
    rows = [t.permute(0, 2, 3, 1) for t in (dy, x)]
    statistics = [v.permute(0, 2, 3, 1) for v in (mean, rstd)]
    dx, dweight, dbias = layer_norm_backward(*rows, x.shape[1:2], weight, bias, *statistics, output_mask)
    return in_layout_of(dx.permute(0, 3, 1, 2), x) if output_mask[0] else dx, dweight, dbias
