"""More than 2^31 elements, which is more than a 32-bit index counts. CNNKERN_LARGE=1 asks for it: it takes minutes.

Values repeat, but for the last rows: what a kernel makes of the first block it has to make of all of them, and sums of
the whole are multiples of a block's. Half of the tensors are one: a residual and an incoming gradient are the input.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cnnkern.triton_kernels.layout import memory_order
from torch import Tensor

from cnnkern import testing

GIB = 2**30
NEEDED = 14 * GIB  # three tensors of 4 GiB and what is made of blocks
BLOCK = 2**20  # elements
WHOLE = 2**31 // BLOCK  # blocks

IMAGES, VECTORS = (64, 8, 8), (64,)


def _available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


@pytest.fixture(autouse=True)
def _large():
    if "CNNKERN_LARGE" not in os.environ:
        pytest.skip("takes minutes and much memory: CNNKERN_LARGE=1 asks for it")
    if not Path("/proc/meminfo").exists() or _available() < NEEDED:
        pytest.skip(f"less than {NEEDED // GIB} GiB of memory are available")
    torch.use_deterministic_algorithms(False)  # which fill fresh memory first


def drawn(row: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    """2^31 elements, a block repeated, and one row of values more."""
    generator = torch.Generator().manual_seed(0)
    rows = BLOCK // torch.Size(row).numel()
    block = testing.randn((rows, *row), generator, dtype) + 0.25
    format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.empty((WHOLE * rows + 1, *row), dtype=dtype, memory_format=format)
    for part in x[:-1].split(rows):
        part.copy_(block)
    x[-1] = testing.randn(row, generator, dtype) * 2
    assert x.numel() > 2**31
    return x


def ends(x: Tensor) -> Tensor:
    """The first block and the last row in float64."""
    rows = (x.shape[0] - 1) // WHOLE
    return torch.cat([x[:rows], x[-1:]]).double()


def total(of: Tensor) -> Tensor:
    """The sum per channel over all rows of what has been computed of :func:`ends`."""
    others = [d for d in range(of.dim()) if d != 1]
    return WHOLE * of[:-1].sum(others) + of[-1:].sum(others)


def assert_repeats(y: Tensor, expected: Tensor) -> None:
    """Every block bit for bit the first, and that and the last row as expected."""
    rows = (y.shape[0] - 1) // WHOLE
    first = y[:rows].clone()
    for i, part in enumerate(y[:-1].split(rows)):
        assert torch.equal(part, first), f"block {i} differs from the first"
    # The result rounded to its dtype, and float32 in between.
    eps = torch.finfo(y.dtype).eps
    torch.testing.assert_close(ends(y), expected, rtol=eps, atol=1e-5 * expected.abs().max().item())


def bits(mask: Tensor, n: int) -> Tensor:
    """The last n bits of a mask of 2^31 + k elements, where k and n are multiples of 8."""
    return ((mask[-n // 8 :, None] >> torch.arange(8)) & 1).bool().flatten()


by_layout = pytest.mark.parametrize(
    ("row", "layout", "dtype"),
    [
        (IMAGES, "contiguous", torch.float16),
        (IMAGES, "channels_last", torch.bfloat16),
        (VECTORS, "contiguous", torch.bfloat16),
    ],
    ids=lambda v: str(v).removeprefix("torch."),
)


@by_layout
@pytest.mark.parametrize("operator", ["bn_act", "bn_add_act"])
def test_batch_norm_in_training_and_eval(operator, row, layout, dtype):
    x = drawn(row, dtype, layout)
    sample, n = ends(x), x.numel() // 64
    over = (1, 64) + (1,) * (x.dim() - 2)
    mean = (total(sample) / n).view(over)
    var = (total((sample - mean).square()) / n).view(over)
    rstd = (var + 1e-5).rsqrt()
    generator = torch.Generator().manual_seed(1)
    weight, bias = (testing.randn((64,), generator, torch.float32) for _ in range(2))
    scale, shift = weight.double().view(over), bias.double().view(over)
    residual = [x] if operator == "bn_add_act" else []
    forward = getattr(torch.ops.cnnkern, operator)

    y = forward(x, *residual, weight, bias, mean.float().flatten(), var.float().flatten(), False, 0.1, 1e-5, "relu")[0]
    normalized = (sample - mean) * rstd
    pre = normalized * scale + shift + (sample if residual else 0)
    assert_repeats(y, pre.relu())
    del y

    running = torch.zeros(64), torch.ones(64)
    y, m, r, *mask = forward(x, *residual, weight, bias, *running, True, 1.0, 1e-5, "relu")
    assert_repeats(y, pre.relu())
    torch.testing.assert_close(running[0].double(), mean.flatten(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(running[1].double(), var.flatten() * n / (n - 1), rtol=1e-5, atol=0)
    if mask and layout == "contiguous":
        assert torch.equal(bits(mask[0], y[-1].numel()), (y[-1] > 0).flatten())
    del y

    backward = getattr(torch.ops.cnnkern, f"{operator}_backward")
    wanted = [True, False, True, True] if residual else [True, True, True]
    dx, *_, dweight, dbias = backward(x, x, weight, bias, m, r, *mask, True, "relu", wanted)
    dy = sample * (pre > 0)
    sums = total(dy), total(dy * normalized)
    torch.testing.assert_close(dbias.double(), sums[0], rtol=1e-4, atol=1e-6 * n)
    torch.testing.assert_close(dweight.double(), sums[1], rtol=1e-4, atol=1e-6 * n)
    expected = scale * rstd * (dy - sums[0].view(over) / n - normalized * sums[1].view(over) / n)
    assert_repeats(dx, expected)
    if residual:
        del dx
        wanted = [False, True, False, False]
        assert_repeats(backward(x, x, weight, bias, m, r, *mask, True, "relu", wanted)[1], dy)


@by_layout
def test_add_relu(row, layout, dtype):
    x = drawn(row, dtype, layout)
    y, mask = torch.ops.cnnkern.add_relu(x, x)
    assert_repeats(y, (2 * ends(x)).relu())
    del y
    dx = torch.ops.cnnkern.add_relu_backward(x, mask, memory_order(x))
    assert_repeats(dx, ends(x) * (ends(x) > 0))


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Callable[..., tuple], Callable[..., tuple]]:
    if x.dim() == 2:
        size, ops = x.shape[1:], torch.ops.cnnkern
        return (
            lambda: ops.layer_norm(x, size, weight, bias, 1e-5),
            lambda m, r: ops.layer_norm_backward(x, x, size, weight, bias, m, r, [True, True, True]),
        )
    return (
        lambda: torch.ops.cnnkern.layer_norm2d(x, weight, bias, 1e-5),
        lambda m, r: torch.ops.cnnkern.layer_norm2d_backward(x, x, weight, bias, m, r, [True, True, True]),
    )


@by_layout
def test_layer_norms(row, layout, dtype):
    x = drawn(row, dtype, layout)
    generator = torch.Generator().manual_seed(1)
    weight, bias = (testing.randn((64,), generator, torch.float32) for _ in range(2))
    forward, backward = _layer_norm(x, weight, bias)

    sample = ends(x).requires_grad_()
    rows = sample.movedim(1, -1)
    expected = F.layer_norm(rows, (64,), weight.double(), bias.double()).movedim(-1, 1)
    y, m, r = forward()
    assert_repeats(y, expected.detach())
    del y

    dx, dweight, dbias = backward(m, r)
    (dsample,) = torch.autograd.grad(expected, sample, sample.detach())
    assert_repeats(dx, dsample)
    normalized = F.layer_norm(rows, (64,)).movedim(-1, 1).detach()
    torch.testing.assert_close(dbias.double(), total(sample.detach()), rtol=1e-4, atol=1e-6 * x.numel() / 64)
    torch.testing.assert_close(
        dweight.double(), total(sample.detach() * normalized), rtol=1e-4, atol=1e-6 * x.numel() / 64
    )
