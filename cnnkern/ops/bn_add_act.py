"""Batch norm, residual and activation in one operator. Kernels: csrc, triton_kernels; autograd: csrc/autograd."""

import torch
from torch import Tensor

from cnnkern import reference
from cnnkern.ops import fake, route, tuned
from cnnkern.triton_kernels import check

_bn_add_act = torch.ops.cnnkern.bn_add_act.default


def batch_norm_add_act(
    input: Tensor,
    residual: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
    act_param: float | None = None,
) -> Tensor:
    """Batch normalisation per channel, over (N, ...), plus a residual, then an activation.

    Equivalent to ``F.relu(F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps) +
    residual)`` for ``act="relu"``, without the ReLU for ``act="none"``; other activations, and ``act_param``, are
    those of :func:`batch_norm_act`.

    Shapes: ``input``, ``residual`` and the result (N, C, ...) of 2 to 5 dimensions, all the same; the others (C,) or
    None. ``running_mean`` and ``running_var`` are updated in place in training, and required in eval mode.
    Dtypes: float32, float64, bfloat16 or float16, ``residual`` that of ``input``; the vectors in the input's dtype, or
    float32 for 16-bit input. The result has PyTorch's strides. Saved for backward: the input, two
    float64 vectors of C and, for ``"relu"``, one bit per element. For activations other than ``"relu"`` and ``"none"``
    the residual is saved too.

    Raises ValueError for one value per channel in training, an unknown ``act``, an ``act_param`` that is not finite or
    that ``act`` does not take, or an invalid ``eps``, RuntimeError for shapes, dtypes or devices that do not match;
    running statistics are then unchanged.

    Source: He et al., Deep Residual Learning for Image Recognition, 2015 (arXiv:1512.03385), figure 2.
    """
    vectors = (running_mean, running_var, weight, bias)
    theirs = route.is_pytorchs((input, residual), vectors, fuses=True, training=training)
    if tuned.table is not None and not theirs:
        lost = tuned.loses("batch_norm_add_act", input, weight, bias, act, training)
        theirs = lost and route.alike(input, residual)
    if theirs and act in reference.ACTIVATIONS:
        check.activation("cnnkern::bn_add_act", act, act_param)
        return route.by_pytorch(batch_norm_add_act, input, residual, *vectors, training, momentum, eps, act, act_param)
    arguments = (weight, bias, running_mean, running_var, training, momentum, eps, act, act_param)
    return _bn_add_act(input, residual, *arguments)[0]


def batch_norm_add_relu(
    input: Tensor,
    residual: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch normalisation, plus a residual, then ReLU: :func:`batch_norm_add_act` with ``act="relu"``."""
    vectors = (running_mean, running_var, weight, bias)
    return batch_norm_add_act(input, residual, *vectors, training, momentum, eps, "relu")


@torch.library.register_fake("cnnkern::bn_add_act")
def _(x, residual, weight, bias, running_mean, running_var, training, momentum, eps, act, act_param=None):
    if fake.is_meta(x):
        check.batch_norm("cnnkern::bn_add_act", x, weight, bias, running_mean, running_var, training, eps)
        check.activation("cnnkern::bn_add_act", act, act_param)
    fake.check_channel_vectors(
        "cnnkern::bn_add_act", x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var
    )
    fake.check_residual("cnnkern::bn_add_act", x, residual)
    stats = x.new_empty(x.shape[1], dtype=torch.float64)
    mask = fake.mask_of(x) if act == "relu" else x.new_empty(0, dtype=torch.uint8)
    return fake.sum_of(fake.batch_norm_of(x), residual, act), stats, torch.empty_like(stats), mask


@torch.library.register_fake("cnnkern::bn_add_act_backward")
def _(dy, x, weight, bias, mean, rstd, mask, channels_last, training, act, output_mask, residual=None, act_param=None):
    like = fake.in_order_of(x, channels_last)
    dx, dresidual = (torch.empty_like(like) if wanted else x.new_empty(0) for wanted in output_mask[:2])
    parameters = zip(output_mask[2:], (weight, bias), strict=True)
    return dx, dresidual, *(fake.parameter_gradient(wanted, v, x.shape[1:2], x) for wanted, v in parameters)
