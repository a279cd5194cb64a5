"""The convolution of a folded model, as csrc/deferred/folded_conv.cpp computes it."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cnnkern.extension import extension
from cnnkern.nn.onednn import dtypes, mkldnn, packing

# The largest results for which cnnkern's kernels are faster: pixels over the batch, and elements.
_POINTWISE_PIXELS, _DEPTHWISE_ELEMENTS = 2**12, 2**18


class _Own(NamedTuple):
    """A kernel of cnnkern ("": none), the smallest image in pixels, and the largest result in elements, for its use."""

    kernel: str = ""
    from_pixels: int = 0
    to_elements: int = 2**62


def prefers_own(conv: nn.modules.conv._ConvNd, dtype: torch.dtype, shape: Sequence[int]) -> bool:
    """Whether cnnkern's kernel, and not oneDNN's, computes a folded convolution of an input of this shape.

    Both run in channels_last. ``python -m benchmarks.studies.folded --layers`` times both for the layers of networks.
    """
    own, (padding, _) = _own(conv, conv.weight), _padding(conv)
    sizes = zip(shape[2:], padding, conv.dilation, conv.weight.shape[2:], conv.stride, strict=True)
    pixels = math.prod((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in sizes)
    return (
        own.kernel != ""
        and dtype == torch.float32
        and own.from_pixels <= math.prod(shape[2:])
        and shape[0] * conv.weight.shape[0] * pixels <= own.to_elements
    )


def own_kernel(conv: nn.modules.conv._ConvNd) -> str:
    """Which of cnnkern's kernels can compute a folded convolution in float32; "" for none."""
    return _own(conv, conv.weight).kernel


def _own(conv: nn.modules.conv._ConvNd, weight: Tensor) -> _Own:
    if not isinstance(conv, nn.Conv2d) or weight.dim() != 4:
        return _Own()
    # Not the layer's attributes: its weight may have been replaced by one that does not fit them.
    outputs, width, k, other = weight.shape
    stride, (padding, pad) = conv.stride, _padding(conv)
    if extension.cpu_capability() != "DEFAULT" and stride[0] == stride[1] and not pad:
        if (k, other) == (1, 1) and conv.groups == 1 and padding == (0, 0):
            return _Own("pointwise", to_elements=_POINTWISE_PIXELS * outputs)
        is_depthwise = width == 1 and conv.groups == outputs and conv.dilation == (1, 1)
        if is_depthwise and k == other and k in (3, 5) and stride[0] in (1, 2) and padding[0] == padding[1] < k:
            return _Own("depthwise", to_elements=_DEPTHWISE_ELEMENTS)
    if conv.groups == 1 or outputs != conv.groups * width or width not in (2, 4, 8, 16):
        return _Own()
    return _Own("grouped", from_pixels=28 * 28 if width == 16 else 0)


def _padding(conv: nn.modules.conv._ConvNd) -> tuple[tuple[int, ...], list[int]]:
    """The zero padding per dimension, and the padding before the convolution as F.pad's argument."""
    around = list(conv._reversed_padding_repeated_twice)  # of the last dimension first, both sides of each
    if conv.padding_mode == "zeros" and around[::2] == around[1::2]:
        return tuple(around[::-2]), []
    return (0,) * len(conv.kernel_size), around


def folded_conv(
    conv: nn.modules.conv._ConvNd,
    weight: Tensor,
    bias: Tensor | None,
    sources: Sequence[Tensor],
    own: bool | None = None,
    normed: bool = False,
) -> Any:
    """``conv`` with another weight and bias, which were computed from ``sources``; it notices if these change.

    It computes ``act(conv(x) + residual)`` in one kernel if oneDNN has one, and keeps weights in oneDNN's layout, which
    depends on the input's shape. `own` selects cnnkern's kernel, if there is one, or oneDNN's: to time both.
    `normed`: a batch norm is folded into the weight.
    """
    padding, pad = _padding(conv)
    chosen = _own(conv, weight)
    if own is not None:
        chosen = _Own(chosen.kernel if own else "")
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    stride, dilation, groups = conv.stride, conv.dilation, conv.groups
    settings = extension.ConvSettings(stride, padding, dilation, groups, pad, mode, *chosen, normed)

    def reorder(weight: Tensor, shape: Sequence[int]) -> Tensor:
        return mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, shape)

    pack = packing(weight, reorder)
    return extension.FoldedConv(weight, bias, settings, dtypes(), pack, list(sources))
