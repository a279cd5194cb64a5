"""The pass over graphs of torch.compile that fuses a batch norm with the addition and activation after it."""

import math
import operator
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_custom_graph_passes, get_hash_for_files
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import TorchDispatchMode

_bn_act = torch.ops.cnnkern.bn_act.default
_bn_add_act = torch.ops.cnnkern.bn_add_act.default

_WITHOUT_NUMBERS = ("relu", "sigmoid", "silu", "hardswish", "mish", "hardsigmoid")


class JoinBatchNorms(CustomGraphPass):
    """Replaces ``cnnkern::bn_act(act="none")`` and what uses its result (an addition, an activation, or both) by one
    operator of cnnkern.

    It only fuses adjacent nodes of the graph, each the only user of the one before it. So nothing happens between them,
    and nothing else sees the tensors between them. A node is not identified by its name: it is run on tensors without
    data, and has to call exactly one ATen operator, which the kernel computes too. The new result has to have the
    shape, dtype, device and strides of the old one.

    Inductor runs the pass before autograd, so the gradient is that of the fused operator.
    """

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=_bn_act):
            _join(node)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


PASS = JoinBatchNorms()


def install() -> None:
    """Makes Inductor run the pass, after those that it already runs."""
    passes = get_custom_graph_passes(config.pre_grad_custom_pass)
    if not any(isinstance(p, JoinBatchNorms) for p in passes):
        config.pre_grad_custom_pass = [*passes, PASS]


class _Call(NamedTuple):
    """A call of an operator: its name, its arguments by their names, and whether it writes to the first of them."""

    name: str
    arguments: dict[str, Any]
    in_place: bool


def _by_name(schema: torch.FunctionSchema, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    defaults = {a.name: a.default_value for a in schema.arguments}
    return defaults | dict(zip(defaults, args, strict=False)) | kwargs


class _Record(TorchDispatchMode):
    """Records the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        schema = func._schema
        name, in_place = schema.name.removeprefix("aten::"), schema.is_mutable
        found = _Call(name.removesuffix("_") if in_place else name, _by_name(schema, args, kwargs or {}), in_place)
        self.calls.append(found)
        return func(*args, **(kwargs or {}))


def _fake(node: fx.Node) -> FakeTensor | None:
    """torch.compile's fake tensor for a node's result, if that is a plain tensor."""
    value = node.meta.get("example_value")
    return value if type(value) is FakeTensor else None


def _call_of(node: fx.Node) -> _Call | None:
    """The only operator that a node calls, with nodes as its tensor arguments; None if it calls none or several."""
    result = _fake(node)
    inputs = [(n, _fake(n)) for n in node.all_input_nodes]
    if result is None or node.op not in ("call_function", "call_method") or any(value is None for _, value in inputs):
        return None
    with result.fake_mode, torch.no_grad(), _Record() as record:
        copies = {n: torch.empty_like(value) for n, value in inputs}
        record.calls.clear()
        args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
        if node.op == "call_method":
            getattr(args[0], node.target)(*args[1:], **kwargs)
        else:
            node.target(*args, **kwargs)
    if len(record.calls) != 1:
        return None
    nodes = {id(copy): n for n, copy in copies.items()}
    (call,) = record.calls
    return call._replace(arguments={name: nodes.get(id(value), value) for name, value in call.arguments.items()})


def _residual(call: _Call, addition: fx.Node, norm: fx.Node) -> fx.Node | None:
    """The other term of an addition; None if this is no addition, or if it writes to a tensor that others use."""
    first, second = (call.arguments.get(name) for name in ("self", "other"))
    if call.name != "add" or call.arguments["alpha"] != 1 or first is second:
        return None
    if first is norm:
        return second if isinstance(second, fx.Node) else None
    if second is not norm or not isinstance(first, fx.Node):
        return None
    return None if call.in_place and not _is_seen_by_none_but(first, addition) else first


def _is_seen_by_none_but(term: fx.Node, user: fx.Node) -> bool:
    """Whether one of cnnkern's operators created this tensor, and only one node uses it."""
    made = term.args[0] if term.target is operator.getitem else None
    ours = isinstance(made, fx.Node) and made.target in (_bn_act, _bn_add_act) and list(made.users) == [term]
    return ours and list(term.users) == [user]


def _finite(number: Any, in_place: bool) -> bool:
    """Whether the kernels support an activation's parameter. In place, PyTorch refuses the gradient of a negative
    one."""
    return isinstance(number, int | float) and math.isfinite(number) and not (in_place and number < 0)


def _activation(call: _Call, tensor: fx.Node) -> tuple[str, float | None] | None:
    """The activation that is applied to a tensor, and its parameter; None if cnnkern does not have it."""
    rest = dict(call.arguments)
    if rest.pop("self", None) is not tensor:
        return None
    if call.name in _WITHOUT_NUMBERS:
        return None if rest else (call.name, None)
    match call.name, rest:
        case "hardtanh", {"min_val": 0, "max_val": 6}:
            return "relu6", None
        case "gelu", {"approximate": "none" | "tanh" as form}:
            return ("gelu" if form == "none" else "gelu_tanh"), None
        case "leaky_relu", {"negative_slope": number} if _finite(number, call.in_place):
            return "leaky_relu", float(number)
        case "elu", {"alpha": number, "scale": 1, "input_scale": 1} if _finite(number, call.in_place):
            return "elu", float(number)
    return None


def _next(node: fx.Node) -> fx.Node | None:
    """The next node, if it is the only user of this one."""
    return node.next if list(node.users) == [node.next] else None


def _join(norm: fx.Node) -> None:
    arguments = _by_name(_bn_act._schema, norm.args, norm.kwargs)
    last = _next(norm)
    if arguments["act"] != "none" or last is None or last.target is not operator.getitem or last.args[1] != 0:
        return
    residual: fx.Node | None = None
    act: tuple[str, float | None] = ("none", None)
    chain = [norm, last]
    while act[0] == "none" and (following := _next(last)) is not None and (call := _call_of(following)) is not None:
        if residual is None and (other := _residual(call, following, last)) is not None:
            residual = other
        elif (found := _activation(call, last)) is not None:
            act = found
        else:
            break
        last = following
        chain.append(last)
    if len(chain) > 2:
        _replace(chain, arguments, residual, act)


def _replace(
    chain: list[fx.Node], arguments: dict[str, Any], residual: fx.Node | None, act: tuple[str, float | None]
) -> None:
    """Replaces these nodes by one operator, if its result has the same metadata."""
    joined, tensors = (_bn_act, ()) if residual is None else (_bn_add_act, (residual,))
    x, *others = arguments.values()
    args = (x, *tensors, *others[:-2], *act)
    result = _fake(chain[-1])
    made = _run(joined, args, result)
    if made is None:
        return
    graph = chain[0].graph
    with graph.inserting_before(chain[0]):
        node = graph.call_function(joined, args)
        y = graph.call_function(operator.getitem, (node, 0))
    node.meta, y.meta = chain[-1].meta | {"example_value": made}, dict(chain[-1].meta)
    chain[-1].replace_all_uses_with(y)
    for old in reversed(chain):
        graph.erase_node(old)


def _run(joined: Any, args: tuple[Any, ...], result: FakeTensor | None) -> tuple[Any, ...] | None:
    """The fake results of the fused operator; None if the first one differs from the old result."""
    values = fx.map_arg(args, _fake)
    x, tensors = values[0], [v for v in values[1:] if isinstance(v, FakeTensor) and v.dim() > 1]
    if result is None or any(not _alike(t, x) for t in tensors):
        return None
    with result.fake_mode, torch.no_grad():
        # The operator writes to running statistics, so vectors are copied.
        made = joined(*(torch.empty_like(v) if isinstance(v, FakeTensor) and v.dim() == 1 else v for v in values))
    y = made[0]
    same = _alike(y, result) and all(map(statically_known_true, map(operator.eq, y.stride(), result.stride())))
    return made if same else None


def _alike(a: FakeTensor, b: FakeTensor) -> bool:
    """Whether these have the same shape, dtype and device."""
    if a.dim() != b.dim() or a.dtype != b.dtype or a.device != b.device:
        return False
    return all(statically_known_true(m == n) for m, n in zip(a.shape, b.shape, strict=True))
