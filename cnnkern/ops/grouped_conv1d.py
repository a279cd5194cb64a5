"""Grouped and depthwise convolution of sequences, by the operator for images: each is an image of one row."""

import torch.nn.functional as F
from torch import Tensor

from cnnkern.ops import route
from cnnkern.ops.convolution import Numbers, fits, numbers
from cnnkern.ops.grouped_conv2d import conv2d


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
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
    step, around, apart = (numbers(value, 1) for value in (stride, padding, dilation))
    if not fits(input, weight, bias, step, around, apart, groups, 1) or left_to_library(input, weight, step[0]):
        return F.conv1d(input, weight, bias, stride, padding, dilation, groups)
    # PyTorch makes the input contiguous too. A single row has one output per column whatever the vertical stride, and
    # kernels want both strides alike.
    row, pad = input.contiguous().unsqueeze(-2), around if isinstance(around, str) else (0, *around)
    return conv2d(row, weight.unsqueeze(2), bias, step * 2, pad, (1, *apart), groups).squeeze(-2)


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
