"""Folds batch norm into convolutions for inference, with the activation and the residual addition behind them.

Chains of convolution, batch norm, addition and activation are found as :func:`cnnkern.convert` finds what follows a
batch norm, in the same traces. A chain becomes one :class:`~cnnkern.nn.folded_conv.FoldedConv`. It stands where the
batch norm stood, which is where the residual is known, and an identity where the convolution stood.
"""

import copy
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from cnnkern.conversion import timm_layers
from cnnkern.conversion.activations import act_of_module, is_apart, is_identity
from cnnkern.conversion.convert import ConversionReport, check_module, convert_layers, revert, uncompiled
from cnnkern.conversion.layers import DIMENSIONS, NAMES, Absorbed, Moved
from cnnkern.conversion.patterns import (
    Fusion,
    can_wait,
    fusion_at,
    is_unseen,
    is_view,
    only_user,
)
from cnnkern.conversion.tracing import module_calls
from cnnkern.nn import batchnorm, sync
from cnnkern.nn.conv import GroupedConv2d
from cnnkern.nn.folded_conv import FoldedConv

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, GroupedConv2d)
# Batch norms of ours by their forward passes, a residual being the second argument of some.
_FORWARDS = (
    batchnorm._FusedBatchNorm.forward,
    batchnorm._FusedBatchNormAdd.forward,
    sync.SyncBatchNorm.forward,
    sync.SyncBatchNormAddReLU.forward,
)


def fold(model: nn.Module) -> nn.Module:
    """A copy of the model for inference: convolutions with the batch norm behind them in their weights, and with the
    residual addition and the activation behind that in their kernel.

    ``model`` is in eval mode, and stays as it is; the copy shares nothing with it. Results are the same up to rounding.
    Norms and grouped convolutions that are not folded are converted as :func:`convert` does it, and convolutions
    without a batch norm are exchanged too, for kernels whose weights are packed ahead.
    :func:`conversion_report` of the result tells what was done; a model without a convolution comes back as it is.

    On the CPU, in float32 and in 16-bit types that the processor has instructions for, PyTorch's oneDNN operators
    compute what was fused; elsewhere PyTorch's convolution runs with the folded weights. Two things differ from the
    model's own: convolutions return channels_last tensors, whatever the input's memory format, and a ReLU inside of
    oneDNN's kernels makes 0 of NaN.

    Raises TypeError for what is no ``nn.Module`` or is a ``torch.jit`` module, ValueError for a model, or a batch norm
    of it, in training mode.
    """
    check_module("fold", model)
    if model.training:
        raise ValueError("cnnkern.fold: the model is in training mode, call eval() first")
    for path, module in model.named_modules():
        if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(f"cnnkern.fold: batch norm {path!r} is in training mode, call eval() first")
    if any(isinstance(m, FoldedConv) for m in model.modules()):
        return copy.deepcopy(model)
    with torch.no_grad():
        folded = revert(copy.deepcopy(model), inplace=True)
        folder = _Folder()
        report = convert_layers(folded, folder)
        if not folder.became:
            folded, report = copy.deepcopy(model), ConversionReport()
    report.made_by, report.nothing = "cnnkern.fold", "no convolution in this model, nothing to fold"
    uncompiled(folded).__dict__["_cnnkern_report"] = report
    return folded


class _Folder:
    """Exchanges the convolutions of a model, one module after the other that holds some."""

    def __init__(self) -> None:
        self.became: dict[int, str] = {}
        self.exchanged: list[nn.Module] = []  # kept, so that no new module is taken for one of them by its id

    def fold(self, holder: nn.Module, graph: fx.Graph | None, alone: Callable[[nn.Module], bool]) -> set[fx.Node]:
        if graph is None:
            self._fold_sequential(holder, alone)
            return set()
        return self._fold_graph(holder, graph, alone)

    def _fold_sequential(self, holder: nn.Module, alone: Callable[[nn.Module], bool]) -> None:
        names = [*(n for n, m in holder._modules.items() if not is_identity(m)), None]
        for name, behind, further in zip(names, names[1:], [*names[2:], None], strict=False):
            conv, norm = holder._modules[name], holder._modules.get(behind)
            if not _is_convolution(conv) or not alone(conv) or norm is None:
                continue
            if not _folds(norm, conv) or not alone(norm) or _adds(norm):
                act = act_of_module(norm)
                if act is not None:
                    holder._modules[name] = self._exchange(conv, None, act)
                    holder._modules[behind] = Absorbed(norm)
                continue
            act = _own_act(norm)
            if act is None:
                activation = holder._modules.get(further)
                act = None if activation is None else act_of_module(activation)
                if act is not None:
                    holder._modules[further] = Absorbed(activation)
            holder._modules[behind] = self._exchange(conv, norm, act or "none")
            holder._modules[name] = Moved(conv)

    def _fold_graph(self, holder: nn.Module, graph: fx.Graph, alone: Callable[[nn.Module], bool]) -> set[fx.Node]:
        calls = module_calls(graph)
        count = Counter(n.target for n in calls)
        added: set[fx.Node] = set()

        def ours(call: fx.Node | None) -> bool:
            return call is not None and call in calls and count[call.target] == 1 and alone(_module(holder, call))

        for call in calls:
            conv = _module(holder, call)
            if not _is_convolution(conv) or not ours(call) or len(call.args) != 1 or call.kwargs:
                continue
            behind = only_user(call)
            norm = _module(holder, behind) if ours(behind) and behind.args[:1] == (call,) else None
            chain = None
            if norm is not None and _folds(norm, conv) and len(behind.args) == 1 + _adds(norm) and not behind.kwargs:
                chain = self._chain(holder, behind, added, lambda until, call=call: can_wait(holder, call, until))
            if chain is None:
                norm, chain = None, self._chain(holder, call, added, lambda until: True)
            absorbs = (chain.act, chain.add is not None)
            if norm is None and absorbs == ("none", False):
                continue
            if chain.add is not None:
                added.add(chain.add)
            own = None if norm is None else _own_act(norm)
            spelled = own is not None  # the norm's class computes the rest by itself
            last = chain.residual if not spelled else behind.args[1] if _adds(norm) else None
            folded = self._exchange(
                conv,
                norm,
                own or chain.act,
                adds=last is not None,
                absorbs=None if spelled or absorbs == ("none", False) else absorbs,
                overwrites=last is not None and is_unseen(holder, last),
            )
            _set(holder, call.target, Moved(conv) if norm is not None else folded)
            if norm is not None:
                _set(holder, behind.target, folded)
        if any(is_view(holder, node) for node in graph.nodes):
            holder.__dict__["_cnnkern_reshapes"] = True
        return added

    def _chain(
        self, holder: nn.Module, call: fx.Node, added: set[fx.Node], waits: Callable[[fx.Node], bool]
    ) -> Fusion | None:
        """What one kernel computes from this convolution or batch norm on, if its input stays as it is until then."""
        if not waits(call):
            return None
        if _own_act(_module(holder, call)) is not None:
            return Fusion(_module(holder, call), call, None, None, None, "none")
        chain = fusion_at(holder, call)
        if chain.add is not None and (chain.add in added or not waits(chain.add)):
            chain = fusion_at(holder, call, with_add=False)
        return chain

    def finish(self, model: nn.Module) -> dict[int, str]:
        alone: dict[int, FoldedConv] = {}
        for module in list(model.modules()):
            for name, conv in module._modules.items():
                if _is_convolution(conv) and not is_apart(conv):
                    if id(conv) not in alone:
                        alone[id(conv)] = self._exchange(conv, None, "none")
                    module._modules[name] = alone[id(conv)]
        return self.became

    def _exchange(
        self,
        conv: nn.modules.conv._ConvNd,
        norm: nn.Module | None,
        act: str,
        adds: bool = False,
        absorbs: tuple[str, bool] | None = None,
        overwrites: bool = False,
    ) -> FoldedConv:
        weight, bias = _weights(conv, norm)
        folded = FoldedConv(conv, weight, bias, act, adds=adds, absorbs=absorbs, overwrites=overwrites)
        parts = ("BatchNorm" * (norm is not None), "add" * adds, NAMES.get(act, ""))
        self.became[id(folded)] = " + ".join(["Conv", *filter(None, parts)])
        self.exchanged += [conv] if norm is None else [conv, norm]
        return folded


def _module(holder: nn.Module, call: fx.Node) -> nn.Module:
    return holder.get_submodule(call.target)


def _set(holder: nn.Module, target: str, module: nn.Module) -> None:
    parent, _, name = target.rpartition(".")
    holder.get_submodule(parent)._modules[name] = module


def _is_convolution(module: nn.Module | None) -> bool:
    """Whether the module is a convolution as it is made, no subclass with a forward pass or a weight of its own."""
    return type(module) in _CONVOLUTIONS and type(module.weight) is nn.Parameter


def _adds(norm: nn.Module) -> bool:
    return isinstance(norm, batchnorm._FusedBatchNormAdd | sync.SyncBatchNormAddReLU)


def _own_act(module: nn.Module) -> str | None:
    """The activation that the class of a batch norm of ours or timm's computes, "none" included; None for others."""
    if timm_layers.is_batch_norm_act(module):
        return timm_layers.act_of(module)
    return module.act if isinstance(module, batchnorm._FusedBatchNorm) else None


def _folds(norm: nn.Module, conv: nn.modules.conv._ConvNd) -> bool:
    """Whether this is a batch norm with statistics that were taken of as many channels."""
    known = type(norm) in (*DIMENSIONS, nn.SyncBatchNorm) or (
        isinstance(norm, batchnorm._FusedBatchNorm) and type(norm).forward in _FORWARDS
    )
    known = known or (timm_layers.is_batch_norm_act(norm) and timm_layers.act_of(norm) is not None)
    return known and norm.running_mean is not None and norm.num_features == conv.out_channels


def _weights(conv: nn.modules.conv._ConvNd, norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of ``norm(conv(x))`` as one convolution, worked out in float64; copies without a norm."""
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
    return tuple(t.detach().to(conv.weight.dtype) for t in (weight, bias))
