"""Every test runs with freshly allocated memory filled with NaN, so that an element nobody wrote shows."""

import os

# Two processes of tests share the cores: a thread that spins while it waits would take them from the other. OpenMP
# reads this when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch


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
