"""What several operators of the backend ``"eager"`` do with tensors: types, masks, gradients that are wanted."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cnnkern.triton_kernels import check
from cnnkern.triton_kernels.layout import (
    Strides,
    mask_bytes,
    memory_order,
)


def to(dtype: torch.dtype, v: Tensor | None) -> Tensor | None:
    return None if v is None else v.to(dtype)


def asked(
    grads: Sequence[Tensor | None], output_mask: Sequence[bool], like: Sequence[Tensor | None], x: Tensor
) -> tuple[Tensor, ...]:
    """The gradients that were asked for, each in the dtype of what it is the gradient of; the others empty."""
    triples = zip(grads, output_mask, like, strict=True)
    return tuple(
        g.to(check.wide_type(x) if t is None else t.dtype) if wanted else x.new_empty(0) for g, wanted, t in triples
    )


def zeros(output_mask: Sequence[bool], like: Sequence[Tensor | None], shape: Sequence[int], x: Tensor):
    """Gradients of x and of parameters of `shape` where x has no elements."""
    pairs = zip(output_mask[1:], like, strict=True)
    parameters = (check.parameter_gradient(wanted, t, shape, x).zero_() for wanted, t in pairs)
    return (torch.zeros_like(x) if output_mask[0] else x.new_empty(0), *parameters)


def shifts(t: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=t.device)


def packed(y: Tensor) -> Tensor:
    """[y > 0], NaN included, one bit per element in the order of y's memory."""
    flat = y.permute(memory_order(y)).reshape(-1)
    bits = torch.zeros(8 * mask_bytes(y.numel()), dtype=torch.uint8, device=y.device)
    bits[: y.numel()] = ~(flat <= 0)
    return (bits.view(-1, 8) << shifts(y)).sum(1, dtype=torch.uint8)


def unpacked(mask: Tensor, x: Tensor, strides: Strides) -> Tensor:
    """A mask as booleans of the shape of x that lie in memory with these strides."""
    bits = (mask[:, None] >> shifts(mask) & 1).bool().view(-1)[: x.numel()]
    return bits.as_strided(x.shape, strides)


def columns(x: Tensor, v: Tensor) -> Tensor:
    return v.to(check.wide_type(x)).view(1, -1, *[1] * (x.dim() - 2))
