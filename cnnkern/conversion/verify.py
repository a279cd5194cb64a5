"""Compares a converted model with its original, on an example."""

import contextlib
import copy
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map


class ConversionError(RuntimeError):
    """The converted model's results differ from the original's; the message says where."""


class _Precision(TorchFunctionMode):
    """Records the floating-point type of lowest precision among the results of a model's operators."""

    def __init__(self) -> None:
        self.eps = torch.finfo(torch.float64).eps

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, Tensor) and t.is_floating_point():
                self.eps = max(self.eps, torch.finfo(t.dtype).eps)
        return result


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def check_results(model: nn.Module, convert: Callable[[nn.Module], nn.Module], example: Any) -> None:
    """Raises ConversionError if outputs, gradients or buffers differ by more than rounding.

    Compares in float64, or in the model's own dtypes if it does not run in float64, for example because of a cast.
    """
    try:
        _run(copy.deepcopy(model).double(), example, True, True)
    except (RuntimeError, TypeError, ValueError):  # raised again below if the model does not run at all
        double = False
    else:
        double = True
    original = copy.deepcopy(model).double() if double else copy.deepcopy(model)
    for training in (True, False):
        with _Precision() as precision:
            theirs = _run(copy.deepcopy(original), example, training, double)
        ours = _run(convert(copy.deepcopy(original)), example, training, double)
        _compare(theirs, ours, "training" if training else "eval", precision.eps)


def _run(model: nn.Module, example: Any, training: bool, double: bool) -> dict[str, Tensor]:
    """Outputs of two calls, gradients and buffers. The second call also shows state that the first one has changed."""

    def fresh(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return copy.deepcopy(value)
        made = value.detach().clone()
        made = made.double() if double and made.is_floating_point() else made
        return made.requires_grad_(value.requires_grad)

    keywords = dict(example) if isinstance(example, Mapping) else {}
    arguments = () if keywords else example if isinstance(example, tuple) else (example,)
    model.train(training)
    found: dict[str, Tensor] = {}
    for call in ("", " of the second call"):
        with _same_random_numbers():
            outputs = model(*tree_map(fresh, arguments), **tree_map(fresh, keywords))
        tensors = [t for t in tree_leaves(outputs) if isinstance(t, Tensor)]
        found |= {f"output {i}{call}": t.detach().clone() for i, t in enumerate(tensors)}
    differentiable = [t for t in tensors if t.requires_grad]
    if differentiable:
        sum(t.square().sum() for t in differentiable).backward()
    found |= {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found | {n: b for n, b in model.named_buffers() if b.is_floating_point()}


def _compare(theirs: dict[str, Tensor], ours: dict[str, Tensor], where: str, eps: float) -> None:
    if theirs.keys() != ours.keys():
        raise ConversionError(
            f"cnnkern.convert: {where}: the outputs or gradients are not those of the original; the model is unchanged"
        )
    # Tolerance for the rounding of a deep model: half of the digits, eight of sixteen in float64.
    tolerance = 1e-7 if eps < 1e-12 else eps**0.5

    def largest(t: Tensor) -> float:
        finite = t[t.isfinite()] if t.is_floating_point() else t
        return finite.abs().max().item() if finite.numel() else 0.0

    scale = max((largest(t) for n, t in theirs.items() if n.startswith("grad")), default=0.0)
    for name, expected in theirs.items():
        mine, size = ours[name], scale if name.startswith("grad") else largest(expected)
        if mine.shape != expected.shape or mine.dtype != expected.dtype:
            raise ConversionError(
                f"cnnkern.convert: {where}: {name} has another shape or dtype; the model is unchanged"
            )
        if not expected.numel():
            continue
        same = (mine == expected) | (mine.isnan() & expected.isnan())
        difference = torch.where(same, 0, (mine - expected).abs()) if expected.dtype != torch.bool else (~same).double()
        error = difference.max().item()
        if not error <= tolerance * size + 1e-12:
            raise ConversionError(
                f"cnnkern.convert: {where}: {name} differs by {error:.1e} (largest value {size:.1e}); "
                "the model is unchanged"
            )
