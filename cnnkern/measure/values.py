"""What goes into a model and comes out of it, whatever it is packed in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


class ModelError(ValueError):
    """A model, or an input of it, that cannot be measured; the message is one line that says why."""


def one_line(error: BaseException) -> str:
    """The message of an exception in one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def float_tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors in what a model returned, in their order: it may be one, or a sequence, a mapping or a
    dataclass of what this function takes."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        parts = list(output.values())
    elif isinstance(output, (list, tuple)):
        parts = list(output)
    elif is_dataclass(output) and not isinstance(output, type):
        parts = [getattr(output, f.name) for f in fields(output)]
    else:
        return []
    return [tensor for part in parts for tensor in float_tensors(part)]


def results_of(model_name: str, output: Any) -> list[Tensor]:
    """:func:`float_tensors`; raises ModelError where there are none."""
    if found := float_tensors(output):
        return found
    raise ModelError(
        f"{model_name} returned {type(output).__name__} without a floating-point tensor: expected a tensor, or a "
        "sequence, mapping or dataclass of them"
    )


def mean_loss(output: Any) -> Tensor:
    """The sum of the means of all floating-point tensors that a model returned."""
    return torch.stack([t.mean().float() for t in results_of("the model", output)]).sum()


def cast(arguments: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments with floating-point tensors in `dtype`."""
    return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)


def placed(arguments: tuple[Any, ...], device: str, channels_last: bool) -> tuple[Any, ...]:
    """The arguments on `device`, those of four dimensions in channels_last where that is asked for."""

    def place(a: Any) -> Any:
        if not isinstance(a, Tensor):
            return a
        return a.to(device, memory_format=torch.channels_last) if channels_last and a.dim() == 4 else a.to(device)

    return tuple(place(a) for a in arguments)


def shapes(arguments: tuple[Any, ...]) -> list[list[int]]:
    """The shapes of the tensors among the arguments."""
    return [list(a.shape) for a in arguments if isinstance(a, Tensor)]


def by_x(shape: list[int] | tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
