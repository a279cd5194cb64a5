"""Training with less memory: results of norms and their activations are not saved, but recomputed in backward.

The autograd nodes recompute them (csrc/autograd/recompute.h). This file switches that on.
"""

import contextlib
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from cnnkern.extension import extension


@contextlib.contextmanager
def recompute() -> Iterator[None]:
    """Within this block autograd does not save results of cnnkern's batch norms (with their activation), layer norms
    and `torch.cat`: the backward pass recomputes them.

    A convolution, or another layer that uses such a result, saves it for its own gradient. Within this block autograd
    saves how to recompute it instead: by one pass over what the norm saves anyway, or by concatenating again. Gradients
    are bit-equal. Only the forward pass has to run within the block:

        with cnnkern.recompute():
            loss = model(images).square().mean()
        loss.backward()

    Input and parameters of the norm may not change between forward and backward. If the input did, the backward pass
    raises the RuntimeError that autograd raises for a saved tensor. Tensors that were concatenated may change. The
    block changes nothing within other saved-tensor hooks, such as those of `torch.utils.checkpoint`, under
    :func:`torch.compile`, and within transforms of `torch.func`. Raises RuntimeError without the compiled extension.
    """
    check_extension("recompute")
    if torch.compiler.is_compiling() or not extension.may_recompute():
        yield
        return
    with saved_tensors_hooks(extension.pack, extension.unpack):
        extension.watch(True)
        try:
            yield
        finally:
            extension.watch(False)


def check_extension(name: str) -> None:
    if extension is None:
        raise RuntimeError(
            f"cnnkern.{name}: recomputation needs the compiled extension, which was not built; `make` in the "
            "repository, or `pip install --no-build-isolation .`, builds it"
        )


_PLAIN = "_cnnkern_plain"  # in a class that was made here: the model's own
_made: weakref.WeakKeyDictionary[type, weakref.ref[type]] = weakref.WeakKeyDictionary()


def switch_on(model: nn.Module) -> nn.Module:
    """Makes every call of the model run within :func:`recompute`, by changing its class. Returns the model."""
    check_extension("recompute")
    if not is_on(model):
        model.__class__ = _recomputing(type(model))
    return model


def switch_off(model: nn.Module) -> None:
    model.__class__ = plain_class(model)


def is_on(model: nn.Module) -> bool:
    return plain_class(model) is not type(model)


def plain_class(model: nn.Module) -> type:
    """The class of a model before :func:`switch_on`."""
    return type(model).__dict__.get(_PLAIN, type(model))


def _recomputing(plain: Any) -> type:
    """A subclass with the name of its base class, by which pickle and copy find it."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with recompute():
            return plain.__call__(self, *args, **kwargs)

    def reduce_ex(self: Any, protocol: Any) -> Any:
        function, arguments, *state = plain.__reduce_ex__(self, protocol)
        return (_made_again, (function, tuple(plain if a is type(self) else a for a in arguments)), *state)

    def extra_repr(self: Any) -> str:
        own = plain.extra_repr(self)
        return f"{own}{', ' if own else ''}recompute=True"

    found = _made.get(plain, lambda: None)()
    if found is None:
        body = {_PLAIN: plain, "__call__": call, "__reduce_ex__": reduce_ex, "extra_repr": extra_repr}
        body |= {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
        found = types.new_class(plain.__name__, (plain,), exec_body=lambda namespace: namespace.update(body))
        _made[plain] = weakref.ref(found)
    return found


def _made_again(function: Callable[..., nn.Module], arguments: tuple[Any, ...]) -> nn.Module:
    return switch_on(function(*arguments))
