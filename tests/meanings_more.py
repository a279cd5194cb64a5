"""More models for test_convert_meaning.py: what happens between a batch norm and what follows it."""

import collections
import contextlib
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
from meanings import CASES, Layers, Reversed, X, case
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint


def written(name: str):
    """A case whose forward pass is this function of the model, of its input and of its batch norm's output."""

    def added(between):
        class Written(Layers):
            def forward(self, x):
                return between(self, x, self.bn(self.conv(x)))

        Written.__name__ = name
        CASES[name] = Written, X
        return between

    return added


class CBA(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            collections.OrderedDict(conv=nn.Conv2d(4, 4, 3, padding=1), bn=nn.BatchNorm2d(4), act=nn.SiLU(inplace=True))
        )


# --- a block's activation called from above, or under another name


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


# --- in place


for operation in ("mul_", "sub_", "div_"):

    @written(f"ChangesItsInput_{operation}")
    def _(self, x, y, operation=operation):
        z = x * 2
        with torch.no_grad():  # eager cannot differentiate it
            y = self.bn(z)
            getattr(z, operation)(0.5)
            y = y + z
        return F.relu(self.features[1](y))

    @written(f"ChangesAViewOfItsInput_{operation}")
    def _(self, x, y, operation=operation):
        z = x * 2
        view = z.view(-1)
        with torch.no_grad():
            y = self.bn(z)
            getattr(view, operation)(0.5)
            y = F.silu(y + z)
        return F.relu(self.features[1](y))

    @written(f"ChangesAViewOfItsOutput_{operation}")
    def _(self, x, y, operation=operation):
        getattr(y[:, :2], operation)(0.5)
        return F.relu(y)


@written("ChangesTheConvolutionsOutput")
def _(self, x, y):
    with torch.no_grad():
        y = self.conv(x)
        z = self.bn(y)
        y *= 2
        z = z + y
    return F.relu(self.features[1](z))


@written("ChangesItThroughData")
def _(self, x, y):
    y.data.mul_(2)
    return F.relu(y)


@written("ChangesItsInputThroughData")
def _(self, x, y):
    z = self.conv(x).detach()
    y = self.bn(z)
    z.data.mul_(3)
    return F.relu(y) + z


@written("ChangesItThroughNumPy")
def _(self, x, y):
    y.detach().numpy()[:] += 1
    return F.relu(y)


@written("AddsInPlace")
def _(self, x, y):
    y += x
    return F.relu(y, inplace=True) + y


@written("AddsItselfInPlace")
def _(self, x, y):
    y += y
    return F.relu(y)


@written("AddsOntoTheResidual")
def _(self, x, y):
    r = x * 1
    r += y
    return F.relu(r) + r


@written("AddsScaled")
def _(self, x, y):
    return F.relu(torch.add(y, x, alpha=2)) + y.add(1) + (1 - y)


@written("ChangesTheResidualOfASum")
def _(self, x, y):
    r = x.detach() * 1
    z = y + r
    r.mul_(3)
    return F.relu(z) + r


@written("UsesASumTwice")
def _(self, x, y):
    z = y + x
    return F.relu(z) * z + y


@written("AddsThreeTimes")
def _(self, x, y):
    return F.relu(y + x + x + self.features[1](x))


@written("AddsBroadcast")
def _(self, x, y):
    return F.relu(y + x.mean((2, 3), keepdim=True)) + F.relu(y[:1] + x)


@written("AddsAnotherType")
def _(self, x, y):
    return F.relu(y + x.float()) + F.relu(x.float() + y)


@written("StaysTheSameObject")
def _(self, x, y):
    z = F.relu_(y)
    return z * (1 if z is y else 100)


# --- what is done with objects


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


# --- autograd


@written("AppliesAFunction")
def _(self, x, y):
    return F.relu(y) + Reversed.apply(y)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy() * 2)

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.saved_tensors[0]


@written("AppliesAFunctionOfItsMemory")
def _(self, x, y):
    return Doubled.apply(y) + F.silu(y)


@written("AppliesAFunctionFirst")
def _(self, x, y):
    z = F.relu(y)
    return z + Doubled.apply(y)


@written("HooksItsGradient")
def _(self, x, y):
    if y.requires_grad:
        y.register_hook(lambda g: g * 2)
    return F.relu(y)


@written("HooksItsGradientLater")
def _(self, x, y):
    z = F.silu(y)
    if y.requires_grad:
        y.register_hook(lambda g: g * 2)
    return z


@written("HooksTheSumsGradient")
def _(self, x, y):
    z = y + x
    w = F.relu(z)
    if y.requires_grad:
        y.register_hook(lambda g: g * 2)
        z.register_hook(lambda g: g * 3)
    return w


@written("KeepsItsGradient")
def _(self, x, y):
    if y.requires_grad:
        y.retain_grad()
    z = F.relu(y)
    if z.requires_grad:
        z.sum().backward(retain_graph=True)
        return z + y.grad
    return z


@written("AsksForItsGradient")
def _(self, x, y):
    z = F.silu(y)
    if not z.requires_grad:
        return z
    (g,) = torch.autograd.grad(z.square().sum(), y, create_graph=True)
    return z + g


@written("AsksForTheSumsGradient")
def _(self, x, y):
    s = y + x
    z = F.relu(s)
    if not z.requires_grad:
        return z
    g, h = torch.autograd.grad(z.square().sum(), (y, s), create_graph=True)
    return z + g * h


@written("PenalisesGradients")
def _(self, x, y):
    x = x.detach().requires_grad_()
    if not torch.is_grad_enabled():
        return F.relu(y)
    z = F.silu(self.bn(self.conv(x)))
    z = F.relu(self.features[1](z) + z)
    (g,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
    return z + g.square()


@written("GoesBackwardFromIt")
def _(self, x, y):
    if not y.requires_grad:
        return y
    g = torch.ones(y.shape, dtype=y.dtype)
    (d,) = torch.autograd.grad(y, self.bn.weight, g, retain_graph=True)
    return F.relu(y) * d.view(1, -1, 1, 1)


@written("LooksAtTheGraph")
def _(self, x, y):
    node = y.grad_fn
    z = F.relu(y)
    return z * (1 if (node is None) == (not y.requires_grad) and y.is_leaf == (node is None) else 100)


@written("DetachesIt")
def _(self, x, y):
    return F.relu(y) * y.detach()


@written("SwitchesGradientsBetween")
def _(self, x, y):
    with torch.no_grad():
        a = F.relu(y)
        b = self.features[1](x)
    return a + F.relu(b) + F.relu(y)


@written("HooksSavedTensorsBetween")
def _(self, x, y):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t / 2):
        z = F.silu(y)
    return z


@written("ChangesModesBetween")
def _(self, x, y):
    class Times(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    class Dispatched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Times(), Dispatched():
        z = F.relu(y)
        z = z + F.relu(self.features[1](z))
    return z


@written("TransformsBetween")
def _(self, x, y):
    z = torch.func.vmap(lambda t: F.relu(t) * 2)(y)
    return z + torch.func.vmap(lambda t: F.relu(t + y[0]))(x)


@written("DifferentiatesWithinATransform")
def _(self, x, y):
    def inner(t):
        return (F.relu(y) * t).sum()

    return y + torch.func.grad(inner)(x)


@written("ChecksItOut")
def _(self, x, y):
    def tail(y, x):
        return F.relu(y) + F.silu(self.features[1](x))

    reentrant = torch.is_grad_enabled()  # without gradients PyTorch warns of it
    return checkpoint(tail, y, x, use_reentrant=False) + checkpoint(tail, y, x, use_reentrant=reentrant)


@written("IsRecomputed")
def _(self, x, y):
    x = x.clone().requires_grad_(torch.is_grad_enabled())
    a = checkpoint(self.hidden, x, use_reentrant=torch.is_grad_enabled())
    b = checkpoint(lambda t: F.relu(self.features[1](t) + t), a, use_reentrant=False)
    return b + F.relu(y)


@written("RunsInInferenceMode")
def _(self, x, y):
    with torch.inference_mode():
        z = F.relu(y) + F.relu(self.features[1](x))
    return F.relu(y) + z.clone()


@written("CastsBetween")
def _(self, x, y):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = F.relu(y) + F.relu(self.features[1](x) + x)
    return z


@torch.jit.script
def scripted(t):
    return t * torch.sigmoid(t)


@written("CallsAScript")
def _(self, x, y):
    return scripted(y) + F.relu(y)


# --- statistics


@written("ReadsItsStatistics")
def _(self, x, y):
    mean = self.bn.running_mean.clone()
    state = {k: v.clone() for k, v in self.bn.state_dict().items()}
    return F.relu(y) + mean.view(1, -1, 1, 1) + state["running_var"].view(1, -1, 1, 1)


@written("ChangesItsParametersBetween")
def _(self, x, y):
    before = self.bn.weight.detach().clone()
    y = y.detach()
    z = self.bn(x)
    with torch.no_grad():
        self.bn.weight.mul_(2)
    z = F.relu(z.detach() + y)
    with torch.no_grad():
        self.bn.weight.copy_(before)
    return z


@written("ChangesItsMomentumAndModeBetween")
def _(self, x, y):
    training, self.bn.momentum = self.bn.training, 0.5
    self.bn.eval()
    z = F.relu(y)
    self.bn.train(training)
    self.bn.momentum = 0.1
    return z


@written("ReplacesItsStatisticsBetween")
def _(self, x, y):
    self.bn.running_mean = self.bn.running_mean.clone()
    return F.relu(y)


@written("ResetsItsStatisticsBetween")
def _(self, x, y):
    with torch.no_grad():  # PyTorch keeps running statistics for its gradient
        y = self.bn(x)
        if self.training:
            self.bn.reset_running_stats()
        return F.relu(y) + self.bn.running_mean.mean()


@case()
class CallsANormTwice(Layers):
    def forward(self, x):
        a, b = self.bn(x), self.bn(2 * x)
        return F.relu(b) + F.relu(a) + self.bn(self.bn(x))


@case()
class SharesStatistics(Layers):
    def __init__(self) -> None:
        super().__init__()
        other = self.features[1]
        other.running_mean, other.running_var = self.bn.running_mean, self.bn.running_var

    def forward(self, x):
        a = self.bn(x)
        b = F.relu(self.features[1](x * 3))
        return F.relu(a) + b


@written("DropsIt")
def _(self, x, y):
    del y
    return F.relu(self.features[1](x)) * self.bn.running_mean.view(1, -1, 1, 1)


@written("FailsBetween")
def _(self, x, y):
    with contextlib.suppress(RuntimeError):
        y + x[:, :3]
    with contextlib.suppress(TypeError):
        F.relu(y, 1, 2)
    return F.relu(y)


@written("UsesItByChance")
def _(self, x, y):
    return F.relu(y) if torch.rand(()) > 0.5 else y * 2


@case()
class HasASchedule(Layers):
    warm = False

    def forward(self, x):
        y = self.bn(self.conv(x))
        self.warm = not self.warm
        return F.relu(y) if self.warm else torch.sigmoid(y)


@written("ChangesItsLayout")
def _(self, x, y):
    z = y.contiguous(memory_format=torch.channels_last)
    return F.relu(z) + F.relu(self.features[1](z)) * y.stride(0) + y.is_contiguous()


@written("SplitsAndTransposes")
def _(self, x, y):
    a, b = y.chunk(2, 1)
    z = self.features[1](x.transpose(2, 3))
    return F.relu(torch.cat([b, a], 1)) + F.relu(z) + z.stride(3)


@written("ComparesAndIndexes")
def _(self, x, y):
    return F.relu(y)[(y > 0).any(0, keepdim=True).expand_as(y)] if y.sum() > -1e9 and len(y) else y


@written("RunsInAnotherThread")
def _(self, x, y):
    found = []
    enabled = torch.is_grad_enabled()

    def work() -> None:
        with torch.set_grad_enabled(enabled):
            found.append(F.relu(y))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0] + y
