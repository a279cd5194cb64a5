"""Converts a model that someone else wrote to the fused layers, in place or as a copy that shares its parameters.

A batch norm is exchanged by giving the module another class, so that it keeps its parameters, its place and its hooks.
What follows it is read from a `torch.fx` trace of the forward pass of the module that holds both, with every child a
leaf. An activation that a batch norm has absorbed is bypassed: its entry is exchanged for an identity where one call
is all it has, else (one `self.relu` for several calls, `F.relu`) the holder's forward pass is replaced by its trace
without that call. Residual additions, which are no modules, are always replaced in the trace. Where tracing fails, the
batch norms are exchanged without what follows, which never changes a meaning. Grouped convolutions and layer norms
are exchanged alone.
"""

import copy
import itertools
import operator
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from cnnkern import reference
from cnnkern.nn import batchnorm, layer_norm, sync
from cnnkern.nn.conv import GroupedConv2d
from cnnkern.nn.folded_conv import FoldedConv
from cnnkern.ops.add_relu import add_relu
from cnnkern.ops.bn_act import batch_norm_act

_DIMENSIONS = {nn.BatchNorm1d: "1d", nn.BatchNorm2d: "2d", nn.BatchNorm3d: "3d"}
# act -> modules and functions that compute it, and nothing else, for any arguments they may have been given.
_MODULES = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}
_FUNCTIONS = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_), "relu"),
    F.relu6: "relu6",
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), "leaky_relu"),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, torch.sigmoid_), "sigmoid"),
    F.silu: "silu",
    F.hardswish: "hardswish",
}
_METHODS = {"relu": "relu", "relu_": "relu", "sigmoid": "sigmoid", "sigmoid_": "sigmoid"}
_NAMES = {"relu": "ReLU", "relu6": "ReLU6", "leaky_relu": "LeakyReLU", "sigmoid": "Sigmoid", "silu": "SiLU"}
_NAMES |= {"hardswish": "Hardswish"}
_ADDS = {operator.add, operator.iadd, torch.add}
_ADD_METHODS = {"add", "add_", "__add__", "__iadd__", "__radd__"}
_IN_PLACE_ADDS = {operator.iadd, "add_", "__iadd__"}


def _classes(kind: type, name: str, namespace: dict[str, Any]) -> dict[type, type]:
    """torch's batch norms -> ours of the same dimensions with `kind` before them and a class attribute or two."""
    found = {}
    for plain, dimensions in _DIMENSIONS.items():
        cls = type(f"{name}{dimensions}", (kind, plain), {"__module__": __name__, **namespace})
        globals()[cls.__name__] = cls  # where pickle looks for it
        found[plain] = cls
    return found


class _AddsWhatFits(batchnorm._FusedBatchNormAdd):
    """A residual that the fused operator does not take, one that is broadcast or promoted, is added as it was."""

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        if isinstance(residual, Tensor) and _alike(input, residual):
            return super().forward(input, residual)
        y = self._normalize(input, lambda *arguments: batch_norm_act(*arguments[:-1], "none"))
        return reference.ACTIVATIONS[self.act](y + residual)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def _add_relu(a: Any, b: Any) -> Any:
    """``relu(a + b)``: fused where the operator takes both, else as it was."""
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_floating_point() and _alike(a, b):
        return add_relu(a, b)
    return torch.relu(a + b)


_ACT_CLASSES = {
    "none": {plain: getattr(batchnorm, f"BatchNorm{d}") for plain, d in _DIMENSIONS.items()},
    "relu": {plain: getattr(batchnorm, f"BatchNormReLU{d}") for plain, d in _DIMENSIONS.items()},
    **{
        act: _classes(batchnorm._FusedBatchNorm, f"BatchNorm{_NAMES[act]}", {"act": act})
        for act in ("relu6", "leaky_relu", "sigmoid", "silu", "hardswish")
    },
}
_ADD_CLASSES = {
    act: _classes(_AddsWhatFits, f"BatchNormAdd{_NAMES.get(act, '')}", {"act": act}) for act in ("none", "relu")
}
_ORIGINAL = {
    fused: plain
    for tables in (_ACT_CLASSES, _ADD_CLASSES)
    for table in tables.values()
    for plain, fused in table.items()
}
# A converted model may have been synchronised since; torch's own synchronised one is what stays.
_ORIGINAL |= dict.fromkeys((sync.SyncBatchNorm, sync.SyncBatchNormReLU, sync.SyncBatchNormAddReLU), nn.SyncBatchNorm)
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)


def _plain() -> dict[type, tuple[type, Callable[[Any], bool]]]:
    """Layers that are exchanged alone -> what for, and whether to.

    torchvision's layer norm is no part of torch; a model that has one has imported it.
    """

    def always(_: nn.Module) -> bool:
        return True

    convnext = sys.modules.get("torchvision.models.convnext")
    theirs = {} if convnext is None else {convnext.LayerNorm2d: (layer_norm.LayerNorm2d, always)}
    return theirs | {
        nn.Conv2d: (GroupedConv2d, lambda conv: conv.groups > 1),
        nn.LayerNorm: (layer_norm.LayerNorm, always),
    }


def _originals() -> dict[type, type]:
    """Our layers -> those that they were."""
    return _ORIGINAL | {ours: plain for plain, (ours, _) in _plain().items()}


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


class _Absorbed(nn.Identity):
    """Stands where an activation stood that the layer before it now applies."""

    inplace = False

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._original = (original,)  # in a tuple, so that it is no submodule

    def extra_repr(self) -> str:
        return f"{self._original[0]!r} in the layer before"


class _Moved(nn.Identity):
    """Stands where a convolution stood that is now computed where the batch norm behind it stood."""

    inplace = False

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._text = repr(original)

    def extra_repr(self) -> str:
        return f"{self._text} in the layer behind"


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
    _check_module("convert", model)
    if verify is not None:
        _verify(model, verify if isinstance(verify, tuple) else (verify,))
    if not inplace:
        model = _sharing_copy(model)
    if "_cnnkern_report" not in model.__dict__:
        model.__dict__["_cnnkern_report"] = _convert(model)
    return model


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


def revert(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Undoes :func:`convert`: the model as it was, with the parameters and statistics that it has now."""
    _check_module("revert", model)
    if any(isinstance(m, FoldedConv) for m in model.modules()):
        raise TypeError(
            "cnnkern.revert: a folded model has no batch norms to go back to; the model that was folded has"
        )
    if not inplace:
        model = _sharing_copy(model)
    for module in list(model.modules()):
        if isinstance(module, _Rewritten):
            module.__class__ = module._original_class
        if module.__dict__.pop("_cnnkern_converted", False):
            module.__class__ = _originals()[type(module)]
            module.__dict__.pop("act", None)
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


class _Folder(Protocol):
    """What cnnkern.fold does with the convolutions of a model before its norms are converted."""

    def fold(self, holder: nn.Module, graph: fx.Graph | None, alone: Callable[[nn.Module], bool]) -> set[fx.Node]:
        """Exchanges a holder's convolutions, read from its trace or, without one, in their order in a sequential.

        Returns the additions that they take over. A module is `alone` if nobody but its holder can see it.
        """

    def finish(self, model: nn.Module) -> dict[int, str]:
        """Exchanges the convolutions that are left, and returns what was made of which, by id."""


def _convert(model: nn.Module, folder: _Folder | None = None) -> ConversionReport:
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    holders = [
        (path, m) for path, m in model.named_modules() if m._modules and not isinstance(m, torch.jit.ScriptModule)
    ]
    traces = {id(m): _trace(m) for _, m in holders if not isinstance(m, nn.Sequential) or _overrides_forward(m)}
    # A layer that a module further up calls, or whose parameters it reads, has users that its holder's trace does not
    # show.
    reached = {
        id(holder.get_submodule(node.target))
        for _, holder in holders
        for node in _calls(traces.get(id(holder)))
        if "." in node.target
    } | {
        id(holder.get_submodule(node.target.rpartition(".")[0]))
        for _, holder in holders
        for node in (traces.get(id(holder)) or fx.Graph()).nodes
        if node.op == "get_attr"
    }
    became: dict[int, str] = {}  # batch norms by what they became
    adds: list[Replacement] = []

    def alone(module: nn.Module) -> bool:
        return not _has_hooks(module) and len(paths[id(module)]) == 1 and id(module) not in reached

    def fusable(norm: nn.Module) -> bool:
        return type(norm) in _DIMENSIONS and alone(norm)

    for path, holder in holders:
        graph = traces.get(id(holder))
        if graph is None and id(holder) in traces:
            continue
        added = set() if folder is None else folder.fold(holder, graph, alone)
        if graph is None:
            became |= _convert_sequential(holder, fusable)
            continue
        for fusion in _fusions(holder, graph, fusable, added):
            _exchange(fusion.norm, (_ADD_CLASSES if fusion.add else _ACT_CLASSES)[fusion.act])
            became[id(fusion.norm)] = _kind(fusion.act, fusion.add is not None)
        adds += [Replacement(f"{path}.{node.name}".lstrip("."), "add + ReLU") for node in _rewrite(holder, graph)]
    if folder is not None:
        became |= folder.finish(model)
    report, plain = ConversionReport(), _plain()
    for path, module in model.named_modules():
        if id(module) in became:
            report.entries.append(Replacement(path, became[id(module)]))
        elif type(module) in _DIMENSIONS:
            _exchange(module, _ACT_CLASSES["none"])
            report.entries.append(Replacement(path, "BatchNorm"))
        elif type(module) in plain and plain[type(module)][1](module):
            _exchange(module, {type(module): plain[type(module)][0]})
            report.entries.append(Replacement(path, type(module).__name__))
        elif isinstance(module, _NORMS) and type(module) not in _originals():
            report.entries.append(Replacement(path, "", f"{type(module).__name__} has a forward pass of its own"))
    report.entries += adds
    return report


def _kind(act: str, add: bool) -> str:
    return "BatchNorm" + " + add" * add + (f" + {_NAMES[act]}" if act != "none" else "")


def _exchange(module: nn.Module, table: dict[type, type]) -> None:
    module.__class__ = table[type(module)]
    module.__dict__["_cnnkern_converted"] = True


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


class _Proxy(fx.Proxy):
    """A proxy that records ``a += b`` as what it is; torch.fx's own would make it ``a = a + b``."""


def _recorded(function: Callable[[Any, Any], Any]) -> Callable[[_Proxy, Any], fx.Proxy]:
    return lambda proxy, other: proxy.tracer.create_proxy("call_function", function, (proxy, other), {})


for _name in fx.graph.inplace_methods:
    setattr(_Proxy, f"__{_name}__", _recorded(getattr(operator, _name)))


class _OwnForward(fx.Tracer):
    """Traces a module's own forward pass; every child is a leaf."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

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


def _act_of_module(module: nn.Module) -> str | None:
    if _has_hooks(module) or (type(module) is nn.LeakyReLU and module.negative_slope != 0.01):
        return None
    return _MODULES.get(type(module))


def _act_of(holder: nn.Module, node: fx.Node) -> str | None:
    """The activation that this call applies to its first argument, if it is one of ours with its usual parameters."""
    if node.op == "call_module":
        return _act_of_module(holder.get_submodule(node.target))
    usual = {"negative_slope": 0.01}
    plain = len(node.args) == 1 and all(k == "inplace" or (k, v) in usual.items() for k, v in node.kwargs.items())
    if node.op == "call_function" and plain:
        return _FUNCTIONS.get(node.target)
    return _METHODS.get(node.target) if node.op == "call_method" and plain else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _activation_after(holder: nn.Module, node: fx.Node) -> tuple[fx.Node | None, str]:
    """The activation that is the one user of a node, and its name; (None, "none") without."""
    user = _only_user(node)
    act = _act_of(holder, user) if user is not None and user.args and user.args[0] is node else None
    return (None, "none") if act is None else (user, act)


def _is_add(node: fx.Node) -> bool:
    called = (node.op == "call_function" and node.target in _ADDS) or (
        node.op == "call_method" and node.target in _ADD_METHODS
    )
    return called and not node.kwargs and len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args)


def _may_write(holder: nn.Module, node: fx.Node) -> bool:
    """Whether the call may change one of its arguments in place."""
    if node.op == "call_module":
        module = holder.get_submodule(node.target)
        return getattr(module, "inplace", not isinstance(module, _FRESH))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "_")
    return (
        name.endswith("_") or name.startswith("__i") or node.target is operator.iadd or bool(node.kwargs.get("inplace"))
    )


@dataclass
class _Fusion:
    """A batch norm with what follows it in the holder's graph."""

    norm: nn.Module
    call: fx.Node
    add: fx.Node | None
    residual: fx.Node | None
    activation: fx.Node | None
    act: str


def _fusion_at(holder: nn.Module, call: fx.Node, with_add: bool = True) -> _Fusion:
    """The longest run of operations from this batch norm on that one operator computes."""
    norm = holder.get_submodule(call.target)
    add = _only_user(call)
    if with_add and add is not None and _is_add(add) and add.args[0] is not add.args[1]:
        residual = add.args[1] if add.args[0] is call else add.args[0]
        # An addition in place changes its first argument: the batch norm's output, which nobody else sees.
        if not (add.target in _IN_PLACE_ADDS and add.args[0] is residual) and _can_wait(holder, call, add):
            activation, act = _activation_after(holder, add)
            if act in ("relu", "none"):
                return _Fusion(norm, call, add, residual, activation, act)
            return _Fusion(norm, call, add, residual, None, "none")
    activation, act = _activation_after(holder, call)
    return _Fusion(norm, call, None, None, activation, act)


def _can_wait(holder: nn.Module, call: fx.Node, add: fx.Node) -> bool:
    """Whether the batch norm may be computed where its output is added: its input is still the same there."""
    if len(call.args) != 1 or call.kwargs or not isinstance(call.args[0], fx.Node):
        return False
    source = call.args[0]
    if _is_unseen(holder, source):
        return True
    node = call.next
    while node is not add:
        if _may_write(holder, node):
            return False
        node = node.next
    return True


def _fusions(
    holder: nn.Module, graph: fx.Graph, fusable: Callable[[nn.Module], bool], added: set[fx.Node]
) -> list[_Fusion]:
    """Of the batch norms that are `fusable`; additions are put into `added`, and those there already left alone."""
    calls = _calls(graph)
    count = Counter(n.target for n in calls)
    found = []
    for call in calls:
        if count[call.target] != 1 or not fusable(holder.get_submodule(call.target)):
            continue
        fusion = _fusion_at(holder, call)
        if fusion.add in added:  # the sum of two batch norms: the first has it
            fusion = _fusion_at(holder, call, with_add=False)
        if fusion.add is not None:
            added.add(fusion.add)
        if fusion.add is not None or fusion.activation is not None:
            found.append(fusion)
    return found


def _convert_sequential(holder: nn.Sequential, fusable) -> dict[int, str]:
    """Exchanges the pairs of a plain nn.Sequential; its batch norms by what they became."""
    names, became = list(holder._modules), {}
    for name, following in itertools.pairwise(names):
        norm, activation = holder._modules[name], holder._modules[following]
        act = _act_of_module(activation)
        if fusable(norm) and act is not None:
            holder._modules[following] = _Absorbed(activation).train(activation.training)
            _exchange(norm, _ACT_CLASSES[act])
            became[id(norm)] = _kind(act, add=False)
    return became


# The last stands for a convolution whose input has been seen to stay as it is.
_FRESH = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.Linear, FoldedConv, _Moved)


def _is_fresh(module: nn.Module) -> bool:
    """Whether the module's output is a tensor of its own, no view of its input, that no hook has seen."""
    if _has_hooks(module):
        return False
    if type(module) is nn.Sequential and len(module):
        return _is_fresh(module[-1])
    return isinstance(module, _FRESH)


def _is_unseen(holder: nn.Module, node: fx.Node) -> bool:
    """Whether the tensor is one that a layer of this holder made, perhaps activated since, and has one reader."""
    if len(node.users) != 1:
        return False
    module = holder.get_submodule(node.target) if node.op == "call_module" else None
    if isinstance(module, _Absorbed) or _act_of(holder, node) is not None:
        return isinstance(node.args[0], fx.Node) and _is_unseen(holder, node.args[0])
    return module is not None and _is_fresh(module)


def _add_relu_at(holder: nn.Module, node: fx.Node) -> fx.Node | None:
    """The ReLU behind this addition, if both may become one call."""
    if not _is_add(node):
        return None
    relu, act = _activation_after(holder, node)
    if act != "relu":
        return None
    if node.target in _IN_PLACE_ADDS:
        target = node.args[0]
        own = target.op == "call_module" and _is_fresh(holder.get_submodule(target.target))
        if not own or _only_user(target) is not node:
            return None
    return relu


def _is_view(holder: nn.Module, node: fx.Node) -> bool:
    """Whether this is a ``view`` of another shape that nobody writes to: ``reshape`` takes channels_last as well."""
    if node.op != "call_method" or node.target != "view" or any(isinstance(a, torch.dtype) for a in node.args):
        return False

    def writes(user: fx.Node) -> bool:
        if user.op == "call_module":
            return getattr(holder.get_submodule(user.target), "inplace", False)
        return _may_write(holder, user)

    return not node.kwargs and not any(writes(user) for user in node.users)


def _absorbed_by(layer: nn.Module) -> tuple[str, bool] | None:
    """The activation and whether an addition, that the code around a layer spells out and the layer computes."""
    if isinstance(layer, FoldedConv):
        return layer.absorbs
    if "_cnnkern_converted" not in layer.__dict__ or type(layer) not in _ORIGINAL:
        return None
    adds = isinstance(layer, _AddsWhatFits)
    return None if layer.act == "none" and not adds else (layer.act, adds)


def _rewrite(holder: nn.Module, graph: fx.Graph | None) -> list[fx.Node]:
    """Takes out what the exchanged layers of this module compute by now, and joins additions with their ReLUs.

    Returns the additions that were joined. What to do is read off the graph and the exchanged layers, so
    that it can be done again on a copy.
    """
    assert graph is not None, f"the forward pass of {type(holder).__name__} could be traced before"
    count = Counter(n.target for n in _calls(graph))
    changed, joined = False, []
    for call in _calls(graph):
        absorbs = _absorbed_by(holder.get_submodule(call.target))
        if absorbs is None:
            continue
        act, adds = absorbs
        fusion = _fusion_at(holder, call, with_add=adds)
        if fusion.act != act:
            continue
        if fusion.add is None:
            if fusion.activation is None:
                continue
            target = fusion.activation.target
            if fusion.activation.op == "call_module" and count[target] == 1 and "." not in target:
                holder._modules[target] = _Absorbed(holder._modules[target])
            else:
                fusion.activation.replace_all_uses_with(call)
                graph.erase_node(fusion.activation)
                changed = True
            continue
        with graph.inserting_before(fusion.add):  # where the residual is what it was
            fused = graph.call_module(call.target, (*call.args, fusion.residual))
        (fusion.activation or fusion.add).replace_all_uses_with(fused)
        for node in filter(None, (fusion.activation, fusion.add, call)):
            graph.erase_node(node)
        changed = True
    for node in graph.nodes if "_cnnkern_reshapes" in holder.__dict__ else ():
        if _is_view(holder, node):
            node.target, changed = "reshape", True
    for node in list(graph.nodes):
        relu = _add_relu_at(holder, node)
        if relu is None:
            continue
        with graph.inserting_before(relu):
            fused = graph.call_function(_add_relu, node.args)
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
        holder.__class__ = type(cls.__name__, (_Rewritten, cls), names)
    return joined
