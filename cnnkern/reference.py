"""Every operator in a few lines of eager PyTorch: its specification, the tests' oracle, the benchmarks' baseline.

Each function has the signature of its namesake in :mod:`cnnkern.functional`. Functions with a suffix are other common
implementations of the same layer: baselines of the benchmarks, called by keyword.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnkern import compat

# Those with a parameter (check.PARAMETERS) have it after the tensor.
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "sigmoid": F.sigmoid,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "elu": F.elu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "mish": F.mish,
    "hardsigmoid": F.hardsigmoid,
}


def activated(x: Tensor, act: str, act_param: float | None = None) -> Tensor:
    return ACTIVATIONS[act](x) if act_param is None else ACTIVATIONS[act](x, act_param)


def _batch_norm(input: Tensor, running_mean, running_var, weight, bias, training, momentum, eps) -> Tensor:
    weight = compat.weight_beside(input, weight, bias)
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def batch_norm_act(
    input: Tensor,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    act="relu",
    act_param=None,
) -> Tensor:
    y = _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return activated(y, act, act_param)


def batch_norm_add_act(
    input: Tensor,
    residual: Tensor,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    act="relu",
    act_param=None,
) -> Tensor:
    y = _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return activated(y + residual, act, act_param)


def batch_norm_prelu(
    input: Tensor,
    running_mean,
    running_var,
    slope: Tensor,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    residual=None,
) -> Tensor:
    y = _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return F.prelu(y if residual is None else y + residual, slope.to(y.dtype))


def sync_batch_norm_act(
    input: Tensor,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    act="relu",
    residual=None,
    group=None,
    act_param=None,
) -> Tensor:
    """With one process. With several it is this function of their concatenated batches."""
    y = _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return activated(y if residual is None else y + residual, act, act_param)


def add_relu(input: Tensor, other: Tensor) -> Tensor:
    return F.relu(input + other)


# In place, as torchvision's and timm's networks have them.
_IN_PLACE: dict[str, Callable[..., Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu_,
    "relu6": functools.partial(F.relu6, inplace=True),
    "leaky_relu": functools.partial(F.leaky_relu, inplace=True),
    "sigmoid": torch.sigmoid_,
    "silu": functools.partial(F.silu, inplace=True),
    "hardswish": functools.partial(F.hardswish, inplace=True),
    "elu": functools.partial(F.elu, inplace=True),
    "gelu": ACTIVATIONS["gelu"],
    "gelu_tanh": ACTIVATIONS["gelu_tanh"],
    "mish": functools.partial(F.mish, inplace=True),
    "hardsigmoid": functools.partial(F.hardsigmoid, inplace=True),
}


def _activated_in_place(x: Tensor, act: str, act_param: float | None) -> Tensor:
    return _IN_PLACE[act](x) if act_param is None else _IN_PLACE[act](x, act_param)


def batch_norm_act_in_place(*, act: str = "relu", act_param: float | None = None, **arguments) -> Tensor:
    return _activated_in_place(_batch_norm(**arguments), act, act_param)


def batch_norm_add_act_in_place(
    *, residual: Tensor, act: str = "relu", act_param: float | None = None, **arguments
) -> Tensor:
    return _activated_in_place(_batch_norm(**arguments).add_(residual), act, act_param)


def add_relu_in_place(input: Tensor, other: Tensor) -> Tensor:
    return F.relu(input + other, inplace=True)


def conv1d(input: Tensor, weight: Tensor, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    return F.conv1d(input, weight, bias, stride, padding, dilation, groups)


def conv2d(input: Tensor, weight: Tensor, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def conv3d(input: Tensor, weight: Tensor, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    return F.conv3d(input, weight, bias, stride, padding, dilation, groups)


def layer_norm(input: Tensor, normalized_shape, weight=None, bias=None, eps=1e-5) -> Tensor:
    if input.is_cuda and weight is not None and weight.dtype != input.dtype and not torch.is_autocast_enabled("cuda"):
        # PyTorch accepts float32 parameters with a 16-bit input only on the CPU and under autocast.
        return F.layer_norm(input.float(), normalized_shape, weight, bias, eps).to(input.dtype)
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


def layer_norm2d(input: Tensor, weight=None, bias=None, eps=1e-6) -> Tensor:
    return layer_norm(input.permute(0, 2, 3, 1), input.shape[1:2], weight, bias, eps).permute(0, 3, 1, 2)


def layer_norm2d_written_out(input: Tensor, weight=None, bias=None, eps=1e-6) -> Tensor:
    """The other common form, which stays in (N, C, H, W)."""
    mean = input.mean(1, keepdim=True)
    y = (input - mean) / ((input - mean).pow(2).mean(1, keepdim=True) + eps).sqrt()
    y = y if weight is None else weight[:, None, None] * y
    return y if bias is None else y + bias[:, None, None]


def max_pool2d(input: Tensor, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
