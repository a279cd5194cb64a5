"""Reads what a module's own forward pass does: its `torch.fx` trace, with every child a leaf.

A trace holds what one call did with proxies. It stands for the forward pass only where nothing else can happen: no way
that other arguments, another mode or chance would take, no state that changes, no context such as `no_grad`, no
function with a gradient of its own. What is seen to be more than that is not traced.
"""

import dis
import functools
import gc
import inspect
import operator
import os
import random
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterable
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.proxy import TraceError

from cnnkern.conversion.activations import is_identity

_ONE_AT_A_TIME = threading.RLock()  # torch.fx patches nn.Module while it traces

_PACKAGES = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.path.dirname(__file__)) + os.sep)
_STANDARD = sysconfig.get_path("stdlib") + os.sep
_TRACER = _PACKAGES[0] + "fx" + os.sep
# Of those, what changes more than tensors, or is another thing for autograd than for a trace.
_CONTEXTS = ("grad_mode.py", "function.py", "profiler.py")
_CONTEXTS = tuple(f"autograd/{file}" for file in _CONTEXTS) + ("amp/autocast_mode.py", "utils/_contextlib.py")
_CONTEXTS = tuple(_PACKAGES[0] + file for file in (*_CONTEXTS, "utils/checkpoint.py", "random.py"))
# What a model asks for, as torch itself does all the time.
_ASKED = (_PACKAGES[0] + "compiler/__init__.py", _STANDARD + "random.py")
_LOOKED_FOR = {*_CONTEXTS, *_ASKED}
_QUESTIONS = {"is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "is_compiling"}
_QUESTIONS |= {"random", "randint", "randperm", "rand", "randn", "rand_like", "randn_like", "bernoulli", "uniform"}
# Instructions of `with` and `except`, by Python's versions, and of `global`.
_UNTRACED = {"SETUP_WITH", "BEFORE_WITH", "BEFORE_ASYNC_WITH", "CHECK_EXC_MATCH", "JUMP_IF_NOT_EXC_MATCH", "POP_EXCEPT"}
_UNTRACED |= {"STORE_GLOBAL", "DELETE_GLOBAL"}


@functools.cache
def _is_theirs(file: str) -> bool:
    """Whether code is a model's, and not of torch, cnnkern or Python."""
    installed = "site-packages" in file or "dist-packages" in file
    return not file.startswith((*_PACKAGES, "<frozen")) and (installed or not file.startswith(_STANDARD))


class _Proxy(fx.Proxy):
    """A proxy that records ``a += b`` as what it is, where torch.fx's own would make it ``a = a + b``, and that notices
    when a model asks for its class."""

    @property
    def __class__(self) -> type:  # type: ignore[override]  # where `isinstance` looks, if the type does not answer it
        tracer = self.tracer
        if isinstance(tracer, _OwnForward) and tracer.watch.asked:  # by the model: C++ would believe it is a tensor
            tracer.asked_for_class = True
            return Tensor if tracer.as_tensors else _Proxy
        return _Proxy


def _recorded(function: Callable[[Any, Any], Any]) -> Callable[[_Proxy, Any], fx.Proxy]:
    return lambda proxy, other: proxy.tracer.create_proxy("call_function", function, (proxy, other), {})


for _name in fx.graph.inplace_methods:
    setattr(_Proxy, f"__{_name}__", _recorded(getattr(operator, _name)))


class _OwnForward(fx.Tracer):
    """Traces a module's own forward pass; every child is a leaf, parameters and buffers are proxies."""

    def __init__(self, watch: "_Watch", as_tensors: bool) -> None:
        super().__init__()
        self.watch = watch
        self.proxy_buffer_attributes = True
        self.as_tensors, self.asked_for_class = as_tensors, False
        self.thread = threading.get_ident()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:  # another one's module
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, dict | list) and type(a) not in (dict, list, immutable_dict, immutable_list):
            raise TraceError(f"a trace would make a plain one of a {type(a).__name__}")
        return super().create_arg(a)


@functools.cache
def _instructions(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The names of a function's instructions, and the local names that it tests for None or asks for what they are."""
    found = list(dis.get_instructions(code))
    tested = set()
    for i, instruction in enumerate(found):
        if not instruction.opname.startswith("LOAD_FAST"):
            continue
        names = instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
        following = found[i + 1 : i + 3]
        none = bool(following) and "_NONE" in following[0].opname
        none |= len(following) == 2 and following[0].argval is None and following[1].opname == "IS_OP"
        before = next((f for f in reversed(found[:i]) if f.opname not in ("PUSH_NULL", "CACHE", "PRECALL")), None)
        asked = before is not None and before.argval in ("hasattr", "type", "callable")
        tested.update(names[-1:] * none + names[:1] * asked)
    return frozenset(f.opname for f in found), frozenset(tested)


class _Watch:
    """Sees what a forward pass calls while it is traced, in this thread alone, and ends it before it does what a trace
    cannot hold."""

    def __init__(self) -> None:
        self.more = False  # than a trace holds: known also if the model has caught the error
        self.asked = False  # whether the model is calling isinstance
        self.before: Any = None
        self.collects = True

    def __enter__(self) -> "_Watch":
        self.before, self.collects = sys.getprofile(), gc.isenabled()
        gc.disable()  # what it calls would seem to be called by the model
        sys.setprofile(self.event)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self.before)
        if self.collects:
            gc.enable()

    def event(self, frame: FrameType, event: str, called: Any) -> None:
        file, more = frame.f_code.co_filename, False
        theirs = _is_theirs(file)
        if event == "call":
            more = self.enters(frame) if theirs else file in _LOOKED_FOR and self.leaves(frame)
        elif event == "return" or not theirs:
            return
        elif called is isinstance:
            self.asked = event == "c_call"
        elif event == "c_call":
            more = self.asks(called)
        if more:  # what is called is not run then
            self.more = True
            raise TraceError("the forward pass does more than a trace holds")

    @staticmethod
    def asks(called: Any) -> bool:
        """Whether this function of C's, which the model calls, may answer otherwise another time: a tensor's, whose
        values are not a trace's to know or to change, or one of chance."""
        owner = getattr(called, "__self__", None)
        return (
            called.__name__ in _QUESTIONS
            or issubclass(type(owner), Tensor)
            or isinstance(owner, random.Random)
            or type(owner).__module__.startswith("numpy.random")
            or (isinstance(owner, type) and issubclass(owner, torch.autograd.Function))
        )

    @staticmethod
    def enters(frame: FrameType) -> bool:
        """Whether this function of the model does more than a trace holds."""
        code, caller = frame.f_code, "" if frame.f_back is None else frame.f_back.f_code.co_filename
        if not (_is_theirs(caller) or caller.startswith(_TRACER)):  # a handler of torch's log, for one
            return False
        names, tested = _instructions(code)
        if not _UNTRACED.isdisjoint(names):
            return True
        arguments = frame.f_locals
        first = arguments.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(first, nn.Module) and not names.isdisjoint(("STORE_ATTR", "DELETE_ATTR")):
            return True
        return any(issubclass(type(arguments.get(name)), fx.Proxy) for name in tested)

    @staticmethod
    def leaves(frame: FrameType) -> bool:
        """Whether the model uses this function of torch's or Python's."""
        asked_by = "" if frame.f_back is None else frame.f_back.f_code.co_filename
        return frame.f_code.co_filename in _CONTEXTS or _is_theirs(asked_by)


class _State:
    """What the Python attributes of a module and of all below it are, to be compared and put back."""

    def __init__(self, module: nn.Module) -> None:
        self.kept = [(m, dict(m.__dict__), self.contents(m.__dict__)) for m in module.modules()]

    @staticmethod
    def contents(attributes: dict[str, Any]) -> dict[str, Any]:
        return {n: type(v)(v) for n, v in attributes.items() if type(v) in (list, dict, set)}

    def put_back(self) -> bool:
        """Whether anything had changed."""
        changed = False
        for module, attributes, contents in self.kept:
            now = module.__dict__
            if not _same(now, attributes):
                changed = True
                now.clear()
                now.update(attributes)
            for name, content in contents.items():
                value = attributes[name]
                if not _same(value, content):
                    changed = True
                    value.clear()
                    (value.extend if type(value) is list else value.update)(content)
        return changed


def _same(now: Any, before: Any) -> bool:
    """Whether two lists, dictionaries or sets hold the very same objects."""

    def ids(value: Any) -> Iterable:
        return [(k, id(v)) for k, v in value.items()] if isinstance(value, dict) else map(id, value)

    return len(now) == len(before) and all(a == b for a, b in zip(ids(now), ids(before), strict=True))


def _has_own_forward(module: nn.Module) -> bool:
    """Whether the forward pass is a function of the module's class that takes the same way for all arguments it may be
    called with: none can be left out."""
    forward = inspect.getattr_static(type(module), "forward", None)
    if "forward" in module.__dict__ or not inspect.isfunction(forward) or isinstance(module, fx.GraphModule):
        return False
    code = getattr(inspect.unwrap(forward), "__code__", None)
    parameters = inspect.signature(forward).parameters.values()
    optional = any(p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in parameters)
    return code is not None and not optional and _QUESTIONS.isdisjoint(code.co_names)


def _traced(module: nn.Module, training: bool, as_tensors: bool) -> tuple[fx.Graph, bool] | None:
    """The graph, and whether it was asked of which class the tensors are; None where there is more than it holds."""
    modes = [(m, m.training) for m in module.modules()]
    for m, _ in modes:
        m.training = training
    state, watch, graph, changed = _State(module), _Watch(), None, False
    tracer = _OwnForward(watch, as_tensors)
    try:
        with watch:
            graph = tracer.trace(module)
    except Exception:  # whatever a forward pass does with a proxy that a tensor would have allowed
        graph = None
    finally:
        changed = state.put_back()  # the tracer's own constants too: tensors that the forward pass makes
        for m, mode in modes:
            m.training = mode
    return None if graph is None or changed or watch.more else (graph, tracer.asked_for_class)


def _layers(graph: fx.Graph) -> list[tuple]:
    """The calls of children, and by what each one's result is used."""
    return [
        (n.target, len(n.args), sorted(map(str, n.kwargs)), [(u.op, str(u.target)) for u in n.users])
        for n in graph.nodes
        if n.op == "call_module"
    ]


def trace(module: nn.Module) -> fx.Graph | None:
    """The graph of the module's forward pass, or None where that may be more than a graph holds, or depends on train
    and eval. Calls of an ``nn.Identity`` are left out.

    The forward pass can be exchanged for it, but where `is_fixed` says that it only tells how layers are called.
    """
    if not _has_own_forward(module):
        return None
    graphs: list[fx.Graph] = []
    with _ONE_AT_A_TIME:
        for as_tensors in (False, True):
            asked = False
            for training in (True, False):
                found = _traced(module, training, as_tensors)
                if found is None:
                    return None
                graphs.append(found[0])
                asked |= found[1]
            if graphs[-1].python_code("self").src != graphs[-2].python_code("self").src:
                return None
            if not asked:
                break
    graph = graphs[0]
    if _layers(graph) != _layers(graphs[-1]):
        return None
    graph._cnnkern_fixed = asked or not _can_be_subclassed(type(module))  # type: ignore[attr-defined]
    for node in module_calls(graph):
        if is_identity(module.get_submodule(node.target)) and len(node.args) == 1 and not node.kwargs:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return graph


def _can_be_subclassed(cls: type) -> bool:
    made = ("__init_subclass__", "__deepcopy__")  # that may want to know the class, or make another object of it
    return type(cls) is type and not any(name in k.__dict__ for k in cls.__mro__[:-1] for name in made)


def is_fixed(graph: fx.Graph) -> bool:
    """Whether the forward pass has to stay as it is: it takes another way for a list than for a tensor, which calls the
    layers alike, or its class allows for no subclass."""
    return getattr(graph, "_cnnkern_fixed", False)


def module_calls(graph: fx.Graph | None) -> list[fx.Node]:
    return [] if graph is None else [n for n in graph.nodes if n.op == "call_module"]
