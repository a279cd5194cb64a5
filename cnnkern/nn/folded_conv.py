"""The convolution of a folded model, as csrc/deferred/folded_conv.cpp computes it: what Python knows of oneDNN."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnnkern.extension import extension

_mkldnn = torch.ops.mkldnn


def prefers_own(weight: Tensor, groups: int, dtype: torch.dtype, pixels: int) -> bool:
    """Whether our kernel of grouped convolution, followed by the activation, beats oneDNN's with the activation in it.

    ``weight`` is (out_channels, C / groups, kH, kW), ``pixels`` the number of pixels of an input image. Both run in
    channels_last. ``python -m benchmarks.studies.folded`` times both for the grouped layers of six networks.
    """
    least = _own_from_pixels(weight, groups)
    return dtype == torch.float32 and 0 <= least <= pixels


def _own_from_pixels(weight: Tensor, groups: int) -> int:
    width = weight.shape[1]
    if weight.dim() != 4 or groups == 1 or weight.shape[0] != groups * width:
        return -1
    return 0 if width in (2, 4, 8) else 28 * 28 if width == 16 else -1


def folded_conv(
    conv: nn.modules.conv._ConvNd,
    weight: Tensor,
    bias: Tensor | None,
    sources: Sequence[Tensor],
    own: bool | None = None,
) -> Any:
    """``conv`` with another weight and bias, made of ``sources``, which notes whether these change.

    It computes ``act(conv(x) + residual)`` in one pass where oneDNN has kernels, and keeps weights in oneDNN's order,
    which depends on the input's shape. `own` says which kernel computes grouped convolutions, for who times both.
    """
    padding: tuple[int, ...] = (0,) * len(conv.kernel_size)
    pad: list[int] = []  # what is padded before
    around = list(conv._reversed_padding_repeated_twice)  # of the last dimension first, both sides of each
    if conv.padding_mode == "zeros" and around[::2] == around[1::2]:
        padding = tuple(around[::-2])
    else:
        pad = around
    least = _own_from_pixels(weight, conv.groups) if own is None else 0 if own else -1
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    settings = extension.ConvSettings(conv.stride, padding, conv.dilation, conv.groups, pad, mode, least, _dtypes())
    known: dict[torch.dtype, list[Tensor]] = {}

    def pack(shape: list[int], dtype: torch.dtype) -> Tensor:
        """The weight in oneDNN's order for an input of this shape: in another it would be reordered in every call."""
        packed = _mkldnn._reorder_convolution_weight(
            weight.to(dtype), padding, conv.stride, conv.dilation, conv.groups, shape
        )
        order, others = _order(packed), known.setdefault(dtype, [])
        for other in others:  # shapes that want one order share it
            if _order(other) == order:
                return other
        others.append(packed)
        return packed

    return extension.FoldedConv(weight, bias, settings, pack, list(sources))


@functools.cache
def _dtypes() -> list[torch.dtype]:
    """Those that oneDNN has fused operators for."""
    if not torch.backends.mkldnn.is_available() or _mkldnn._is_mkldnn_acl_supported():
        return []  # Arm's library has none
    found = [torch.float32]
    found += [torch.bfloat16] * _mkldnn._is_mkldnn_bf16_supported()
    return found + [torch.float16] * _mkldnn._is_mkldnn_fp16_supported()


def _order(packed: Tensor) -> Sequence[int]:
    """What tells two orders of a weight apart: oneDNN's descriptor, without the bytes in it that are padding."""
    descriptor = _mkldnn._get_mkldnn_serialized_md(packed).tolist()
    return [*descriptor[:108], *descriptor[112:316], *descriptor[320:]]
