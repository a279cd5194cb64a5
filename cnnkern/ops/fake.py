"""What the operators' fakes share: outputs without data, for torch.compile and torch.export."""

from collections.abc import Sequence

import torch
from torch import Tensor


def is_meta(x: Tensor) -> bool:
    """Whether no kernel will ever check what this tensor is given with: the fake is all that there is."""
    return x.device.type == "meta"


def empty_like_layout(x: Tensor) -> Tensor:
    """An output of the kernels: dense, in the input's memory format."""
    transposed = x.dim() == 3 and x.transpose(1, 2).is_contiguous()
    dense = (
        x.is_contiguous()
        or transposed
        or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
        or (x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d))
    )
    if dense:
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch._prims_common.suggest_memory_format(x))


def mask_of(x: Tensor) -> Tensor:
    """A mask of one bit an element, in four bytes at least."""
    return x.new_empty(torch.sym_max((x.numel() + 7) // 8, 4), dtype=torch.uint8)


def like(wanted: bool, t: Tensor | None, x: Tensor) -> Tensor:
    """A gradient of t where it is wanted, else an empty tensor."""
    return torch.empty_like(t) if wanted else x.new_empty(0)  # type: ignore[arg-type]  # not wanted of None


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
            lambda name=name: f"{op}: {name} should contain one element a channel",  # type: ignore[misc]
        )


def check_residual(op: str, x: Tensor, residual: Tensor) -> None:
    torch._check(
        residual.shape == x.shape and residual.dtype == x.dtype and residual.device == x.device,
        lambda: f"{op}: residual must have the input's shape, dtype and device",
    )


def layer_norm_statistics(x: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """mean and rstd of a layer norm over `dims`: those dimensions have one element."""
    shape = [1 if d in dims else n for d, n in enumerate(x.shape)]
    mean = x.new_empty(shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return mean, torch.empty_like(mean)


def layer_norm_parameters(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, output_mask: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """dweight and dbias of a layer norm, dense whatever the parameters' strides."""
    wanted = ((output_mask[1], weight), (output_mask[2], bias))
    dense = [v.new_empty(v.shape) if want and v is not None else x.new_empty(0) for want, v in wanted]
    return dense[0], dense[1]
