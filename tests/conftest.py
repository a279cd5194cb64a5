"""Fixtures and options. Every test runs with new memory filled with NaN, so that elements that no kernel wrote show."""

import ctypes
import gc
import json
import math
import os
import pickle
import struct
import sys
from pathlib import Path
from typing import NamedTuple

# Two processes of tests share the cores: a thread that spins while it waits would slow down the other process.
# OpenMP reads this when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Without it PyTorch refuses matrix products on a GPU while deterministic algorithms are asked for.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Tests do not use this machine's table of `cnnkern tune`.
os.environ["CNNKERN_TUNE"] = "0"

import numpy as np
import pytest
import torch


class Device(NamedTuple):
    """The kernels under test ("cpu", "cuda" or "triton"), the device of their tensors, and the largest number of
    elements."""

    kernels: str
    tensors: str
    elements: float = math.inf


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        default="cpu",
        choices=("cpu", "cuda", "triton", "emulator"),
        help="the kernels that the conformance suite tests: the CPU's, a GPU's in CUDA C++ or Triton, or CUDA C++ on "
        "the emulator (docs/emulator.md)",
    )
    parser.addoption(
        "--cpu-tool",
        help="test CPU kernels built with this (tests/cpu_kernels) instead of the extension's: plain, or a sanitizer "
        "that Python was started under",
    )
    parser.addoption(
        "--emulator-tool",
        default="plain",
        help="what the emulated kernels are built with: plain, or a sanitizer that Python was started under",
    )
    parser.addoption(
        "--emulator-launches",
        type=Path,
        help="write a JSON list of the kernels that the emulator ran (Emulator.launches) to this file",
    )


@pytest.fixture(scope="session")
def device(pytestconfig):
    name = pytestconfig.getoption("--device")
    if name != "cpu":  # which convolutions cuDNN computes in TF32 is its own choice, and no measure of errors
        torch.backends.cudnn.allow_tf32 = False
    if name in ("cpu", "cuda"):
        yield Device(name, name)
        return
    if name == "triton":
        import cnnkern

        with cnnkern.backend(name):
            yield Device(name, "cuda")
        return
    import emulator

    tool, launches = pytestconfig.getoption("--emulator-tool"), pytestconfig.getoption("--emulator-launches")
    with emulator.Emulator(tool) as machine:
        # tests/test_emulator.py has the shapes that it takes to reach what is beyond.
        yield Device("cuda", "cpu", elements=512 if tool == "thread" else 4096)
    if launches is not None:
        launches.write_text(json.dumps(machine.launches()))


@pytest.fixture(scope="session", autouse=True)
def _cpu_kernels(pytestconfig):
    tool = pytestconfig.getoption("--cpu-tool")
    if tool is None:
        yield
        return
    import cpu_kernels

    with cpu_kernels.answering(tool):
        yield


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


_kept = 0  # of them that stay when all has been given back that can be


@pytest.fixture(autouse=True)
def _memory_is_given_back():
    """Returns memory to the system if a test left more than 256 MB: models in cycles, compiled graphs, free blocks.

    Otherwise a process of tests would keep the peak memory of each of a hundred models.
    """
    yield
    global _kept
    if _resident() < _kept + 2**28:
        return
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # of glibc
        libc.malloc_trim(0)
    _kept = _resident()


@pytest.fixture(autouse=True)
def _poisoned_memory():
    torch.use_deterministic_algorithms(True)  # also fills uninitialised memory
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def generator(request) -> torch.Generator:
    """Random numbers that differ from test to test and repeat from run to run."""
    seed = sum(ord(c) * 31**i for i, c in enumerate(request.node.name)) % 2**31
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def malloc_as_it_was(monkeypatch):
    """`cnnkern train` without tune_malloc, which would change malloc for all later tests."""
    from cnnkern import train

    monkeypatch.setattr(train, "tune_malloc", lambda: "")


@pytest.fixture
def tiny(monkeypatch) -> str:
    """A model of 8x8 images with a residual, batch norms and dropout, under that name in the zoo."""
    from torch import nn

    from cnnkern import models
    from cnnkern.models import registry
    from cnnkern.models.layers import layer_set

    def tiny(num_classes: int = 10, in_channels: int = 1, fused: bool = True):
        return nn.Sequential(
            nn.Conv2d(in_channels, 8, 3, padding=1),
            layer_set(fused).BatchNormReLU2d(8),
            models.ResidualBlock(8, fused=fused),
            nn.Dropout(0.2),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * 16, num_classes),
        )

    tiny.input_size = (1, 8, 8)
    monkeypatch.setitem(registry.BUILDERS, "tiny", tiny)
    return "tiny"


@pytest.fixture
def mnist(tmp_path):
    """MNIST's and Fashion-MNIST's files with six and four images."""
    written = {}
    for folder in ("MNIST", "FashionMNIST"):
        raw = tmp_path / folder / "raw"
        raw.mkdir(parents=True)
        for part, count in (("train", 6), ("t10k", 4)):
            images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
            labels = np.arange(count, dtype=np.uint8)
            (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + images.tobytes())
            (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())
            written[part] = torch.from_numpy(images)
    return tmp_path, written


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """CIFAR-10's files with two images in each batch; torchvision would look for the checksums of the real ones."""
    import torchvision

    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (6, 2, 3072), dtype=np.uint8)
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        (folder / name).write_bytes(pickle.dumps({"data": images[i], "labels": [i, 9 - i]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    return tmp_path, images
