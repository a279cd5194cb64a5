"""`cnnkern.tune_malloc`: fewer page faults where the C library is glibc, a clear sentence where it is not; no leaks."""

import ctypes
import gc
import sys
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch

import cnnkern
from cnnkern import memory
from tests.child import run_child
from tests.leaks import MAY_STAY, leaked_by_ten_thousand

FAULTS = """
import resource, sys, torch, cnnkern
if sys.argv[1] == "tuned":
    assert "reuses blocks" in cnnkern.tune_malloc()
def call():
    torch.ones(30_000_000)  # 120 MB
for _ in range(20):  # until freed blocks lie together: glibc before 2.38 asks for more than an aligned block gives back
    call()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    call()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_large_tensors_are_not_faulted_anew():
    clean = {"PATH": "/usr/bin:/bin"}
    default, tuned = (
        int(run_child([sys.executable, "-c", FAULTS, how], env=clean, check=True).stdout)
        for how in ("default", "tuned")
    )
    pages = 10 * 30_000_000 * 4 // 4096
    assert tuned < pages / 50
    assert default > pages / 600, "malloc's defaults have changed: is tune_malloc still of use?"  # huge pages: 1/512


def test_without_glibc_nothing_is_done(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert cnnkern.tune_malloc() == "cnnkern: malloc is unchanged: this C library is not glibc"


def test_a_refusal_is_named(monkeypatch):
    class Refusing:
        def mallopt(option, value):
            return int(option != -3)

        def gnu_get_libc_version():
            return b"9.9"

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Refusing)
    assert (
        memory.tune_malloc() == "cnnkern: malloc is partly unchanged: glibc 9.9 refused mallopt option M_MMAP_THRESHOLD"
    )


@pytest.mark.parametrize(
    "layer",
    [
        cnnkern.nn.AddReLU(),
        cnnkern.nn.BatchNormAddReLU2d(8),
        cnnkern.nn.GroupedConv2d(8, 8, 3, padding=1, groups=8),
        cnnkern.nn.GroupedConv2d(8, 8, 3, padding=1, groups=2),
        cnnkern.nn.GroupedConv2d(8, 16, 3, groups=2),  # the library's
        cnnkern.nn.LayerNorm(8),
        cnnkern.nn.LayerNorm2d(8),
    ],
    ids=str,
)
def test_ten_thousand_calls_leak_nothing_errors_included(layer):
    x = torch.randn(2, 8, 8, 8, requires_grad=True)
    wrong = torch.randn(2, 5, 7, 7)
    more = (torch.randn(2, 8, 8, 8, requires_grad=True),) if "Add" in type(layer).__name__ else ()

    def call(i):
        layer(x, *more).sum().backward()
        if i % 10 == 0:
            with pytest.raises(RuntimeError):
                layer(wrong, *more)

    assert leaked_by_ten_thousand(call) < MAY_STAY


def test_ten_thousand_calls_of_a_folded_model_leak_nothing():
    """Of more shapes than weights are kept packed for."""
    norm = torch.nn.BatchNorm2d(16)
    folded = cnnkern.fold(torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3), norm, torch.nn.ReLU()).eval())
    inputs = [torch.randn(1, 8, n, n) for n in range(8, 20)]
    with torch.no_grad():
        assert leaked_by_ten_thousand(lambda i: folded(inputs[i % len(inputs)])) < MAY_STAY


class Residual(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            *(torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU()),
            *(torch.nn.Conv2d(8, 8, 1), torch.nn.BatchNorm2d(8)),
        )
        self.norm = torch.nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + x) + self.norm(x)


@pytest.mark.parametrize(
    ("by", "training"),
    [
        (cnnkern.fold, False),
        (cnnkern.convert, False),
        (cnnkern.convert, True),
        (partial(cnnkern.convert, recompute=True), True),
    ],
    ids=["folded", "converted, eval", "converted, training", "recomputed"],
)
def test_a_model_that_nothing_holds_is_freed(by: Callable[[torch.nn.Module], torch.nn.Module], training: bool):
    """What the extension holds of it is out of sight of Python's collector, which could not free a cycle through it."""
    model = by(Residual().train(training))
    held = [weakref.ref(part) for part in (*model.modules(), *model.parameters(), *model.buffers())]
    for _ in range(3):
        with torch.set_grad_enabled(training):
            y = model(torch.randn(2, 8, 12, 12))
        if training:
            y.sum().backward()
    del model, y
    gc.collect()
    assert not [part() for part in held if part() is not None]
