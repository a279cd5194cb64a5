"""In-place additions to another tensor than the batch norm's output, `r += bn(x)`, as in blocks of many branches."""

import torch
import torch.nn.functional as F
from torch import nn

from meanings.base import case, written


class Branches(nn.Module):
    """MobileOne's and RepVGG's: convolutions of one image with a batch norm each, a scale and the image itself."""

    def __init__(self, count: int = 2, scale: bool = True, skip: bool = True, act: nn.Module | None = None) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)) for _ in range(count)
        )
        self.scale = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)) if scale else None
        self.skip = nn.BatchNorm2d(4) if skip else None
        self.act = act or nn.ReLU(inplace=True)

    def forward(self, x):
        """timm's, where the image comes last, but for the branch that is called first."""
        skip = self.skip(x) if self.skip is not None else 0
        out = self.scale(x) if self.scale is not None else 0
        for branch in self.branches:
            out += branch(x)
        out += skip
        return self.act(out)


class ScaleAndSkipFirst(Branches):
    """Apple's, where they come first."""

    def forward(self, x):
        scale = self.scale(x) if self.scale is not None else 0
        skip = self.skip(x) if self.skip is not None else 0
        out = scale + skip
        for branch in self.branches:
            out += branch(x)
        return self.act(out)


@case()
class IsMobileOne(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            Branches(),
            Branches(3, scale=False, act=nn.GELU()),
            Branches(1, skip=False, act=nn.SiLU(inplace=True)),
            Branches(1, scale=False, skip=False),
            ScaleAndSkipFirst(1),
            ScaleAndSkipFirst(2, act=nn.SiLU()),
            ScaleAndSkipFirst(2, scale=False, skip=False),
        )


@case()
class IsRepVGG(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(ScaleAndSkipFirst(1), ScaleAndSkipFirst(1, skip=False), ScaleAndSkipFirst(1, scale=False))


@written("AddsOntoAView")
def _(self, x, y):
    r = self.conv(x)
    view = r.view(3, 4, 36).view_as(y)
    view += y
    return F.relu(r) + view


@written("AddsOntoASlice")
def _(self, x, y):
    r = torch.cat([self.conv(x), x], 1)
    r[:, :4] += y
    r[:2] += self.bn(x).repeat(1, 2, 1, 1)[:2]
    return r


@written("AddsOntoAnImageOfABatch")
def _(self, x, y):
    r = self.conv(torch.cat([x, x]))
    r[3:] += y
    return r.sin()


@written("AddsOntoWhatWasUsedBefore")
def _(self, x, y):
    r = self.conv(x)
    before = r * 2
    r += y
    return F.silu(before) + r.cos() * r


@written("AddsOntoTheSameTensorTwice")
def _(self, x, y):
    r = self.conv(x)
    r += y
    r += self.bn(x * 2)
    return r * x


@written("AddsTheSameTwice")
def _(self, x, y):
    r = self.conv(x)
    r += y
    r += y
    return F.relu(r) * y


@written("AddsOntoALeaf")
def _(self, x, y):
    r = torch.zeros_like(x)
    r += y
    return F.relu(r, inplace=True) + r


@written("AddsOntoAParameter")
def _(self, x, y):
    with torch.no_grad():
        self.bn.bias += self.bn(x).mean((0, 2, 3))
        total = torch.nn.Parameter(x.clone())
        total += self.bn(x)
    return F.relu(y) + total


@written("AddsWithoutGradients")
def _(self, x, y):
    with torch.no_grad():
        r = self.conv(x)
        r += self.bn(x)
    return r + y


@written("AddsOntoItsInput")
def _(self, x, y):
    with torch.no_grad():  # eager cannot differentiate it
        z = self.conv(x)
        z += self.bn(z)
        z.view(-1)[:72] += self.bn(z[:1]).flatten()[:72]
    return F.relu(y) + z


@written("AddsOntoWhatASumWaitsFor")
def _(self, x, y):
    r = self.conv(x)
    z = y + r
    r += self.bn(x)
    return F.silu(z) + r


@written("AddsOntoASumOfSums")
def _(self, x, y):
    z = y + x
    z += self.bn(x * 2)
    kept = z
    z += self.bn(x * 3)
    z += self.features[1](x)
    return F.silu(z, inplace=True) * kept


@written("AddsOntoASumThatIsUsed")
def _(self, x, y):
    z = y + x
    before = z * 2
    z += self.bn(x * 2)
    return F.relu(z) + before


@written("AddsOntoZero")
def _(self, x, y):
    return sum([self.bn(x), y, 0.0 + self.bn(x * 2)]) + F.relu(0 + self.bn(x)) + (self.bn(x) + 0).view_as(x)


@written("AddsZeroToWhatIsUsed")
def _(self, x, y):
    z = 0 + y
    z += self.bn(x)
    return F.relu(z) * y


@written("AddsOntoAnotherMemoryFormat")
def _(self, x, y):
    r = self.conv(x).to(memory_format=torch.channels_last)
    r += y
    s = self.conv(x).contiguous()
    s += self.bn(x.to(memory_format=torch.channels_last))
    return F.relu(r) + s


@written("AddsOntoAnotherShape")
def _(self, x, y):
    r = self.conv(torch.cat([x, x])).view(2, 3, 4, 6, 6)
    r += y
    r += self.bn(x[:1])
    return F.relu(r)


@written("HooksWhatItAddsOnto")
def _(self, x, y):
    r, z = self.conv(x), y + x
    for t in (r, z):
        t.requires_grad and t.register_hook(lambda g: g * 2)
        t += self.bn(x)
        t.requires_grad and t.register_hook(lambda g: g * 3)
    return F.relu(r) * F.silu(z)
