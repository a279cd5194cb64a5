"""The layers that conversion replaces, and what replaces them."""

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from cnnkern.conversion import timm_layers
from cnnkern.conversion.deferral import FOLDED_SITE, NAMES, SITE, Deferring, became
from cnnkern.nn import batchnorm, layer_norm, sync
from cnnkern.nn.conv import GroupedConv1d, GroupedConv2d, GroupedConv3d
from cnnkern.nn.pooling import MaxPool2d


def kind_now(module: nn.Module) -> tuple[str, str]:
    """The kind of a batch norm in a report, by what it was fused with so far, and the reason."""
    if FOLDED_SITE in module.__dict__:
        return became("Conv + BatchNorm", module.__dict__[FOLDED_SITE])
    if isinstance(module, _ConvertedBatchNorm) or timm_layers.is_batch_norm_act(module):
        return became("BatchNorm", module.__dict__.get(SITE))
    kind = "BatchNorm" + " + add" * isinstance(module, batchnorm._FusedBatchNormAdd)
    return kind + (f" + {NAMES[module.act]}" if module.act != "none" else ""), ""


class _ConvertedBatchNorm(Deferring):
    """A batch norm with a deferred result: it is computed when it is used, fused with the activation or addition
    that uses it. To other code the result is an ordinary tensor (csrc/deferred).
    """

    act = "none"

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(self, Deferring):  # a wrapper of this method was put on the layer before it was reverted
            return type(self).forward(self, input)
        return self.deferred(input)


class ConvertedBatchNorm1d(_ConvertedBatchNorm, batchnorm.BatchNorm1d):
    pass


class ConvertedBatchNorm2d(_ConvertedBatchNorm, batchnorm.BatchNorm2d):
    pass


class ConvertedBatchNorm3d(_ConvertedBatchNorm, batchnorm.BatchNorm3d):
    pass


BATCH_NORMS: dict[type, type] = {
    nn.BatchNorm1d: ConvertedBatchNorm1d,
    nn.BatchNorm2d: ConvertedBatchNorm2d,
    nn.BatchNorm3d: ConvertedBatchNorm3d,
}
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)


def replacements() -> dict[type, tuple[type, Callable[[Any], bool]]]:
    """Layer -> its replacement, and a function that decides whether a module is replaced.

    Layers of torchvision and timm are included if these are imported, as they are if a model has such a layer.
    """

    def always(_: nn.Module) -> bool:
        return True

    def is_grouped(conv: nn.modules.conv._ConvNd) -> bool:
        return conv.groups > 1

    convnext = sys.modules.get("torchvision.models.convnext")
    theirs = {} if convnext is None else {convnext.LayerNorm2d: (layer_norm.LayerNorm2d, always)}
    theirs |= {plain: (ours, timm_layers.exchanges) for plain, ours in timm_layers.known().items()}
    return {
        **{plain: (ours, always) for plain, ours in BATCH_NORMS.items()},
        **theirs,
        nn.Conv1d: (GroupedConv1d, is_grouped),
        nn.Conv2d: (GroupedConv2d, is_grouped),
        nn.Conv3d: (GroupedConv3d, is_grouped),
        nn.LayerNorm: (layer_norm.LayerNorm, always),
        nn.MaxPool2d: (MaxPool2d, always),
    }


def originals() -> dict[type, type]:
    """cnnkern's layer -> the original one, also after ``convert_sync_batchnorm``."""
    from cnnkern.conversion import sequential
    from cnnkern.conversion.folding_conv import CONVOLUTIONS
    from cnnkern.conversion.folding_linear import LINEARS

    found = {ours: plain for plain, (ours, _) in replacements().items()}
    found |= {ours: found.get(plain, plain) for plain, ours in (CONVOLUTIONS | LINEARS).items()}
    found |= sequential.originals()
    return found | timm_layers.synchronised() | {sync.SyncBatchNorm: nn.SyncBatchNorm}


def replace(module: nn.Module, ours: type) -> None:
    module.__class__ = ours
    module.__dict__["_cnnkern_converted"] = True
