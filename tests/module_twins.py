"""The torch.nn layers that cnnkern.nn's modules are equivalent to, by name: TWINS."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

import cnnkern

SHAPES = {"1d": (6, 5, 7), "2d": (3, 5, 4, 6), "3d": (2, 5, 3, 4, 2)}


class Added(nn.Module):
    """A batch norm of torch.nn, then the residual addition, then the activation."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return F.relu(a + b)


@dataclass
class Twin:
    """The counterpart of a cnnkern module: a layer with the same state, and a function of its output."""

    layer: type
    arguments: tuple
    shape: tuple[int, ...]
    after: Callable[..., Tensor] = lambda y: y
    inputs: int = 1
    keywords: tuple[str, ...] = ()  # that the twin has not


def _twin(name: str) -> Twin:
    lazy, name = name.startswith("Lazy"), name.removeprefix("Lazy")
    prefix = "Lazy" if lazy else ""
    if name == "AddReLU":
        return Twin(Added, (), (3, 5, 4, 6), inputs=2)
    if name == "LayerNorm":
        return Twin(nn.LayerNorm, ((4, 6),), (3, 5, 4, 6))
    if name == "MaxPool2d":
        return Twin(nn.MaxPool2d, (3, 1, 1), (3, 5, 4, 6))
    if name == "LayerNorm2d":
        return Twin(LayerNorm2d, (5, 1e-6), (3, 5, 4, 6))  # as torchvision's convnext makes them
    if name.startswith("GroupedConv"):
        twin = getattr(nn, prefix + name.removeprefix("Grouped"))
        rest = (1, 1, 1, 4)  # stride, padding, dilation, groups
        return Twin(
            twin,
            (8, 3, *rest) if lazy else (8, 8, 3, *rest),
            {"1d": (3, 8, 7), "2d": (3, 8, 6, 7), "3d": (3, 8, 4, 5, 6)}[name[-2:]],
        )
    adds, relu = "Add" in name, name.endswith("ReLU") or "ReLU" in name or "Act" in name
    dimensions = "2d" if name.startswith("Sync") else name[-2:]
    twin = nn.SyncBatchNorm if name.startswith("Sync") else getattr(nn, f"{prefix}BatchNorm{dimensions}")

    def after(y: Tensor, *residual: Tensor) -> Tensor:
        y = y + residual[0] if adds else y
        return F.relu(y) if relu else y

    return Twin(
        twin, () if lazy else (5,), SHAPES[dimensions], after, 1 + adds, ("act", "act_param") if "Act" in name else ()
    )


LAYERS = [name for name in cnnkern.nn.__all__ if name[0].isupper() and name != "DenseBlock"]  # which contains layers
TWINS = {name: _twin(name) for name in LAYERS}


def inputs_of(twin: Twin, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    return [torch.randn(twin.shape, generator=g).to(dtype) for _ in range(twin.inputs)]


def pair(name: str, **keywords: Any) -> tuple[nn.Module, nn.Module]:
    """The module and its counterpart, with the same parameters; lazy ones before their first input."""
    twin = TWINS[name]
    torch.manual_seed(0)
    ours, theirs = getattr(cnnkern.nn, name)(*twin.arguments, **keywords), twin.layer(*twin.arguments, **keywords)
    with torch.no_grad():
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            if not nn.parameter.is_lazy(p):
                q.copy_(nn.init.normal_(p))
    return ours, theirs


def run(twin: Twin, layer: nn.Module, inputs: list[Tensor], ours: bool) -> Tensor:
    if ours or isinstance(layer, Added):
        return layer(*inputs)
    if isinstance(layer, nn.SyncBatchNorm):  # in one process
        uses = not layer.training or layer.track_running_stats
        statistics = (layer.running_mean, layer.running_var) if uses else (None, None)
        y = F.batch_norm(inputs[0], *statistics, layer.weight, layer.bias, layer.training, layer.momentum, layer.eps)
        if layer.training:
            layer.num_batches_tracked.add_(1)
        return twin.after(y, *inputs[1:])
    return twin.after(layer(inputs[0]), *inputs[1:])


def described(module: nn.Module) -> dict[str, tuple]:
    return {n: (t.dtype, t.device, type(t).__name__) for n, t in module.state_dict(keep_vars=True).items()}
