"""Folds batch norm into convolutions for inference, with the activation and the residual addition behind them.

Convolutions and batch norms are replaced by layers of their own class, parameters and names; the model's own forward
pass runs as it is. A convolution's result waits, as that of a converted batch norm does (csrc/deferred), for what
uses it: a batch norm that does takes the convolution over, with its own scale and offset in the weights, and waits in
its turn for an addition and an activation.
"""

import copy
import threading
import weakref
from typing import Any

import torch
from torch import Tensor, fx, nn

from cnnkern.conversion.convert import ConversionReport, Replacement, check_module, convert, revert, uncompiled
from cnnkern.conversion.deferral import FOLDED_SITE, SITE, Site, became
from cnnkern.conversion.layers import replace
from cnnkern.nn import sync
from cnnkern.nn.batchnorm import _FusedBatchNorm
from cnnkern.nn.conv import GroupedConv2d
from cnnkern.nn.folded_conv import folded_conv
from cnnkern.nn.traced import leaf

_LOCK = threading.Lock()
_CACHE = "_cnnkern_folded"  # in a convolution: it with its folded weights, by the batch norm they were folded with


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
            if path not in known and isinstance(module, _FoldingConv | _FusedBatchNorm):
                report.entries.append(Replacement(path, type(module).__name__))
        folded.requires_grad_(False)
    uncompiled(folded).__dict__["_cnnkern_report"] = report
    return folded


def _is_convolution(module: nn.Module) -> bool:
    """Whether this is a convolution as it is made, no subclass with a forward pass or a weight of its own."""
    return type(module) in CONVOLUTIONS and type(module.weight) is nn.Parameter


def _weights(conv: nn.modules.conv._ConvNd, norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of ``norm(conv(x))`` as one convolution, computed in float64; copies without a norm."""
    if norm is None:
        return conv.weight.detach().clone(), None if conv.bias is None else conv.bias.detach().clone()
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    mean = norm.running_mean.double()
    bias = (-mean if conv.bias is None else conv.bias.double() - mean) * scale
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    weight = conv.weight.double() * scale.view(-1, *[1] * (conv.weight.dim() - 1))
    return weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)


def _is_current(folded: Any, settings: tuple, sources: list[Tensor]) -> bool:
    return folded is not None and folded.settings == settings and folded.holds(sources)


class _FoldingConv(nn.modules.conv._ConvNd):
    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return leaf(self, input)
        if (
            type(input) is not Tensor
            or self.training
            or (torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad))
            or torch.compiler.is_compiling()
            or torch._C._get_tracing_state() is not None
        ):
            return super().forward(input)
        folded = self.folded(None)
        y = None if folded is None else folded.call(_site(self, SITE), input)
        return super().forward(input) if y is None else y

    def folded(self, norm: nn.Module | None) -> Any:
        """This convolution, with the norm behind it in its weights; None where they are of unusual types."""
        sources, settings = _sources(self, norm), _settings(self, norm)
        cache = self.__dict__.setdefault(_CACHE, {})
        found = cache.get(id(norm))
        if _is_current(found, settings, sources):
            return found
        if any(type(t) not in (Tensor, nn.Parameter) for t in sources):
            return None
        with _LOCK, torch.no_grad():  # of two threads one folds
            found = cache.get(id(norm))
            if not _is_current(found, settings, sources):
                found = folded_conv(self, *_weights(self, norm), sources)
                found.settings, found.of = settings, weakref.ref(self)
                cache[id(norm)] = found
        return found

    def became(self) -> tuple[str, str] | None:
        """The kind of layer in a report, and why it is no other; None where the batch norm behind it tells."""
        kind, reason = became("Conv", self.__dict__.get(SITE))
        return None if kind == "Conv + BatchNorm" else (kind, reason)

    def take_norm(self, before: Any, norm: nn.Module, input: Tensor) -> Tensor | None:
        """The norm of `input`, which is the waiting result of `before`, as one convolution; None where it is two."""
        tensors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        if (
            not _is_current(before, _settings(self, None), _sources(self, None))  # has changed since
            or norm.running_mean is None
            or norm.num_features != self.out_channels
            or any(t is not None and t.dtype != self.weight.dtype for t in tensors)
            or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))
        ):
            return None
        folded = self.folded(norm)
        return None if folded is None else folded.take_over(_site(norm, FOLDED_SITE), input)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in (SITE, _CACHE)}


def _sources(conv: nn.modules.conv._ConvNd, norm: nn.Module | None) -> list[Tensor]:
    found = [conv.weight, conv.bias]
    if norm is not None:
        found += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
    return [t for t in found if t is not None]


def _settings(conv: nn.modules.conv._ConvNd, norm: nn.Module | None) -> tuple:
    padding = (conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return (*padding, None if norm is None else (norm.eps, norm.weight is None, norm.bias is None))


def _site(layer: nn.Module, name: str) -> Any:
    site = layer.__dict__.get(name)
    if site is None:
        site = layer.__dict__[name] = Site()
    return site


def _make(base: type, name: str, *mixin: type) -> type:
    made = type(name, (*mixin, base), {"__module__": __name__})
    globals()[name] = made  # where pickle looks for it
    return made


_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, GroupedConv2d)
CONVOLUTIONS = {plain: _make(plain, f"Folding{plain.__name__}", _FoldingConv) for plain in _PLAIN}
