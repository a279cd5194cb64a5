"""Which layers the code of a forward pass that cannot be traced may use by themselves.

Layers of a child may be joined if nobody sees what is between them. A module that calls the child as a whole does not;
one that goes through its layers, takes some of them, or hands it to a function that might, does. That is read from
the source. Whatever is not one of the few plain ways to use a child counts as a use of all below it.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from torch import fx, nn

_HARMLESS = {"isinstance", "hasattr", "type", "id", "callable", "bool", "str", "repr"}
_THROUGH = {"enumerate", "zip", "reversed", "list", "tuple", "iter", "sorted", "len"}  # hand on what they are given
_CHILDREN = {"children", "named_children", "values", "items", "_modules"}
_EVERYTHING = {"modules", "named_modules", "get_submodule", "apply"}


def reached_by(holder: nn.Module) -> set[int]:
    """The modules below `holder`, by id, that its forward pass may use but by calling a child that holds them."""
    try:
        return _Reader(holder).reached()
    except _Unread:
        return _below(holder)


class _Unread(Exception):
    """The source is missing, or is not what it seems."""


def _below(module: nn.Module) -> set[int]:
    return {id(m) for m in module.modules() if m is not module}


class _Reader:
    def __init__(self, holder: nn.Module) -> None:
        self.holder, self.found = holder, set()  # type: ignore[var-annotated]
        self.read: set[Any] = set()
        self.waiting = ["forward"]

    def reached(self) -> set[int]:
        cls = type(self.holder)
        if cls.__module__.startswith("torch.") and not isinstance(self.holder, fx.GraphModule):
            return set()  # DataParallel, a compiled module: they know nothing of what a child is made of
        if "forward" in self.holder.__dict__ or isinstance(self.holder, fx.GraphModule):
            raise _Unread
        if cls.__getattr__ is not nn.Module.__getattr__ or "__getattribute__" in cls.__dict__:
            raise _Unread
        while self.waiting:
            name = self.waiting.pop()
            for cls in type(self.holder).__mro__:  # also those that super() may mean
                function = cls.__dict__.get(name)
                if function is None or cls is nn.Module or function in self.read:
                    continue
                self.read.add(function)
                self._read(function)
        return self.found

    def _read(self, function: Any) -> None:
        if isinstance(function, staticmethod | classmethod | property):
            function = function.fget if isinstance(function, property) else function.__func__
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
        except (OSError, TypeError, SyntaxError) as error:
            raise _Unread from error
        definition = tree.body[0]
        if not isinstance(definition, ast.FunctionDef):
            raise _Unread
        arguments = [*definition.args.posonlyargs, *definition.args.args]
        if not arguments:
            return
        _Function(self, definition).uses_of(arguments[0].arg, self.holder, is_self=True)


class _Function:
    """The uses of modules within one function."""

    def __init__(self, reader: _Reader, definition: ast.FunctionDef) -> None:
        self.reader, self.definition = reader, definition
        self.parents = {child: node for node in ast.walk(definition) for child in ast.iter_child_nodes(node)}
        self.followed: set[tuple[str, int]] = set()

    def names(self, name: str) -> Iterator[ast.Name]:
        for node in ast.walk(self.definition):
            if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load):
                yield node

    def uses_of(self, name: str, module: nn.Module, is_self: bool = False) -> None:
        if (name, id(module)) not in self.followed:
            self.followed.add((name, id(module)))
            for node in self.names(name):
                self.use(node, module, is_self)

    def open(self, module: nn.Module) -> None:
        """Its children are used one by one."""
        if module is not self.reader.holder:  # whose own are known to be: nothing is joined in it
            self.reader.found |= {id(child) for child in module._modules.values() if child is not None}

    def everything(self, module: nn.Module) -> None:
        self.reader.found |= _below(module) | ({id(module)} - {id(self.reader.holder)})

    def use(self, node: ast.expr, module: nn.Module, is_self: bool = False) -> None:
        """Of an expression whose value is this module."""
        parent = self.parents[node]
        if isinstance(parent, ast.Call) and parent.func is node:
            return  # as a whole
        if isinstance(parent, ast.Attribute):
            self.attribute(parent, module, is_self)
        elif isinstance(parent, ast.Subscript) and parent.value is node:
            self.element(parent, module)
        elif isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id in _HARMLESS:
            return
        elif isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id == "getattr":
            self.element(parent, module)
        elif self.iterates(node, parent):
            self.elements(node, module)
        elif isinstance(parent, ast.Assign) and parent.value is node and isinstance(parent.targets[0], ast.Name):
            self.uses_of(parent.targets[0].id, module)
        elif not self.is_test(node):
            self.everything(module)

    def attribute(self, node: ast.Attribute, module: nn.Module, is_self: bool) -> None:
        child = module._modules.get(node.attr)
        called = isinstance(self.parents[node], ast.Call) and self.parents[node].func is node  # type: ignore[attr-defined]
        if child is not None:
            if not is_self:
                self.open(module)
            self.use(node, child)
        elif node.attr in _CHILDREN:
            self.elements(self.parents[node] if called else node, module)  # type: ignore[arg-type]
        elif node.attr in _EVERYTHING:
            self.everything(module)
        elif is_self:
            if callable(getattr(type(module), node.attr, None)) or isinstance(
                inspect.getattr_static(type(module), node.attr, None), property
            ):
                self.reader.waiting.append(node.attr)
        elif node.attr in module._parameters or node.attr in module._buffers:
            self.reader.found.add(id(module))
        elif node.attr == "forward" and called:
            return
        elif callable(getattr(type(module), node.attr, None)) and not hasattr(nn.Module, node.attr):
            self.everything(module)  # a method of its own, which may use any of its layers

    def element(self, node: ast.expr, module: nn.Module) -> None:
        """Of `module[...]`, or of an attribute of it whose name is worked out."""
        parent = self.parents[node]
        if isinstance(parent, ast.Call) and parent.func is node:
            self.open(module)
        elif isinstance(parent, ast.Assign) and isinstance(parent.targets[0], ast.Name) and parent.value is node:
            self.only_called([parent.targets[0].id], module)
        elif self.iterates(node, parent):
            self.elements(node, module)
        elif not self.is_test(node):
            self.everything(module)

    def iterates(self, node: ast.AST, parent: ast.AST) -> bool:
        loops = isinstance(parent, ast.For | ast.comprehension) and parent.iter is node
        return loops or (
            isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id in _THROUGH
        )

    def elements(self, node: ast.AST, module: nn.Module) -> None:
        """Of an expression that hands out the module's children."""
        parent = self.parents[node]
        while isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id in _THROUGH:
            if parent.func.id == "len":
                return
            node, parent = parent, self.parents[parent]
        if isinstance(parent, ast.For | ast.comprehension) and parent.iter is node:
            self.only_called([n.id for n in ast.walk(parent.target) if isinstance(n, ast.Name)], module)
        else:
            self.everything(module)

    def only_called(self, names: Iterable[str], module: nn.Module) -> None:
        """The names stand for children of the module, which had better be called and no more."""
        self.open(module)
        for name in names:
            for node in self.names(name):
                parent = self.parents[node]
                call = isinstance(parent, ast.Call)
                called = call and parent.func is node  # type: ignore[attr-defined]
                harmless = call and isinstance(parent.func, ast.Name) and parent.func.id in _HARMLESS  # type: ignore[attr-defined]
                index = isinstance(parent, ast.Subscript) and parent.slice is node
                if not (called or harmless or index or self.is_test(node)):
                    self.everything(module)

    def is_test(self, node: ast.AST) -> bool:
        """Whether the expression is only asked whether it is something."""
        parent = self.parents[node]
        while isinstance(parent, ast.BoolOp) or (isinstance(parent, ast.UnaryOp) and isinstance(parent.op, ast.Not)):
            node, parent = parent, self.parents[parent]
        return isinstance(parent, ast.Compare) or (
            isinstance(parent, ast.If | ast.While | ast.IfExp | ast.Assert) and parent.test is node
        )


def kept_elsewhere(model: nn.Module) -> set[int]:
    """Layers, by id, that a list or another attribute of a module makes known: those that it holds, those beside them,
    and the children of one that it holds."""
    parents = {id(c): m for m in model.modules() for c in m._modules.values() if c is not None}
    found: set[int] = set()
    for module in model.modules():
        for name, value in module.__dict__.items():
            if name in ("_modules", "_original") or not isinstance(value, nn.Module | list | tuple | dict | set):
                continue
            for kept in _modules_in(value):
                for holder in (kept, parents.get(id(kept), kept)):
                    found |= {id(c) for c in holder._modules.values() if c is not None}
    return found


def _modules_in(value: Any, depth: int = 3) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif depth and isinstance(value, list | tuple | set | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _modules_in(part, depth - 1)
