"""Batch norm, residual and PReLU in one operator. Kernels: csrc, triton_kernels; autograd: csrc/autograd."""

import torch
from torch import Tensor

from cnnkern.ops import fake, route
from cnnkern.triton_kernels import check

_bn_prelu = torch.ops.cnnkern.bn_prelu.default


def batch_norm_prelu(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    slope: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor:
    """Batch normalisation over (N, ...) of each channel, plus a residual where there is one, then PReLU.

    Equivalent to ``F.prelu(F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps) +
    residual, slope)``: z where it is positive, else ``slope * z``. The slope gets a gradient.

    Shapes: ``input``, ``residual`` and the result (N, C, ...) of 2 to 5 dimensions, all the same; ``slope`` (C,), or
    one element for all channels; the others (C,) or None. ``running_mean`` and ``running_var`` are updated in place
    when training, and are needed when not.
    Dtypes: float32, float64, bfloat16 or float16, ``residual`` that of ``input``; slope and vectors in the input's
    dtype, or float32 for 16-bit input. The result has PyTorch's strides. Saved for backward: the input, the
    residual and two float64 vectors of C.

    Raises ValueError for one value per channel in training or an invalid ``eps``, RuntimeError for shapes, dtypes or
    devices that do not match; running statistics are then unchanged.

    Source: He et al., Delving Deep into Rectifiers, 2015 (arXiv:1502.01852), section 2.1.
    """
    inputs = (input,) if residual is None else (input, residual)
    vectors = (running_mean, running_var, slope, weight, bias)
    if route.is_pytorchs(inputs, vectors, fuses=True, training=training):
        return route.by_pytorch(batch_norm_prelu, input, *vectors, training, momentum, eps, residual)
    arguments = (residual, weight, bias, slope, running_mean, running_var, training, momentum, eps)
    return _bn_prelu(input, *arguments)[0]


@torch.library.register_fake("cnnkern::bn_prelu")
def _(x, residual, weight, bias, slope, running_mean, running_var, training, momentum, eps):
    op = "cnnkern::bn_prelu"
    if fake.is_meta(x):
        check.batch_norm(op, x, weight, bias, running_mean, running_var, training, eps)
        check.slope(op, slope, x)
    fake.check_channel_vectors(op, x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    fake.check_slope(op, x, slope)
    if residual is not None:
        fake.check_residual(op, x, residual)
    stats = x.new_empty(x.shape[1], dtype=torch.float64)
    y = fake.batch_norm_of(x, "prelu")
    return y if residual is None else fake.sum_of(y, residual, "prelu"), stats, torch.empty_like(stats)


@torch.library.register_fake("cnnkern::bn_prelu_backward")
def _(dy, x, residual, weight, bias, slope, mean, rstd, channels_last, training, output_mask):
    like = fake.in_order_of(x, channels_last)
    dx, dresidual = (torch.empty_like(like) if wanted else x.new_empty(0) for wanted in output_mask[:2])
    parameters = zip(output_mask[2:4], (weight, bias), strict=True)
    dweight, dbias = (fake.parameter_gradient(wanted, v, x.shape[1:2], x) for wanted, v in parameters)
    return dx, dresidual, dweight, dbias, torch.empty_like(slope) if output_mask[4] else x.new_empty(0)
