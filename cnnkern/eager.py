"""PyTorch's own operators behind the schemas of ours: the backend ``"eager"``, and the answer where there is no other.

Each function has the signature of its operator in csrc/ops.cpp, and its errors. Gradients recompute what no operator
of ours saves.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cnnkern import reference
from cnnkern.triton_kernels import check
from cnnkern.triton_kernels.layout import (
    Strides,
    empty_strided_like,
    in_batch_norm_layout,
    in_layout,
    in_layout_of,
    laid_out,
    mask_bytes,
    memory_order,
    strides_in_order,
    strides_of_sum,
    with_plain_strides,
    with_strides,
)

_aten = torch.ops.aten


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _to(dtype: torch.dtype, v: Tensor | None) -> Tensor | None:
    return None if v is None else v.to(dtype)


def _asked(
    grads: Sequence[Tensor | None], output_mask: Sequence[bool], like: Sequence[Tensor | None], x: Tensor
) -> tuple[Tensor, ...]:
    """The gradients that were asked for, each in the dtype of what it is the gradient of; the others empty."""
    triples = zip(grads, output_mask, like, strict=True)
    return tuple(g.to(_wide(x) if t is None else t.dtype) if wanted else x.new_empty(0) for g, wanted, t in triples)


def _zeros(output_mask: Sequence[bool], like: Sequence[Tensor | None], shape: Sequence[int], x: Tensor):
    """Gradients of x and of parameters of `shape` where x has no elements."""
    pairs = zip(output_mask[1:], like, strict=True)
    parameters = (check.parameter_gradient(wanted, t, shape, x).zero_() for wanted, t in pairs)
    return (torch.zeros_like(x) if output_mask[0] else x.new_empty(0), *parameters)


def _shifts(t: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=t.device)


def _packed(y: Tensor) -> Tensor:
    """[y > 0], NaN included, one bit per element in the order of y's memory."""
    flat = y.permute(memory_order(y)).reshape(-1)
    bits = torch.zeros(8 * mask_bytes(y.numel()), dtype=torch.uint8, device=y.device)
    bits[: y.numel()] = ~(flat <= 0)
    return (bits.view(-1, 8) << _shifts(y)).sum(1, dtype=torch.uint8)


def _unpacked(mask: Tensor, x: Tensor, strides: Strides) -> Tensor:
    """A mask as booleans of the shape of x that lie in memory with these strides."""
    bits = (mask[:, None] >> _shifts(mask) & 1).bool().view(-1)[: x.numel()]
    return bits.as_strided(x.shape, strides)


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
    "relu": lambda dy, pre: _aten.threshold_backward(dy, pre, 0),
    "relu6": lambda dy, pre: _aten.hardtanh_backward(dy, pre, 0, 6),
    "leaky_relu": lambda dy, pre, slope: _aten.leaky_relu_backward(dy, pre, slope, False),
    "sigmoid": lambda dy, pre: _aten.sigmoid_backward(dy, torch.sigmoid(pre)),
    "silu": _aten.silu_backward,
    "hardswish": _aten.hardswish_backward,
    "elu": lambda dy, pre, alpha: _aten.elu_backward(dy, alpha, 1, 1, False, pre),
    "gelu": _aten.gelu_backward,
    "gelu_tanh": lambda dy, pre: _aten.gelu_backward(dy, pre, approximate="tanh"),
    "mish": _aten.mish_backward,
    "hardsigmoid": _aten.hardsigmoid_backward,
}


def _through_activation(dy: Tensor, pre: Tensor, act: str, act_param: float | None) -> Tensor:
    if act not in check.PARAMETERS:
        return _ACTIVATION_GRADIENTS[act](dy, pre)
    return _ACTIVATION_GRADIENTS[act](dy, pre, check.PARAMETERS[act] if act_param is None else act_param)


def _pre(x, weight, bias, mean, rstd):
    """The batch norm's result, computed again from the statistics that were saved."""
    wide = _wide(x)
    w, b, m, var = _to(wide, weight), _to(wide, bias), mean.to(wide), rstd.pow(-2).to(wide)
    return torch.native_batch_norm(x, w, b, m, var, False, 0.0, 0.0)[0]


def bn_act_backward(
    dy, x, weight, bias, mean, rstd, training, act, output_mask: Sequence[bool], act_param: float | None = None
):
    check.batch_norm_backward("cnnkern::bn_act_backward", dy, x, weight, bias, act != "none", mean, rstd, output_mask)
    check.activation("cnnkern::bn_act_backward", act, act_param)
    x = in_batch_norm_layout(x)
    if act != "none" and x.numel() > 0:  # the operator saves no mask, so what the activation saw is computed again
        dy = _through_activation(dy, _pre(x, weight, bias, mean, rstd), act, act_param)
    return _batch_norm_backward(dy, x, weight, bias, mean, rstd, training, output_mask)


def _batch_norm_backward(dy, x, weight, bias, mean, rstd, training, output_mask):
    parameters = (x, weight, bias)
    if x.numel() == 0:
        return _zeros(output_mask, parameters[1:], x.shape[1:2], x)
    wide = _wide(x)
    mean, rstd, var = mean.to(wide), rstd.to(wide), rstd.pow(-2).to(wide)
    # PyTorch 2.11's CUDA kernels give a bias that has no weight beside it a wrong gradient in eval, or crash.
    ones_or_weight = torch.ones_like(mean) if weight is None else weight.to(wide)
    # In eval the statistics are the running ones, and eps is part of this variance.
    grads = _aten.native_batch_norm_backward(
        in_layout_of(dy, x), x, ones_or_weight, mean, var, mean, rstd, training, 0.0, list(output_mask)
    )
    dx, dweight, dbias = _asked(grads, output_mask, parameters, x)
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
    mask = _packed(y) if act == "relu" else x.new_empty(0, dtype=torch.uint8)
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
        g = in_layout_of(torch.where(_unpacked(mask, x, x.stride()), g, 0), x)
    if recomputes and x.numel() > 0:
        pre = in_layout_of(_pre(x, weight, bias, mean, rstd), x) + in_layout_of(residual, x)
        g = in_layout_of(_through_activation(g, pre, act, act_param), x)
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
        wide = _wide(x)
        z = in_layout_of(_pre(x.to(wide), weight, bias, mean, rstd), x)
        z = z if residual is None else z + residual
        g, negative = g.to(wide), ~(z > 0)
        if wants_dslope:
            products = torch.where(negative, g * z, 0)
            dims = range(x.dim()) if slope.numel() == 1 else [d for d in range(x.dim()) if d != 1]
            dslope = products.sum(list(dims), dtype=torch.float64).view(slope.shape).to(slope.dtype)
        g = in_layout_of(torch.where(negative, g * _columns(x, slope.expand(x.shape[1])), g).to(x.dtype), x)
    dx, dweight, dbias = _batch_norm_backward(g, x, weight, bias, mean, rstd, training, [wants_dx, *wants])
    return dx, g.clone() if wants_dresidual else x.new_empty(0), dweight, dbias, dslope


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
    return with_strides(y, strides), _packed(y) if act == "relu" else none


def _columns(x: Tensor, v: Tensor) -> Tensor:
    return v.to(_wide(x)).view(1, -1, *[1] * (x.dim() - 2))


def _normalized(x, weight, bias, mean, rstd):
    """(x - mean) * weight * rstd + bias in float32 at least. The difference is that of float64 vectors."""
    pre = ((x.double() - mean.view(1, -1, *[1] * (x.dim() - 2))).to(_wide(x))) * _columns(x, rstd)
    pre = pre if weight is None else pre * _columns(x, weight)
    return pre if bias is None else pre + _columns(x, bias)


def _through(dy, x, weight, bias, mean, rstd, mask, act, residual, act_param):
    """The part of dy that the mask or the activation lets through, in float32 at least."""
    if mask is not None:
        return torch.where(_unpacked(mask, x, x.stride()), dy, 0).to(_wide(x))
    if act == "none" or x.numel() == 0:
        return dy.to(_wide(x))
    pre = _normalized(x, weight, bias, mean, rstd).to(x.dtype)
    pre = pre if residual is None else pre + residual
    return _through_activation(dy, pre, act, act_param).to(_wide(x))


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
    dx = g - _columns(x, means[0]) - _normalized(x, None, None, mean, rstd) * _columns(x, means[1])
    grads = (dx * _columns(x, scale), g)
    return tuple(
        in_layout_of(t.to(x.dtype), x) if wanted else x.new_empty(0)
        for t, wanted in zip(grads, output_mask, strict=True)
    )


def add_relu(x, residual):
    check.floating("cnnkern::add_relu", x)
    check.same_shape("cnnkern::add_relu", "residual", residual, x)
    y = torch.relu(x + residual)
    return y, _packed(y)


def add_relu_backward(dy, mask, order: Sequence[int]):
    check.floating("cnnkern::add_relu_backward", dy)
    check.mask("cnnkern::add_relu_backward", mask, mask_bytes(dy.numel()), dy)
    check.order("cnnkern::add_relu_backward", order, dy)
    strides = strides_in_order(dy.shape, order)
    dx = empty_strided_like(dy, strides)
    return dx.copy_(torch.where(_unpacked(mask, dy, strides), dy, 0))


def grouped_conv2d(x, weight, bias, stride, padding, dilation, groups):
    return _aten.convolution(x, weight, bias, stride, padding, dilation, False, (0, 0), groups)


def grouped_conv2d_backward(dy, x, weight, stride, padding, dilation, groups, output_mask: Sequence[bool]):
    grads = _aten.convolution_backward(
        dy, x, weight, [weight.shape[0]], stride, padding, dilation, False, (0, 0), groups, list(output_mask)
    )
    return _asked(grads, output_mask, (x, weight, weight), x)


def layer_norm(x, normalized_shape, weight, bias, eps, wide=False):
    check.layer_norm("cnnkern::layer_norm", x, normalized_shape, weight, bias, wide)
    dtype = _wide(x)
    shape = list(normalized_shape)
    y, mean, rstd = torch.native_layer_norm(x.to(dtype), shape, _to(dtype, weight), _to(dtype, bias), eps)
    return with_plain_strides(y.to(dtype if wide else x.dtype).contiguous()), mean, rstd


def layer_norm_backward(dy, x, normalized_shape, weight, bias, mean, rstd, output_mask: Sequence[bool]):
    op = "cnnkern::layer_norm_backward"
    check.layer_norm(op, x, normalized_shape, weight, bias, check.is_wide(dy, x))
    shape = list(normalized_shape)
    kept = list(x.shape[: x.dim() - len(shape)]) + [1] * len(shape)
    check.layer_norm_saved(op, dy, x, kept, weight, bias, mean, rstd, output_mask)
    wide = _wide(x)
    inputs = (dy.to(wide).contiguous(), x.to(wide).contiguous())
    # PyTorch's operator needs a bias to give its gradient, but does not read it.
    parameters = (_to(wide, weight), x.new_zeros(shape, dtype=wide) if output_mask[2] else None)
    grads = _aten.native_layer_norm_backward(*inputs, shape, mean, rstd, *parameters, list(output_mask))
    dx, dweight, dbias = _asked(grads, output_mask, (x, weight, bias), x)
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


def _corners(y: Tensor, stride: Sequence[int], padding: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Row and column where each window begins."""
    rows, columns = (torch.arange(n, device=y.device) for n in y.shape[2:])
    return (rows * stride[0] - padding[0])[:, None], columns * stride[1] - padding[1]


def max_pool2d(x, kernel_size, stride, padding, ceil_mode):
    check.max_pool2d("cnnkern::max_pool2d", x, kernel_size, stride, padding, ceil_mode)
    y, indices = _aten.max_pool2d_with_indices(x, kernel_size, stride, padding, 1, ceil_mode)
    top, left = _corners(y, stride, padding)
    positions = (indices // x.shape[3] - top) * kernel_size[1] + indices % x.shape[3] - left
    return y, in_layout_of(positions.to(torch.uint8), y)


def max_pool2d_backward(dy, positions, size, kernel_size, stride, padding, channels_last):
    check.max_pool2d_backward("cnnkern::max_pool2d_backward", dy, positions, size, kernel_size, stride, padding)
    top, left = _corners(dy, stride, padding)
    at = positions.long()
    indices = (top + at // kernel_size[1]) * size[1] + left + at % kernel_size[1]
    dx = dy.new_zeros((*dy.shape[:2], size[0] * size[1]), dtype=_wide(dy))
    dx = dx.scatter_add_(2, indices.flatten(2), dy.to(dx.dtype).flatten(2)).view(*dy.shape[:2], *size)
    return dx.to(dy.dtype).contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


FORWARD: tuple[Callable, ...] = (
    *(bn_act, bn_add_act, bn_prelu, add_relu, grouped_conv2d, layer_norm, layer_norm2d, max_pool2d),
)
BACKWARD: tuple[Callable, ...] = (
    *(bn_act_backward, bn_add_act_backward, bn_prelu_backward, add_relu_backward),
    *(grouped_conv2d_backward, layer_norm_backward, layer_norm2d_backward, max_pool2d_backward),
)
# Parts of a layer whose derivative is that of the whole: cnnkern/ops/sync_bn_autograd.py.
PARTS: tuple[Callable, ...] = (sync_bn_stats, sync_bn, sync_bn_sums, sync_bn_backward)
LAUNCHERS: dict[str, Callable] = {function.__name__: function for function in (*FORWARD, *BACKWARD, *PARTS)}
