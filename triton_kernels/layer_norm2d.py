"""layer_norm2d and layer_norm2d_backward of csrc/ops.cpp in Triton: the pixels of planes, or rows, of lines.py."""

from collections.abc import Sequence

from cnnkern.triton_kernels import check, lines
from cnnkern.triton_kernels.layout import dense, in_layout, in_layout_of
from torch import Tensor


def _lines(x: Tensor) -> lines.Lines:  # x from in_layout
    N, C, H, W = x.shape
    if H * W == 1 or not x.is_contiguous():
        return lines.Lines.of(1, max(C, 1), N * H * W, True)
    return lines.Lines.of(N, max(C, 1), H * W, False)


def layer_norm2d(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, wide: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and rstd, as the schema in csrc/ops.cpp has it."""
    check.layer_norm2d("cnnkern::layer_norm2d", x, weight, bias, wide)
    x = in_layout(x)
    N, _, H, W = x.shape
    return lines.forward(x, _lines(x), dense(weight), dense(bias), eps, (N, 1, H, W), wide)


def layer_norm2d_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias as the schema in csrc/ops.cpp has it; of no elements where `output_mask` is False."""
    op = "cnnkern::layer_norm2d_backward"
    check.layer_norm2d(op, x, weight, bias, check.is_wide(dy, x))
    N, _, H, W = x.shape
    check.layer_norm_saved(op, dy, x, (N, 1, H, W), weight, bias, mean, rstd, output_mask)
    x = in_layout(x)
    dy = in_layout_of(dy, x)
    return lines.backward(dy, x, _lines(x), weight, bias, mean, rstd, x.shape[1:2], output_mask)
