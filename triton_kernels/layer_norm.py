"""layer_norm and layer_norm_backward of csrc/ops.cpp in Triton: rows of lines.py."""

import math
from collections.abc import Sequence

from cnnkern.triton_kernels import check, lines
from cnnkern.triton_kernels.layout import dense, with_plain_strides
from torch import Tensor


def _rows(x: Tensor, normalized_shape: Sequence[int]) -> tuple[lines.Lines, list[int]]:
    """How x is cut, and the shape of its statistics."""
    C = math.prod(normalized_shape)
    kept = list(x.shape[: x.dim() - len(normalized_shape)])
    return lines.Lines.of(1, max(C, 1), math.prod(kept), True), kept + [1] * len(normalized_shape)


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and rstd, as the schema in csrc/ops.cpp has it."""
    check.layer_norm("cnnkern::layer_norm", x, normalized_shape, weight, bias, wide)
    cut, shape = _rows(x, normalized_shape)
    return lines.forward(with_plain_strides(x.contiguous()), cut, dense(weight), dense(bias), eps, shape, wide)


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias as the schema in csrc/ops.cpp has it; of no elements where `output_mask` is False."""
    op = "cnnkern::layer_norm_backward"
    check.layer_norm(op, x, normalized_shape, weight, bias, check.is_wide(dy, x))
    cut, shape = _rows(x, normalized_shape)
    check.layer_norm_saved(op, dy, x, shape, weight, bias, mean, rstd, output_mask)
    x = with_plain_strides(x.contiguous())
    return lines.backward(dy.contiguous(), x, cut, weight, bias, mean, rstd, normalized_shape, output_mask)
