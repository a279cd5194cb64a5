"""The models by name."""

import difflib
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

from torch import nn


class Builder(Protocol):
    """What builds a model; ``input_size`` is the (channels, height, width) that the model is usually given."""

    __name__: str
    input_size: tuple[int, ...]

    def __call__(self, *, fused: bool = True, **kwargs: Any) -> nn.Module: ...


BUILDERS: dict[str, Builder] = {}
F = TypeVar("F", bound=Callable[..., nn.Module])


def register(*input_size: int) -> Callable[[F], F]:
    """Enters a builder under its own name, with the (channels, height, width) that the model is usually given."""

    def enter(function: F) -> F:
        builder = cast(Builder, function)
        builder.input_size = input_size
        BUILDERS[builder.__name__] = builder
        return function

    return enter


def list_models() -> list[str]:
    """The names that :func:`create_model` takes, in alphabetical order."""
    return sorted(BUILDERS)


def create_model(name: str, fused: bool = True, **kwargs) -> nn.Module:
    """The model ``name`` of :func:`list_models`, on the fused kernels or, with ``fused=False``, on PyTorch's operators.

    ``kwargs`` go to the builder: all take ``num_classes`` and ``in_channels``. Both forms have the same parameters and
    state-dict keys. Raises ValueError for an unknown name, TypeError for an argument that the builder does not have.
    """
    return get_builder(name)(fused=fused, **kwargs)


def get_builder(name: str) -> Builder:
    """The builder of the model ``name``; its ``input_size`` is (channels, height, width). ValueError if unknown."""
    if name not in BUILDERS:
        raise ValueError(unknown_model(name, "cnnkern.models.list_models() has the names"))
    return BUILDERS[name]


def unknown_model(name: str, listed: str) -> str:
    """What is said of a name that no model has: those that are near, and `listed`, where all are."""
    near = difflib.get_close_matches(name.lower().replace("-", "_"), BUILDERS, n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"no model is called {name!r}: {hint}{listed}"
