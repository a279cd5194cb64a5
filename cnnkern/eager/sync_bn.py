"""Batch norms over several processes, by PyTorch's operators: the parts around the collectives."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cnnkern import reference
from cnnkern.eager.batch_norm import through_activation
from cnnkern.eager.tensors import columns, packed, unpacked
from cnnkern.triton_kernels import check
from cnnkern.triton_kernels.layout import (
    in_batch_norm_layout,
    in_layout_of,
    laid_out,
    strides_of_sum,
    with_strides,
)


def sync_bn_stats(x):
    check.image("cnnkern::sync_bn_stats", x)
    values = x.movedim(1, -1).reshape(-1, x.shape[1]).double()
    if x.numel() == 0:
        return values.new_zeros(2 * x.shape[1] + 1)
    var, mean = torch.var_mean(values, 0, correction=0)
    return torch.cat([mean, var, mean.new_full((1,), values.shape[0])])


def sync_bn(x, residual, weight, bias, mean, rstd, act, act_param: float | None = None):
    check.sync_bn("cnnkern::sync_bn", x, residual, weight, bias, mean, rstd, act, act_param)
    x = in_batch_norm_layout(x)
    pre = _normalized(x, weight, bias, mean, rstd).to(x.dtype)
    none = x.new_empty(0, dtype=torch.uint8)
    if residual is None:
        return reference.activated(in_layout_of(pre, x), act, act_param), none
    strides = strides_of_sum(x, residual, act)
    y = in_layout_of(reference.activated(pre + residual, act, act_param), x)
    return with_strides(y, strides), packed(y) if act == "relu" else none


def _normalized(x, weight, bias, mean, rstd):
    """(x - mean) * weight * rstd + bias in float32 at least. The difference is that of float64 vectors."""
    pre = ((x.double() - mean.view(1, -1, *[1] * (x.dim() - 2))).to(check.wide_type(x))) * columns(x, rstd)
    pre = pre if weight is None else pre * columns(x, weight)
    return pre if bias is None else pre + columns(x, bias)


def _through(dy, x, weight, bias, mean, rstd, mask, act, residual, act_param):
    """The part of dy that the mask or the activation lets through, in float32 at least."""
    if mask is not None:
        return torch.where(unpacked(mask, x, x.stride()), dy, 0).to(check.wide_type(x))
    if act == "none" or x.numel() == 0:
        return dy.to(check.wide_type(x))
    pre = _normalized(x, weight, bias, mean, rstd).to(x.dtype)
    pre = pre if residual is None else pre + residual
    return through_activation(dy, pre, act, act_param).to(check.wide_type(x))


def sync_bn_sums(
    dy,
    x,
    weight,
    bias,
    mean,
    rstd,
    mask,
    channels_last,
    act,
    residual: Tensor | None = None,
    act_param: float | None = None,
):
    op = "cnnkern::sync_bn_sums"
    check.sync_bn_sums(op, dy, x, weight, bias, mean, rstd, mask, channels_last, act, residual, act_param)
    dims = [d for d in range(x.dim()) if d != 1]
    dy, x = laid_out(dy, channels_last), laid_out(x, channels_last)
    g = _through(dy, x, weight, bias, mean, rstd, mask, act, residual, act_param)
    normalized = _normalized(x, None, None, mean, rstd)
    return torch.stack([g.sum(dims, dtype=torch.float64), (g * normalized).sum(dims, dtype=torch.float64)])


def sync_bn_backward(
    dy,
    x,
    weight,
    bias,
    mean,
    rstd,
    mask,
    channels_last,
    act,
    sums,
    count,
    output_mask: Sequence[bool],
    residual: Tensor | None = None,
    act_param: float | None = None,
):
    op = "cnnkern::sync_bn_backward"
    statistics = (weight, bias, mean, rstd, mask)
    check.sync_bn_backward(op, dy, x, *statistics, channels_last, act, sums, count, output_mask, residual, act_param)
    x = laid_out(x, channels_last)
    g = _through(laid_out(dy, channels_last), x, *statistics, act, residual, act_param)
    scale = rstd if weight is None else rstd * weight
    means = sums / count
    dx = g - columns(x, means[0]) - _normalized(x, None, None, mean, rstd) * columns(x, means[1])
    grads = (dx * columns(x, scale), g)
    return tuple(
        in_layout_of(t.to(x.dtype), x) if wanted else x.new_empty(0)
        for t, wanted in zip(grads, output_mask, strict=True)
    )
