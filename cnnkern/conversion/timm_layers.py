"""The replacements of timm's custom norm layers: a batch norm that has its activation as a child, and layer norms.

timm is not required. If a model has imported timm, subclasses of its classes are created, with the same names:
`BatchNormAct2d`, `LayerNorm` and `LayerNorm2d`.
"""

import functools
import importlib
import sys

from torch import Tensor, fx, nn

from cnnkern.conversion.deferral import Deferring
from cnnkern.nn import layer_norm, sync
from cnnkern.nn.traced import leaf
from cnnkern.ops.bn_act import batch_norm_act


class _BatchNormAct(Deferring):
    """Its activation is a module, which uses the batch norm's deferred result and is so fused with it."""

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return leaf(self, input)
        return self._modules["act"](self.drop(self.deferred(input)))

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


def __getattr__(name: str) -> type:  # pickle looks for the classes here, before timm may be imported
    if name not in _TIMM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, ours = _TIMM[name]
    return _made(ours, getattr(importlib.import_module(module), name))


def exchanges(norm: nn.Module) -> bool:
    """Whether to replace timm's norm: not with its fast_norm, which computes in lower precision."""
    return not getattr(norm, "_fast_norm", False)


def known() -> dict[type, type]:
    """timm's classes -> their replacements, of those that have been imported."""
    found = {}
    for name, (module, ours) in _TIMM.items():
        theirs = getattr(sys.modules.get(module), name, None)
        if theirs is not None:
            found[theirs] = _made(ours, theirs)
    return found


def is_batch_norm_act(module: nn.Module) -> bool:
    """Whether this is a `BatchNormAct2d`, timm's or its replacement."""
    theirs = getattr(sys.modules.get("timm.layers.norm_act"), "BatchNormAct2d", None)
    return isinstance(module, _BatchNormAct) or (theirs is not None and type(module) is theirs)


def synchronised() -> dict[type, type]:
    """The synchronised replacement -> timm's class."""
    theirs = getattr(sys.modules.get("timm.layers.norm_act"), "SyncBatchNormAct", None)
    return {} if theirs is None else {SyncBatchNormAct: theirs}
