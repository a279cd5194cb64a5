"""Masks of one bit per element, in the order of the tensor's memory: element i is bit i % 8 of byte i / 8."""

import torch
import triton
import triton.language as tl
from cnnkern.triton_kernels import layout
from cnnkern.triton_kernels.layout import mask_bytes
from torch import Tensor


@triton.jit
def above(v, bound):
    """v > bound, and true for NaN: eager's ReLU lets the gradient of NaN pass."""
    return tl.where(v <= bound, 0, 1)


@triton.jit
def packed(bits):
    """Rows of eight bits (n, 8) as bytes (n,)."""
    return tl.sum(bits << tl.arange(0, 8)[None, :], axis=1).to(tl.uint8)


@triton.jit
def unpacked(bytes):
    """Bytes (n,) as rows of eight bits (n, 8)."""
    return (bytes[:, None] >> tl.arange(0, 8)[None, :]) & 1 != 0


@triton.jit
def bit_at(bits, at, inside):
    """The bits of the elements `at`, false for those that are not inside."""
    byte = tl.load(bits + (at >> 3), inside, other=0).to(tl.int32)
    return (byte >> (at & 7).to(tl.int32)) & 1 != 0


@triton.jit
def stretch(numel, BYTES: tl.constexpr):
    """A program's bytes of the mask (BYTES,), and its elements (BYTES, 8) with those that are inside."""
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    at = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    return byte, at, at < numel


@triton.jit
def positive_kernel(y, mask, numel, size, BYTES: tl.constexpr):
    byte, at, inside = stretch(numel, BYTES)
    v = tl.load(y + at, inside, other=0.0)
    wide = v.to(tl.float64) if y.dtype.element_ty == tl.float64 else v.to(tl.float32)
    tl.store(mask + byte, packed(above(wide, 0.0)), byte < size)


def grid_of(numel: int) -> tuple[int]:
    return (max(triton.cdiv(numel, layout.TILE), 1),)


def pack_positive(y: Tensor) -> Tensor:
    """The mask [y > 0] of y, which is dense."""
    mask = y.new_empty(mask_bytes(y.numel()), dtype=torch.uint8)
    positive_kernel[grid_of(y.numel())](y, mask, y.numel(), mask.numel(), BYTES=layout.TILE // 8)
    return mask
