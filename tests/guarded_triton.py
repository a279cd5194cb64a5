"""Triton's interpreter under guard: kernels run on CPU tensors, and what a GPU would not forgive is an error.

Left alone the interpreter, which computes with numpy on raw pointers, reads and writes out of bounds, lets programs of
one launch overwrite each other's results or read what another is writing, truncates to bfloat16, computes with
bfloat16's bits as integers, and rounds a fused multiply-add twice. :func:`guarded` makes each an error, or right;
tests/test_guarded_triton.py plants the faults.
"""

import contextlib
import dataclasses
import importlib
import pkgutil
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction


class Memory:
    """The memory of one launch's arguments: accesses have to stay inside, and programs out of each other's way."""

    def __init__(self, tensors: list[Tensor]) -> None:
        spans = [self.span(t) for t in tensors if t.numel() > 0]
        self.begins, self.ends = np.array(sorted(spans), dtype=np.uint64).reshape(-1, 2).T
        self.read: list[tuple[np.ndarray, tuple[int, ...]]] = []
        self.written: list[tuple[np.ndarray, tuple[int, ...]]] = []

    @staticmethod
    def span(t: Tensor) -> tuple[int, int]:
        last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()

    def check(self, kind: str, addresses: np.ndarray, itemsize: int) -> None:
        at = np.searchsorted(self.begins, addresses, side="right") - 1
        outside = (at < 0) | (addresses + np.uint64(itemsize) > self.ends[np.maximum(at, 0)])
        if outside.any():
            raise IndexError(f"{kind} out of bounds: {outside.sum()} of {addresses.size} addresses")

    def load(self, addresses: np.ndarray, itemsize: int, program: tuple[int, ...]) -> None:
        self.check("load", addresses, itemsize)
        self.read.append((addresses, program))

    def store(self, addresses: np.ndarray, itemsize: int, program: tuple[int, ...]) -> None:
        self.check("store", addresses, itemsize)
        self.written.append((addresses, program))

    def finish(self) -> None:
        """What programs in any order, or at once, would disagree about."""
        written = np.concatenate([np.empty(0, np.uint64), *(addresses for addresses, _ in self.written)])
        if written.size == 0:
            return
        owners = np.repeat(np.arange(len(self.written)), [addresses.size for addresses, _ in self.written])
        order = np.argsort(written, kind="stable")
        written, owners = written[order], owners[order]
        if (written[1:] == written[:-1]).any():
            raise RuntimeError("two stores of one launch write to the same address")
        for addresses, program in self.read:
            near = addresses[(addresses >= written[0]) & (addresses <= written[-1])]
            at = np.searchsorted(written, near)
            for owner in np.unique(owners[at[written[at] == near]]):
                if self.written[owner][1] != program:
                    raise RuntimeError("a program of one launch reads what another writes")


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.uint16).numpy()


def _install(patch: pytest.MonkeyPatch) -> None:
    builder = interpreter.InterpreterBuilder
    memories: list[Memory] = []
    launch, load, store = interpreter.GridExecutor.__call__, builder.create_masked_load, builder.create_masked_store
    cast, binary, fma, dot = builder.cast_impl, builder.binary_op, builder.create_fma, builder.create_dot

    def guarded_launch(self, *args, **kwargs):
        memories.append(Memory([a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]))
        try:
            with np.errstate(all="ignore"):  # NaN and infinity are values here, not warnings
                launch(self, *args, **kwargs)
            memories[-1].finish()
        finally:
            memories.pop()

    def guarded_load(self, ptrs, mask, *rest):
        active = np.broadcast_to(ptrs.data, mask.data.shape)[mask.data]
        memories[-1].load(active, max(ptrs.get_element_ty().primitive_bitwidth // 8, 1), self.grid_idx)
        return load(self, ptrs, mask, *rest)

    def guarded_store(self, ptrs, value, mask, *rest):
        active = np.broadcast_to(ptrs.data, mask.data.shape)[mask.data]
        memories[-1].store(active, max(ptrs.get_element_ty().primitive_bitwidth // 8, 1), self.grid_idx)
        return store(self, ptrs, value, mask, *rest)

    def rounding_cast(self, src, dst_type):
        conversion = (src.dtype.scalar, dst_type.scalar)
        if conversion == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(bfloat16_to_float32(src.data), tl.float32)
        if conversion == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(float32_to_bfloat16(src.data), tl.bfloat16)
        if tl.bfloat16 in conversion and conversion[0] != conversion[1]:
            raise TypeError(f"cast {conversion[0]} -> {conversion[1]} goes by way of float32")
        return cast(self, src, dst_type)

    def checked_binary(self, lhs, rhs, op):
        if tl.bfloat16 in (lhs.dtype.scalar, rhs.dtype.scalar):
            raise TypeError("arithmetic on raw bfloat16; convert to float32 first")
        return binary(self, lhs, rhs, op)

    def fused(self, x, y, z):
        if z.dtype.scalar != tl.float32:
            return fma(self, x, y, z)
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return interpreter.TensorHandle(exact.astype(np.float32), tl.float32)

    def wide_dot(self, a, b, d, *rest):
        """Products of bfloat16 are exact in float32, which is what tensor cores sum them in."""
        if d.dtype.scalar in (tl.bfloat16, tl.float16):
            raise TypeError(f"dot accumulates in {d.dtype.scalar}; it has to in float32")
        a, b = (
            interpreter.TensorHandle(bfloat16_to_float32(v.data), tl.float32) if v.dtype.scalar == tl.bfloat16 else v
            for v in (a, b)
        )
        return dot(self, a, b, d, *rest)

    def no_atomics(self, *arguments):
        raise TypeError("an atomic operation: sums of floating-point numbers would depend on the order of programs")

    # A third of the time goes into asserting that no integer overflows, which none does in tensors this small.
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    patch.setattr(interpreter.interpreter_builder, "options", options)
    patch.setattr(interpreter.GridExecutor, "__call__", guarded_launch)
    patch.setattr(builder, "create_masked_load", guarded_load)
    patch.setattr(builder, "create_masked_store", guarded_store)
    patch.setattr(builder, "cast_impl", rounding_cast)
    patch.setattr(builder, "binary_op", checked_binary)
    patch.setattr(builder, "create_fma", fused)
    patch.setattr(builder, "create_dot", wide_dot)
    patch.setattr(builder, "create_atomic_rmw", no_atomics)
    patch.setattr(builder, "create_atomic_cas", no_atomics)


@contextlib.contextmanager
def _language_patched(patch: pytest.MonkeyPatch):
    """Triton's language as the interpreter needs it, once for all launches; compiled kernels find it as it was after.

    What `triton.jit` made of Triton's own functions is settled when Triton is imported, perhaps by another test.
    """
    importlib.import_module("triton.experimental.gluon")  # the first launch would, and wants the functions as they are
    for name, function in list(vars(tl.standard).items()):
        if isinstance(function, JITFunction):
            interpreted = interpreter.InterpretedFunction(function.fn)
            patch.setattr(tl.standard, name, interpreted)
            if getattr(tl, name, None) is function:
                patch.setattr(tl, name, interpreted)

    def _names_the_language():
        return tl.load

    scopes = [interpreter._patch_lang(tl.standard.sum.fn), interpreter._patch_lang(_names_the_language)]
    patch.setattr(interpreter, "_patch_lang", lambda fn: interpreter._LangPatchScope())
    try:
        yield
    finally:
        for scope in reversed(scopes):
            scope.restore()


def _import_interpreted() -> SimpleNamespace:
    """The modules of cnnkern.triton_kernels under TRITON_INTERPRET=1, and not left where others would import them."""
    package = importlib.import_module("cnnkern.triton_kernels")
    names = {module.name: f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__)}
    saved = {name: sys.modules.pop(name) for name in names.values() if name in sys.modules}
    attributes = dict(vars(package))
    for short in names.keys() & attributes.keys():  # `from package import module` looks there first
        delattr(package, short)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        modules = {short: importlib.import_module(name) for short, name in names.items()}
    for short, name in names.items():
        del sys.modules[name]
        delattr(package, short)
    sys.modules.update(saved)
    vars(package).update(attributes)
    return SimpleNamespace(**modules)


@contextlib.contextmanager
def guarded() -> Iterator[SimpleNamespace]:
    """The modules of cnnkern.triton_kernels by their short names, their kernels interpreted under guard."""
    modules = _import_interpreted()
    with pytest.MonkeyPatch.context() as patch, _language_patched(patch):
        _install(patch)
        yield modules
