"""What timm's own norms are replaced by: a batch norm that has its activation as a child, layer norms.

timm is no requirement. Its classes are looked up where a model has imported them, and ours, which are subclasses of
them, are made then: `BatchNormAct2d`, `LayerNorm` and `LayerNorm2d`, each named as timm's.
"""

import functools
import importlib
import sys

from torch import Tensor, fx, nn

from cnnkern.conversion.deferral import deferred
from cnnkern.nn import batchnorm, layer_norm, sync
from cnnkern.nn.traced import leaf
from cnnkern.ops.bn_act import batch_norm_act


class _BatchNormAct(batchnorm._FusedBatchNorm):
    """Its activation, a module, asks for the batch norm's result, which is computed with it then."""

    _counts_refused_calls = True

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return leaf(self, input)
        return self._modules["act"](self.drop(deferred(self, input)))

    def _behind(self, y: Tensor) -> Tensor:  # type: ignore[override]
        return y


class SyncBatchNormAct(sync.SyncBatchNorm):
    """What ``convert_sync_batchnorm`` makes of a converted `BatchNormAct2d`."""

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return leaf(self, input)
        operator = self._over_processes(batch_norm_act)
        y = self._normalize(input, lambda *arguments: operator(*arguments[:-2], "none"))
        return self._modules["act"](self.drop(y))

    _behind = _BatchNormAct._behind


_BatchNormAct.synchronised = SyncBatchNormAct

_TIMM = {
    "BatchNormAct2d": ("timm.layers.norm_act", _BatchNormAct),
    "LayerNorm": ("timm.layers.norm", layer_norm.LayerNorm),
    "LayerNorm2d": ("timm.layers.norm", layer_norm.LayerNorm2d),
}


@functools.cache
def _made(ours: type, theirs: type) -> type:
    return type(theirs.__name__, (ours, theirs), {"__module__": __name__, "synchronised": SyncBatchNormAct})


def __getattr__(name: str) -> type:  # where pickle looks for the classes, timm imported yet or not
    if name not in _TIMM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, ours = _TIMM[name]
    return _made(ours, getattr(importlib.import_module(module), name))


def exchanges(norm: nn.Module) -> bool:
    """Whether to replace a norm of timm's: its fast_norm computes otherwise, in lower precision."""
    return not getattr(norm, "_fast_norm", False)


def known() -> dict[type, type]:
    """timm's classes -> ours, of those that have been imported."""
    found = {}
    for name, (module, ours) in _TIMM.items():
        theirs = getattr(sys.modules.get(module), name, None)
        if theirs is not None:
            found[theirs] = _made(ours, theirs)
    return found


def is_batch_norm_act(module: nn.Module) -> bool:
    """Whether this is a `BatchNormAct2d`, timm's as it is or replaced."""
    theirs = getattr(sys.modules.get("timm.layers.norm_act"), "BatchNormAct2d", None)
    return isinstance(module, _BatchNormAct) or (theirs is not None and type(module) is theirs)


def synchronised() -> dict[type, type]:
    """Our synchronised class -> timm's."""
    theirs = getattr(sys.modules.get("timm.layers.norm_act"), "SyncBatchNormAct", None)
    return {} if theirs is None else {SyncBatchNormAct: theirs}
