"""The last step of a sum over programs: their partial sums, in float64, are added in a fixed order."""

import triton
import triton.language as tl
from cnnkern.triton_kernels.layout import COMBINE
from torch import Tensor


@triton.jit
def store_rounded(p, at, v, mask):
    """Stores fp64, rounded to fp32 on its way to 16 bits as in the C++ kernels."""
    if p.dtype.element_ty == tl.float64:
        tl.store(p + at, v, mask)
    else:
        tl.store(p + at, v.to(tl.float32).to(p.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["chunks", "length"])
def sum_chunks_kernel(partial, out, chunks, length, K: tl.constexpr, CB: tl.constexpr):
    """partial (chunks, length) -> out (length,)."""
    c = tl.program_id(0) * CB + tl.arange(0, CB)
    total = tl.zeros((CB,), tl.float64)
    for k0 in range(0, chunks, K):
        k = k0 + tl.arange(0, K)[:, None]
        p = partial + k.to(tl.int64) * length + c[None, :]
        total += tl.sum(tl.load(p, (k < chunks) & (c < length)[None, :], other=0.0), axis=0)
    store_rounded(out, c, total, c < length)


def sum_chunks(partial: Tensor, out: Tensor) -> None:
    """out, of any shape, dense, is the sum of partial (chunks, out.numel()) over its rows."""
    chunks, length = partial.shape
    sum_chunks_kernel[(triton.cdiv(length, COMBINE["CB"]),)](partial, out, chunks, length, **COMBINE)
