"""What the operators' fakes share: outputs without data, for torch.compile and torch.export."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from cnnkern.triton_kernels.check import wide_type
from cnnkern.triton_kernels.layout import batch_norm_result, empty_strided_like, strides_of_sum


def is_meta(x: Tensor) -> bool:
    """Whether no kernel will ever check what this tensor is given with: the fake is all that there is."""
    return x.device.type == "meta"


def _format(x: Tensor) -> torch.memory_format:
    """What x is dense in, or what its strides suggest."""
    formats = (torch.contiguous_format, *((torch.channels_last,) if x.dim() == 4 else ()))
    formats += (torch.channels_last_3d,) if x.dim() == 5 else ()
    return next((f for f in formats if x.is_contiguous(memory_format=f)), None) or suggest_memory_format(x)


def empty_like_layout(x: Tensor) -> Tensor:
    """An output of the kernels: dense, in the input's memory format."""
    if x.dim() == 3 and not x.is_contiguous() and x.transpose(1, 2).is_contiguous():
        return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    return torch.empty_like(x, memory_format=_format(x))


def batch_norm_of(x: Tensor, act: str = "none") -> Tensor:
    """The output of a batch norm: as PyTorch's on a CPU, where three-dimensional ones are contiguous."""
    if x.dim() == 3 and x.device.type == "cpu":
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return batch_norm_result(empty_like_layout(x), act)


def in_order_of(x: Tensor, channels_last: bool) -> Tensor:
    """Like x, with channels innermost or contiguous."""
    if channels_last:
        return torch.empty_like(x.movedim(1, -1), memory_format=torch.contiguous_format).movedim(-1, 1)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def sum_of(a: Tensor, b: Tensor, act: str) -> Tensor:
    """act(a + b), with PyTorch's own strides."""
    if a.is_contiguous() and b.is_contiguous():
        return torch.empty_like(a, memory_format=torch.contiguous_format)
    return empty_strided_like(a, strides_of_sum(a, b, act))


def mask_of(x: Tensor) -> Tensor:
    """A mask of one bit per element, in four bytes at least."""
    return x.new_empty(torch.sym_max((x.numel() + 7) // 8, 4), dtype=torch.uint8)


def parameter_gradient(wanted: bool, t: Tensor | None, shape: Sequence[int], x: Tensor) -> Tensor:
    """A gradient of t where it is wanted, else an empty tensor; in the dtype of sums where t is not given."""
    if not wanted:
        return x.new_empty(0)
    return x.new_empty(shape, dtype=wide_type(x) if t is None else t.dtype)


def check_channel_vectors(op: str, x: Tensor, **vectors: Tensor | None) -> None:
    for name, vector in vectors.items():
        if vector is None:
            continue
        torch._check(
            vector.device == x.device,
            lambda name=name, v=vector: (  # type: ignore[misc]
                f"{op}: expected {name} on {x.device} like the input; got {v.device}"
            ),
        )
        torch._check(
            vector.dim() == 1 and vector.shape[0] == x.shape[1],
            lambda name=name: f"{op}: {name} should contain one element per channel",  # type: ignore[misc]
        )


def check_residual(op: str, x: Tensor, residual: Tensor) -> None:
    torch._check(
        residual.shape == x.shape and residual.dtype == x.dtype and residual.device == x.device,
        lambda: f"{op}: residual must have the input's shape, dtype and device",
    )


def check_slope(op: str, x: Tensor, slope: Tensor) -> None:
    torch._check(
        slope.device == x.device, lambda: f"{op}: expected slope on {x.device} like the input; got {slope.device}"
    )
    torch._check(
        slope.dim() <= 1 and (slope.numel() == 1 or slope.numel() == x.shape[1]),
        lambda: f"{op}: slope should contain 1 element or one per channel",
    )


def layer_norm_statistics(x: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """mean and rstd of a layer norm over `dims`: those dimensions have one element."""
    shape = [1 if d in dims else n for d, n in enumerate(x.shape)]
    mean = x.new_empty(shape, dtype=wide_type(x))
    return mean, torch.empty_like(mean)
