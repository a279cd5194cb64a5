"""PReLU, whose slope has a gradient, behind a batch norm and behind an addition."""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from meanings.base import CASES, Layers, Reversed, X, written


class Sloped(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.slopes, self.slope = nn.PReLU(4), nn.PReLU(init=-0.5)


sloped = functools.partial(written, of=Sloped)


@sloped("SlopesAChannel")
def _(self, x, y):
    return self.slopes(y)


@sloped("OneSlope")
def _(self, x, y):
    return self.slope(y)


@sloped("SlopesBehindASum")
def _(self, x, y):
    return self.slopes(y + x)


@sloped("OneSlopeBehindASumInPlace")
def _(self, x, y):
    y += x
    return self.slope(y)


@sloped("SlopesUsedTwice")
def _(self, x, y):
    return self.slopes(y) * self.slopes(self.features[0](y))


@sloped("SlopesOfAnother")
def _(self, x, y):
    return F.prelu(y, 2 * self.conv.bias)


@sloped("SlopesAreNoParameters")
def _(self, x, y):
    return F.prelu(y + x, torch.full((4,), 0.3, dtype=x.dtype)) + F.prelu(x, torch.tensor(0.1, dtype=x.dtype))


@sloped("HooksTheGradientBeforeSlopes")
def _(self, x, y):
    if y.requires_grad:
        y.register_hook(lambda g: g * 2)
    return self.slopes(y)


@sloped("HooksTheGradientBeforeSlopesLater")
def _(self, x, y):
    z = self.slope(y)
    if y.requires_grad:
        y.register_hook(lambda g: g * 2)
    return z


@sloped("HooksTheSumsGradientBeforeSlopes")
def _(self, x, y):
    z = y + x
    w = self.slopes(z)
    if y.requires_grad:
        y.register_hook(lambda g: g * 2)
        z.register_hook(lambda g: g * 3)
    return w


@sloped("HooksTheSlopesGradient")
def _(self, x, y):
    s = self.slopes.weight * 1
    z = F.prelu(y, s)
    if s.requires_grad:
        s.register_hook(lambda g: g * 2)
        z.register_hook(lambda g: g * 3)
    return z


@sloped("KeepsTheGradientBeforeSlopes")
def _(self, x, y):
    if y.requires_grad:
        y.retain_grad()
    z = self.slopes(y)
    if z.requires_grad:
        z.sum().backward(retain_graph=True)
        return z + y.grad
    return z


@sloped("AsksForTheGradientBeforeSlopes")
def _(self, x, y):
    z = self.slopes(y)
    if not z.requires_grad:
        return z
    (g,) = torch.autograd.grad(z.square().sum(), y, create_graph=True)
    return z + g


@sloped("AsksForTheSlopesGradient")
def _(self, x, y):
    z = self.slopes(y)
    if not z.requires_grad:
        return z
    (g,) = torch.autograd.grad(z.square().sum(), self.slopes.weight, create_graph=True)
    return z + g.view(4, 1, 1) / 1000


@sloped("AsksForTheSlopeGradientBehindASum")
def _(self, x, y):
    z = self.slope(x + y)
    if not z.requires_grad:
        return z
    (g,) = torch.autograd.grad(z.square().sum(), self.slope.weight, create_graph=True)
    return z + g / 1000


@sloped("AsksForTheSlopesGradientBeforeAnotherUse")
def _(self, x, y):
    z = self.slopes(y)
    if not z.requires_grad:
        return z + torch.sigmoid(y)
    (g,) = torch.autograd.grad(z.square().sum(), self.slopes.weight, retain_graph=True)
    torch.sigmoid(y).sum().backward(retain_graph=True)
    return z + g.view(4, 1, 1) / 1000


@sloped("UsesWhatSlopesWereGivenAgain")
def _(self, x, y):
    return self.slopes(y) + torch.sigmoid(y)


@sloped("AppliesAFunctionBesideSlopes")
def _(self, x, y):
    return self.slope(y) + Reversed.apply(y)


@sloped("OverwritesTheResidualBehindSlopes")
def _(self, x, y):
    r = x * 2
    z = self.slopes(y + r)
    r.zero_()
    return z + r


@sloped("ReplacesTheSlopeThroughData")
def _(self, x, y):
    s = self.slopes.weight.detach().clone()
    z = F.prelu(y, s)
    s.data = torch.zeros(4, dtype=x.dtype)
    return z


@sloped("SlopesBehindAnotherBatchNorm")
def _(self, x, y):
    return self.slope(self.features[1](self.slopes(y)))


class LearnsItsSlopesAlone(Sloped):
    def __init__(self) -> None:
        super().__init__()
        for p in (*self.conv.parameters(), *self.bn.parameters()):
            p.requires_grad_(False)

    def forward(self, x):
        return self.slopes(self.bn(self.conv(x)) + x)


class SlopesAreFrozen(Sloped):
    def __init__(self) -> None:
        super().__init__()
        self.slopes.requires_grad_(False)

    def forward(self, x):
        return self.slopes(self.bn(self.conv(x)))


class IResNetBlock(nn.Module):
    """As insightface's iresnet has it."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.bn2, self.prelu = nn.BatchNorm2d(8), nn.PReLU(8)
        self.conv2, self.bn3 = nn.Conv2d(8, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.downsample = nn.Sequential(nn.Conv2d(4, 8, 1, 2, bias=False), nn.BatchNorm2d(8))

    def forward(self, x):
        out = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        out = self.bn3(self.conv2(out))
        out += self.downsample(x)
        return out


CASES |= {cls.__name__: (cls, X) for cls in (LearnsItsSlopesAlone, SlopesAreFrozen, IResNetBlock)}
