"""What a module's own forward pass does with its layers: runs of operations that one operator of ours computes.

They are read from its trace (tracing.py).
"""

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from cnnkern.conversion.activations import act_of_module, is_apart, why_apart
from cnnkern.conversion.layers import Absorbed, Moved
from cnnkern.conversion.tracing import is_fixed, module_calls
from cnnkern.nn.folded_conv import FoldedConv

# Functions that compute an activation of ours, and nothing else.
_FUNCTIONS = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_), "relu"),
    F.relu6: "relu6",
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), "leaky_relu"),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, torch.sigmoid_), "sigmoid"),
    F.silu: "silu",
    F.hardswish: "hardswish",
}
_METHODS = {"relu": "relu", "relu_": "relu", "sigmoid": "sigmoid", "sigmoid_": "sigmoid"}
_ADDS = {operator.add, operator.iadd, torch.add}
_ADD_METHODS = {"add", "add_", "__add__", "__iadd__", "__radd__"}
IN_PLACE_ADDS = {operator.iadd, "add_", "__iadd__"}
# The last stands for a convolution whose input has been seen to stay as it is.
_FRESH = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.Linear, FoldedConv, Moved)


def _makes_its_output(module: nn.Module) -> bool:
    """Whether this is a layer, of torch's or ours, whose output is a tensor of its own and whose input stays as it is:
    a subclass may return what it was given."""
    return isinstance(module, _FRESH) and type(module).__module__.startswith(("torch.nn.", "cnnkern."))


def only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _act_of(holder: nn.Module, node: fx.Node) -> str | None:
    """The activation that this call applies to its first argument, if it is one of ours with its usual parameters."""
    if node.op == "call_module":
        return act_of_module(holder.get_submodule(node.target))
    usual = {"negative_slope": 0.01}
    plain = len(node.args) == 1 and all(k == "inplace" or (k, v) in usual.items() for k, v in node.kwargs.items())
    if node.op == "call_function" and plain:
        return _FUNCTIONS.get(node.target)
    return _METHODS.get(node.target) if node.op == "call_method" and plain else None


def _activation_after(holder: nn.Module, node: fx.Node) -> tuple[fx.Node | None, str]:
    """The activation that is the one user of a node, and its name; (None, "none") without."""
    user = only_user(node)
    act = _act_of(holder, user) if user is not None and user.args and user.args[0] is node else None
    if act is not None and is_fixed(node.graph) and not is_once_called_child(user):
        act = None
    return (None, "none") if act is None else (user, act)


def is_once_called_child(node: fx.Node) -> bool:
    """Whether this is the one call of a child, which can be bypassed without another forward pass."""
    if node.op != "call_module" or "." in node.target:
        return False
    return sum(other.target == node.target for other in module_calls(node.graph)) == 1


def _is_add(node: fx.Node) -> bool:
    called = (node.op == "call_function" and node.target in _ADDS) or (
        node.op == "call_method" and node.target in _ADD_METHODS
    )
    return called and not node.kwargs and len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args)


def _may_write(holder: nn.Module, node: fx.Node) -> bool:
    """Whether the call may change one of its arguments in place."""
    if node.op == "call_module":
        module = holder.get_submodule(node.target)
        return getattr(module, "inplace", not _makes_its_output(module))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "_")
    return (
        name.endswith("_")
        or name.startswith("__i")
        or node.target is operator.iadd
        or bool(node.kwargs.get("inplace"))
        or "out" in node.kwargs
    )


@dataclass
class Fusion:
    """A batch norm with what follows it in the holder's graph."""

    norm: nn.Module
    call: fx.Node
    add: fx.Node | None
    residual: fx.Node | None
    activation: fx.Node | None
    act: str


def fusion_at(holder: nn.Module, call: fx.Node, with_add: bool = True) -> Fusion:
    """The longest run of operations from this batch norm on that one operator computes."""
    norm = holder.get_submodule(call.target)
    add = only_user(call)
    with_add = with_add and not is_fixed(call.graph)
    if with_add and add is not None and _is_add(add) and add.args[0] is not add.args[1]:
        residual = add.args[1] if add.args[0] is call else add.args[0]
        # An addition in place changes its first argument: the batch norm's output, which nobody else sees.
        if not (add.target in IN_PLACE_ADDS and add.args[0] is residual) and can_wait(holder, call, add):
            activation, act = _activation_after(holder, add)
            if act in ("relu", "none"):
                return Fusion(norm, call, add, residual, activation, act)
            return Fusion(norm, call, add, residual, None, "none")
    activation, act = _activation_after(holder, call)
    return Fusion(norm, call, None, None, activation, act)


def can_wait(holder: nn.Module, call: fx.Node, add: fx.Node) -> bool:
    """Whether the batch norm may be computed where its output is added: its input is still the same there."""
    if len(call.args) != 1 or call.kwargs or not isinstance(call.args[0], fx.Node):
        return False
    source = call.args[0]
    if is_unseen(holder, source):
        return True
    node = call.next
    while node is not add:
        if _may_write(holder, node):
            return False
        node = node.next
    return True


def fusions(
    holder: nn.Module, graph: fx.Graph, fusable: Callable[[nn.Module], bool], added: set[fx.Node]
) -> list[Fusion]:
    """Of the batch norms that are `fusable`; additions are put into `added`, and those there already left alone."""
    calls = module_calls(graph)
    count = Counter(n.target for n in calls)
    found = []
    for call in calls:
        if count[call.target] != 1 or not fusable(holder.get_submodule(call.target)):
            continue
        fusion = fusion_at(holder, call)
        if fusion.add in added:  # the sum of two batch norms: the first has it
            fusion = fusion_at(holder, call, with_add=False)
        if fusion.add is not None:
            added.add(fusion.add)
        if fusion.add is not None or fusion.activation is not None:
            found.append(fusion)
    return found


def follows(module: nn.Module) -> str:
    """That this module follows, and no operator computes it with what it follows."""
    named = type(module).__name__ if module._modules else repr(module)
    return f"{named} follows" + (f", which {why_apart(module)}" if is_apart(module) else "")


def why_alone(holder: nn.Module, graph: fx.Graph, name: str) -> str:
    """Why the child batch norm of this name took nothing of what follows it."""
    calls = [n for n in module_calls(graph) if n.target == name]
    if len(calls) != 1:
        return f"is called {len(calls)} times" if calls else f"is not called by {type(holder).__name__}"
    user = only_user(calls[0])
    if user is None:
        return f"its output is used {len(calls[0].users)} times"
    if user.op == "output":
        return f"its output is that of {type(holder).__name__}"
    if user.op == "call_module":
        return follows(holder.get_submodule(user.target))
    if _is_add(user) and user.args[0] is not user.args[1]:
        residual = user.args[1] if user.args[0] is calls[0] else user.args[0]
        if user.target in IN_PLACE_ADDS and user.args[0] is residual:
            return "it is added to another tensor in place"
        if not can_wait(holder, calls[0], user):
            return "its input changes before it is added"
        return "the other addend of the sum has the addition"
    return f"{user.target if isinstance(user.target, str) else user.target.__name__} follows"


def _is_fresh(module: nn.Module) -> bool:
    """Whether the module's output is a tensor of its own, no view of its input, that no hook has seen."""
    if is_apart(module):
        return False
    if type(module) is nn.Sequential and len(module):
        return _is_fresh(module[-1])
    return _makes_its_output(module)


def is_unseen(holder: nn.Module, node: fx.Node) -> bool:
    """Whether the tensor is one that a layer of this holder made, perhaps activated since, and has one reader."""
    if len(node.users) != 1:
        return False
    module = holder.get_submodule(node.target) if node.op == "call_module" else None
    if isinstance(module, Absorbed) or _act_of(holder, node) is not None:
        return isinstance(node.args[0], fx.Node) and is_unseen(holder, node.args[0])
    return module is not None and _is_fresh(module)


def add_relu_at(holder: nn.Module, node: fx.Node) -> fx.Node | None:
    """The ReLU behind this addition, if both may become one call."""
    if not _is_add(node) or is_fixed(node.graph):
        return None
    relu, act = _activation_after(holder, node)
    if act != "relu":
        return None
    if node.target in IN_PLACE_ADDS:
        target = node.args[0]
        own = target.op == "call_module" and _is_fresh(holder.get_submodule(target.target))
        if not own or only_user(target) is not node:
            return None
    return relu


def is_view(holder: nn.Module, node: fx.Node) -> bool:
    """Whether this is a ``view`` of another shape that nobody writes to: ``reshape`` takes channels_last as well."""
    if (
        is_fixed(node.graph)
        or node.op != "call_method"
        or node.target != "view"
        or any(isinstance(a, torch.dtype) for a in node.args)
    ):
        return False

    def writes(user: fx.Node) -> bool:
        if user.op == "call_module":
            return getattr(holder.get_submodule(user.target), "inplace", False)
        return _may_write(holder, user)

    return not node.kwargs and not any(writes(user) for user in node.users)
