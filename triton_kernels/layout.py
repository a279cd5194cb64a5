"""Tensors in, memory layouts out (csrc/memory_layout.h in Python), and how a tensor is cut into programs."""

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 2048  # elements in flight in a program: 16 a thread of four warps, two to four 128-bit loads
RUN = 512  # contiguous elements of a plane in a tile, while there are images to fill the rest
CHANNELS = 64  # channels of a tile in rows: at least one whole cache line a row
PIXELS = 32  # of planes, side by side in a tile that holds all channels: a cache line of fp32
PROGRAMS = 1024  # enough to fill a large GPU; only beyond it does a program take several tiles
# Of the kernels that combine chunks: four fp64 channels fill a 32-byte sector.
COMBINE = {"K": 256, "CB": 4}
MAX_CHUNK = 16  # tiles a program: the additions that an fp32 lane makes before it moves on to fp64


def is_rows(x: Tensor) -> bool:
    """Channels innermost and dense, as channels_last has it; (N, L, C) transposed to (N, C, L) counts too."""
    return 3 <= x.dim() <= 5 and x.movedim(1, -1).is_contiguous()


def in_layout(x: Tensor) -> Tensor:
    """x itself where it has one of the two layouts, else a copy in the one that its strides suggest."""
    if x.is_contiguous() or is_rows(x):
        return x
    return x.contiguous(memory_format=torch._prims_common.suggest_memory_format(x))


def in_layout_of(t: Tensor, x: Tensor) -> Tensor:
    """t, or a copy of it, with the strides of x."""
    same = all(n <= 1 or a == b for n, a, b in zip(x.shape, t.stride(), x.stride(), strict=True))
    return t if same else torch.empty_like(x).copy_(t)


def in_rows(t: Tensor) -> Tensor:
    """t, or a copy of it, with channels innermost."""
    return t if is_rows(t) else t.movedim(1, -1).contiguous().movedim(-1, 1)


def dense(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.contiguous()


def mask_bytes(numel: int) -> int:
    """Of a mask of one bit an element; at least the four that the C++ kernels read at once."""
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
