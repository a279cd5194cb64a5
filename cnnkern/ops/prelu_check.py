"""What bn_prelu asks of its inputs: csrc/check.h in Python, as triton_kernels/check.py is for the other operators."""

from collections.abc import Sequence

from torch import Tensor

from cnnkern.triton_kernels import check


def slope(op: str, v: Tensor, x: Tensor) -> None:
    if v.dim() > 1 or v.numel() not in (1, x.shape[1]):
        raise RuntimeError(
            f"{op}: slope should contain 1 element or {x.shape[1]} (one per channel); got shape {list(v.shape)}"
        )
    check.parameter_type(op, "slope", v, x)


def backward(
    op: str,
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor,
    mean: Tensor,
    rstd: Tensor,
    channels_last: bool,
    output_mask: Sequence[bool],
) -> None:
    wanted = [output_mask[0], *output_mask[2:4]]
    check.batch_norm_backward(op, dy, x, weight, bias, True, mean, rstd, wanted)
    slope(op, slopes, x)
    if residual is not None:
        check.same_shape(op, "residual", residual, x)
    elif output_mask[1]:
        raise RuntimeError(f"{op}: output_mask asks for dresidual, but residual is None")
    check.channels_last(op, x, channels_last)
