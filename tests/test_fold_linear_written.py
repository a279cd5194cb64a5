"""Linear layers of folded models, in every way that a model may use their output: results, and what is fused."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnnkern
from cnnkern import testing
from tests.test_fold import counts


class Written(nn.Module):
    def __init__(self, forward: Callable) -> None:
        super().__init__()
        self.linear, self.other, self._written = nn.Linear(8, 8), nn.Linear(8, 8), forward
        self.norm, self.drop = nn.LayerNorm(8), nn.Dropout()
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor | tuple:
        return self._written(self, x)


def input_changed(self, x):
    z = x * 2
    y = self.linear(z)
    z.mul_(3)
    return F.gelu(y)


def input_changed_through_a_view(self, x):
    z = x * 2
    view = z[:1]
    y = self.linear(z)
    view.mul_(3)
    return F.gelu(y)


def residual_changed(self, x):
    z = x * 2
    y = self.linear(x) + z
    z.mul_(3)
    return F.relu(y) + z


def written_to(self, x):
    y = self.linear(x)
    y[0] = 1
    return F.gelu(y)


def sum_written_to(self, x):
    y = self.linear(x) + x
    y.mul_(2)
    return F.relu(y)


def view_written_to(self, x):
    y = self.linear(x)
    y.view(-1)[3] = 1
    return F.gelu(y) + y


def onto_another(self, x):
    z = x * 2
    z += self.linear(x)
    return F.relu(z)


WRITTEN = {
    "method": (lambda self, x: self.linear(x).relu(), {"Linear + ReLU": 1}),
    "in place": (lambda self, x: self.linear(x).relu_(), {"Linear + ReLU": 1}),
    "residual": (lambda self, x: x + self.linear(x), {"Linear + add": 1}),
    "residual, dropout": (lambda self, x: x + self.drop(self.linear(self.norm(x))), {"Linear + add": 1}),
    "residual, activation": (lambda self, x: F.gelu(self.linear(x) + x), {"Linear + add + GELU": 1}),
    "two": (lambda self, x: F.relu(self.linear(x) + self.other(x)), {"Linear + add + ReLU": 1, "Linear": 1}),
    "a strided residual": (lambda self, x: F.relu(self.linear(x) + x.transpose(0, 1).contiguous().transpose(0, 1)), {}),
    "a residual of another dtype": (lambda self, x: F.relu(self.linear(x) + x.half()), {"Linear": 2}),
    "a broadcast residual": (lambda self, x: F.relu(self.linear(x) + x[:1]), {"Linear": 2}),
    "alpha": (lambda self, x: torch.add(self.linear(x), x, alpha=2), {"Linear": 2}),
    "prelu": (lambda self, x: F.prelu(self.linear(x), self.scale[:1]), {"Linear + PReLU": 1}),
    "leaky": (lambda self, x: F.leaky_relu(self.linear(x), 0.3), {"Linear + LeakyReLU": 1}),
    "softplus": (lambda self, x: F.softplus(self.linear(x)), {"Linear": 2}),
    "used twice": (lambda self, x: (lambda y: F.gelu(y) * y)(self.linear(x)), {"Linear": 2}),
    "returned": (lambda self, x: (lambda y: (y, F.gelu(y)))(self.linear(x)), {"Linear": 2}),
    "viewed": (lambda self, x: F.gelu(self.linear(x).view(-1)), {"Linear": 2}),
    "transposed": (lambda self, x: F.gelu(self.linear(x).transpose(0, 1)), {"Linear": 2}),
    "split": (lambda self, x: F.gelu(self.linear(x).chunk(2, -1)[1]), {"Linear": 2}),
    "out": (lambda self, x: torch.mul(self.linear(x), 2, out=torch.empty_like(x)), {"Linear": 2}),
    "numpy": (lambda self, x: torch.from_numpy(self.linear(x).numpy() * 2), {"Linear": 2}),
    "written to": (written_to, {"Linear": 2}),
    "a view written to": (view_written_to, {"Linear": 2}),
    "the sum written to": (sum_written_to, {"Linear + add": 1}),
    "onto another": (onto_another, {"Linear": 2}),
    "input changed": (input_changed, {"Linear": 2}),
    "input changed through a view": (input_changed_through_a_view, {"Linear": 2}),
    "residual changed": (residual_changed, {"Linear + add": 1}),
    "weight read": (lambda self, x: self.linear(x) * self.linear.weight.sum(), {"Linear": 2}),
    "weight used": (lambda self, x: F.linear(F.gelu(self.linear(x)), self.linear.weight), {"Linear + GELU": 1}),
    "twice": (lambda self, x: self.linear(F.gelu(self.linear(x))), {"Linear + GELU": 1}),
    "dropped": (lambda self, x: (self.linear(x), self.other(x))[1], {"Linear": 2}),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_however_it_is_written(name):
    forward, expected = WRITTEN[name]
    torch.manual_seed(0)
    model = Written(forward).eval()
    folded, x = cnnkern.fold(model), torch.randn(3, 4, 8)
    exact = copy.deepcopy(model).double()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for _ in range(3):
                mine, theirs, truth = (
                    y if type(y) is tuple else (y,) for y in (folded(x), model(x), exact(x.double()))
                )
                for m, t, e in zip(mine, theirs, truth, strict=True):
                    assert m.stride() == t.stride()
                    testing.assert_as_good_as({"y": m}, {"y": t}, {"y": e.double()})
    found = counts(folded)
    assert {kind: found.get(kind, 0) for kind in expected} == expected
