"""What a converted model's layers are replaced by."""

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from cnnkern.conversion import timm_layers
from cnnkern.conversion.deferral import FOLDED_SITE, NAMES, SITE, became, deferred
from cnnkern.nn import batchnorm, layer_norm, sync
from cnnkern.nn.conv import GroupedConv1d, GroupedConv2d
from cnnkern.nn.pooling import MaxPool2d


def kind_now(module: nn.Module) -> tuple[str, str]:
    """The kind of layer that a batch norm of ours is in a report, by what it did so far, and why it is no other."""
    if FOLDED_SITE in module.__dict__:
        return became("Conv + BatchNorm", module.__dict__[FOLDED_SITE])
    if isinstance(module, _ConvertedBatchNorm) or timm_layers.is_batch_norm_act(module):
        return became("BatchNorm", module.__dict__.get(SITE))
    kind = "BatchNorm" + " + add" * isinstance(module, batchnorm._FusedBatchNormAdd)
    return kind + (f" + {NAMES[module.act]}" if module.act != "none" else ""), ""


class _ConvertedBatchNorm(batchnorm._FusedBatchNorm):
    """A batch norm whose result is computed when it is used, with the activation or the addition that uses it.

    The result is a tensor like any other to everybody else: csrc/deferred.
    """

    act = "none"
    _counts_refused_calls = True

    def forward(self, input: Tensor) -> Tensor:
        return deferred(self, input)


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
    """Layers -> what replaces them, and whether to.

    Those of torchvision and timm are no part of torch; a model that has one has imported it.
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
        nn.LayerNorm: (layer_norm.LayerNorm, always),
        nn.MaxPool2d: (MaxPool2d, always),
    }


def originals() -> dict[type, type]:
    """Our layers -> those that they were. A converted model may have been synchronised since."""
    from cnnkern.conversion import sequential
    from cnnkern.conversion.folding_conv import CONVOLUTIONS

    found = {ours: plain for plain, (ours, _) in replacements().items()}
    found |= {ours: found.get(plain, plain) for plain, ours in CONVOLUTIONS.items()}
    found |= sequential.originals()
    return found | timm_layers.synchronised() | {sync.SyncBatchNorm: nn.SyncBatchNorm}


def replace(module: nn.Module, ours: type) -> None:
    module.__class__ = ours
    module.__dict__["_cnnkern_converted"] = True
