"""Folds batch norm into convolutions for inference, with the activation and the residual addition after it.

Convolutions, linear layers and batch norms are replaced by subclasses with the same parameters and names. The model's
own forward pass is unchanged. A convolution or a linear layer returns a deferred result, as a converted batch norm does
(csrc/deferred). The batch norm that uses a convolution's replaces it by another deferred result: the convolution with
the batch norm's scale and offset in the weights. An addition and an activation are then fused with it.
"""

import copy

import torch
from torch import nn

from cnnkern.conversion.convert import ConversionReport, Replacement, check_module, convert, revert, uncompiled
from cnnkern.conversion.deferral import Site, compute_on_return
from cnnkern.conversion.folding import FoldingLayer
from cnnkern.conversion.folding_conv import CONVOLUTIONS
from cnnkern.conversion.folding_linear import LINEARS
from cnnkern.conversion.layers import replace
from cnnkern.conversion.sequential import folding_class, is_sequential
from cnnkern.nn import sync
from cnnkern.nn.batchnorm import _FusedBatchNorm

_LAYERS = CONVOLUTIONS | LINEARS


def fold(model: nn.Module) -> nn.Module:
    """Returns a copy of the model for inference: a convolution and the batch norm after it run as one convolution. The
    residual addition and the activation after the batch norm are the epilogue of its kernel, and so are those after an
    ``nn.Linear``.

    ``model`` has to be in eval mode, and is not changed. The copy shares nothing with it, and has the same parameters
    under the same names. Results are the same within rounding. Norms and grouped convolutions are converted as by
    :func:`convert`. After a grouped ``nn.Conv1d``, which runs on cnnkern's kernels, the batch norm stays a separate
    layer. :func:`conversion_report` of the copy lists what was done, after the model has run.

    Weights are folded in the first call, and again after a parameter has changed. On the CPU, in float32 and in 16-bit
    types for which the processor has instructions, PyTorch's oneDNN operators or cnnkern's kernels compute the folded
    convolutions and the linear layers, with packed weights. Elsewhere PyTorch's convolution runs with the folded
    weights, and PyTorch's linear layer. Where gradients are needed, and in programs made by torch.compile and
    torch.export, nothing is folded and the model runs as a converted one. A ReLU in oneDNN's kernels returns 0 for NaN.

    Raises TypeError if ``model`` is not an ``nn.Module`` or is a ``torch.jit`` module, ValueError if the model, or a
    batch norm in it, is in training mode.
    """
    check_module("fold", model)
    if model.training:
        raise ValueError("cnnkern.fold: the model is in training mode; call eval() first")
    for path, module in model.named_modules():
        if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(f"cnnkern.fold: batch norm {path!r} is in training mode; call eval() first")
    with torch.no_grad():  # with gradients, copies of the parameters of torch.jit modules are no leaves
        folded = revert(copy.deepcopy(model), inplace=True)
    report = ConversionReport(
        made_by="cnnkern.fold", nothing="no convolution or linear layer in this model, nothing to fold"
    )
    if Site is not None and any(map(_is_folded, folded.modules())):
        folded = convert(folded, inplace=True)
        report.entries = list(uncompiled(folded).__dict__["_cnnkern_report"].entries)
        known = {entry.path for entry in report.entries}
        for path, module in folded.named_modules():
            if _is_folded(module):
                replace(module, _LAYERS[type(module)])
            elif type(module) is nn.SyncBatchNorm:
                replace(module, sync.SyncBatchNorm)
            elif is_sequential(module):
                replace(module, folding_class(type(module)))
            if path not in known and isinstance(module, FoldingLayer | _FusedBatchNorm):
                report.entries.append(Replacement(path, type(module).__name__))
        folded.requires_grad_(False)
        compute_on_return(uncompiled(folded))
    uncompiled(folded).__dict__["_cnnkern_report"] = report
    return folded


def _is_folded(module: nn.Module) -> bool:
    """Whether this is an unmodified layer to fold: no subclass with its own forward pass or weight."""
    return type(module) in _LAYERS and type(module.weight) is nn.Parameter
