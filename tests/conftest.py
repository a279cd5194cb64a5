"""Every test runs with freshly allocated memory filled with NaN, so that an element nobody wrote shows."""

import json
import math
import os
from pathlib import Path
from typing import NamedTuple

# Two processes of tests share the cores: a thread that spins while it waits would take them from the other. OpenMP
# reads this when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Without it PyTorch refuses matrix products on a GPU while deterministic algorithms are asked for.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch


class Device(NamedTuple):
    """Whose kernels the battery holds to account, as in Case.devices, where its tensors are, and how large at most."""

    kernels: str
    tensors: str
    elements: float = math.inf


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        default="cpu",
        choices=("cpu", "cuda", "triton", "emulator"),
        help="whose kernels the battery judges: the CPU's, a GPU's in CUDA C++ or Triton, or those in CUDA C++ on the "
        "emulator (docs/emulator.md)",
    )
    parser.addoption(
        "--emulator-tool",
        default="plain",
        help="what the emulated kernels are built with: plain, or a sanitizer that Python was started under",
    )
    parser.addoption(
        "--emulator-launches",
        type=Path,
        help="a file that will list the kernels that the emulator has run (Emulator.launches), in JSON",
    )


@pytest.fixture(scope="session")
def device(pytestconfig):
    name = pytestconfig.getoption("--device")
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
