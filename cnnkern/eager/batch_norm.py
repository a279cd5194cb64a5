"""Batch norms of one process, by PyTorch's operators."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cnnkern import reference
from cnnkern.eager.tensors import asked, columns, packed, to, unpacked, zeros
from cnnkern.triton_kernels import check
from cnnkern.triton_kernels.layout import (
    in_batch_norm_layout,
    in_layout_of,
    laid_out,
    mask_bytes,
    strides_of_sum,
    with_strides,
)


def bn_act(x, weight, bias, running_mean, running_var, training, momentum, eps, act, act_param=None):
    check.batch_norm("cnnkern::bn_act", x, weight, bias, running_mean, running_var, training, eps)
    check.activation("cnnkern::bn_act", act, act_param)
    y, mean, rstd = _batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps)
    return reference.activated(y, act, act_param), mean, rstd


def _batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps):
    y = torch.empty_like(in_batch_norm_layout(x))
    if x.numel() == 0:
        mean = x.new_zeros(x.shape[1], dtype=torch.float64)
        return y, mean, torch.ones_like(mean)
    found, mean, rstd = torch.native_batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps)
    if not training:
        mean, rstd = running_mean, (running_var.double() + eps).rsqrt()
    return in_layout_of(found, y), mean.double(), rstd.double()


_ACTIVATION_GRADIENTS: dict[str, Callable[..., Tensor]] = {
    "relu": lambda dy, pre: torch.ops.aten.threshold_backward(dy, pre, 0),
    "relu6": lambda dy, pre: torch.ops.aten.hardtanh_backward(dy, pre, 0, 6),
    "leaky_relu": lambda dy, pre, slope: torch.ops.aten.leaky_relu_backward(dy, pre, slope, False),
    "sigmoid": lambda dy, pre: torch.ops.aten.sigmoid_backward(dy, torch.sigmoid(pre)),
    "silu": torch.ops.aten.silu_backward,
    "hardswish": torch.ops.aten.hardswish_backward,
    "elu": lambda dy, pre, alpha: torch.ops.aten.elu_backward(dy, alpha, 1, 1, False, pre),
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda dy, pre: torch.ops.aten.gelu_backward(dy, pre, approximate="tanh"),
    "mish": torch.ops.aten.mish_backward,
    "hardsigmoid": torch.ops.aten.hardsigmoid_backward,
}


def through_activation(dy: Tensor, pre: Tensor, act: str, act_param: float | None) -> Tensor:
    if act not in check.PARAMETERS:
        return _ACTIVATION_GRADIENTS[act](dy, pre)
    return _ACTIVATION_GRADIENTS[act](dy, pre, check.PARAMETERS[act] if act_param is None else act_param)


def _pre(x, weight, bias, mean, rstd):
    """The batch norm's result, computed again from the statistics that were saved."""
    wide = check.wide_type(x)
    w, b, m, var = to(wide, weight), to(wide, bias), mean.to(wide), rstd.pow(-2).to(wide)
    return torch.native_batch_norm(x, w, b, m, var, False, 0.0, 0.0)[0]


def bn_act_backward(
    dy, x, weight, bias, mean, rstd, training, act, output_mask: Sequence[bool], act_param: float | None = None
):
    check.batch_norm_backward("cnnkern::bn_act_backward", dy, x, weight, bias, act != "none", mean, rstd, output_mask)
    check.activation("cnnkern::bn_act_backward", act, act_param)
    x = in_batch_norm_layout(x)
    if act != "none" and x.numel() > 0:  # the operator saves no mask, so what the activation saw is computed again
        dy = through_activation(dy, _pre(x, weight, bias, mean, rstd), act, act_param)
    return _batch_norm_backward(dy, x, weight, bias, mean, rstd, training, output_mask)


def _batch_norm_backward(dy, x, weight, bias, mean, rstd, training, output_mask):
    parameters = (x, weight, bias)
    if x.numel() == 0:
        return zeros(output_mask, parameters[1:], x.shape[1:2], x)
    wide = check.wide_type(x)
    mean, rstd, var = mean.to(wide), rstd.to(wide), rstd.pow(-2).to(wide)
    # PyTorch 2.11's CUDA kernels give a bias that has no weight beside it a wrong gradient in eval, or crash.
    ones_or_weight = torch.ones_like(mean) if weight is None else weight.to(wide)
    # In eval the statistics are the running ones, and eps is part of this variance.
    grads = torch.ops.aten.native_batch_norm_backward(
        in_layout_of(dy, x), x, ones_or_weight, mean, var, mean, rstd, training, 0.0, list(output_mask)
    )
    dx, dweight, dbias = asked(grads, output_mask, parameters, x)
    return in_layout_of(dx, x) if output_mask[0] else dx, dweight, dbias


def bn_add_act(
    x, residual, weight, bias, running_mean, running_var, training, momentum, eps, act, act_param: float | None = None
):
    check.batch_norm("cnnkern::bn_add_act", x, weight, bias, running_mean, running_var, training, eps)
    check.same_shape("cnnkern::bn_add_act", "residual", residual, x)
    check.activation("cnnkern::bn_add_act", act, act_param)
    pre, mean, rstd = _batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps)
    strides = strides_of_sum(pre, residual, act)
    y = reference.activated(pre.add_(residual), act, act_param)
    mask = packed(y) if act == "relu" else x.new_empty(0, dtype=torch.uint8)
    return with_strides(y, strides), mean, rstd, mask


def bn_add_act_backward(
    dy,
    x,
    weight,
    bias,
    mean,
    rstd,
    mask,
    channels_last,
    training,
    act,
    output_mask: Sequence[bool],
    residual: Tensor | None = None,
    act_param: float | None = None,
):
    op = "cnnkern::bn_add_act_backward"
    wants_dx, wants_dresidual, *wants = output_mask
    recomputes = check.recomputes_sum(act)
    check.batch_norm_backward(op, dy, x, weight, bias, recomputes, mean, rstd, [wants_dx, *wants])
    check.activation(op, act, act_param)
    check.saved_residual(op, act, residual, x)
    check.channels_last(op, x, channels_last)
    check.mask(op, mask, mask_bytes(x.numel()) if act == "relu" else 0, x)
    x = laid_out(x, channels_last)
    g = in_layout_of(dy, x)
    if act == "relu":
        g = in_layout_of(torch.where(unpacked(mask, x, x.stride()), g, 0), x)
    if recomputes and x.numel() > 0:
        pre = in_layout_of(_pre(x, weight, bias, mean, rstd), x) + in_layout_of(residual, x)
        g = in_layout_of(through_activation(g, pre, act, act_param), x)
    dx, dweight, dbias = _batch_norm_backward(g, x, weight, bias, mean, rstd, training, [wants_dx, *wants])
    return dx, g.clone() if wants_dresidual else x.new_empty(0), dweight, dbias


def bn_prelu(x, residual, weight, bias, slope, running_mean, running_var, training, momentum, eps):
    op = "cnnkern::bn_prelu"
    check.batch_norm(op, x, weight, bias, running_mean, running_var, training, eps)
    check.slope(op, slope, x)
    if residual is not None:
        check.same_shape(op, "residual", residual, x)
    pre, mean, rstd = _batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps)
    if residual is None:
        return torch.prelu(pre, slope.to(x.dtype)), mean, rstd
    strides = strides_of_sum(pre, residual, "prelu")
    return with_strides(torch.prelu(pre.add_(residual), slope.to(x.dtype)), strides), mean, rstd


def bn_prelu_backward(
    dy, x, residual, weight, bias, slope, mean, rstd, channels_last, training, output_mask: Sequence[bool]
):
    op = "cnnkern::bn_prelu_backward"
    check.bn_prelu_backward(op, dy, x, residual, weight, bias, slope, mean, rstd, channels_last, output_mask)
    wants_dx, wants_dresidual, *wants, wants_dslope = output_mask
    x = laid_out(x, channels_last)
    g, dslope = in_layout_of(dy, x), slope.new_zeros(slope.shape) if wants_dslope else x.new_empty(0)
    if x.numel() > 0:
        wide = check.wide_type(x)
        z = in_layout_of(_pre(x.to(wide), weight, bias, mean, rstd), x)
        z = z if residual is None else z + residual
        g, negative = g.to(wide), ~(z > 0)
        if wants_dslope:
            products = torch.where(negative, g * z, 0)
            dims = range(x.dim()) if slope.numel() == 1 else [d for d in range(x.dim()) if d != 1]
            dslope = products.sum(list(dims), dtype=torch.float64).view(slope.shape).to(slope.dtype)
        g = in_layout_of(torch.where(negative, g * columns(x, slope.expand(x.shape[1])), g).to(x.dtype), x)
    dx, dweight, dbias = _batch_norm_backward(g, x, weight, bias, mean, rstd, training, [wants_dx, *wants])
    return dx, g.clone() if wants_dresidual else x.new_empty(0), dweight, dbias, dslope
