"""Hooks, graphs, modes and transforms between a batch norm and what follows it."""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from meanings.base import Reversed, written


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
