"""What Python does with tensors and layers: other names, containers, threads, types."""

import collections
import copy
import dataclasses
import functools
import io
import threading
import types
import weakref

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meanings.base import CASES, CBA, Layers, X, case, written


@case()
class CallsItsBlocksActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = CBA(), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.block.act(self.head(self.block(x)))


@case()
class CallsAnActivationOfItsBody(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(CBA(), nn.Conv2d(4, 4, 1))

    def forward(self, x):
        return self.body[0].act(self.body(x))


@case()
class HasAnActivationOfTwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.SiLU()
        self.act2 = self.act

    def forward(self, x):
        return self.act2(self.bn(self.conv(x)))


@written("AsksForTheExactType")
def _(self, x, y):
    table = {Tensor: 1}
    same = type(y) is Tensor and y.__class__ is Tensor and type(y) in table
    return F.relu(y) * (1 if same else 100)


@written("KeepsItInContainers")
def _(self, x, y):
    found = collections.OrderedDict(a=y)
    lists = collections.defaultdict(list)
    lists["y"].append([y, {y}])
    z = F.relu(found["a"])
    return z + lists["y"][0][0] * len(lists["y"][0][1])


GLOBAL: dict = {}


@written("KeepsItInAGlobal")
def _(self, x, y):
    GLOBAL["y"] = y
    return F.relu(y) + GLOBAL.pop("y")


@written("PrintsIt")
def _(self, x, y):
    print(y, file=io.StringIO())
    return F.relu(y) + len(f"{y.shape}") + float(y.detach().sum())


@written("CountsInACounterAndNumPy")
def _(self, x, y):
    counts = collections.Counter(np.sign(y.detach().numpy()).ravel().tolist())
    return F.relu(y) * (counts[1.0] > 10)


@written("RefersToItWeakly")
def _(self, x, y):
    reference = weakref.ref(y)
    z = F.relu(y)
    del y
    return z * (2 if reference() is None else 3)


@written("CopiesIt")
def _(self, x, y):
    kept = copy.deepcopy(y.detach())
    file = io.BytesIO()
    torch.save(y.detach(), file)
    file.seek(0)
    return F.relu(y) + kept + torch.load(file)


@written("PutsAnAttributeOnIt")
def _(self, x, y):
    y.scale = 3
    return F.relu_(y) * y.scale


@case(X[0], None)
class TakesAPair(Layers):
    def forward(self, x, skip):
        x, skip = (self.bn(self.conv(x)), skip)
        if skip is not None:
            x = x + skip
        kept = [t for t in (x, skip) if t is not None]
        return F.relu(kept[0]) if x.dtype is torch.float64 else x


@case(X[0], X[0])
class TakesAPairOfTensors(CASES["TakesAPair"][0]):
    pass


class Nothing(nn.Module):
    def forward(self, x):
        return None


@case()
class HasAGateThatReturnsNone(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Nothing()

    def forward(self, x):
        y = self.hidden(x)
        gates = {"g": self.gate(x)}
        if (found := self.gate(x)) is None and [g for g in gates.values() if g is not None] == []:
            return y
        return y * 100 if found is None else y * found


@case()
class ReadsItsDevice(Layers):
    @property
    def device(self):
        return next(self.parameters()).device

    def forward(self, x):
        x = x.to(self.device, next(self.parameters()).dtype)
        return self.hidden(x)


@dataclasses.dataclass
class Output:
    y: Tensor
    scaled: Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.scaled = self.y * 3


@case()
class ReturnsADataclass(Layers):
    def forward(self, x):
        found = Output(self.bn(self.conv(x)))
        return F.relu(found.y) + found.scaled


@case()
class KeepsLayersInObjects(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.kept = types.SimpleNamespace(bn=self.features[1])
        self.call = functools.partial(self.run, self.bn)

    def run(self, bn, x):
        return bn(x)

    def forward(self, x):
        return F.relu(self.call(self.kept.bn(self.features(x))))


class Child(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.bn(x))


@case()
class CallsItsChildsNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = Child()
        self.kept = types.SimpleNamespace(norm=self.child.bn)

    def forward(self, x):
        return self.child(x) + self.kept.norm(x)


@case()
class HasALock(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "lock"}

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        self.lock = threading.Lock()

    def forward(self, x):
        with self.lock:
            return self.hidden(x)


@case()
class Flattens(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4 * 36, 2)

    def forward(self, x):
        y = self.hidden(x)
        return self.head(y.view(y.size(0), -1))
