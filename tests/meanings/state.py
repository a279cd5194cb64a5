"""Forward passes that do more than compute: they count, draw, keep, switch, branch."""

import collections
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from meanings.base import CASES, PATCHED, Layers, Reversed, X, case


@case()
class ChangesABuffer(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ema", torch.ones(()))

    def forward(self, x):
        y = self.hidden(x)
        self.ema.mul_(0.9).add_(y.detach().mean(), alpha=0.1)
        return y * self.ema


@case()
class CountsInTraining(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.steps += 1
        return self.hidden(x) + self.steps


@case()
class InitialisesItself(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("ready", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.ready.item() == 0:
            self.scale.data.fill_(float(x.detach().std()))
            self.ready.fill_(1)
        return self.hidden(x) / self.scale


@case()
class CountsInPython(Layers):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return self.hidden(x) * self.calls


@case()
class KeepsWhatItSaw(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list = []

    def forward(self, x):
        self.seen.append(x.shape)
        return self.hidden(x) * len(self.seen)


@case()
class SetsItsChild(Layers):
    def forward(self, x):
        self.bn.momentum = 0.5
        return self.hidden(x)


@case()
class ReversesGradients(Layers):
    def forward(self, x):
        return Reversed.apply(self.hidden(x))


@case()
class HasAFrozenPart(Layers):
    def forward(self, x):
        with torch.no_grad():
            y = self.hidden(x)
        return self.features[0](y)


@case()
class IsFrozen(Layers):
    @torch.no_grad()
    def forward(self, x):
        return self.hidden(x)


@case()
class SwitchesGradients(Layers):
    def forward(self, x):
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        y = self.hidden(x)
        torch.set_grad_enabled(before)
        return self.features[0](y)


@case()
class Checkpoints(Layers):
    def forward(self, x):
        return checkpoint(self.features[:3], x, use_reentrant=False) + checkpoint(self.hidden, x, use_reentrant=False)


@case(X[0], None)
class TakesNoMask(Layers):
    def forward(self, x, mask):
        y = self.hidden(x)
        return y if mask is None else y * mask


@case(X[0], 0.5)
class TakesANumberOrATensor(Layers):
    def forward(self, x, scale):
        y = self.hidden(x)
        return y * 2 if isinstance(scale, float) else y * scale


@case(X[0])
class TakesATensorOrAList(Layers):
    def forward(self, x):
        if not isinstance(x, torch.Tensor):
            x = x[0]
        return self.act(self.bn(self.conv(x)))


@case(list(X))
class TakesAListOrATensor(TakesATensorOrAList):
    pass


@case()
class TakesOptions(Layers):
    def forward(self, x, **options):
        skip = options.get("skip")
        y = self.bn(self.conv(x))
        return F.relu(y if skip is None else y + skip)


@case()
class AsksItsChildsMode(Layers):
    def forward(self, x):
        return F.silu(self.bn(F.dropout(x, 0.5, self.features[3].training)))


def perhaps(x, share):
    return x * 0 if random.random() < share else x


@case()
class DrawsInAHelper(Layers):
    def forward(self, x):
        return perhaps(self.hidden(x), 0.5)


@case()
class ReadsABuffer(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        y = self.hidden(x) * self.scale.item()
        self.scale.add_(1)
        return y


@case()
class Tries(Layers):
    def forward(self, x):
        try:
            count = len(x)
        except TypeError:
            count = 0
        return self.hidden(x) * count


@case()
class TapsItsFeatures(Layers):
    def forward(self, x, taps=(1,)):
        out = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in taps:
                out.append(x)
        return out


@case()
class TakesAPartOfItsFeatures(Layers):
    def forward(self, x, until=2):
        return self.features[:until](x)


@case()
class ReachesIntoAChild(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(collections.OrderedDict(bn=nn.BatchNorm2d(4), relu=nn.ReLU()))

    def forward(self, x, more=True):
        return self.block.bn(x) + self.block(x)


@case()
class HandsAChildOn(Layers):
    def forward(self, x, layers=2):
        return self.run(self.features, x, layers)

    def run(self, features, x, layers):
        for layer in list(features.children())[:layers]:
            x = layer(x)
        return x


@case()
class KeepsAList(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.steps = [self.conv, self.bn, self.act]

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x


class Child(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parent: list = []

    def forward(self, x):
        return self.parent[0].bn(x)


@case()
class IsKnownToItsChild(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.child = Child()
        self.child.parent.append(self)

    def forward(self, x):
        return self.act(self.bn(x)) + self.child(x)


@case()
class DelegatesAttributes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = CASES["TakesATensorOrAList"][0]()

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x):
        return F.silu(self.bn(self.conv(x))) + self.inner(x)


@case()
class ChangesATensorOfItsOwn(Layers):
    """One that is no buffer, and that nothing puts back."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.zeros((), dtype=torch.float64)

    def forward(self, x):
        self.seen.add_(1)
        return self.hidden(x) * self.seen


@case()
class ReadsATensorOfItsOwn(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.full((), 3.0)

    def forward(self, x):
        return self.hidden(x) * self.scale.item()


@case()
class ReadsItsConvolution(Layers):
    def forward(self, x):
        y = self.act(self.bn(self.conv(x)))
        return y.reshape(x.shape[0], self.conv.out_channels, -1)


@case()
class CopiesItself(Layers):
    def __deepcopy__(self, memo):
        made = type(self)().to(self.conv.weight.dtype).train(self.training)
        made.load_state_dict(self.state_dict())
        return made

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)) + x)


class Same(nn.Conv2d):
    def forward(self, x):
        return x


@case()
class AddsOntoItsInput(Layers):
    """A subclass of a convolution may return what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.same = Same(4, 4, 1)

    def forward(self, x):
        z = x * 1
        y = self.same(z)
        y += self.features[0](x)
        return F.relu(y) + z


@case()
class Registered(Layers):
    def __init_subclass__(cls, *, tag) -> None:
        super().__init_subclass__()

    def forward(self, x):
        return self.hidden(x)


def patched(name: str, forward: Callable[[nn.Module], Callable]) -> None:
    def make() -> nn.Module:
        model = nn.Sequential(collections.OrderedDict(conv=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4), relu=nn.ReLU()))
        model.add_module("part", CASES["ReadsABuffer"][0]())
        module = model.get_submodule(name)
        module.forward = forward(module)
        return model

    PATCHED[name or "model"] = make


patched("relu", lambda module: lambda x: x * 3)
patched("bn", lambda module: lambda x: type(module).forward(module, x) * 2)
patched("conv", lambda module: lambda x: type(module).forward(module, x) * 2)
patched("part", lambda module: lambda x: type(module).forward(module, x) + x)
patched("", lambda module: lambda x: module.bn(module.conv(x)))
