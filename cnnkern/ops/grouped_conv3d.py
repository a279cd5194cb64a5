"""Grouped and depthwise convolution of volumes, such as videos, by the operator of images."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnkern.ops import route
from cnnkern.ops.convolution import Numbers, fits, numbers

_grouped_conv = torch.ops.cnnkern.grouped_conv2d.default


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
) -> Tensor:
    """3-D convolution, fast on a CPU for many groups: depthwise, and groups of a few channels.

    Equivalent to ``F.conv3d(input, weight, bias, stride, padding, dilation, groups)``; all its arguments are accepted.
    PyTorch's kernel is used where it is faster, and for CUDA tensors (``docs/grouped_conv.md`` has the rule).

    Shapes: ``input`` (N, C, T, H, W) or (C, T, H, W); ``weight`` (out_channels, C / groups, kT, kH, kW); ``bias``
    (out_channels,) or None; the result (N, out_channels, T', H', W') or without N. ``padding`` is a number of elements,
    one for each of the three dimensions, ``"valid"`` or ``"same"``. All tensors have one dtype. The result is
    channels_last_3d where the input or the weight is. Saved for backward: ``input`` and ``weight``.

    Raises RuntimeError, as PyTorch does, for shapes, dtypes or devices that do not match, for groups that do not divide
    the channels and for a kernel larger than the padded input.
    """
    if route.is_pytorchs((input,), (weight, bias), shards=True):
        return route.by_pytorch(conv3d, input, weight, bias, stride, padding, dilation, groups)
    strides, paddings, dilations = (numbers(value, 3) for value in (stride, padding, dilation))
    if input.is_cuda or not fits(input, weight, bias, strides, paddings, dilations, groups, 3):
        return F.conv3d(input, weight, bias, stride, padding, dilation, groups)
    if isinstance(paddings, str):
        total = [0 if paddings == "valid" else d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
        if any(n % 2 for n in total):  # padded on one side alone
            return F.conv3d(input, weight, bias, stride, padding, dilation, groups)
        paddings = tuple(n // 2 for n in total)
    if input.dim() == 4:
        return _grouped_conv(input[None], weight, bias, strides, paddings, dilations, groups)[0]
    return _grouped_conv(input, weight, bias, strides, paddings, dilations, groups)
