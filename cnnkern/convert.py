"""Converts a model that someone else wrote to the fused layers, in place or as a copy that shares its parameters.

A batch norm is exchanged by giving the module another class, so that it keeps its parameters, its place and its hooks.
What follows it is read from a `torch.fx` trace of the forward pass of the module that holds both, with every child a
leaf. A ReLU that a batch norm has absorbed is bypassed: its entry is exchanged for an identity where one call is all
it has, else (one `self.relu` for several calls, `F.relu`) the holder's forward pass is replaced by its trace without
that call. Where tracing fails, the batch norms are exchanged without an activation, which never changes a meaning.
"""

import copy
import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from cnnkern.nn import batchnorm

_PLAIN = {
    nn.BatchNorm1d: batchnorm.BatchNorm1d,
    nn.BatchNorm2d: batchnorm.BatchNorm2d,
    nn.BatchNorm3d: batchnorm.BatchNorm3d,
}
_WITH_RELU = {
    nn.BatchNorm1d: batchnorm.BatchNormReLU1d,
    nn.BatchNorm2d: batchnorm.BatchNormReLU2d,
    nn.BatchNorm3d: batchnorm.BatchNormReLU3d,
}
_ORIGINAL = {fused: plain for table in (_PLAIN, _WITH_RELU) for plain, fused in table.items()}
_RELU_FUNCTIONS = {F.relu, F.relu_, torch.relu, torch.relu_}
_RELU_METHODS = {"relu", "relu_"}


@dataclass(frozen=True)
class Replacement:
    """One batch norm of the model: its path, the kind it became (empty if left alone), and why."""

    path: str
    kind: str
    reason: str = ""


@dataclass
class ConversionReport:
    """What :func:`convert` did: an entry for each batch norm. ``print`` shows it; ``counts`` adds it up."""

    entries: list[Replacement] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        return dict(Counter(e.kind or "left alone" for e in self.entries))

    def __str__(self) -> str:
        if not self.entries:
            return "cnnkern.convert: no batch norm in this model, nothing to convert"
        width = max(len(e.path) for e in self.entries)
        lines = [
            f"{e.path:{width}}  {e.kind or 'left alone'}{f' ({e.reason})' if e.reason else ''}" for e in self.entries
        ]
        total = ", ".join(f"{n} {kind}" for kind, n in sorted(self.counts.items()))
        return "\n".join([f"cnnkern.convert: {total}", *lines])


class _Absorbed(nn.Identity):
    """Stands where a ReLU stood that the batch norm before it now applies."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._original = (original,)  # in a tuple, so that it is no submodule

    def extra_repr(self) -> str:
        return f"{self._original[0]!r} in the batch norm before"


class _Rewritten:
    """Marks the class of a module whose forward pass is its own trace without the absorbed calls."""

    _original_class: type

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # The class is made at run time: a copy or a pickle carries the original class and is rewritten anew.
        return _restore, (self._original_class, self.__dict__)


def _restore(original_class: type, state: dict[str, Any]) -> nn.Module:
    module = original_class.__new__(original_class)
    module.__dict__.update(state)
    _rewrite(module, _trace(module))
    return module


def convert(model: nn.Module, inplace: bool = False) -> nn.Module:
    """The model with its batch norms, and the ReLUs that follow them, on the fused kernels.

    The result shares parameters and buffers with ``model`` and has the same state-dict keys, so an optimiser made
    before still works and checkpoints fit either. With ``inplace`` the model itself is changed and returned. Results
    are the same up to rounding, in training and in eval. Subclasses of batch norm are left alone; a batch norm or a
    ReLU with hooks, and a batch norm whose output is used twice, is converted without the ReLU.

    :func:`conversion_report` tells what was replaced and why, :func:`revert` undoes it. Converting twice changes
    nothing. Raises TypeError for what is no ``nn.Module`` or is a ``torch.jit`` module.
    """
    _check_module("convert", model)
    if not inplace:
        model = _sharing_copy(model)
    if "_cnnkern_report" not in model.__dict__:
        model.__dict__["_cnnkern_report"] = _convert(model)
    return model


def revert(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Undoes :func:`convert`: the model as it was, with the parameters and statistics that it has now."""
    _check_module("revert", model)
    if not inplace:
        model = _sharing_copy(model)
    for module in list(model.modules()):
        if isinstance(module, _Rewritten):
            module.__class__ = module._original_class
        if module.__dict__.pop("_cnnkern_converted", False):
            module.__class__ = _ORIGINAL[type(module)]
        for name, child in module._modules.items():
            if isinstance(child, _Absorbed):
                module._modules[name] = child._original[0].train(child.training)
        module.__dict__.pop("_cnnkern_report", None)
    return model


def conversion_report(model: nn.Module) -> ConversionReport:
    """What :func:`convert` did to this model or, for a model not converted yet, what it would do."""
    _check_module("conversion_report", model)
    return convert(model).__dict__["_cnnkern_report"]


def _check_module(name: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"cnnkern.{name}: expected a torch.nn.Module; got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"cnnkern.{name}: a torch.jit module cannot be converted; convert the model before scripting it"
        )


def _sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree around the same parameters and buffers."""
    shared = {id(t): t for module in model.modules() for t in (*module._parameters.values(), *module._buffers.values())}
    return copy.deepcopy(model, memo=shared)


def _convert(model: nn.Module) -> ConversionReport:
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    holders = [
        (path, m) for path, m in model.named_modules() if m._modules and not isinstance(m, torch.jit.ScriptModule)
    ]
    traces = {id(m): _trace(m) for _, m in holders if not isinstance(m, nn.Sequential) or _overrides_forward(m)}
    # A batch norm that a module further up calls by itself has callers that its holder's trace does not show.
    reached = {
        id(holder.get_submodule(node.target))
        for _, holder in holders
        for node in _calls(traces.get(id(holder)))
        if "." in node.target
    }
    absorbed: set[int] = set()
    for _, holder in holders:

        def fusable(norm: nn.Module) -> bool:
            return (
                type(norm) in _PLAIN and not _has_hooks(norm) and len(paths[id(norm)]) == 1 and id(norm) not in reached
            )

        if id(holder) in traces:
            pairs = _pairs_in_trace(holder, traces[id(holder)], fusable)
        else:
            pairs = _pairs_in_sequential(holder, fusable)
        for norm in pairs:
            absorbed.add(id(norm))
            _exchange(norm, _WITH_RELU)
        if id(holder) in traces and pairs:
            _rewrite(holder, traces[id(holder)])
    report = ConversionReport()
    for path, module in model.named_modules():
        if id(module) in absorbed:
            report.entries.append(Replacement(path, "BatchNorm + ReLU"))
        elif type(module) in _PLAIN:
            _exchange(module, _PLAIN)
            report.entries.append(Replacement(path, "BatchNorm"))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module) not in _ORIGINAL:
            report.entries.append(Replacement(path, "", f"{type(module).__name__} has a forward pass of its own"))
    return report


def _exchange(norm: nn.Module, table: dict[type, type]) -> None:
    norm.__class__ = table[type(norm)]
    norm.__dict__["_cnnkern_converted"] = True


def _has_hooks(module: nn.Module) -> bool:
    return any(
        (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    )


def _overrides_forward(module: nn.Sequential) -> bool:
    return type(module).forward is not nn.Sequential.forward


class _OwnForward(fx.Tracer):
    """Traces a module's own forward pass; every child is a leaf."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _trace(module: nn.Module) -> fx.Graph | None:
    """The graph of the module's forward pass, or None where it cannot be traced or differs between train and eval."""
    graphs, state = [], dict(module.__dict__)
    try:
        for mode in (True, False):
            module.training = mode  # of this module alone: its children are leaves
            graphs.append(_OwnForward().trace(module))
    except Exception:  # whatever a forward pass does with a proxy that a tensor would have allowed
        return None
    finally:
        module.__dict__.clear()  # a forward pass may leave proxies behind
        module.__dict__.update(state)
    return graphs[0] if graphs[0].python_code("self").src == graphs[1].python_code("self").src else None


def _calls(graph: fx.Graph | None) -> list[fx.Node]:
    return [] if graph is None else [n for n in graph.nodes if n.op == "call_module"]


def _is_relu_call(holder: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        relu = holder.get_submodule(node.target)
        return type(relu) is nn.ReLU and not _has_hooks(relu)
    return (node.op == "call_function" and node.target in _RELU_FUNCTIONS) or (
        node.op == "call_method" and node.target in _RELU_METHODS
    )


def _relu_after(holder: nn.Module, norm: fx.Node) -> fx.Node | None:
    """The ReLU that is the one user of a batch norm's output."""
    users = list(norm.users)
    return users[0] if len(users) == 1 and _is_relu_call(holder, users[0]) and users[0].args[0] is norm else None


def _pairs_in_trace(holder: nn.Module, graph: fx.Graph | None, fusable) -> list[nn.Module]:
    calls = _calls(graph)
    count = Counter(n.target for n in calls)
    return [
        holder.get_submodule(n.target)
        for n in calls
        if count[n.target] == 1 and fusable(holder.get_submodule(n.target)) and _relu_after(holder, n) is not None
    ]


def _pairs_in_sequential(holder: nn.Sequential, fusable) -> list[nn.Module]:
    names, pairs = list(holder._modules), []
    for name, following in itertools.pairwise(names):
        norm, relu = holder._modules[name], holder._modules[following]
        if fusable(norm) and type(relu) is nn.ReLU and not _has_hooks(relu):
            holder._modules[following] = _Absorbed(relu).train(relu.training)
            pairs.append(norm)
    return pairs


def _rewrite(holder: nn.Module, graph: fx.Graph | None) -> None:
    """Takes the ReLU calls out that the batch norms before them apply by now."""
    assert graph is not None, f"the forward pass of {type(holder).__name__} could be traced before"
    count = Counter(n.target for n in _calls(graph))
    changed = False
    for node in _calls(graph):
        norm = holder.get_submodule(node.target)
        relu = (
            _relu_after(holder, node)
            if getattr(norm, "act", None) == "relu" and "_cnnkern_converted" in norm.__dict__
            else None
        )
        if relu is None:
            continue
        if relu.op == "call_module" and count[relu.target] == 1 and "." not in relu.target:
            holder._modules[relu.target] = _Absorbed(holder._modules[relu.target])
        else:
            relu.replace_all_uses_with(node)
            graph.erase_node(relu)
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
        holder.__class__ = type(cls.__name__, (_Rewritten, cls), names)
