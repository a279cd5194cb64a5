"""`cnnkern.fold` of models whose forward passes are written in many ways: what is folded, and that results stay."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnkern
from tests.test_fold import ADD, CONV, LAYOUTS, RELU, counts, judged, randomised


class Written(nn.Module):
    """Two convolutions with batch norms, and a forward pass that is given."""

    def __init__(self, forward):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4, affine=False)
        self._written = forward

    def forward(self, x):
        return self._written(self, x)


class Flattened(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = F.relu(self.bn(self.conv(x)) + x)
        return y.view(-1, 120)


def in_place_before_the_add(self, x):
    z = x * 2
    y = self.bn(self.conv(z))
    z.mul_(3)
    return F.relu(y + z)


def in_place_behind_the_add(self, x):
    z = x * 2
    y = self.bn(self.conv(z)) + z
    z.mul_(3)
    return F.relu(y) + z


def in_place_between(self, x):
    z = x * 2
    y = self.conv(z)
    z.mul_(3)
    return self.bn(y)


def weight_read_elsewhere(self, x):
    return self.bn(self.conv(x)) + self.conv.weight.sum()


def onto_the_branch(self, x):
    y = self.bn2(self.conv2(x))
    return self.act(self.bn(self.conv(x)) + y)


def residual_read_again(self, x):
    y = self.bn2(self.conv2(x))
    return F.relu(self.bn(self.conv(x)) + y) * y


WRITTEN = {
    "F.relu": (lambda self, x: F.relu(self.bn(self.conv(x))), {RELU: 1, CONV: 0}),
    "one relu, two calls": (lambda self, x: self.act(self.bn2(self.conv2(self.act(self.bn(self.conv(x)))))), {RELU: 2}),
    "sigmoid": (lambda self, x: torch.sigmoid(self.bn(self.conv(x))), {"Conv + BatchNorm + Sigmoid": 1}),
    "leaky_relu": (lambda self, x: F.leaky_relu(self.bn(self.conv(x))), {"Conv + BatchNorm + LeakyReLU": 1}),
    "gelu": (lambda self, x: F.gelu(self.bn(self.conv(x))), {"Conv + BatchNorm + GELU": 1}),
    "no norm": (lambda self, x: F.relu(self.conv(x)), {"Conv + ReLU": 1}),
    "no norm, residual": (lambda self, x: F.relu(self.conv(x) + x), {"Conv + add + ReLU": 1}),
    "residual": (lambda self, x: F.relu(x + self.bn(self.conv(x))), {ADD: 1}),
    "residual, no relu": (lambda self, x: self.bn(self.conv(x)).add(x) * 2, {"Conv + BatchNorm + add": 1}),
    "broadcast": (lambda self, x: F.relu(self.bn(self.conv(x)) + x.mean((2, 3), keepdim=True)), {CONV: 1}),
    "two branches": (onto_the_branch, {ADD: 1, CONV: 1}),
    "residual read again": (residual_read_again, {ADD: 1, CONV: 1}),
    "output read twice": (lambda self, x: (lambda y: F.relu(self.bn(y)) + y)(self.conv(x)), {RELU: 1}),
    "norm first": (lambda self, x: self.conv(F.relu(self.bn(x))), {"BatchNorm + ReLU": 1, "Conv": 2}),
    "called twice": (lambda self, x: self.bn(self.conv(self.bn(self.conv(x)))), {CONV: 1}),
    "input changed between conv and norm": (in_place_between, {"BatchNorm": 2}),
    "input changed before the add": (in_place_before_the_add, {CONV: 1}),
    "input changed behind the add": (in_place_behind_the_add, {"Conv + BatchNorm + add": 1}),
    "weight read": (weight_read_elsewhere, {CONV: 1}),
    "untraceable": (lambda self, x: self.bn(self.conv(x)) if x.sum() < 1e9 else x, {CONV: 1}),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_however_it_is_written(name):
    forward, expected = WRITTEN[name]
    torch.manual_seed(1)
    model = randomised(Written(forward))
    folded = cnnkern.fold(model)
    x = torch.randn(3, 4, 9, 7)
    judged(folded, model, x, layouts=LAYOUTS)
    found = counts(folded)
    assert {k: found.get(k, 0) for k in expected} == expected
    with torch.no_grad():
        other = copy.deepcopy(folded)
        other(x)  # where a result is used twice, the first call may round otherwise
        assert torch.equal(other(x), folded(x))


def test_views_take_what_the_convolutions_return():
    """Which is channels_last, for contiguous input too."""
    model = randomised(Written(lambda self, x: (lambda y: y.view(y.size(0), -1))(self.bn(self.conv(x)))))
    folded = cnnkern.fold(model)
    x = torch.randn(2, 4, 5, 6)
    judged(folded, model, x)
    model = randomised(Flattened())
    judged(pickle.loads(pickle.dumps(cnnkern.fold(model))), model, x)
    bits = randomised(Written(lambda self, x: self.bn(self.conv(x)).view(torch.int32)))
    assert cnnkern.fold(bits)(x).dtype == torch.int32
