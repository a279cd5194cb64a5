"""Arguments of convolutions of one and three dimensions, as PyTorch's functions take them."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

from torch import Tensor

Numbers = int | Sequence[int]


def numbers(value: Any, dims: int) -> Any:
    """A number for each dimension, of one for all or of a sequence. Texts, and sequences of other lengths, stay."""
    if not isinstance(value, (list, tuple)):
        return value if isinstance(value, str) else (value,) * dims
    return tuple(value) * dims if len(value) == 1 else tuple(value)


def fits(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int, dims: int
) -> bool:
    """Whether this is a grouped convolution of real numbers. PyTorch's functions have the others, and all errors.

    `stride`, `padding` and `dilation` are of :func:`numbers`.
    """
    if input.is_complex() or input.dim() not in (dims + 1, dims + 2) or weight.dim() != dims + 2 or groups < 2:
        return False
    outputs, width, *taps = weight.shape
    if width * groups != input.shape[-dims - 1] or outputs == 0 or outputs % groups or 0 in taps:
        return False
    if bias is not None and bias.shape != (outputs,):
        return False
    around = (0,) * dims if isinstance(padding, str) else padding
    if any(len(n) != dims or not all(isinstance(i, Integral) for i in n) for n in (stride, around, dilation)):
        return False
    if min(*stride, *dilation) < 1 or min(around) < 0:
        return False
    if isinstance(padding, str) and padding != "valid":
        return padding == "same" and set(stride) == {1}
    sizes = zip(input.shape[-dims:], around, dilation, taps, strict=True)
    return all(size + 2 * p >= d * (k - 1) + 1 for size, p, d, k in sizes)
