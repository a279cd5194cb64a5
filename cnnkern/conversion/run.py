"""Runs: consecutive layers of an ``nn.Sequential`` in a folded model, without the Python overhead of module calls.

Everything that their calls would read in Python is compared with a snapshot from when the run was made. If anything
differs, the layers are called one by one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from cnnkern.conversion.deferral import FOLDED_SITE, SITE
from cnnkern.conversion.folding import FoldingLayer
from cnnkern.extension import extension

_GLOBAL_HOOKS = [
    value
    for name, value in vars(nn.modules.module).items()
    if name.startswith("_global_") and name.endswith("_hooks") and isinstance(value, dict)
]


def is_plain(layer: nn.Module) -> bool:
    """Whether calling a layer only calls its class's forward, in eval mode."""
    held = vars(layer)
    return (
        not layer.training
        and not any(value for name, value in held.items() if isinstance(value, dict) and name.endswith("_hooks"))
        and not any(callable(getattr(type(layer), name, None)) for name in held)
    )


class Run:
    """Consecutive layers, some of them folded. ``modules`` are all modules that would be called, in order.

    Each item of ``groups`` is a layer, or a convolution and the batch norm after it.
    """

    def __init__(self, modules: list[nn.Module], groups: list[tuple[Any, ...]]) -> None:
        self.steps: list[Callable[[Tensor], Tensor | None]] = []
        self.folded: list[tuple[Any, list[Tensor]]] = []
        for layer, *norms in groups:
            if not isinstance(layer, FoldingLayer):
                self.steps.append(layer.forward)
                continue
            norm = norms[0] if norms else None
            folded, site = layer.folded(norm), vars(norm)[FOLDED_SITE] if norms else vars(layer)[SITE]
            self.folded.append((folded, layer.sources(norm)))
            self.steps.append(lambda x, call=folded.call, site=site: call(site, x))
        self.kept: list[Any] = []  # keeps alive what the snapshot points to
        # After folding has stored its results in the modules.
        self.snapshot = extension.Snapshot(modules, _GLOBAL_HOOKS, self.kept)

    def holds(self) -> bool:
        """Whether calling the layers would still compute the same."""
        return self.snapshot.holds() and all(folded.holds(made_of) for folded, made_of in self.folded)

    def call(self, x: Tensor) -> Tensor | None:
        """The layers' result; None if they have to be called one by one."""
        if torch.is_grad_enabled() and (
            x.requires_grad or any(t.requires_grad for _, made_of in self.folded for t in made_of)
        ):
            return None
        if forward_ad._current_level >= 0 or torch._C._get_tracing_state() is not None or not self.holds():
            return None
        y: Tensor | None = x
        for step in self.steps:
            y = step(y)  # type: ignore[arg-type]
            if y is None:  # PyTorch's layer has to compute it
                return None
        return y
