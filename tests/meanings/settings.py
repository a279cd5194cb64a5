"""Batch norms of all settings and of inputs of all shapes, and tensors that are written to in unusual ways."""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from meanings.base import X, case, written


class Norms(nn.Module):
    """A batch norm of each setting, behind each other."""

    def __init__(self, norm: type = nn.BatchNorm2d) -> None:
        super().__init__()
        settings = [{"momentum": None}, {"track_running_stats": False}, {"affine": False}, {"momentum": 0.0}]
        settings += [{"affine": False, "track_running_stats": False}, {"eps": 0.1, "momentum": 1.0}, {"eps": 1e-3}]
        self.norms = nn.ModuleList(norm(4, **setting) for setting in settings)

    def forward(self, x):
        for norm in self.norms:
            x = F.relu(norm(x)) + F.silu(norm(x) + x)
        return x


@case()
class HasAllSettings(Norms):
    pass


@case(X[0].flatten(2))
class HasAllSettingsInOneDimension(Norms):
    def __init__(self) -> None:
        super().__init__(nn.BatchNorm1d)


@case(X[0].mean((2, 3)))
class HasAllSettingsOfFeatures(HasAllSettingsInOneDimension):
    pass


@case(X[0].unflatten(3, (2, 3)))
class HasAllSettingsInThreeDimensions(Norms):
    def __init__(self) -> None:
        super().__init__(nn.BatchNorm3d)


@case(X[0][0])
class HasAllSettingsWithoutABatch(HasAllSettingsOfFeatures):
    """(C, H, W) is refused by a batch norm of two dimensions, and is (N, C, L) to one of one."""

    def forward(self, x):
        with contextlib.suppress(ValueError):
            return nn.BatchNorm2d(4)(x) * 100
        return super().forward(x.mT[:, :4])


@written("NormalizesNothing")
def _(self, x, y):
    empty = F.relu(self.bn(x[:0])) + F.relu(self.features[1](x[:0]) + x[:0])
    with contextlib.suppress(ValueError):
        y = F.relu(self.bn(x[:1, :, :1, :1])) if self.training else y
    with contextlib.suppress(RuntimeError, ValueError):
        y = F.relu(self.bn(x[:, :3])) * 100
    return F.relu(y) + len(empty)


@written("ChangesItsShapeInPlace")
def _(self, x, y):
    y = y.clone(memory_format=torch.preserve_format) if y.requires_grad and y.is_leaf else y
    z = self.features[1](x)
    z.unsqueeze_(0).squeeze_(0).transpose_(2, 3)
    s = y + x
    s.swapaxes_(2, 3).t_() if s.dim() == 2 else s.swapaxes_(2, 3)
    return F.relu(z) + F.relu(s)


@written("ChangesItsInputsShape")
def _(self, x, y):
    with torch.no_grad():
        z = x * 1
        y = self.bn(z)
        z.transpose_(2, 3)
    return F.relu(y) + z


@written("ChangesPartsOfIt")
def _(self, x, y):
    y = y + 0 * x
    z = self.features[1](x)
    z[0], z[:, 1] = 0, x[:, 1]
    z[1:].view(2, -1).clamp_(0)
    z.diagonal(dim1=2, dim2=3).fill_(1)
    z.masked_fill_(x > 1, 0)
    return F.relu(z) + F.relu_(y[0]) + F.relu(self.bn(x).index_add_(0, torch.tensor([0]), x[:1]))


@written("ChangesManyAtOnce")
def _(self, x, y):
    with torch.no_grad():
        z, r = x * 1, x * 1
        a, b = self.bn(z), self.features[1](x) + r
        torch._foreach_mul_([z, r], 3)
        c = torch._foreach_add([a, b], [x, x])
        d = self.bn(x)
        torch._foreach_add_([d, r], 1)
        return F.relu(a) + F.relu(b) + F.relu(c[0]) + c[1] + F.relu(d) + F.relu(self.bn(z)) + r


@written("SetsItsMemory")
def _(self, x, y):
    with torch.no_grad():
        z = x * 1
        a = self.bn(z)
        z.set_((x * 5).untyped_storage(), 0, x.shape, x.stride())
        b = self.features[1](x)
        b.set_(x * 7)
        r = x * 1
        c = self.bn(x) + r
        r.resize_(0)
    return F.relu(a) + F.relu(b) + F.relu(c)


@written("WritesOut")
def _(self, x, y):
    with torch.no_grad():
        y = self.bn(x)
        buffer = torch.empty_like(x)
        torch.add(y, x, out=buffer)
        torch.sigmoid(y, out=y)
        z = self.bn(x)
        torch.nn.functional.gelu(z, approximate="tanh")
        torch.clamp(z, 0, out=z)
    return F.relu(buffer) + y + F.relu(z)


@written("SharesItsMemory")
def _(self, x, y):
    with torch.no_grad():
        y = self.bn(x)
        torch.from_dlpack(y).mul_(2)
        z = self.features[1](x)
        z.untyped_storage().fill_(0)
        w = self.bn(x)
        pointer = w.data_ptr()
    return F.relu(y) + F.relu(z) + F.relu(w) * bool(pointer)


@written("RunsOnADefaultDevice")
def _(self, x, y):
    with torch.device("cpu"):
        z = F.relu(self.features[1](x) + y)
        return z + torch.ones(()).to(z) + F.silu(self.bn(x))


@written("ConvertsItToWhatItIs")
def _(self, x, y):
    y = F.dropout(y.to(x.dtype).contiguous(), 0.5, training=False).expand_as(x).requires_grad_(y.requires_grad)
    return F.relu(y) + F.relu(self.features[1](x).to(x).double().flatten(0, 0) + x)
