"""The convolution of a folded model as a layer, with the batch norm after it folded into its weights."""

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, fx, nn

from cnnkern.conversion.deferral import FOLDED_SITE, SITE, Site, became
from cnnkern.nn.conv import GroupedConv2d, GroupedConv3d
from cnnkern.nn.folded_conv import folded_conv
from cnnkern.nn.traced import leaf

_LOCK = threading.Lock()
CACHE = "_cnnkern_folded"  # in a convolution: the folded convolutions, by batch norm


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


class FoldingConv(nn.modules.conv._ConvNd):
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
        y = None if folded is None else folded.call(site(self, SITE), input)
        return super().forward(input) if y is None else y

    def folded(self, norm: nn.Module | None) -> Any:
        """This convolution with the norm after it in its weights; None for parameters of unusual types."""
        made_of, settings = sources(self, norm), _settings(self, norm)
        cache = self.__dict__.setdefault(CACHE, {})
        found = cache.get(id(norm))
        if _is_current(found, settings, made_of):
            return found
        if any(type(t) not in (Tensor, nn.Parameter) for t in made_of):
            return None
        with _LOCK, torch.no_grad():  # one thread folds at a time
            found = cache.get(id(norm))
            if not _is_current(found, settings, made_of):
                found = folded_conv(self, *_weights(self, norm), made_of)
                found.settings, found.of = settings, weakref.ref(self)
                cache[id(norm)] = found
        return found

    def became(self) -> tuple[str, str] | None:
        """The kind of layer in a report, and the reason; None if the batch norm after it reports both."""
        kind, reason = became("Conv", self.__dict__.get(SITE))
        return None if kind == "Conv + BatchNorm" else (kind, reason)

    def takes(self, norm: nn.Module) -> bool:
        """Whether a batch norm in eval mode can be folded into this convolution."""
        tensors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        return (
            norm.running_mean is not None
            and norm.num_features == self.out_channels
            and all(t is None or t.dtype == self.weight.dtype for t in tensors)
            and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))
        )

    def take_norm(self, before: Any, norm: nn.Module, input: Tensor) -> Tensor | None:
        """The norm of `input`, the deferred result of `before`, as one convolution; None if it cannot be folded."""
        if not _is_current(before, _settings(self, None), sources(self, None)) or not self.takes(norm):
            return None  # it has changed since
        folded = self.folded(norm)
        return None if folded is None else folded.take_over(site(norm, FOLDED_SITE), input)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in (SITE, CACHE)}


def sources(conv: nn.modules.conv._ConvNd, norm: nn.Module | None) -> list[Tensor]:
    """The tensors from which the folded weights of a convolution and its batch norm are computed."""
    found = [conv.weight, conv.bias]
    if norm is not None:
        found += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
    return [t for t in found if t is not None]


def _settings(conv: nn.modules.conv._ConvNd, norm: nn.Module | None) -> tuple:
    padding = (conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return (*padding, None if norm is None else (norm.eps, norm.weight is None, norm.bias is None))


def site(layer: nn.Module, name: str) -> Any:
    """How a layer's results were computed."""
    found = layer.__dict__.get(name)
    if found is None:
        found = layer.__dict__[name] = Site()
    return found


def _make(base: type, name: str, *mixin: type) -> type:
    made = type(name, (*mixin, base), {"__module__": __name__})
    globals()[name] = made  # where pickle looks for it
    return made


_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, GroupedConv2d, GroupedConv3d)
CONVOLUTIONS = {plain: _make(plain, f"Folding{plain.__name__}", FoldingConv) for plain in _PLAIN}
