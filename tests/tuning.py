"""Shared by the tests of `cnnkern tune`: a temporary cache folder, and a call to measure."""

import pytest
import torch
from torch import nn

import cnnkern
from cnnkern.measure import tune
from cnnkern.measure.steps import Setting
from cnnkern.ops import tuned

GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def own_tables(tmp_path, monkeypatch):
    """An empty cache folder that is used, and no table after the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CNNKERN_TUNE", raising=False)
    monkeypatch.setattr(tuned, "table", None)
    yield
    monkeypatch.undo()
    tuned.load()


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


def calls_of(model, x, training):
    return tune.calls_of(cnnkern.convert(model), (x,), Setting(training, "cpu"))


def lost(shape=(4, 6)) -> tuned.Measured:
    call = calls_of(nn.LayerNorm(shape[1]), randn(*shape), False)[0]
    return tuned.Measured(call, 0.5, 0.01)
