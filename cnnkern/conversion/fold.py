"""Folds batch norm into convolutions for inference, with the activation and the residual addition behind them.

Convolutions and batch norms are replaced by layers of their own class, parameters and names; the model's own forward
pass runs as it is. A convolution's result waits, as that of a converted batch norm does (csrc/deferred), for what
uses it: a batch norm that does takes the convolution over, with its own scale and offset in the weights, and waits in
its turn for an addition and an activation.
"""

import copy

from torch import nn

from cnnkern.conversion.convert import ConversionReport, Replacement, check_module, convert, revert, uncompiled
from cnnkern.conversion.deferral import Site
from cnnkern.conversion.folding_conv import CONVOLUTIONS, FoldingConv
from cnnkern.conversion.layers import replace
from cnnkern.conversion.sequential import folding_class, is_sequential
from cnnkern.nn import sync
from cnnkern.nn.batchnorm import _FusedBatchNorm


def fold(model: nn.Module) -> nn.Module:
    """A copy of the model for inference: a convolution and the batch norm behind it run as one convolution, with the
    residual addition and the activation behind that in its kernel.

    ``model`` is in eval mode, and stays as it is; the copy shares nothing with it, and has the same parameters, under
    the same names. Results are the same up to rounding. Norms and grouped convolutions are converted as :func:`convert`
    does it; behind a grouped ``nn.Conv1d``, whose kernels are cnnkern's, the batch norm stays a layer of its own.
    :func:`conversion_report` of the result tells what was done, once the model has run.

    Weights are folded at the first call, and again when a parameter has changed. On the CPU, in float32 and in 16-bit
    types that the processor has instructions for, PyTorch's oneDNN operators compute what was fused, on weights packed
    for them; elsewhere PyTorch's convolution runs with the folded weights. Where gradients are wanted, and in programs
    that torch.compile and torch.export make, the model runs as it is converted. A ReLU inside of oneDNN's kernels makes
    0 of NaN.

    Raises TypeError for what is no ``nn.Module`` or is a ``torch.jit`` module, ValueError for a model, or a batch norm
    of it, in training mode.
    """
    check_module("fold", model)
    if model.training:
        raise ValueError("cnnkern.fold: the model is in training mode, call eval() first")
    for path, module in model.named_modules():
        if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(f"cnnkern.fold: batch norm {path!r} is in training mode, call eval() first")
    folded = revert(copy.deepcopy(model), inplace=True)
    report = ConversionReport(made_by="cnnkern.fold", nothing="no convolution in this model, nothing to fold")
    if Site is not None and any(map(_is_convolution, folded.modules())):
        folded = convert(folded, inplace=True)
        report.entries = list(uncompiled(folded).__dict__["_cnnkern_report"].entries)
        known = {entry.path for entry in report.entries}
        for path, module in folded.named_modules():
            if _is_convolution(module):
                replace(module, CONVOLUTIONS[type(module)])
            elif type(module) is nn.SyncBatchNorm:
                replace(module, sync.SyncBatchNorm)
            elif is_sequential(module):
                replace(module, folding_class(type(module)))
            if path not in known and isinstance(module, FoldingConv | _FusedBatchNorm):
                report.entries.append(Replacement(path, type(module).__name__))
        folded.requires_grad_(False)
    uncompiled(folded).__dict__["_cnnkern_report"] = report
    return folded


def _is_convolution(module: nn.Module) -> bool:
    """Whether this is a convolution as it is made, no subclass with a forward pass or a weight of its own."""
    return type(module) in CONVOLUTIONS and type(module.weight) is nn.Parameter
