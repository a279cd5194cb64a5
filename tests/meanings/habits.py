"""Habits of other libraries' users that changed a converted model's meaning once: two kernels for one batch norm."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meanings.base import Layers, case, written


class Logged(Tensor):
    """A subclass of which PyTorch computes everything."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


@case()
class NormalizesSlices(Layers):
    """As slimmable networks do: PyTorch's batch norm of some channels, between calls of the whole layer."""

    def forward(self, x):
        norm, found = self.features[1], []
        for width in (2, 3, 4):
            statistics = norm.running_mean[:width], norm.running_var[:width]
            z = F.batch_norm(x[:, :width], *statistics, norm.weight[:width], norm.bias[:width], self.training)
            found += [F.pad(F.relu(z), (0, 0, 0, 0, 0, 4 - width)), F.relu(norm(x * width)), F.silu(norm(x) + x)]
        return sum(found)


@written("NormalizesSubclassesToo")
def _(self, x, y):
    a = F.relu(self.bn(x.as_subclass(Logged)) + x)
    b = self.bn(x)
    b += x.as_subclass(Logged)
    return F.relu(y) + a.as_subclass(Tensor) + F.relu(b).as_subclass(Tensor) + F.relu(self.bn(x))


@case()
class KeepsItsSums(nn.Module):
    """As cells of searched architectures do: each sum goes to an activation, and to the concatenation at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(6))

    def forward(self, x):
        states = [self.norms[0](x), self.norms[1](x * 2)]
        for a, b in ((2, 3), (4, 5)):
            states.append(self.norms[a](F.relu(states[-1])) + self.norms[b](F.silu(states[-2])))
        return torch.cat(states, 1) + F.relu(states[-1]).repeat(1, 4, 1, 1)
