"""What a converted model's layers are exchanged for, and what stands where a layer stood."""

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from cnnkern import reference
from cnnkern.conversion import timm_layers
from cnnkern.nn import batchnorm, layer_norm, sync
from cnnkern.nn.conv import GroupedConv2d
from cnnkern.ops import route
from cnnkern.ops.bn_act import batch_norm_act

IN_PLACE = "_cnnkern_adds_in_place"  # in a module that does
DIMENSIONS = {nn.BatchNorm1d: "1d", nn.BatchNorm2d: "2d", nn.BatchNorm3d: "3d"}
NAMES = {"relu": "ReLU", "relu6": "ReLU6", "leaky_relu": "LeakyReLU", "sigmoid": "Sigmoid", "silu": "SiLU"}
NAMES |= {"hardswish": "Hardswish"}


def _classes(kind: type, name: str, namespace: dict[str, Any]) -> dict[type, type]:
    """torch's batch norms -> ours of the same dimensions with `kind` before them and a class attribute or two."""
    found = {}
    for plain, dimensions in DIMENSIONS.items():
        cls = type(f"{name}{dimensions}", (kind, plain), {"__module__": __name__, **namespace})
        globals()[cls.__name__] = cls  # where pickle looks for it
        found[plain] = cls
    return found


def _add_unfused(
    module: batchnorm._FusedBatchNorm, input: Tensor, residual: Tensor, operator: Callable[..., Tensor]
) -> Tensor:
    """The batch norm by its operator without an activation, then what PyTorch makes of the addition: one in place keeps
    the batch norm's dtype and shape."""
    y = module._normalize(input, lambda *arguments: operator(*arguments[:-1], "none"))
    return reference.ACTIVATIONS[module.act](y.add_(residual) if IN_PLACE in module.__dict__ else y + residual)


class SyncAddsWhatFits(sync.SyncBatchNormAddReLU):
    """What ``convert_sync_batchnorm`` makes of :class:`AddsWhatFits`."""

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        if takes(input, residual):
            return super().forward(input, residual)
        return _add_unfused(self, input, residual, self._over_processes(batch_norm_act))


class AddsWhatFits(batchnorm._FusedBatchNormAdd):
    """A residual that the fused operator does not take, one that is broadcast or promoted, is added as it was."""

    synchronised = SyncAddsWhatFits

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        if takes(input, residual):
            return super().forward(input, residual)
        return _add_unfused(self, input, residual, batch_norm_act)


def takes(input: Any, residual: Any) -> bool:
    """Whether the fused operators add these two; under `torch.fx`, which knows nothing of them, the layer will tell."""
    if isinstance(input, fx.Proxy) or isinstance(residual, fx.Proxy):
        return True
    both = isinstance(input, Tensor) and isinstance(residual, Tensor)
    return both and input.is_floating_point() and route.has_kernels(input) and _alike(input, residual)


def _alike(a: Tensor, b: Tensor) -> bool:
    return route.alike(a, b) and a.device == b.device


ACT_CLASSES = {
    "none": {plain: getattr(batchnorm, f"BatchNorm{d}") for plain, d in DIMENSIONS.items()},
    "relu": {plain: getattr(batchnorm, f"BatchNormReLU{d}") for plain, d in DIMENSIONS.items()},
    **{
        act: _classes(batchnorm._FusedBatchNorm, f"BatchNorm{NAMES[act]}", {"act": act})
        for act in ("relu6", "leaky_relu", "sigmoid", "silu", "hardswish")
    },
}
ADD_CLASSES = {
    act: _classes(AddsWhatFits, f"BatchNormAdd{NAMES.get(act, '')}", {"act": act}) for act in ("none", "relu")
}
ORIGINAL = {
    fused: plain for tables in (ACT_CLASSES, ADD_CLASSES) for table in tables.values() for plain, fused in table.items()
}
# A converted model may have been synchronised since; torch's own synchronised one is what stays.
ORIGINAL |= dict.fromkeys((sync.SyncBatchNorm, sync.SyncBatchNormReLU, SyncAddsWhatFits), nn.SyncBatchNorm)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)


def exchanged_alone() -> dict[type, tuple[type, Callable[[Any], bool]]]:
    """Layers that are exchanged alone -> what for, and whether to.

    Those of torchvision and timm are no part of torch; a model that has one has imported it.
    """

    def always(_: nn.Module) -> bool:
        return True

    convnext = sys.modules.get("torchvision.models.convnext")
    theirs = {} if convnext is None else {convnext.LayerNorm2d: (layer_norm.LayerNorm2d, always)}
    theirs |= {plain: (ours, timm_layers.exchanges) for plain, ours in timm_layers.known().items()}
    return theirs | {
        nn.Conv2d: (GroupedConv2d, lambda conv: conv.groups > 1),
        nn.LayerNorm: (layer_norm.LayerNorm, always),
    }


def originals() -> dict[type, type]:
    """Our layers -> those that they were."""
    return ORIGINAL | timm_layers.synchronised() | {ours: plain for plain, (ours, _) in exchanged_alone().items()}


def kind_alone(module: nn.Module) -> str:
    """What a layer that was exchanged alone is called in a report."""
    if timm_layers.is_batch_norm_act(module):
        return kind_of(timm_layers.act_of(module) or "none", add=False)
    return type(module).__name__


class Absorbed(nn.Identity):
    """Stands where an activation stood that the layer before it now applies."""

    inplace = False

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._original = (original,)  # in a tuple, so that it is no submodule

    def extra_repr(self) -> str:
        return f"{self._original[0]!r} in the layer before"


_SETTINGS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class Moved(nn.Identity):
    """Stands where a convolution stood that is now computed where the batch norm behind it stood."""

    inplace = False

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._text = repr(original)
        for name in _SETTINGS:  # which a forward pass may read
            setattr(self, name, getattr(original, name))

    def extra_repr(self) -> str:
        return f"{self._text} in the layer behind"


def kind_of(act: str, add: bool) -> str:
    return "BatchNorm" + " + add" * add + (f" + {NAMES[act]}" if act != "none" else "")


def exchange(module: nn.Module, table: dict[type, type]) -> None:
    module.__class__ = table[type(module)]
    module.__dict__["_cnnkern_converted"] = True
