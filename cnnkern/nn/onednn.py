"""What Python knows of oneDNN: for which dtypes PyTorch has its fused operators, and weights in its order."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

mkldnn = torch.ops.mkldnn


@functools.cache
def dtypes() -> list[torch.dtype]:
    """Those that oneDNN has fused operators for."""
    if not torch.backends.mkldnn.is_available() or mkldnn._is_mkldnn_acl_supported():
        return []  # Arm's library has none
    found = [torch.float32]
    found += [torch.bfloat16] * mkldnn._is_mkldnn_bf16_supported()
    return found + [torch.float16] * mkldnn._is_mkldnn_fp16_supported()


def packing(
    weight: Tensor, reorder: Callable[[Tensor, Sequence[int]], Tensor]
) -> Callable[[list[int], torch.dtype], Tensor]:
    """Packs a weight for an input of a shape, with `reorder`: in another order it would be reordered in every call.

    What is returned does not hold the layer, which holds it through the extension, where Python's collector sees no
    cycle.
    """
    known: dict[torch.dtype, list[Tensor]] = {}

    def pack(shape: list[int], dtype: torch.dtype) -> Tensor:
        packed = reorder(weight.to(dtype), shape)
        order, others = _order(packed), known.setdefault(dtype, [])
        for other in others:  # shapes that want one order share it
            if _order(other) == order:
                return other
        others.append(packed)
        return packed

    return pack


def _order(packed: Tensor) -> Sequence[int]:
    """What tells two orders of a weight apart: oneDNN's descriptor, without the bytes in it that are padding."""
    descriptor = mkldnn._get_mkldnn_serialized_md(packed).tolist()
    return [*descriptor[:108], *descriptor[112:316], *descriptor[320:]]
