"""What is written to between a batch norm and what follows it."""

import torch
import torch.nn.functional as F

from meanings.base import written

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
