"""Every operator in a few lines of eager PyTorch: its specification, the tests' oracle, the benchmarks' baseline.

Each function has the signature of its namesake in :mod:`cnnkern.functional`.
"""

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "sigmoid": F.sigmoid,
    "silu": F.silu,
    "hardswish": F.hardswish,
}


def batch_norm_act(
    input: Tensor, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5, act="relu"
) -> Tensor:
    return ACTIVATIONS[act](F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps))


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
) -> Tensor:
    y = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return ACTIVATIONS[act](y + residual)


def add_relu(input: Tensor, other: Tensor) -> Tensor:
    return F.relu(input + other)


def conv2d(input: Tensor, weight: Tensor, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
