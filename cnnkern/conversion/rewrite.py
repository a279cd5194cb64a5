"""Exchanges a module's forward pass for its trace without what the layers before compute by now."""

import copy
import operator
from typing import Any

import torch
from torch import fx, nn

from cnnkern.conversion.layers import IN_PLACE, ORIGINAL, Absorbed, AddsWhatFits, SyncAddsWhatFits, takes
from cnnkern.conversion.patterns import IN_PLACE_ADDS, add_relu_at, fusion_at, is_once_called_child, is_view
from cnnkern.conversion.tracing import module_calls, trace
from cnnkern.nn.folded_conv import FoldedConv
from cnnkern.ops.add_relu import add_relu


class Rewritten:
    """Marks the class of a module whose forward pass is its own trace without the absorbed calls."""

    _original_class: type

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Of the same class: what follows is copy.deepcopy's way with an object that has no such method."""
        return copy._reconstruct(self, memo, *super().__reduce_ex__(4))  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # The class is made at run time: a pickle carries the original class and is rewritten anew.
        return _restore, (self._original_class, self.__dict__)


def _restore(original_class: type, state: dict[str, Any]) -> nn.Module:
    module = original_class.__new__(original_class)
    module.__dict__.update(state)
    graph = trace(module)
    if graph is None:
        raise RuntimeError(
            f"cnnkern: the forward pass of this {original_class.__name__}, which was converted, cannot be read again; "
            "save a state_dict, or the model as cnnkern.revert gives it"
        )
    rewrite(module, graph)
    return module


def rewrite(holder: nn.Module, graph: fx.Graph) -> list[fx.Node]:
    """Takes out what the exchanged layers of this module compute by now, and joins additions with their ReLUs.

    Returns the additions that were joined. What to do is read off the graph and the exchanged layers, so
    that it can be done again on a copy.
    """
    changed, joined = False, []
    for call in module_calls(graph):
        absorbs = _absorbed_by(holder.get_submodule(call.target))
        if absorbs is None:
            continue
        act, adds = absorbs
        fusion = fusion_at(holder, call, with_add=adds)
        if fusion.act != act:
            continue
        if fusion.add is None:
            if fusion.activation is None:
                continue
            target = fusion.activation.target
            if is_once_called_child(fusion.activation):
                holder._modules[target] = Absorbed(holder._modules[target])
            else:
                fusion.activation.replace_all_uses_with(call)
                graph.erase_node(fusion.activation)
                changed = True
            continue
        if fusion.add.target in IN_PLACE_ADDS:
            holder.get_submodule(call.target).__dict__[IN_PLACE] = True
        with graph.inserting_before(fusion.add):  # where the residual is what it was
            fused = graph.call_module(call.target, (*call.args, fusion.residual))
        (fusion.activation or fusion.add).replace_all_uses_with(fused)
        for node in filter(None, (fusion.activation, fusion.add, call)):
            graph.erase_node(node)
        changed = True
    for node in graph.nodes if "_cnnkern_reshapes" in holder.__dict__ else ():
        if is_view(holder, node):
            node.target, changed = "reshape", True
    for node in list(graph.nodes):
        relu = add_relu_at(holder, node)
        if relu is None:
            continue
        with graph.inserting_before(relu):
            fused = graph.call_function(_add_in_place_relu if node.target in IN_PLACE_ADDS else _add_relu, node.args)
        relu.replace_all_uses_with(fused)
        graph.erase_node(relu)
        graph.erase_node(node)
        joined.append(node)
        changed = True
    if changed:
        cls = type(holder)
        forward = type(fx.GraphModule(holder, graph)).forward
        names = {
            "forward": forward,
            "_original_class": cls,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
        }
        holder.__class__ = type(cls.__name__, (Rewritten, cls), names)
    return joined


def _absorbed_by(layer: nn.Module) -> tuple[str, bool] | None:
    """The activation and whether an addition, that the code around a layer spells out and the layer computes."""
    if isinstance(layer, FoldedConv):
        return layer.absorbs
    if "_cnnkern_converted" not in layer.__dict__ or type(layer) not in ORIGINAL:
        return None
    adds = isinstance(layer, AddsWhatFits | SyncAddsWhatFits)
    return None if layer.act == "none" and not adds else (layer.act, adds)


def _add_relu(a: Any, b: Any) -> Any:
    """``relu(a + b)``: fused where the operator takes both, else as it was."""
    return add_relu(a, b) if takes(a, b) else torch.relu(a + b)


def _add_in_place_relu(a: Any, b: Any) -> Any:
    """``relu(a += b)``, where nobody else sees a."""
    return add_relu(a, b) if takes(a, b) else torch.relu(operator.iadd(a, b))
