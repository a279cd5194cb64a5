"""What changes a tensor, or its place in the graph, without an operator."""

import contextlib
import threading

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meanings.base import written


def frozen(self: nn.Module, x: Tensor) -> Tensor:
    """The batch norm's output where no gradient is asked for, though they are recorded."""
    weight, bias = self.bn.weight.detach(), self.bn.bias.detach()
    return torch.func.functional_call(self.bn, {"weight": weight, "bias": bias}, (x,))


# --- the result's device and dtype, by which a tensor is made


@written("MakesATensorLikeIt")
def _(self, x, y):
    return F.relu(y) * y.new_tensor([2.0, 3.0]).sum() + y.new([1.0])


@written("MakesATensorInAnotherThread")
def _(self, x, y):
    made = []
    thread = threading.Thread(target=lambda: made.append(y.detach().mean()))
    thread.start()
    thread.join()
    return F.relu(y) * made[0]


# --- the result's place in the graph


@written("AsksForAGradientOfAFrozenPart")
def _(self, x, y):
    if not torch.is_grad_enabled():
        return F.relu(y)
    y = frozen(self, x).requires_grad_()
    (g,) = torch.autograd.grad(F.relu(y).square().sum(), y)
    return F.relu(y) + g


@written("AsksForAGradientOfAFrozenSum")
def _(self, x, y):
    if not torch.is_grad_enabled():
        return F.relu(y)
    y = frozen(self, x).requires_grad_()
    s = frozen(self, x) + x
    s.requires_grad_()
    (g,) = torch.autograd.grad(F.relu(y + x).square().sum(), y)
    (h,) = torch.autograd.grad(F.relu(s).square().sum(), s)
    return F.relu(y + x) + g + h


@written("ChangesALeafThatRequiresAGradient")
def _(self, x, y):
    if not torch.is_grad_enabled():
        return F.relu(y)
    y = frozen(self, x).requires_grad_()
    with contextlib.suppress(RuntimeError):
        y = F.relu_(y) * 100
    return y + x


class Tripled(torch.autograd.Function):
    """Changes nothing, and says that it did."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, dy):
        return dy * 3


@written("MarksItDirty")
def _(self, x, y):
    return F.relu(Tripled.apply(y))


@written("MarksTheSumsTermDirty")
def _(self, x, y):
    return F.relu(Tripled.apply(y) + x)


@written("MarksTheSumDirty")
def _(self, x, y):
    return F.relu(Tripled.apply(y + x))


@written("HooksTheActivationsNode")
def _(self, x, y):
    z = F.relu(y)
    if z.requires_grad:
        z.grad_fn.register_hook(lambda inputs, _: tuple(2 * g for g in inputs))
    return z


@written("LooksAtTheActivationsNode")
def _(self, x, y):
    z = F.silu(y)
    if not z.requires_grad:
        return z
    seen: list = []
    z.grad_fn.register_hook(lambda inputs, _: seen.extend(g.detach() for g in inputs))
    (z * x).sum().backward(retain_graph=True)
    return z + seen[0]


# --- memory that is changed, or exchanged, without an operator


@written("ChangesItsBiasBeforeTheGradient")
def _(self, x, y):
    z = F.silu(self.bn(x)) + F.relu(self.features[1](x))
    with torch.no_grad():
        for norm in (self.bn, self.features[1]):
            norm.bias.add_(1)
    if z.requires_grad:
        z.square().sum().backward()
    with torch.no_grad():
        for norm in (self.bn, self.features[1]):
            norm.bias.sub_(1)
    return z.detach() + x


@written("ExchangesAParameterBetween")
def _(self, x, y):
    weight = self.bn.weight.data
    with torch.no_grad():
        y = self.bn(x)
        self.bn.weight.data = weight * 2
        y = F.relu(y)
        self.bn.weight.data = weight
    return F.relu(self.features[1](x) + y)


@written("FreesItsInputBetween")
def _(self, x, y):
    with torch.no_grad():
        z = self.conv(x)
        y = self.bn(z)
        z.data = z.new_zeros(())
        y = F.relu(y)
    return F.relu(self.features[1](x) + y)


@written("ReadsItsInputAsAnArray")
def _(self, x, y):
    z = self.conv(x)
    y = self.bn(z)
    mean = float(z.detach().numpy().mean())
    return F.relu(y) * mean


@written("ChangesItsInputAsAnArray")
def _(self, x, y):
    z = self.conv(x).detach()
    y = self.bn(z)
    np.multiply(z.numpy(), 3, out=z.numpy())
    return F.relu(y) + z


@written("ReadsItsParametersAsArrays")
def _(self, x, y):
    y = self.bn(x)
    total = sum(float(p.detach().numpy().sum()) for p in self.bn.parameters())
    return F.relu(y) * total


@written("ReadsItsStatisticsAsAnArray")
def _(self, x, y):
    y = self.features[1](x)
    return y * float(self.features[1].running_mean.numpy().sum())


@written("AddsItToAnotherLayout")
def _(self, x, y):
    innermost = x.contiguous(memory_format=torch.channels_last)
    a, b = F.relu(innermost + self.bn(x)), x + self.bn(innermost)
    c = F.relu(x.mT.contiguous().mT + self.bn(x))
    return a * a.stride(1) + b * b.stride(1) + c * c.stride(3)
