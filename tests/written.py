"""Models with batch norms, written in the ways that people write them (WRITTEN), and what is fused in each."""

import operator
import random

import torch
import torch.nn.functional as F
import torchvision
from meanings import IResNetBlock
from torch import nn

ADD, RELU = "BatchNorm + add + ReLU", "BatchNorm + ReLU"


class Block(nn.Module):
    """One ReLU module for two calls, an in-place add between."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        out = self.conv2(self.relu(self.bn(self.conv1(x))))
        out += x
        return self.relu(out)


class Functional(nn.Module):
    def __init__(self, relu):
        super().__init__()
        self.bn, self.relu_call = nn.BatchNorm2d(4), relu

    def forward(self, x):
        return self.relu_call(self.bn(x)) * 2


class UsedTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        y = self.bn(x)
        return self.relu(y) + y


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(F.relu(self.bn(x)))


class DependsOnMode(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.bn(x)
        return F.relu(y) if self.training else y


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        y = self.bn(x)
        return self.relu(y) if y.sum() > 1e9 else y


class ReachedFromAbove(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        return self.inner(x) + self.inner[0](x)


class Residual(nn.Module):
    """A convolution, a batch norm, and then `join` of its output and the input."""

    def __init__(self, join):
        super().__init__()
        self.conv, self.bn, self.join = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), join
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.0)

    def forward(self, x):
        return self.join(self, self.bn(self.conv(x)), x)


def in_place(self, y, x):
    y += x
    return self.relu(y)


def in_place_on_the_residual(self, y, x):
    r = x * 1
    r += y
    return F.relu(r) + r


def residual_overwritten_after_the_add(self, y, x):
    r = x * 1
    z = y + r
    r.mul_(3)
    return F.relu(z) + r


def residual_overwritten_after_the_activation(self, y, x):
    r = x * 1
    z = F.silu(y + r)
    r.mul_(3)
    return z + r


def residual_overwritten_through_data_after_the_activation(self, y, x):
    r = x * 1
    z = F.gelu(y + r)
    r.data.mul_(3)
    return z + r


def residual_put_in_anothers_place_after_the_activation(self, y, x):
    r = (x * 1).detach()
    z = F.silu(y + r)
    r.data = r * 2
    return z + r


def used_twice_after_the_add(self, y, x):
    z = y + x
    return F.relu(z) * z


class TwoNorms(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.bn1(x) + self.bn2(2 * x))


class NormOfWhatIsOverwritten(nn.Module):
    """The batch norm's input changes in place before the addition, so it must not be computed there."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        z = x * 2
        y = self.bn(z)
        z.mul_(3)
        return torch.relu(y + z)


class Quantizable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.skip = torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x):
        return self.skip.add_relu(x, self.bn(self.conv(x)))


class NormThen(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)


class OptionalArgument(NormThen):
    def forward(self, x, skip=None):
        y = self.bn(x)
        return F.relu(y) if skip is None else F.relu(y + skip)


class ByChance(NormThen):
    def forward(self, x):
        y = self.bn(x)
        return y if random.random() > 2 else F.relu(y)


class ByGradientMode(NormThen):
    def forward(self, x):
        y = self.bn(x)
        return F.relu(y) if torch.is_grad_enabled() else torch.sigmoid(y)


class TensorOfItsOwn(NormThen):
    def forward(self, x):
        return F.relu(self.bn(x)) * torch.tensor(2.0)


class WithModuleList(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(4)])

    def forward(self, x):
        for norm in self.norms:
            x = F.relu(norm(x))
        return x


class StochasticDepthBetween(NormThen):
    def __init__(self):
        super().__init__()
        self.drop = torchvision.ops.StochasticDepth(0.0, "row")

    def forward(self, x):
        return F.relu(self.drop(self.bn(x)) + x)


def shared_norm() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    return nn.Sequential(norm, nn.ReLU(), nn.Sequential(norm))


WRITTEN = {
    "one relu, many calls": (Block, {"BatchNorm + ReLU": 1}),
    "F.relu": (lambda: Functional(F.relu), {"BatchNorm + ReLU": 1}),
    "torch.relu": (lambda: Functional(torch.relu), {"BatchNorm + ReLU": 1}),
    "method": (lambda: Functional(lambda x: x.relu()), {"BatchNorm + ReLU": 1}),
    "in-place method": (lambda: Functional(lambda x: x.relu_()), {"BatchNorm + ReLU": 1}),
    "F.relu in place": (lambda: Functional(lambda x: F.relu(x, inplace=True)), {"BatchNorm + ReLU": 1}),
    "sequential, shared relu": (
        lambda: (lambda r: nn.Sequential(nn.BatchNorm2d(4), r, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), r))(nn.ReLU()),
        {"BatchNorm + ReLU": 2},
    ),
    "output used twice": (UsedTwice, {"BatchNorm": 1}),
    "called twice": (CalledTwice, {"BatchNorm + ReLU": 1}),
    "depends on the mode": (DependsOnMode, {"BatchNorm + ReLU": 1}),
    "untraceable": (Untraceable, {"BatchNorm": 1}),
    "an argument that may be left out": (OptionalArgument, {"BatchNorm + ReLU": 1}),
    "by chance": (ByChance, {"BatchNorm + ReLU": 1}),
    "by gradient mode": (ByGradientMode, {"BatchNorm + ReLU": 1}),
    "a tensor of its own": (TensorOfItsOwn, {"BatchNorm + ReLU": 1}),
    "module list": (WithModuleList, {"BatchNorm + ReLU": 1}),
    "stochastic depth between": (StochasticDepthBetween, {ADD: 1}),
    "torch.relu_": (lambda: Functional(torch.relu_), {"BatchNorm + ReLU": 1}),
    "F.relu_": (lambda: Functional(F.relu_), {"BatchNorm + ReLU": 1}),
    "operator.iadd": (lambda: Residual(lambda self, y, x: F.relu(operator.iadd(y, x))), {ADD: 1}),
    "reached from above": (ReachedFromAbove, {"BatchNorm + add": 1}),
    "one batch norm in two places": (shared_norm, {"BatchNorm + ReLU": 1}),
    **{
        name: (lambda act=act: nn.Sequential(nn.BatchNorm2d(4), act), {f"BatchNorm + {type(act).__name__}": 1})
        for name, act in {
            "relu6": nn.ReLU6(inplace=True),
            "leaky relu": nn.LeakyReLU(),
            "sigmoid": nn.Sigmoid(),
            "silu": nn.SiLU(),
            "hardswish": nn.Hardswish(),
            "leaky relu of another slope": nn.LeakyReLU(0.2),
            "leaky relu that falls": nn.LeakyReLU(-0.2),
            "leaky relu in place": nn.LeakyReLU(0.2, inplace=True),
            "elu": nn.ELU(),
            "elu of another alpha, in place": nn.ELU(0.7, inplace=True),
            "gelu": nn.GELU(),
            "mish": nn.Mish(),
            "mish in place": nn.Mish(inplace=True),
            "hardsigmoid": nn.Hardsigmoid(),
            "hardsigmoid in place": nn.Hardsigmoid(inplace=True),
        }.items()
    },
    "gelu, tanh": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.GELU("tanh")), {"BatchNorm + GELU(tanh)": 1}),
    "F.gelu, tanh": (lambda: Functional(lambda x: F.gelu(x, approximate="tanh")), {"BatchNorm + GELU(tanh)": 1}),
    "F.gelu": (lambda: Functional(F.gelu), {"BatchNorm + GELU": 1}),
    "F.elu": (lambda: Functional(lambda x: F.elu(x, 0.5)), {"BatchNorm + ELU": 1}),
    "F.mish": (lambda: Functional(F.mish), {"BatchNorm + Mish": 1}),
    "F.hardsigmoid": (lambda: Functional(F.hardsigmoid), {"BatchNorm + Hardsigmoid": 1}),
    "softplus": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Softplus()), {"BatchNorm": 1}),
    "F.selu": (lambda: Functional(F.selu), {"BatchNorm": 1}),
    "F.celu": (lambda: Functional(lambda x: F.celu(x, 0.5)), {"BatchNorm": 1}),
    "F.leaky_relu of another slope": (
        lambda: Functional(lambda x: F.leaky_relu(x, 0.2)),
        {"BatchNorm + LeakyReLU": 1},
    ),
    "F.leaky_relu": (lambda: Functional(F.leaky_relu), {"BatchNorm + LeakyReLU": 1}),
    "F.silu": (lambda: Functional(F.silu), {"BatchNorm + SiLU": 1}),
    "bn + x, relu": (lambda: Residual(lambda self, y, x: F.relu(y + x)), {ADD: 1}),
    "x + bn, relu": (lambda: Residual(lambda self, y, x: (x + y).relu()), {ADD: 1}),
    "torch.add, in-place relu": (lambda: Residual(lambda self, y, x: torch.add(x, y).relu_()), {ADD: 1}),
    "in-place add, relu module": (lambda: Residual(in_place), {ADD: 1}),
    "add method, no relu": (lambda: Residual(lambda self, y, x: y.add(x) * 2), {"BatchNorm + add": 1}),
    "add, sigmoid": (lambda: Residual(lambda self, y, x: torch.sigmoid(y + x)), {"BatchNorm + add + Sigmoid": 1}),
    **{
        f"add, {name}": (lambda act=act: Residual(lambda self, y, x: act(y + x)), {f"BatchNorm + add + {name}": 1})
        for name, act in {
            "ReLU6": F.relu6,
            "LeakyReLU": lambda x: F.leaky_relu(x, 0.2),
            "SiLU": F.silu,
            "Hardswish": F.hardswish,
            "ELU": lambda x: F.elu(x, 0.7),
            "GELU": F.gelu,
            "GELU(tanh)": lambda x: F.gelu(x, approximate="tanh"),
            "Mish": F.mish,
            "Hardsigmoid": F.hardsigmoid,
        }.items()
    },
    "add in place, SiLU in place": (
        lambda: Residual(lambda self, y, x: F.silu(y.add_(x), inplace=True)),
        {"BatchNorm + add + SiLU": 1},
    ),
    "residual, then bn, ELU in place": (
        lambda: Residual(lambda self, y, x: F.elu(x + y, inplace=True)),
        {"BatchNorm + add + ELU": 1},
    ),
    "prelu, a slope a channel": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.PReLU(4)), {"BatchNorm + PReLU": 1}),
    "prelu, one slope": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.PReLU()), {"BatchNorm + PReLU": 1}),
    "F.prelu": (
        lambda: Functional(lambda x: F.prelu(x, torch.tensor(0.2, dtype=x.dtype))),
        {"BatchNorm + PReLU": 1},
    ),
    "add, PReLU": (
        lambda: Residual(lambda self, y, x: F.prelu(x + y, self.conv.bias)),
        {"BatchNorm + add + PReLU": 1},
    ),
    "insightface's block": (IResNetBlock, {"BatchNorm": 2, "BatchNorm + PReLU": 1, "BatchNorm + add": 1}),
    "scaled add": (lambda: Residual(lambda self, y, x: torch.add(y, x, alpha=2)), {"BatchNorm": 1}),
    "add of a number": (lambda: Residual(lambda self, y, x: F.relu(y + 1)), {"BatchNorm": 1}),
    "added to itself": (lambda: Residual(lambda self, y, x: F.relu(y + y)), {"BatchNorm": 1}),
    "broadcast residual": (
        lambda: Residual(lambda self, y, x: F.relu(y + x.mean((2, 3), keepdim=True))),
        {"BatchNorm": 1},
    ),
    "broadcast addition": (
        lambda: Residual(lambda self, y, x: F.relu(x[:1] + 2 * x) * y),
        {"BatchNorm": 1},
    ),
    "in place on the residual": (lambda: Residual(in_place_on_the_residual), {"BatchNorm + add": 1}),
    "residual overwritten after the add": (
        lambda: Residual(residual_overwritten_after_the_add),
        {"BatchNorm + add": 1},
    ),
    "residual overwritten after the activation": (
        lambda: Residual(residual_overwritten_after_the_activation),
        {"BatchNorm + add + SiLU": 1},
    ),
    "residual overwritten through data after the activation": (
        lambda: Residual(residual_overwritten_through_data_after_the_activation),
        {"BatchNorm + add + GELU": 1},
    ),
    "residual put in another's place after the activation": (
        lambda: Residual(residual_put_in_anothers_place_after_the_activation),
        {"BatchNorm + add + SiLU": 1},
    ),
    "sum used twice": (lambda: Residual(used_twice_after_the_add), {"BatchNorm + add": 1}),
    "dropout between": (
        lambda: Residual(lambda self, y, x: F.relu(F.alpha_dropout(self.drop(y), 0.0).to(x) + x)),  # they drop nothing
        {ADD: 1},
    ),
    "sum of two batch norms": (TwoNorms, {ADD: 1, "BatchNorm": 1}),
    "FloatFunctional": (Quantizable, {ADD: 1}),
    "nothing": (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), {}),
}
