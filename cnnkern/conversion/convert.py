"""Converts a model that someone else wrote to the fused layers, in place or as a copy that shares its parameters.

A batch norm is exchanged by giving the module another class, so that it keeps its parameters, its place and its hooks.
What follows it is read from a trace of the forward pass of the module that holds both (tracing.py). An activation that
a batch norm has absorbed is bypassed: its entry is exchanged for an identity where one call is all it has, else (one
`self.relu` for several calls, `F.relu`) the holder's forward pass is replaced by its trace without that call. Residual
additions, which are no modules, are always replaced in the trace. Where tracing fails, the batch norms are exchanged
without what follows, and those below it with it only where that forward pass does not reach them (reach.py): neither
ever changes a meaning. Grouped convolutions and layer norms are exchanged alone.
"""

import copy
import itertools
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from cnnkern.conversion.activations import act_of_module, is_apart, is_identity, why_apart
from cnnkern.conversion.layers import (
    ACT_CLASSES,
    ADD_CLASSES,
    DIMENSIONS,
    IN_PLACE,
    NORMS,
    Absorbed,
    exchange,
    exchanged_alone,
    kind_alone,
    kind_of,
    originals,
)
from cnnkern.conversion.patterns import follows, fusions, why_alone
from cnnkern.conversion.reach import kept_elsewhere, reached_by
from cnnkern.conversion.rewrite import Rewritten, rewrite
from cnnkern.conversion.tracing import module_calls, trace
from cnnkern.nn.folded_conv import FoldedConv


@dataclass(frozen=True)
class Replacement:
    """A layer or an addition: its path, the kind it became (empty if left alone), and why."""

    path: str
    kind: str
    reason: str = ""


@dataclass
class ConversionReport:
    """What :func:`convert` or :func:`fold` did, an entry for each layer and each addition that it replaced or
    had to leave alone.

    ``print`` shows it; ``counts`` adds it up.
    """

    entries: list[Replacement] = field(default_factory=list)
    made_by: str = "cnnkern.convert"
    nothing: str = "no norm and no grouped convolution in this model, nothing to convert"

    @property
    def counts(self) -> dict[str, int]:
        return dict(Counter(e.kind or "left alone" for e in self.entries))

    def __str__(self) -> str:
        if not self.entries:
            return f"{self.made_by}: {self.nothing}"
        width = max(len(e.path) for e in self.entries)
        lines = [
            f"{e.path:{width}}  {e.kind or 'left alone'}{f' ({e.reason})' if e.reason else ''}" for e in self.entries
        ]
        total = ", ".join(f"{n} {kind}" for kind, n in sorted(self.counts.items()))
        return "\n".join([f"{self.made_by}: {total}", *lines])


class ConversionError(RuntimeError):
    """The converted model does not compute what the original does; the message says where they differ."""


def convert(model: nn.Module, inplace: bool = False, verify: Any = None) -> nn.Module:
    """The model with its norms and grouped convolutions, and the activations and residual additions behind batch norms,
    on our kernels.

    The result shares parameters and buffers with ``model`` and has the same state-dict keys, so an optimiser made
    before still works and checkpoints fit either. With ``inplace`` the model itself is changed and returned. Results
    are the same up to rounding, in training and in eval. Subclasses of batch norm and layer norm are left alone; a
    batch norm or an activation with hooks, and a batch norm whose output is used twice, is converted without what
    follows.

    ``verify`` is an example input, or a tuple of them: forward pass and gradients of the original and of the result
    are then compared on it, in float64, in training and in eval mode, and :class:`ConversionError` is raised where
    they differ; ``model`` is as it was.

    :func:`conversion_report` tells what was replaced and why, :func:`revert` undoes it. Converting twice changes
    nothing. Raises TypeError for what is no ``nn.Module`` or is a ``torch.jit`` module.
    """
    check_module("convert", model)
    if verify is not None:
        _verify(model, verify if isinstance(verify, tuple) else (verify,))
    if not inplace:
        model = _sharing_copy(model)
    inner = uncompiled(model)
    if "_cnnkern_report" not in inner.__dict__:
        inner.__dict__["_cnnkern_report"] = convert_layers(inner)
    return model


def revert(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Undoes :func:`convert`: the model as it was, with the parameters and statistics that it has now."""
    check_module("revert", model)
    if any(isinstance(m, FoldedConv) for m in model.modules()):
        raise TypeError(
            "cnnkern.revert: a folded model has no batch norms to go back to; the model that was folded has"
        )
    for path, module in model.named_modules():
        if "_cnnkern_converted" in module.__dict__ and type(module) not in originals():
            raise TypeError(
                f"cnnkern.revert: {path!r} has become a {type(module).__name__} since it was converted; "
                "take that back before, as torch.nn.utils.parametrize.remove_parametrizations does"
            )
    if not inplace:
        model = _sharing_copy(model)
    for module in list(model.modules()):
        if isinstance(module, Rewritten):
            module.__class__ = module._original_class
        if module.__dict__.pop("_cnnkern_converted", False):
            module.__class__ = originals()[type(module)]
            module.__dict__.pop("act", None)
            module.__dict__.pop(IN_PLACE, None)
        for name, child in module._modules.items():
            if isinstance(child, Absorbed):
                module._modules[name] = child._original[0].train(child.training)
        module.__dict__.pop("_cnnkern_report", None)
    return model


def conversion_report(model: nn.Module) -> ConversionReport:
    """What :func:`convert` did to this model or, for a model not converted yet, what it would do."""
    check_module("conversion_report", model)
    return uncompiled(convert(model)).__dict__["_cnnkern_report"]


def _verify(model: nn.Module, inputs: tuple) -> None:
    """Raises ConversionError where outputs, gradients or buffers differ by more than rounding in float64."""

    def double(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    inputs = torch.utils._pytree.tree_map(double, inputs)
    original = copy.deepcopy(model).double()
    for training in (True, False):
        results = []
        for candidate in (copy.deepcopy(original), convert(copy.deepcopy(original), inplace=True)):
            with torch.random.fork_rng():
                torch.manual_seed(0)  # for dropout
                outputs = candidate.train(training)(*inputs)
            tensors = [t for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, Tensor)]
            found = {f"output {i}": t.detach() for i, t in enumerate(tensors)}
            differentiable = [t for t in tensors if t.requires_grad]
            if differentiable:
                sum(t.square().sum() for t in differentiable).backward()
            found |= {f"gradient of {n}": p.grad for n, p in candidate.named_parameters() if p.grad is not None}
            results.append(found | {n: b for n, b in candidate.named_buffers() if b.is_floating_point()})
        theirs, ours = results
        where = "training" if training else "eval"
        if theirs.keys() != ours.keys():
            raise ConversionError(f"cnnkern.convert: {where}: other outputs or gradients than the original's")
        scale = max((t.abs().max().item() for n, t in theirs.items() if n.startswith("grad") and t.numel()), default=0)
        for name, expected in theirs.items():
            largest = scale if name.startswith("grad") else expected.abs().max().item() if expected.numel() else 0.0
            same = ours[name].shape == expected.shape
            error = (ours[name] - expected).abs().max().item() if same and expected.numel() else 0.0
            if not same or not error <= 1e-7 * largest + 1e-12:
                raise ConversionError(
                    f"cnnkern.convert: {where}: {name} differs by {error:.1e} (largest value {largest:.1e}); "
                    "the model is left as it was"
                )


def check_module(name: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"cnnkern.{name}: expected a torch.nn.Module; got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"cnnkern.{name}: a torch.jit module cannot be converted; convert the model before scripting it"
        )


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside of torch.compile's, which loses attributes of its own when it is copied."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # which takes a second to import, and there is none without it
    return model._orig_mod if dynamo is not None and isinstance(model, dynamo.OptimizedModule) else model


def _sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree around the same parameters and buffers."""
    shared = {id(t): t for module in model.modules() for t in (*module._parameters.values(), *module._buffers.values())}
    return copy.deepcopy(model, memo=shared)


class _Folder(Protocol):
    """What cnnkern.fold does with the convolutions of a model before its norms are converted."""

    def fold(self, holder: nn.Module, graph: fx.Graph | None, alone: Callable[[nn.Module], bool]) -> set[fx.Node]:
        """Exchanges a holder's convolutions, read from its trace or, without one, in their order in a sequential.

        Returns the additions that they take over. A module is `alone` if nobody but its holder can see it.
        """

    def finish(self, model: nn.Module) -> dict[int, str]:
        """Exchanges the convolutions that are left, and returns what was made of which, by id."""


def convert_layers(model: nn.Module, folder: _Folder | None = None) -> ConversionReport:
    """Exchanges a model's layers where they are; its convolutions by `folder`, before the norms, if there is one."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    holders = [
        (path, m) for path, m in model.named_modules() if m._modules and not isinstance(m, torch.jit.ScriptModule)
    ]
    # Of one that was converted before, by itself, the layers are what they can be.
    traces = {
        id(m): None if isinstance(m, Rewritten) else trace(m)
        for _, m in holders
        if not isinstance(m, nn.Sequential) or _overrides_forward(m)
    }
    # A layer that a module further up calls, or whose parameters it reads, has users that its holder's trace does not
    # show.
    reached = {
        id(holder.get_submodule(node.target))
        for _, holder in holders
        for node in module_calls(traces.get(id(holder)))
        if "." in node.target
    } | {
        id(holder.get_submodule(node.target.rpartition(".")[0]))
        for _, holder in holders
        for node in (traces.get(id(holder)) or fx.Graph()).nodes
        if node.op == "get_attr"
    }
    untraced = [m for _, m in holders if id(m) in traces and traces[id(m)] is None]
    reached = reached.union(kept_elsewhere(model), *map(reached_by, untraced))
    became: dict[int, str] = {}  # batch norms by what they became
    reasons: dict[int, str] = {}  # those that took nothing of what follows, by why
    adds: list[Replacement] = []

    def alone(module: nn.Module) -> bool:
        return not is_apart(module) and len(paths[id(module)]) == 1 and id(module) not in reached

    def fusable(norm: nn.Module) -> bool:
        return type(norm) in DIMENSIONS and alone(norm)

    def why(holder: nn.Module, name: str, norm: nn.Module) -> str:
        if is_apart(norm):
            return why_apart(norm)
        if len(paths[id(norm)]) > 1:
            return "stands in several places"
        if id(norm) in reached:
            return "is reached from a module further up"
        graph = traces.get(id(holder))
        if graph is not None:
            return why_alone(holder, graph, name)
        if id(holder) in traces:
            return f"the forward pass of {type(holder).__name__} cannot be traced, or may branch"
        names = [n for n, m in holder._modules.items() if not is_identity(m)]
        following = [holder._modules[n] for n in names[names.index(name) + 1 :]]
        return follows(following[0]) if following else f"nothing follows in its {type(holder).__name__}"

    for _, holder in holders:
        for name, norm in holder._modules.items():
            if type(norm) in DIMENSIONS:
                reasons.setdefault(id(norm), why(holder, name, norm))

    for path, holder in holders:
        graph = traces.get(id(holder))
        if graph is None and id(holder) in traces:
            continue
        added = set() if folder is None else folder.fold(holder, graph, alone)
        if graph is None:
            became |= _convert_sequential(holder, fusable)
            continue
        for fusion in fusions(holder, graph, fusable, added):
            exchange(fusion.norm, (ADD_CLASSES if fusion.add else ACT_CLASSES)[fusion.act])
            became[id(fusion.norm)] = kind_of(fusion.act, fusion.add is not None)
        adds += [Replacement(f"{path}.{node.name}".lstrip("."), "add + ReLU") for node in rewrite(holder, graph)]
    if folder is not None:
        became |= folder.finish(model)
    report, plain = ConversionReport(), exchanged_alone()
    for path, module in model.named_modules():
        if id(module) in became:
            report.entries.append(Replacement(path, became[id(module)]))
        elif type(module) in DIMENSIONS:
            exchange(module, ACT_CLASSES["none"])
            report.entries.append(Replacement(path, "BatchNorm", reasons.get(id(module), "the model is this layer")))
        elif type(module) in plain and plain[type(module)][1](module):
            exchange(module, {type(module): plain[type(module)][0]})
            report.entries.append(Replacement(path, kind_alone(module)))
        elif isinstance(module, NORMS) and type(module) not in originals():
            report.entries.append(Replacement(path, "", f"{type(module).__name__} has a forward pass of its own"))
    report.entries += adds
    return report


def _convert_sequential(holder: nn.Sequential, fusable) -> dict[int, str]:
    """Exchanges the pairs of a plain nn.Sequential; its batch norms by what they became."""
    names, became = [n for n, m in holder._modules.items() if not is_identity(m)], {}
    for name, following in itertools.pairwise(names):
        norm, activation = holder._modules[name], holder._modules[following]
        act = act_of_module(activation)
        if fusable(norm) and act is not None:
            holder._modules[following] = Absorbed(activation).train(activation.training)
            exchange(norm, ACT_CLASSES[act])
            became[id(norm)] = kind_of(act, add=False)
    return became


def _overrides_forward(module: nn.Sequential) -> bool:
    return type(module).forward is not nn.Sequential.forward or "forward" in module.__dict__
