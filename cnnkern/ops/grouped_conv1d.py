"""Grouped and depthwise convolution of sequences, by the operator for images: each is an image of one row."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from cnnkern.ops import route
from cnnkern.ops.grouped_conv2d import conv2d

_Numbers = int | Sequence[int]


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Numbers = 1,
    padding: _Numbers | str = 0,
    dilation: _Numbers = 1,
    groups: int = 1,
) -> Tensor:
    """1-D convolution, fast for many groups: depthwise, and groups of a few channels.

    Equivalent to ``F.conv1d(input, weight, bias, stride, padding, dilation, groups)``; all its arguments are accepted.
    PyTorch's kernel is used where it is faster (``docs/grouped_conv.md`` has the rule).

    Shapes: ``input`` (N, C, L) or (C, L); ``weight`` (out_channels, C / groups, K); ``bias`` (out_channels,) or None;
    the result (N, out_channels, L') or (out_channels, L'), contiguous. ``padding`` is a number of elements, ``"valid"``
    or ``"same"``. All tensors have one dtype. Saved for backward: ``input``, made contiguous, and ``weight``.

    Raises RuntimeError, as PyTorch does, for shapes, dtypes or devices that do not match, for groups that do not divide
    the channels and for a kernel longer than the padded input.
    """
    if route.is_pytorchs((input,), (weight, bias), shards=True):
        return route.by_pytorch(conv1d, input, weight, bias, stride, padding, dilation, groups)
    step, around, apart = _single(stride), _single(padding), _single(dilation)
    if not _fits(input, weight, bias, step, around, apart, groups) or left_to_library(input, weight, step):
        return F.conv1d(input, weight, bias, stride, padding, dilation, groups)
    # PyTorch makes the input contiguous too. A single row has one output per column whatever the vertical stride, and
    # kernels want both strides alike.
    row, pad = input.contiguous().unsqueeze(-2), around if isinstance(around, str) else (0, around)
    return conv2d(row, weight.unsqueeze(2), bias, (step, step), pad, (1, apart), groups).squeeze(-2)


def _single(value: Any) -> Any:
    """The number in a sequence of one. Longer sequences are F.conv1d's to refuse."""
    return value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value


def _fits(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> bool:
    """Whether this is a grouped convolution of real numbers. F.conv1d has what else there is, and all errors."""
    if input.is_complex() or input.dim() not in (2, 3) or weight.dim() != 3 or groups < 2:
        return False
    outputs, width, taps = weight.shape
    if width * groups != input.shape[-2] or outputs == 0 or outputs % groups or taps == 0:
        return False
    if bias is not None and bias.shape != (outputs,):
        return False
    whole = (stride, dilation) if isinstance(padding, str) else (stride, dilation, padding)
    if not all(isinstance(value, Integral) for value in whole) or min(stride, dilation) < 1:
        return False
    span = dilation * (taps - 1) + 1
    if isinstance(padding, str):
        return (padding == "valid" and input.shape[-1] >= span) or (padding == "same" and stride == 1)
    return padding >= 0 and input.shape[-1] + 2 * padding >= span


def left_to_library(input: Tensor, weight: Tensor, stride: int) -> bool:
    """Whether PyTorch computes it on a CPU: where it was faster (`python -m benchmarks.studies.sequences`)."""
    if not input.is_cpu:
        return False
    _, width, taps = weight.shape
    batch = input.shape[0] if input.dim() == 3 else 1
    outputs = input.shape[-1] // stride  # about
    if input.element_size() == 2:
        return width > 8 or (width > 2 and taps > 9)
    if width >= 16:
        return width > 16 or (batch > 8 and outputs < 64)
    return width == 1 and taps <= 3 and batch > 16 and outputs < 16
