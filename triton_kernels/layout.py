"""Tensors in, memory layouts out (csrc/memory_layout.h in Python), and how a tensor is cut into programs."""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 2048  # elements in flight in a program: 16 per thread of four warps, two to four 128-bit loads
RUN = 512  # contiguous elements of a plane in a tile, while there are images to fill the rest
CHANNELS = 64  # channels of a tile in rows: at least one whole cache line per row
PIXELS = 32  # of planes, side by side in a tile that holds all channels: a cache line of fp32
PROGRAMS = 1024  # enough to fill a large GPU; only beyond it does a program take several tiles
# Of the kernels that combine chunks: four fp64 channels fill a 32-byte sector.
COMBINE = {"K": 256, "CB": 4}
MAX_CHUNK = 16  # tiles a program: the additions that an fp32 lane makes before it moves on to fp64


Strides = tuple[int, ...]


def is_rows(x: Tensor) -> bool:
    """Channels innermost and dense, as channels_last has it; (N, L, C) transposed to (N, C, L) counts too."""
    return 3 <= x.dim() <= 5 and x.movedim(1, -1).is_contiguous()


def with_plain_strides(x: Tensor) -> Tensor:
    """x, with the strides that a new tensor of its layout has: those of dimensions of one element may be anything in x,
    and what is allocated like it would keep them."""
    order = list(range(x.dim())) if x.is_contiguous() else [0, *range(2, x.dim()), 1]
    strides = strides_in_order(x.shape, order)
    return x if x.stride() == strides else x.as_strided(x.shape, strides)


def in_layout(x: Tensor) -> Tensor:
    """x itself where it has one of the two layouts, else a copy in the one that its strides suggest."""
    if x.is_contiguous() or is_rows(x):
        return with_plain_strides(x)
    return x.contiguous(memory_format=torch._prims_common.suggest_memory_format(x))


def batch_norm_in_rows(x: Tensor) -> bool:
    """Whether batch norms compute x with channels innermost. 3-D results are contiguous on a CPU, as PyTorch's."""
    if x.is_contiguous() or (x.dim() == 3 and x.device.type == "cpu"):
        return False
    return is_rows(x) or torch._prims_common.suggest_memory_format(x) != torch.contiguous_format


def laid_out(t: Tensor, rows: bool) -> Tensor:
    """t, or a copy of it, with channels innermost or, without `rows`, contiguous."""
    if is_rows(t) if rows else t.is_contiguous():
        return with_plain_strides(t)
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if rows else t.contiguous()


def in_batch_norm_layout(x: Tensor) -> Tensor:
    return laid_out(x, batch_norm_in_rows(x))


def keeps_strides(act: str) -> bool:
    """Whether PyTorch's activation has the strides of its input."""
    return act in ("none", "relu6", "prelu")


def batch_norm_result(x: Tensor, act: str) -> Tensor:
    """The result of a batch norm of x, from in_batch_norm_layout, with the strides of PyTorch's activation behind its
    batch norm."""
    if keeps_strides(act):
        return torch.empty_like(x)
    return empty_strided_like(x, elementwise_strides(x.shape, x.stride(), x.stride()))


def with_strides(t: Tensor, strides: Strides) -> Tensor:
    """t, or a copy of it, with these strides."""
    return t if t.stride() == strides else empty_strided_like(t, strides).copy_(t)


def densely(t: Tensor, strides: Strides) -> Tensor:
    """t, or a copy of it, whose elements lie as with these strides: those of dimensions of one element may differ."""
    return t if lie_alike(t.shape, t.stride(), strides) else empty_strided_like(t, strides).copy_(t)


def in_layout_of(t: Tensor, x: Tensor) -> Tensor:
    """t, or a copy of it, whose elements lie as those of x do."""
    return densely(t, x.stride())


def empty_strided_like(t: Tensor, strides: Strides) -> Tensor:
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device)


def lie_alike(sizes: Sequence[int], a: Strides, b: Strides) -> bool:
    """Whether elements lie in the same places: the strides of dimensions of one element do not matter."""
    return all(n <= 1 or x == y for n, x, y in zip(sizes, a, b, strict=True))


def elementwise_strides(sizes: Sequence[int], a: Strides, b: Strides) -> Strides:
    """The strides of PyTorch's elementwise operators on two tensors, by the rule of its TensorIterator.

    They are those that both lie in, else the dimensions are sorted by the strides of the first that tells two apart.
    """
    dims = range(len(sizes))
    for order in ([*dims], [0, 2, 3, 1])[: 2 if len(sizes) == 4 else 1]:
        plain = strides_in_order(sizes, order)
        if 0 in sizes or (lie_alike(sizes, a, plain) and lie_alike(sizes, b, plain)):
            return plain
    if a == b and lie_alike(sizes, a, strides_in_order(sizes, sorted(dims, key=lambda d: -a[d]))):
        return a

    def compare(d: int, e: int) -> int:
        """Whether d lies further in than e: negative, further out: positive, or nobody knows."""
        for strides in (a, b):
            if strides[d] == 0 or strides[e] == 0:
                continue
            if strides[d] != strides[e]:
                return -1 if strides[d] < strides[e] else 1
            if sizes[d] > sizes[e]:
                return 1
        return 0

    order = [*reversed(dims)]  # from the innermost
    for i in dims:
        at = i
        for before in reversed(range(i)):
            found = compare(order[before], order[at])
            if found < 0:
                break
            if found > 0:
                order[before], order[at] = order[at], order[before]
                at = before
    return strides_in_order(sizes, order[::-1])


def strides_of_sum(a: Tensor, b: Tensor, act: str) -> Strides:
    """The strides of PyTorch's act(a + b)."""
    total = elementwise_strides(a.shape, a.stride(), b.stride())
    return total if keeps_strides(act) else elementwise_strides(a.shape, total, total)


def memory_order(y: Tensor) -> list[int]:
    """The dimensions from the outermost to the innermost in the memory of a dense tensor."""
    return sorted(range(y.dim()), key=lambda d: -y.stride(d))


def strides_in_order(sizes: Sequence[int], order: Sequence[int]) -> Strides:
    """The strides of a dense tensor whose dimensions lie in that order."""
    strides, stride = [0] * len(order), 1
    for d in reversed(order):
        strides[d] = stride
        stride *= max(sizes[d], 1)
    return tuple(strides)


def dense(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.contiguous()


def mask_bytes(numel: int) -> int:
    """Of a mask of one bit per element; at least the four that the C++ kernels read at once."""
    return max((numel + 7) // 8, 4)


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def ceil_power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


class Cut(NamedTuple):
    """A tensor as (outer, ...) lines of `width` dense elements: planes (N, C, HW) or rows (N * HW, C).

    A tile is R lines by B elements. A program owns a channel (planes) or B channels (rows), and of those a chunk:
    `chunk` consecutive ones of the `steps` tiles that the channel has.
    """

    rows: bool
    outer: int
    C: int
    width: int
    unit: int  # a power of two that divides width: a constant of the kernel, from which it knows the alignment
    R: int
    B: int
    steps: int
    chunk: int

    @property
    def chunks(self) -> int:
        return -(-self.steps // self.chunk)

    @property
    def grid(self) -> tuple[int]:
        return (self.chunks * (-(-self.C // self.B) if self.rows else self.C),)

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.outer, self.C, self.width // self.unit, self.steps, self.chunk

    @property
    def constants(self) -> dict[str, int | bool]:
        return {"UNIT": self.unit, "ROWS": self.rows, "R": self.R, "B": self.B}

    @property
    def channel_view(self) -> tuple[int, ...]:
        """A channel as runs of elements: channel stride, runs, run stride, length of a run, step in a run."""
        if self.rows:
            return 1, 1, 0, self.outer, self.C
        return self.width, self.outer, self.C * self.width, self.width, 1

    @classmethod
    def of(cls, x: Tensor) -> "Cut":  # x from in_layout, not empty
        N, C = x.shape[:2]
        HW = x.numel() // (N * C)
        rows = HW == 1 or not x.is_contiguous()
        outer, width = (N * HW, C) if rows else (N, HW)
        B = min(ceil_power(width), CHANNELS if rows else max(RUN, TILE // ceil_power(N)), TILE)
        R = min(ceil_power(outer), TILE // B)
        steps = -(-outer // R) * (1 if rows else -(-width // B))
        programs = steps * (-(-C // B) if rows else C)
        chunk = min(max(programs // PROGRAMS, 1), MAX_CHUNK)
        return cls(rows, outer, C, width, min(width & -width, 16), R, B, steps, chunk)
