"""``nn.Sequential`` in a folded model: which of its layers form a run, without a call per layer (run.py)."""

import functools
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cnnkern.conversion.deferral import FOLDED_SITE, SITE
from cnnkern.conversion.folding import FoldingLayer
from cnnkern.conversion.folding_conv import FoldingConv
from cnnkern.conversion.layers import BATCH_NORMS
from cnnkern.conversion.run import Run, is_plain
from cnnkern.nn.traced import NotScriptable

_PLAN = "_cnnkern_plan"  # in a Sequential: its Plan
_TRIES = 8  # plans per Sequential that are always made
_WORTH = 16  # uses of a plan that pay for making another one


class _Part(NamedTuple):
    """Children ``first`` to ``last - 1``: a run, or layers that are called one by one."""

    first: int
    last: int
    run: Run | None = None


class _Plan:
    """How a Sequential runs: its children, and the parts into which they are divided."""

    def __init__(self, owner: nn.Sequential) -> None:
        self.owner = weakref.ref(owner)
        self.made_for: tuple[list[Any], list[_Part]] | None = None
        self.made = self.held = 0

    def call(self, owner: nn.Sequential, input: Any) -> Any:
        made_for = self.made_for
        if made_for is None or made_for[0] != list(owner._modules.values()):
            made_for = self.made_for = self._make(list(owner._modules.values()))
        children, parts = made_for
        for first, last, run in parts:
            layers = list(owner._modules.values())[first:last]  # another layer may have changed them
            if run is not None and type(input) is Tensor and layers == children[first:last]:
                y = run.call(input)
                if y is not None:
                    self.held += 1
                    input = y
                    continue
                if not run.holds():
                    self.made_for = None  # make another plan next time
            for layer in layers:
                input = layer(input)
        return input

    def _make(self, children: list[Any]) -> tuple[list[Any], list[_Part]]:
        self.made += 1
        worth = self.made <= _TRIES + self.held // _WORTH
        return children, list(_parts(children)) if worth else [_Part(0, len(children))]


class FoldingSequential(NotScriptable, nn.Sequential):
    """For each class of Sequentials, a class is made that inherits from it and from this one."""

    def forward(self, input: Any) -> Any:
        if torch.compiler.is_compiling() or type(input) is not Tensor:
            return super().forward(input)
        plan = self.__dict__.get(_PLAN)
        if plan is None or plan.owner() is not self:  # a replica shares its original's plan
            plan = self.__dict__[_PLAN] = _Plan(self)
            return super().forward(input)  # after the first call it is known what is fused
        return plan.call(self, input)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != _PLAN}

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _new, (originals()[type(self)],), self.__getstate__()


def is_sequential(module: nn.Module) -> bool:
    """Whether this is an ``nn.Sequential``, or a subclass that inherits its forward."""
    kind = type(module)
    return isinstance(module, nn.Sequential) and kind.forward is nn.Sequential.forward and "forward" not in vars(module)


@functools.cache
def folding_class(plain: type) -> type:
    """The class that a Sequential of a folded model gets."""
    return type(f"Folding{plain.__name__}", (FoldingSequential, plain), {"__module__": __name__, "_plain": plain})


def originals() -> dict[type, type]:
    """Those classes -> the original ones."""
    return {ours: ours._plain for ours in FoldingSequential.__subclasses__()}  # type: ignore[attr-defined]


def _new(plain: type) -> nn.Module:
    return nn.Module.__new__(folding_class(plain))


def _walk(child: nn.Module | None) -> Iterator[nn.Module | None]:
    """The layers of a child, through nested Sequentials; None if it has to be called."""
    if child is None or not is_plain(child):
        yield None
        return
    yield child
    if isinstance(child, FoldingSequential):
        for inner in child._modules.values():
            yield from _walk(inner)


def _has_run(layer: FoldingLayer) -> bool:
    return SITE in vars(layer) and layer.is_of_plain_tensors(None)


def _is_torchs(layer: nn.Module) -> bool:
    """Whether this is a layer of torch.nn whose forward changes no module."""
    return type(layer).__module__.startswith("torch.nn.modules.") and not layer._modules


def _groups(layers: list[nn.Module]) -> list[tuple[nn.Module, ...]] | None:
    """The layers in groups, a convolution with its batch norm; None if one has to be called. The first is a folded
    layer."""
    groups: list[tuple[nn.Module, ...]] = []
    for layer in layers:
        before = groups[-1][0] if groups and len(groups[-1]) == 1 else None
        if isinstance(before, FoldingConv) and type(layer) in BATCH_NORMS.values():
            if FOLDED_SITE not in vars(layer) or not before.takes(layer):
                return None
            groups[-1] = (before, layer)
        elif _has_run(layer) if isinstance(layer, FoldingLayer) else groups and _is_torchs(layer):
            groups.append((layer,))
        else:
            return None
    return groups


def _parts(children: list[Any]) -> Iterator[_Part]:
    """The longest runs, from the first child on, and the children between them."""
    first = 0
    while first < len(children):
        modules: list[nn.Module] = []
        groups: list[tuple[nn.Module, ...]] = []
        last = first
        for child in children[first:]:
            walked = list(_walk(child))
            if None in walked:
                break
            found = _groups([m for m in (*modules, *walked) if not isinstance(m, FoldingSequential)])
            if found is None:
                break
            modules += walked
            groups, last = found, last + 1
        yield _Part(first, max(last, first + 1), Run(modules, groups) if groups else None)
        first = max(last, first + 1)
