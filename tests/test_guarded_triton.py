"""Mutation tests of the checks in Triton's interpreter: each finds the kind of bug that it is for."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this platform")
import guarded_triton
import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture(scope="module", autouse=True)
def guard():
    with guarded_triton.guarded():
        yield


def launch(kernel, x, y, n=8, grid=(1,)):
    interpreter.InterpretedFunction(kernel)[grid](x, y, n, BLOCK=8)


def copy_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, i < n), i < n)


def test_a_right_kernel_passes():
    x, y = torch.arange(8.0), torch.empty(8)
    launch(copy_kernel, x, y)
    assert torch.equal(x, y)
    launch(copy_kernel, x[:7], y[:7], 7)


def test_out_of_bounds():
    x, y = torch.arange(8.0), torch.empty(8)
    with pytest.raises(Exception, match="load out of bounds: 1 of 8"):
        launch(copy_kernel, x[:7], y)
    with pytest.raises(Exception, match="store out of bounds: 1 of 8"):
        launch(copy_kernel, x, y[:7])
    with pytest.raises(Exception, match="load out of bounds: 1 of 8"):
        launch(copy_kernel, x[1:], y)


def colliding_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i // 2, tl.load(x + i))


def test_two_stores_to_one_address():
    x, y = torch.arange(8.0), torch.empty(8)
    with pytest.raises(RuntimeError, match="two stores of one launch write to the same address"):
        launch(colliding_kernel, x, y)
    with pytest.raises(RuntimeError, match="two stores of one launch write to the same address"):
        launch(copy_kernel, x, y, grid=(2,))


def shifting_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + (i + n) % 16))


def test_a_program_that_reads_what_another_writes():
    x = torch.arange(16.0)
    launch(shifting_kernel, x, None, n=0, grid=(2,))  # each its own
    with pytest.raises(RuntimeError, match="a program of one launch reads what another writes"):
        launch(shifting_kernel, x, None, n=1, grid=(2,))


def atomic_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(y + i, tl.load(x + i))


def test_atomic_operations():
    with pytest.raises(Exception, match="an atomic operation"):
        launch(atomic_kernel, torch.arange(8.0), torch.zeros(8))


def raw_bfloat16_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i) + tl.load(x + i))


def test_arithmetic_on_raw_bfloat16():
    with pytest.raises(Exception, match="arithmetic on raw bfloat16"):
        launch(raw_bfloat16_kernel, torch.arange(8).bfloat16(), torch.empty(8, dtype=torch.bfloat16))


def convert_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i).to(tl.float32).to(y.dtype.element_ty))


def test_conversion_to_bfloat16_rounds_to_nearest_even():
    values = torch.tensor([1.00390625, -1.01171875, 3.4e38, 1e-40, torch.nan, torch.inf, -0.0, 1e-45])
    for source in (values, values.bfloat16()):
        y = torch.empty(8, dtype=torch.bfloat16)
        launch(convert_kernel, source, y)
        torch.testing.assert_close(y, values.bfloat16(), rtol=0, atol=0, equal_nan=True)


def fma_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i)
    tl.store(y + i, tl.fma(v, v, -v * v))


def test_a_fused_multiply_add_rounds_once():
    x = 1 + torch.arange(1, 9) * 2.0**-13
    y = torch.empty(8)
    launch(fma_kernel, x, y)
    lost = x.double().square() - x.square().double()
    assert lost.any()
    torch.testing.assert_close(y.double(), lost, rtol=0, atol=0)


def dot_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    v = tl.load(x + at)
    tl.store(y + at, tl.dot(v, v, out_dtype=y.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dot_of_16_bit_types(dtype):
    x = torch.linspace(-1, 1, 64).view(8, 8).to(dtype)
    y = torch.empty(8, 8)
    launch(dot_kernel, x, y)
    torch.testing.assert_close(y, x.float() @ x.float())
    if dtype == torch.float16:  # bfloat16 is no accumulator for Triton either
        with pytest.raises(Exception, match="dot accumulates in fp16"):
            launch(dot_kernel, x, torch.empty(8, 8, dtype=dtype))
