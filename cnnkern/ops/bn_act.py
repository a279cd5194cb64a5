"""Batch norm and activation in one operator. Kernels: csrc/cpu, csrc/cuda, triton_kernels; autograd: csrc/autograd."""

import torch
from torch import Tensor

from cnnkern import reference
from cnnkern.ops import fake, route, tuned
from cnnkern.triton_kernels import check

_bn_act = torch.ops.cnnkern.bn_act.default


def batch_norm_act(
    input: Tensor,
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
    """Batch normalisation per channel, over (N, ...), then an activation.

    Equivalent to ``F.relu(F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps))``
    for ``act="relu"``, to the batch norm alone for ``act="none"``; other activations are ``"relu6"``, ``"leaky_relu"``,
    ``"sigmoid"``, ``"silu"``, ``"hardswish"``, ``"elu"``, ``"gelu"``, ``"gelu_tanh"`` (``approximate="tanh"``),
    ``"mish"`` and ``"hardsigmoid"``, as `torch.nn.functional` has them. ``act_param`` is the slope of ``"leaky_relu"``
    (0.01 where it is None) or alpha of ``"elu"`` (1.0); the others take none.

    Shapes: ``input`` and the result (N, C, ...) of 2 to 5 dimensions; the others (C,) or None. ``running_mean`` and
    ``running_var`` are updated in place in training, and required in eval mode.
    Dtypes: float32, float64, bfloat16 or float16; the vectors in the input's dtype, or float32 for 16-bit input.
    The result has PyTorch's strides. Saved for backward: the input and two float64 vectors of C.

    Raises ValueError for one value per channel in training, an unknown ``act``, an ``act_param`` that is not finite or
    that ``act`` does not take, or an invalid ``eps``, RuntimeError for shapes, dtypes or devices that do not match;
    running statistics are then unchanged.

    Source: Ioffe and Szegedy, Batch Normalization, 2015 (arXiv:1502.03167).
    """
    vectors = (running_mean, running_var, weight, bias)
    theirs = route.is_pytorchs((input,), vectors, fuses=True, training=training)
    if tuned.table is not None and not theirs:
        theirs = tuned.loses("batch_norm_act", input, weight, bias, act, training)
    if theirs and act in reference.ACTIVATIONS:
        check.activation("cnnkern::bn_act", act, act_param)
        return route.by_pytorch(batch_norm_act, input, *vectors, training, momentum, eps, act, act_param)
    return _bn_act(input, weight, bias, running_mean, running_var, training, momentum, eps, act, act_param)[0]


def batch_norm_relu(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch normalisation, then ReLU: :func:`batch_norm_act` with ``act="relu"``."""
    return batch_norm_act(input, running_mean, running_var, weight, bias, training, momentum, eps, "relu")


@torch.library.register_fake("cnnkern::bn_act")
def _(x, weight, bias, running_mean, running_var, training, momentum, eps, act, act_param=None):
    if fake.is_meta(x):
        check.batch_norm("cnnkern::bn_act", x, weight, bias, running_mean, running_var, training, eps)
        check.activation("cnnkern::bn_act", act, act_param)
    fake.check_channel_vectors(
        "cnnkern::bn_act", x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var
    )
    stats = x.new_empty(x.shape[1], dtype=torch.float64)
    return fake.batch_norm_of(x, act), stats, torch.empty_like(stats)


@torch.library.register_fake("cnnkern::bn_act_backward")
def _(dy, x, weight, bias, mean, rstd, training, act, output_mask, act_param=None):
    dx = fake.batch_norm_of(x) if output_mask[0] else x.new_empty(0)
    parameters = zip(output_mask[1:], (weight, bias), strict=True)
    return dx, *(fake.parameter_gradient(wanted, v, x.shape[1:2], x) for wanted, v in parameters)
