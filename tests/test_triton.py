"""The Triton kernels, run by Triton's interpreter on CPU tensors, and compiled ahead of time: neither needs a GPU.

Run as a script, this file compiles the kernels for the compute capability given and prints what the cubins contain.
"""

import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from cnnkern import functional, testing

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

CASE = testing.CASES["bn_act"]
# Of input and of parameters.
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "bfloat16, float32": (torch.bfloat16, torch.float32),
    "float16, float32": (torch.float16, torch.float32),
}
MODULES = ("batch_norm", "bn_act", "layout")


# The interpreter computes with numpy on raw pointers. Left alone it reads out of bounds, truncates to bfloat16,
# computes with bfloat16's bits as integers, and rounds a fused multiply-add twice; here each is an error or right.


class Memory:
    """The memory of one launch's arguments: reads and writes have to stay inside, writes must not meet."""

    def __init__(self, tensors: list[Tensor]) -> None:
        spans = [self.span(t) for t in tensors if t.numel() > 0]
        self.begins, self.ends = np.array(sorted(spans), dtype=np.uint64).reshape(-1, 2).T
        self.written: list[np.ndarray] = []

    @staticmethod
    def span(t: Tensor) -> tuple[int, int]:
        last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()

    def check(self, kind: str, addresses: np.ndarray, itemsize: int) -> None:
        at = np.searchsorted(self.begins, addresses, side="right") - 1
        outside = (at < 0) | (addresses + np.uint64(itemsize) > self.ends[np.maximum(at, 0)])
        if outside.any():
            raise IndexError(f"{kind} out of bounds: {outside.sum()} of {addresses.size} addresses")

    def write(self, addresses: np.ndarray, itemsize: int) -> None:
        self.check("store", addresses, itemsize)
        self.written.append(addresses)

    def finish(self) -> None:
        written = np.concatenate(self.written) if self.written else np.empty(0)
        if np.unique(written).size != written.size:
            raise RuntimeError("two stores of one launch write to the same address")


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.uint16).numpy()


def install_guard(patch: pytest.MonkeyPatch) -> None:
    builder = interpreter.InterpreterBuilder
    memories: list[Memory] = []
    launch, load, store = interpreter.GridExecutor.__call__, builder.create_masked_load, builder.create_masked_store
    cast, binary, fma = builder.cast_impl, builder.binary_op, builder.create_fma

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
        memories[-1].check("load", active, max(ptrs.get_element_ty().primitive_bitwidth // 8, 1))
        return load(self, ptrs, mask, *rest)

    def guarded_store(self, ptrs, value, mask, *rest):
        active = np.broadcast_to(ptrs.data, mask.data.shape)[mask.data]
        memories[-1].write(active, max(ptrs.get_element_ty().primitive_bitwidth // 8, 1))
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

    # A third of the time goes into asserting that no integer overflows, which none does in tensors this small.
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    patch.setattr(interpreter.interpreter_builder, "options", options)
    patch.setattr(interpreter.GridExecutor, "__call__", guarded_launch)
    patch.setattr(builder, "create_masked_load", guarded_load)
    patch.setattr(builder, "create_masked_store", guarded_store)
    patch.setattr(builder, "cast_impl", rounding_cast)
    patch.setattr(builder, "binary_op", checked_binary)
    patch.setattr(builder, "create_fma", fused)


@contextlib.contextmanager
def language_patched(patch: pytest.MonkeyPatch):
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
    scopes = [interpreter._patch_lang(tl.standard.sum.fn), interpreter._patch_lang(copy_kernel)]
    patch.setattr(interpreter, "_patch_lang", lambda fn: interpreter._LangPatchScope())
    try:
        yield
    finally:
        for scope in reversed(scopes):
            scope.restore()


def import_interpreted() -> SimpleNamespace:
    """The kernels' modules under TRITON_INTERPRET=1, without leaving them where others would import them."""
    names = {short: f"cnnkern.triton_kernels.{short}" for short in MODULES}
    saved = {name: sys.modules.pop(name) for name in names.values() if name in sys.modules}
    package = importlib.import_module("cnnkern.triton_kernels")
    attributes = dict(vars(package))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        modules = {short: importlib.import_module(name) for short, name in names.items()}
    for short, name in names.items():
        del sys.modules[name]
        delattr(package, short)
    sys.modules.update(saved)
    vars(package).update(attributes)
    return SimpleNamespace(**modules)


@pytest.fixture(scope="module")
def kernels():
    modules = import_interpreted()
    with pytest.MonkeyPatch.context() as patch, language_patched(patch):
        install_guard(patch)
        yield modules


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fresh memory holds NaN, so that an element that nobody wrote shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_tiles(kernels, monkeypatch):
    """Tiles so small that small tensors have many tiles a chunk and many chunks a channel."""
    for name, value in {"TILE": 32, "RUN": 8, "CHANNELS": 8, "PROGRAMS": 2, "MAX_CHUNK": 3}.items():
        monkeypatch.setattr(kernels.layout, name, value)
    monkeypatch.setitem(kernels.batch_norm.COMBINE, "K", 4)
    monkeypatch.setitem(kernels.batch_norm.COMBINE, "CB", 2)


@pytest.fixture
def batch_norm_act(kernels):
    """The public function on the Triton launchers."""

    class BnAct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias, running_mean, running_var, training, momentum, eps, act):
            y, mean, rstd = kernels.bn_act.bn_act(
                x, weight, bias, running_mean, running_var, training, momentum, eps, act
            )
            ctx.save_for_backward(x, weight, bias, mean, rstd)
            ctx.training, ctx.act = training, act
            return y

        @staticmethod
        def backward(ctx, dy):
            x, weight, bias, mean, rstd = ctx.saved_tensors
            mask = list(ctx.needs_input_grad[:3])
            grads = kernels.bn_act.bn_act_backward(dy, x, weight, bias, mean, rstd, ctx.training, ctx.act, mask)
            return *(g if wanted else None for g, wanted in zip(grads, mask, strict=True)), *[None] * 6

    def function(
        input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5, act="relu"
    ):
        return BnAct.apply(input, weight, bias, running_mean, running_var, training, momentum, eps, act)

    return function


def make(shape, dtype=torch.float32, parameters=None, layout="contiguous", seed=0, **variant):
    generator = torch.Generator().manual_seed(seed)
    inputs = CASE.inputs(shape, dtype, generator=generator, parameter_dtype=parameters, **variant)
    dy = testing.randn(shape, generator, dtype)
    return inputs | {"input": testing.with_layout(inputs["input"], layout)}, testing.with_layout(dy, layout)


def operator_inputs(shape, dtype=torch.float32, layout="contiguous", **variant):
    """Arguments of the operator, in the schema's order."""
    inputs, dy = make(shape, dtype, layout=layout, **variant)
    names = ("weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "act")
    return [inputs["input"], *(inputs[n] for n in names)], dy


def is_dense(t: Tensor, channels_last: bool) -> bool:
    return (t.movedim(1, -1) if channels_last else t).is_contiguous()


# Results


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("variant", CASE.variants)
def test_as_good_as_eager(batch_norm_act, variant, dtypes):
    shapes = {"channels_last": (3, 17, 3, 3)}
    if dtypes == "float32":  # a program a channel: slow to interpret; other dtypes in test_many_tiles_and_chunks
        shapes["contiguous"] = (2, 3, 5, 7)
    for layout, shape in shapes.items():
        inputs, dy = make(shape, *DTYPES[dtypes], layout, **CASE.variants[variant])
        testing.check(CASE, inputs, dy, function=batch_norm_act)


@pytest.mark.parametrize("shape", CASE.shapes, ids=str)
def test_ragged_shapes(batch_norm_act, shape):
    # The interpreter takes its time for a program, which is a channel in planes and 64 in rows, and for a tile.
    layouts = ["contiguous", "channels_last"] if np.prod(shape) < 5000 else ["contiguous"]
    for layout in layouts if shape[1] <= 20 else ["channels_last"]:
        inputs, dy = make(shape, layout=layout)
        testing.check(CASE, inputs, dy, function=batch_norm_act)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16, float32"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(5, 3, 4, 9), (61, 2, 2, 1), (2, 3, 11, 7)], ids=str)
def test_many_tiles_and_chunks(batch_norm_act, kernels, shape, layout, training, dtypes):
    inputs, dy = make(shape, *DTYPES[dtypes], layout, training=training)
    cut = kernels.layout.Cut.of(inputs["input"])
    assert cut.steps > cut.chunk > 1
    testing.check(CASE, inputs, dy, function=batch_norm_act)


def test_cut_covers_the_tensor(kernels):
    for N, C, H in itertools.product((1, 2, 32, 33), (1, 3, 64, 2048), (1, 7, 14, 56, 112)):
        for rows in (False, True):
            x = torch.empty((N, C, H, H), device="meta")
            x = x.to(memory_format=torch.channels_last) if rows else x
            cut = kernels.layout.Cut.of(x)
            assert cut.outer * cut.width * (1 if cut.rows else C) == x.numel()
            assert cut.R * cut.B <= kernels.layout.TILE
            assert cut.width % cut.unit == 0
            assert cut.chunk <= kernels.layout.MAX_CHUNK
            assert (cut.chunks - 1) * cut.chunk < cut.steps <= cut.chunks * cut.chunk


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ["none", "relu"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(batch_norm_act, layout, act, training):
    for shape in CASE.gradcheck_shapes:
        inputs, _ = make(shape, torch.float64, layout=layout, training=training, act=act, seed=3)

        def function(x, w, b, inputs=inputs):
            state = {n: inputs[n].clone() for n in CASE.mutated}
            return batch_norm_act(**inputs | state | {"input": x, "weight": w, "bias": b})

        leaves = tuple(inputs[n].clone().requires_grad_() for n in CASE.differentiable)
        y = function(*leaves)
        assert act == "none" or ((y > 1e-3) | (y == 0)).all()  # away from the kink
        # Entry by entry takes two calls an entry, so for the most part a random direction is checked.
        assert torch.autograd.gradcheck(function, leaves, fast_mode=y.numel() > 12 or layout == "channels_last")


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "sliced channels_last", "permuted"])
def test_layouts_of_results(kernels, rank, layout):
    shape = (3, 6, 4, 5, 2)[:rank]
    base, order = layout.removeprefix("sliced ").replace("permuted", "contiguous"), list(range(rank))
    x, dy = (t.clone(memory_format=torch.preserve_format) for t in pair_of_tensors(shape, base))
    if layout == "sliced channels_last":
        x = torch.cat([x, x], dim=1)[:, : shape[1]]
    if layout == "permuted":  # neither layout, and not to be kept
        order[0], order[-1] = order[-1], order[0]
        x = x.permute(order).contiguous().permute(order)
    arguments = [x, None, None, None, None, True, 0.1, 1e-5, "relu"]
    y, mean, rstd = kernels.bn_act.bn_act(*arguments)
    theirs = torch.ops.cnnkern.bn_act(*arguments)
    torch.testing.assert_close((y, mean, rstd), theirs)
    assert y.stride() == theirs[0].stride()
    gradients = []
    for g in (dy, dy.contiguous(), testing.with_layout(dy, "channels_last"), testing.with_layout(dy, "sliced")):
        dx = kernels.bn_act.bn_act_backward(g, x, None, None, mean, rstd, True, "relu", [True, False, False])[0]
        assert dx.stride() == y.stride()
        gradients.append(dx)
    assert all(torch.equal(g, gradients[0]) for g in gradients)


def pair_of_tensors(shape, layout):
    inputs, dy = make(shape, layout=layout)
    return inputs["input"], dy


def test_expanded_gradient(batch_norm_act):
    inputs, dy = make((3, 5, 4, 4))
    for g in (torch.tensor(1.0).expand(dy.shape), dy[:1, :, :1, :1].expand(dy.shape)):
        testing.check(CASE, inputs, g, function=batch_norm_act)


def test_strided_vectors(batch_norm_act):
    inputs, dy = make((3, 7, 4, 4))
    strided = {n: torch.stack([inputs[n], torch.full_like(inputs[n], torch.nan)], 1) for n in ("weight", "bias")}
    testing.check(CASE, inputs | {n: v[:, 0] for n, v in strided.items()}, dy, function=batch_norm_act)
    state = {n: torch.stack([inputs[n], torch.full_like(inputs[n], 7.0)], 1) for n in CASE.mutated}
    batch_norm_act(**inputs | {n: v[:, 0] for n, v in state.items()})
    dense = {n: inputs[n].clone() for n in CASE.mutated}
    batch_norm_act(**inputs | dense)
    for n in CASE.mutated:
        assert torch.equal(state[n][:, 0], dense[n])
        assert (state[n][:, 1] == 7).all()


# Statistics


HARD = {
    "mean >> std": lambda x: 1e4 + 1e-2 * x,
    "mean >> std, far first": lambda x: torch.cat([x[:1] - 1e3, x[1:]]),
    "constant": lambda x: torch.full_like(x, 0.1),
    "constant and large": lambda x: torch.full_like(x, -1e10 / 3),
    "zero": torch.zeros_like,
    "large": lambda x: 1e30 * x,
    "tiny": lambda x: 1e-30 * x,
    "denormal": lambda x: 1e-41 * x,
    "outlier first": lambda x: torch.cat([x.flatten()[:1] * 1e6, x.flatten()[1:]]).view_as(x),
    "trend": lambda x: x + 100 * torch.arange(x.shape[-1], dtype=x.dtype),
}


@pytest.mark.parametrize(
    ("layout", "tiles"), [("contiguous", "small_tiles"), ("channels_last", "small_tiles"), ("channels_last", None)]
)
@pytest.mark.parametrize("data", HARD)
def test_statistics_of_hard_data(batch_norm_act, request, data, layout, tiles):
    if tiles is not None:
        request.getfixturevalue(tiles)
    inputs, dy = make((4, 3, 5, 9), act="none")
    x = HARD[data](inputs["input"].double()).float()
    inputs["running_mean"].zero_(), inputs["running_var"].zero_()
    testing.check(CASE, inputs | {"input": testing.with_layout(x, layout)}, dy, function=batch_norm_act)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("offset", "scale", "eps"), [(1e4, 1e-2, 1e-5), (-3e29, 1e30, 1e-5), (0.0, 1e-22, 1e-50)])
def test_digits_that_eager_loses(batch_norm_act, offset, scale, eps, layout):
    """Eager is no measure here: it rounds the mean to float32, squares out of its range, or both."""
    inputs, dy = make((6, 3, 5, 7), layout=layout, act="none", running=False, eps=eps)
    inputs["input"] = offset + scale * inputs["input"].sub(2)
    mine = testing.run(batch_norm_act, CASE, inputs, dy)
    truth = testing.run(CASE.reference, CASE, testing.to_float64(inputs), dy.double())
    if offset != 1e4:  # the slope of dx in x, of the order of rstd squared, is out of float32's range too
        del mine["grad of input"], truth["grad of input"]
    for name, value in mine.items():
        torch.testing.assert_close(value.double(), truth[name], rtol=0, atol=2e-6 * truth[name].abs().max().item())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_poison_their_channel_alone(kernels, value, layout, training):
    (x, *rest), dy = operator_inputs((3, 5, 4, 4), layout=layout, training=training)
    clean = kernels.bn_act.bn_act(x, *[r.clone() if isinstance(r, Tensor) else r for r in rest])
    clean_grads = kernels.bn_act.bn_act_backward(
        dy, x, rest[0], rest[1], clean[1], clean[2], training, "relu", [True] * 3
    )
    x[1, 2, 3, 0] = value
    state = [r.clone() if isinstance(r, Tensor) else r for r in rest]
    y, mean, rstd = kernels.bn_act.bn_act(x, *state)
    grads = kernels.bn_act.bn_act_backward(dy, x, rest[0], rest[1], mean, rstd, training, "relu", [True] * 3)
    others = [0, 1, 3, 4]
    for mine, theirs in zip((y, grads[0]), (clean[0], clean_grads[0]), strict=True):
        assert torch.equal(mine[:, others], theirs[:, others])
    for mine, theirs in zip((mean, rstd, *grads[1:]), (*clean[1:], *clean_grads[1:]), strict=True):
        assert torch.equal(mine[others], theirs[others])
    eager = torch.relu(torch.native_batch_norm(x, *rest[:2], *[r.clone() for r in rest[2:4]], *rest[4:7])[0])
    assert torch.equal(y.isnan(), eager.isnan())
    if training:
        assert y[:, 2].isnan().all()
        assert state[2][2].isnan() if value != value else state[2][2] == value
        assert state[3][2].isnan()


# Contracts


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_reruns_are_bit_equal(kernels, layout):
    (x, *rest), dy = operator_inputs((6, 5, 4, 9), layout=layout)

    def both():
        state = [r.clone() if isinstance(r, Tensor) else r for r in rest]
        y, mean, rstd = kernels.bn_act.bn_act(x, *state)
        grads = kernels.bn_act.bn_act_backward(dy, x, *rest[:2], mean, rstd, True, "relu", [True] * 3)
        return [y, mean, rstd, *state[2:4], *grads]

    assert all(torch.equal(a, b) for a, b in zip(both(), both(), strict=True))


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-7, 1e-40])
@pytest.mark.parametrize("dtypes", ["float32", "float64", "bfloat16, float32", "float16, float32"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradient_mask_is_the_outputs(kernels, layout, dtypes, scale):
    """With dy = 1, dbias counts the outputs that are not zero; tiny scales give values that round to zero."""
    dtype, parameters = DTYPES[dtypes]
    for training in (True, False):
        inputs, _ = make((4, 5, 6, 7), dtype, parameters, layout, training=training)
        x, weight, bias = inputs["input"], inputs["weight"] * scale, inputs["bias"] * scale * 0.1
        y, mean, rstd = kernels.bn_act.bn_act(
            x, weight, bias, inputs["running_mean"], inputs["running_var"], training, 0.1, 1e-5, "relu"
        )
        ones = torch.ones_like(x)
        dx, _, dbias = kernels.bn_act.bn_act_backward(ones, x, weight, bias, mean, rstd, training, "relu", [True] * 3)
        assert 0 < y.count_nonzero() < y.numel() or (dtypes, scale) == ("float16, float32", 1e-40)
        assert torch.equal(dbias.double(), (y != 0).sum((0, 2, 3)).double())
        if not training and scale >= 1e-3:
            wanted = (y != 0) & (weight != 0).view(1, -1, 1, 1)
            assert torch.equal(dx != 0, wanted)


def test_empty_batch(kernels):
    for shape in ((0, 3, 4, 4), (2, 3, 0), (0, 3), (2, 0, 3)):
        for training in (True, False):
            (x, *rest), dy = operator_inputs(shape, training=training)
            before = [r.clone() if isinstance(r, Tensor) else r for r in rest]
            mine, theirs = kernels.bn_act.bn_act(x, *rest), torch.ops.cnnkern.bn_act(x, *before)
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
            assert all(torch.equal(rest[i], before[i]) for i in (2, 3))
            backward = (dy, x, rest[0], rest[1], *mine[1:], training, "relu", [True] * 3)
            torch.testing.assert_close(
                kernels.bn_act.bn_act_backward(*backward),
                torch.ops.cnnkern.bn_act_backward(*backward),
                rtol=0,
                atol=0,
            )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=3)), ids=str)
def test_output_mask(kernels, mask, training):
    (x, *rest), dy = operator_inputs((3, 5, 4, 4), training=training)
    _, mean, rstd = kernels.bn_act.bn_act(x, *rest)
    arguments = (dy, x, *rest[:2], mean, rstd, training, "relu")
    everything = kernels.bn_act.bn_act_backward(*arguments, [True] * 3)
    some = kernels.bn_act.bn_act_backward(*arguments, list(mask))
    for wanted, g, full in zip(mask, some, everything, strict=True):
        assert torch.equal(g, full) if wanted else g.shape == (0,)


FORWARD_ERRORS = {
    "integers": lambda a: a.update(x=a["x"].long()),
    "one dimension": lambda a: a.update(x=a["x"][0, :, 0, 0]),
    "six dimensions": lambda a: a.update(x=a["x"][..., None, None]),
    "weight of another length": lambda a: a.update(weight=a["weight"][:-1]),
    "bias of two dimensions": lambda a: a.update(bias=a["bias"][None]),
    "weight of another dtype": lambda a: a.update(weight=a["weight"].bfloat16()),
    "half running_mean beside bfloat16": lambda a: a.update(x=a["x"].bfloat16(), running_mean=a["running_mean"].half()),
    "float32 running_var beside float64": lambda a: a.update(
        x=a["x"].double(), weight=None, bias=None, running_mean=a["running_mean"].double()
    ),
    "weight on another device": lambda a: a.update(weight=a["weight"].to("meta")),
    "running_mean alone": lambda a: a.update(running_var=None),
    "running_var alone": lambda a: a.update(running_mean=None),
    "eval without statistics": lambda a: a.update(running_mean=None, running_var=None, training=False),
    "one value a channel": lambda a: a.update(x=a["x"][:1, :, :1, :1]),
    "eps of zero in training": lambda a: a.update(eps=0.0),
    "negative eps in eval": lambda a: a.update(eps=-1e-5, training=False),
    "unknown activation": lambda a: a.update(act="tanh"),
}
BACKWARD_ERRORS = {
    "dy of another shape": lambda a: a.update(dy=a["dy"][:, :, :-1]),
    "dy of another dtype": lambda a: a.update(dy=a["dy"].double()),
    "dy on another device": lambda a: a.update(dy=a["dy"].to("meta")),
    "weight of another length": lambda a: a.update(weight=a["weight"][:-1]),
    "float32 mean": lambda a: a.update(mean=a["mean"].float()),
    "strided rstd": lambda a: a.update(rstd=a["rstd"].repeat_interleave(2)[::2]),
    "dweight without weight": lambda a: a.update(weight=None),
    "dbias without bias": lambda a: a.update(bias=None),
    "unknown activation": lambda a: a.update(act="tanh"),
}


def raised(function, arguments) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011  (the caller compares type and message)
        function(*arguments)
    return caught.value


@pytest.mark.parametrize("misuse", FORWARD_ERRORS)
def test_forward_errors_are_those_of_the_cpp_kernel(kernels, misuse):
    names = ("x", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "act")
    values, _ = operator_inputs((3, 5, 4, 4))
    arguments = dict(zip(names, values, strict=True))
    FORWARD_ERRORS[misuse](arguments)
    before = {n: arguments[n].clone() for n in CASE.mutated if arguments[n] is not None}
    mine = raised(kernels.bn_act.bn_act, arguments.values())
    if misuse != "weight on another device":  # which the dispatcher sends elsewhere
        theirs = raised(torch.ops.cnnkern.bn_act, arguments.values())
        assert type(mine) is type(theirs)
        assert str(mine) == str(theirs)
    else:
        assert "expected weight on cpu like the input; got meta" in str(mine)
    assert all(torch.equal(arguments[n], v) for n, v in before.items())


@pytest.mark.parametrize("misuse", BACKWARD_ERRORS)
def test_backward_errors_are_those_of_the_cpp_kernel(kernels, misuse):
    values, dy = operator_inputs((3, 5, 4, 4))
    _, mean, rstd = kernels.bn_act.bn_act(*values)
    names = ("dy", "x", "weight", "bias", "mean", "rstd", "training", "act", "output_mask")
    arguments = dict(zip(names, (dy, *values[:3], mean, rstd, True, "relu", [True] * 3), strict=True))
    BACKWARD_ERRORS[misuse](arguments)
    mine = raised(kernels.bn_act.bn_act_backward, arguments.values())
    if misuse != "dy on another device":
        theirs = raised(torch.ops.cnnkern.bn_act_backward, arguments.values())
        assert type(mine) is type(theirs)
        assert str(mine) == str(theirs)
    else:
        assert "dy must be on cpu; got meta" in str(mine)


def test_registered_as_the_operator(kernels):
    """On the dispatch key of the CPU, where there are tensors to call it with: schema and autograd."""
    library = torch.library.Library("cnnkern", "IMPL")
    calls = []

    def counted(name):
        launcher = getattr(kernels.bn_act, name)

        def call(*arguments):
            calls.append(name)
            return launcher(*arguments)

        return call

    try:
        for name in ("bn_act", "bn_act_backward"):
            library.impl(name, counted(name), "CPU", allow_override=True)
        inputs, dy = make((3, 5, 4, 4))
        testing.check(CASE, inputs, dy, function=functional.batch_norm_act)
        assert calls == ["bn_act", "bn_act_backward"]
        values, dy = operator_inputs((3, 5, 4, 4))
        checks = ("test_schema", "test_faketensor")  # the others are about autograd, not about who computes
        torch.library.opcheck(torch.ops.cnnkern.bn_act.default, values, test_utils=checks)
        _, mean, rstd = torch.ops.cnnkern.bn_act(*values)
        backward = (dy, *values[:3], mean, rstd, True, "relu", [True, False, True])
        torch.library.opcheck(torch.ops.cnnkern.bn_act_backward.default, backward, test_utils=checks)
    finally:
        library._destroy()
    calls.clear()
    functional.batch_norm_act(**inputs)
    assert calls == []


# The guard


def copy_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, i < n), i < n)


def colliding_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i // 2, tl.load(x + i))


def raw_bfloat16_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i) + tl.load(x + i))


def convert_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i).to(tl.float32).to(y.dtype.element_ty))


@pytest.mark.usefixtures("kernels")
def test_guard_catches_what_the_interpreter_lets_pass():
    def launch(kernel, x, y, n=8):
        interpreter.InterpretedFunction(kernel)[(1,)](x, y, n, BLOCK=8)

    x, y = torch.arange(8.0), torch.empty(8)
    launch(copy_kernel, x, y)
    assert torch.equal(x, y)
    with pytest.raises(Exception, match="load out of bounds: 1 of 8"):
        launch(copy_kernel, x[:7], y)
    with pytest.raises(Exception, match="store out of bounds: 1 of 8"):
        launch(copy_kernel, x, y[:7])
    launch(copy_kernel, x[:7], y[:7], 7)
    with pytest.raises(RuntimeError, match="same address"):
        launch(colliding_kernel, x, y)
    with pytest.raises(Exception, match="arithmetic on raw bfloat16"):
        launch(raw_bfloat16_kernel, x.bfloat16(), y.bfloat16())
    values = torch.tensor([1.00390625, -1.01171875, 3.4e38, 1e-40, torch.nan, torch.inf, -0.0, 1e-45])
    for source in (values, values.bfloat16()):
        y = torch.empty(8, dtype=torch.bfloat16)
        launch(convert_kernel, source, y)
        torch.testing.assert_close(y, values.bfloat16(), rtol=0, atol=0, equal_nan=True)


# What the compiler makes of it


def compile_kernel(kernel, dtype, constants, capability):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    wide = ("partial", "mean", "rstd")
    types = dict.fromkeys(("x", "y", "dy", "dx", "weight", "bias", "dweight", "dbias"), f"*{dtype}")
    types |= dict.fromkeys(("running_mean", "running_var"), f"*{dtype}")
    types |= dict.fromkeys(wide, "*fp64") | {"table": "*fp32", "momentum": "fp64", "eps": "fp64"}
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    constexprs = {(names.index(n),): value for n, value in constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    return triton.compile(
        ASTSource(kernel, signature=signature, constexprs=constexprs, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 4},
    )


def describe(compiled) -> dict[str, object]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])

    def run(option: str) -> str:
        return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout

    usage, code = run("-res-usage"), run("-sass")
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "loads": re.findall(r"\b(LDG\.[\w.]+)", code),
        "stores": re.findall(r"\b(STG\.[\w.]+)", code),
    }


def compile_all(capability: int, dtypes: list[str]) -> dict[str, dict[str, object]]:
    from cnnkern.triton_kernels import batch_norm, bn_act, layout

    report = {}
    for dtype, rows in itertools.product(dtypes, (False, True)):
        x = torch.empty((32, 64, 56, 56), device="meta")
        cut = layout.Cut.of(x.to(memory_format=torch.channels_last) if rows else x).constants
        for kernel, constants in (
            (batch_norm.moments_kernel, {}),
            (bn_act.bn_act_apply_kernel, {"ACT": "relu"}),
            (bn_act.bn_act_backward_sums_kernel, {"ACT": "relu", "dx": None}),
            (bn_act.bn_act_backward_apply_kernel, {"ACT": "relu"}),
        ):
            name = f"{kernel.fn.__name__} {dtype} {'rows' if rows else 'planes'}"
            report[name] = describe(compile_kernel(kernel, dtype, cut | constants, capability))
    for kernel, constants in (
        (batch_norm.moments_finalise_kernel, batch_norm.COMBINE),
        (batch_norm.running_statistics_kernel, {"BLOCK": 128}),
        (bn_act.bn_act_backward_finalise_kernel, batch_norm.COMBINE | {"S": tl.float32}),
    ):
        report[f"{kernel.fn.__name__} {dtypes[0]}"] = describe(compile_kernel(kernel, dtypes[0], constants, capability))
    return report


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtypes"), [(80, ["fp32"]), (90, ["fp32", "bf16"])])
def test_compiled_code(tmp_path, capability, dtypes):
    """Compiled for ResNet-50's (32, 64, 56, 56): no spills, and 128-bit accesses to the tensors."""
    command = [sys.executable, __file__, str(capability), *dtypes]
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report) == 8 * len(dtypes) + 3
    # Tensors that a kernel reads and writes; what else it accesses are vectors of C.
    tensors = {"moments_kernel": (1, 0), "bn_act_apply": (1, 1), "backward_sums": (2, 0), "backward_apply": (2, 1)}
    for name, code in report.items():
        assert code["spills"] == 0, name
        assert code["stack"] == 0, name
        assert code["registers"] <= 96, name  # five blocks of four warps a multiprocessor
        for kernel, (reads, writes) in tensors.items():
            if kernel in name:
                vectors = 2048 // 128 // (4 if "fp32" in name else 8)  # 128-bit accesses of a thread to a tensor
                wide = [sum(".128" in access for access in code[kind]) for kind in ("loads", "stores")]
                first = 2 if kernel == "moments_kernel" else 1  # its first tile stands before the loop
                assert wide == [first * reads * vectors, writes * vectors], f"{name}: {code}"


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]), sys.argv[2:])))
