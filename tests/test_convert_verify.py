"""`cnnkern.convert(model, verify=example)`: which differences it reports, and which not."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import cnnkern
from cnnkern.conversion.layers import ConvertedBatchNorm2d


def build(name: str) -> nn.Module:
    return torchvision.models.get_model(name, weights=None, num_classes=10)


def _wrong_output(y, self):
    return -y


def _wrong_gradient(y, self):
    return y + 1e-3 * (y - y.detach())


def _wrong_statistics(y, self):
    if self.training:
        self.running_var.mul_(1.001)
    return y


def _wrong_in_eval(y, self):
    return y * (1 if self.training else 1.001)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (_wrong_output, "training: output 0 differs by"),
        (_wrong_gradient, "training: gradient of .* differs by"),
        (_wrong_statistics, "training: .*running_var differs by"),
        (_wrong_in_eval, "eval: output 0 differs by"),
    ],
)
def test_verify_refuses_what_is_not_right(fault, message, monkeypatch):
    model = build("resnet18")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    right = ConvertedBatchNorm2d.forward
    monkeypatch.setattr(ConvertedBatchNorm2d, "forward", lambda self, x: fault(right(self, x), self))
    with pytest.raises(cnnkern.ConversionError, match=f"{message} .*the model is unchanged"):
        cnnkern.convert(model, inplace=True, verify=(torch.randn(2, 3, 32, 32),))
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Changing(nn.Module):
    """In-place preprocessing, NumPy's random numbers, float32 inside, infinities, a keyword argument."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x, *, scale):
        x.mul_(scale)
        y = F.relu(self.bn(x.float()).to(x.dtype)) * np.random.rand() * random.random()
        return y, torch.full((2,), -torch.inf, dtype=x.dtype)


def test_verify_tells_nothing_wrong():
    x = torch.randn(2, 4, 3, 3)
    before = x.clone()
    cnnkern.convert(Changing(), verify={"x": x, "scale": 2.0})
    assert torch.equal(x, before)


def test_verify_passes_what_is_right():
    model = build("resnet18")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    converted = cnnkern.convert(model, verify=torch.randn(2, 3, 32, 32))
    assert type(converted.layer1[0].bn2) is ConvertedBatchNorm2d
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
