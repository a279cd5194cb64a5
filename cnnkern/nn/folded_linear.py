"""The linear layer of a folded model, as csrc/deferred/folded_linear.cpp computes it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cnnkern.extension import extension
from cnnkern.nn.onednn import dtypes, mkldnn, packing

_OWN_ROWS = 2**12  # up to this many input vectors cnnkern's kernel is faster


def prefers_own(dtype: torch.dtype, rows: int) -> bool:
    """Whether cnnkern's kernel, and not oneDNN's, computes a folded linear layer of an input with this many vectors.

    ``python -m benchmarks.studies.folded --layers`` times both for the layers of networks.
    """
    return dtype == torch.float32 and rows <= _own_rows()


def _own_rows() -> int:
    return _OWN_ROWS if extension.cpu_capability() != "DEFAULT" else 0


def folded_linear(weight: Tensor, bias: Tensor | None, sources: Sequence[Tensor], own: bool | None = None) -> Any:
    """A linear layer with this weight and bias, computed from ``sources``; it can tell whether these have changed.

    It computes ``act(linear(x) + residual)`` on the CPU in the dtypes that oneDNN has kernels for. `own` selects
    cnnkern's kernel or oneDNN's in float32, to time both; None follows :func:`prefers_own`.
    """
    rows = _own_rows() if own is None else 2**62 if own else 0

    def reorder(weight: Tensor, shape: Sequence[int]) -> Tensor:
        return mkldnn._reorder_linear_weight(weight, shape[0])

    return extension.FoldedLinear(weight, bias, rows, dtypes(), packing(weight, reorder), list(sources))
