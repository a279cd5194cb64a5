"""Shared by the tests of `cnnkern.recompute`: small models, their gradients, and the bytes that are saved."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnnkern
from cnnkern.measure import profile

LAYOUTS = ("contiguous", "channels_last")
N, C, SIDE = 4, 8, 10


class Net(nn.Module):
    """Batch norms before layers that save their result: convolutions, also depthwise, a pooling, views, a linear
    layer."""

    def __init__(self, act: nn.Module | None = None):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, C, 3), nn.BatchNorm2d(C)
        self.act = act or nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(C, C, 3, groups=C), nn.BatchNorm2d(C)
        self.conv3, self.bn3 = nn.Conv2d(C // 2, C, 1, bias=False), nn.BatchNorm2d(C)
        self.pool, self.fc = nn.AvgPool2d(2), nn.Linear(C * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(x))  # without an activation, and used twice as views
        a, b = y.chunk(2, dim=1)
        x = self.act(self.bn3(self.conv3(a) + self.conv3(b)))
        return self.fc(self.pool(x).flatten(1))


class Users(nn.Module):
    """Three layers use one result."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.bn = nn.Conv2d(3, C, 3), nn.BatchNorm2d(C)
        self.convs = nn.ModuleList(nn.Conv2d(C, C, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.bn(self.before(x)))
        return sum(conv(y) for conv in self.convs)


def image(dtype: torch.dtype = torch.float32, layout: str = "contiguous", seed: int = 0) -> Tensor:
    x = torch.randn(N, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def seeded(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> nn.Module:
    torch.manual_seed(0)
    model = make().to(dtype)
    return model.to(memory_format=torch.channels_last) if layout == "channels_last" else model


def pair(make: Callable[[], nn.Module], **how: Any) -> tuple[nn.Module, nn.Module]:
    """A converted model, and the same with recompute."""
    model = seeded(make, **how)
    return cnnkern.convert(copy.deepcopy(model)), cnnkern.convert(copy.deepcopy(model), recompute=True)


def gradients(model: nn.Module, x: Tensor, **how: Any) -> list[Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    loss = model(x).float().square().mean()
    return list(torch.autograd.grad(loss, [x, *model.parameters()], **how))


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert torch.equal(x, y), f"gradient {i} differs by {(x - y).abs().max()}"
        assert x.stride() == y.stride()


def held(function: Callable[[], object]) -> int:
    return profile.held_bytes(function, "cpu")
