"""PyTorch's oneDNN operators: the dtypes for which they are fused, and weights packed in oneDNN's layout."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

mkldnn = torch.ops.mkldnn


@functools.cache
def dtypes() -> list[torch.dtype]:
    """The dtypes for which PyTorch has oneDNN's fused operators here."""
    if not torch.backends.mkldnn.is_available() or mkldnn._is_mkldnn_acl_supported():
        return []  # Arm's library has none
    found = [torch.float32]
    found += [torch.bfloat16] * mkldnn._is_mkldnn_bf16_supported()
    return found + [torch.float16] * mkldnn._is_mkldnn_fp16_supported()


def packing(
    weight: Tensor, reorder: Callable[[Tensor, Sequence[int]], Tensor]
) -> Callable[[list[int], torch.dtype], Tensor]:
    """Returns a function that packs a weight for an input's shape by `reorder`, so that no call has to reorder it.

    The function must not refer to the layer: the layer refers to it through the extension, and Python's collector does
    not see such a cycle.
    """
    known: dict[torch.dtype, list[Tensor]] = {}

    def pack(shape: list[int], dtype: torch.dtype) -> Tensor:
        packed = reorder(weight.to(dtype), shape)
        order, others = _order(packed), known.setdefault(dtype, [])
        for other in others:  # shapes with the same layout share one packed weight
            if _order(other) == order:
                return other
        others.append(packed)
        return packed

    return pack


def _order(packed: Tensor) -> Sequence[int]:
    """oneDNN's descriptor of a packed weight, without its padding bytes: equal for equal layouts."""
    descriptor = mkldnn._get_mkldnn_serialized_md(packed).tolist()
    return [*descriptor[:108], *descriptor[112:316], *descriptor[320:]]
