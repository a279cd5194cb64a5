"""What the models of this folder are made with, and where they are kept."""

import collections
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU()
        self.features = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))

    def hidden(self, x):
        return F.relu(self.bn(self.conv(x)))


PATCHED: dict[str, Callable[[], nn.Module]] = {}
CASES: dict[str, tuple[Callable[[], nn.Module], tuple]] = {}
X = (torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64),)


def case(*inputs: Any):
    """A class whose forward pass takes these inputs, or one image."""

    def added(cls):
        CASES[cls.__name__] = cls, inputs or X
        return cls

    return added


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return -dy


def written(name: str, of: type[Layers] = Layers):
    """A case whose forward pass is this function of the model, of its input and of its batch norm's output."""

    def added(between):
        class Written(of):
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
