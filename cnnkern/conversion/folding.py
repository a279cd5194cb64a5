"""The convolutions and linear layers of a folded model, whose results are deferred (csrc/deferred)."""

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

from cnnkern.conversion.deferral import SITE, Site, became
from cnnkern.nn.traced import NotScriptable, leaf

_LOCK = threading.Lock()
CACHE = "_cnnkern_folded"  # in a layer: its folded forms, by the id of the batch norm after it (of None without one)


class FoldingLayer(NotScriptable):
    """A base class. :func:`folding_classes` combines a subclass with each class of PyTorch's layers."""

    kind: str  # its name in a report

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return leaf(self, input)
        if (
            type(input) is not Tensor
            or self.training
            or forward_ad._current_level >= 0
            or (torch.is_grad_enabled() and (input.requires_grad or any(t.requires_grad for t in self.sources(None))))
            or torch.compiler.is_compiling()
            or torch._C._get_tracing_state() is not None
        ):
            return super().forward(input)
        folded = self.folded(None)
        y = None if folded is None else folded.call(site(self, SITE), input)
        return super().forward(input) if y is None else y

    def sources(self, norm: nn.Module | None) -> list[Tensor]:
        """The tensors from which the folded weights are computed: of this layer, and of the batch norm after it."""
        found = [self.weight, self.bias]
        if norm is not None:
            found += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
        return [t for t in found if t is not None]

    def settings(self, norm: nn.Module | None) -> tuple:
        """What else the folded weights depend on."""
        raise NotImplementedError

    def make(self, norm: nn.Module | None, sources: list[Tensor]) -> Any:
        """The extension's form of this layer, with the norm folded into its weights."""
        raise NotImplementedError

    def is_current(self, folded: Any, norm: nn.Module | None) -> bool:
        """Whether nothing has changed since `folded` was made."""
        return folded is not None and folded.settings == self.settings(norm) and folded.holds(self.sources(norm))

    def folded(self, norm: nn.Module | None) -> Any:
        """The extension's form of this layer and the norm, kept until they change; None for subclasses of tensors
        and within transforms."""
        cache = self.__dict__.setdefault(CACHE, {})
        found = cache.get(id(norm))
        if self.is_current(found, norm):
            return found
        if not self.is_of_plain_tensors(norm):
            return None
        with _LOCK, torch.no_grad():  # of two threads one folds
            found = cache.get(id(norm))
            if not self.is_current(found, norm):
                found = self.make(norm, self.sources(norm))
                found.settings, found.of = self.settings(norm), weakref.ref(self)
                cache[id(norm)] = found
        return found

    def is_of_plain_tensors(self, norm: nn.Module | None) -> bool:
        return all(
            type(t) in (Tensor, nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(t)
            for t in self.sources(norm)
        )

    def became(self) -> tuple[str, str] | None:
        """The kind of layer in a report, and why it is not fused; None if the report has it with the layer after it."""
        return became(self.kind, self.__dict__.get(SITE))

    def take_norm(self, before: Any, norm: nn.Module, input: Tensor) -> Tensor | None:
        """The norm of `input`, the deferred result of `before`, as one layer with this one; None if they stay two."""
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in (SITE, CACHE)}


def site(layer: nn.Module, name: str) -> Any:
    """The record of how a layer's results were computed."""
    found = layer.__dict__.get(name)
    if found is None:
        found = layer.__dict__[name] = Site()
    return found


def folding_classes(mixin: type, plain: tuple[type, ...], module: str) -> dict[type, type]:
    """From classes of layers to their classes in a folded model. These have to be in `module`, where pickle looks."""
    return {base: type(f"Folding{base.__name__}", (mixin, base), {"__module__": module}) for base in plain}
