"""Layers that follow one another in an ``nn.Sequential`` of a folded model, without what calling a module costs.

Everything that their calls would read in Python is compared with what it was when the run was made. Where anything
differs, the layers have to be called.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cnnkern.conversion.deferral import FOLDED_SITE, SITE
from cnnkern.conversion.folding_conv import FoldingConv, sources
from cnnkern.extension import extension

_GLOBAL_HOOKS = [
    value
    for name, value in vars(nn.modules.module).items()
    if name.startswith("_global_") and name.endswith("_hooks") and isinstance(value, dict)
]


def is_plain(layer: nn.Module) -> bool:
    """Whether calling a layer is calling its class's forward pass, in eval mode."""
    held = vars(layer)
    return (
        not layer.training
        and not any(value for name, value in held.items() if isinstance(value, dict) and name.endswith("_hooks"))
        and not any(callable(getattr(type(layer), name, None)) for name in held)
    )


class Run:
    """Layers of which some are convolutions: ``modules`` are all that the call would go through, in its order.

    Each of ``groups`` is a layer, or a convolution and the batch norm behind it.
    """

    def __init__(self, modules: list[nn.Module], groups: list[tuple[Any, ...]]) -> None:
        self.steps: list[Callable[[Tensor], Tensor | None]] = []
        self.folded: list[tuple[Any, list[Tensor]]] = []
        for layer, *norms in groups:
            if not isinstance(layer, FoldingConv):
                self.steps.append(layer.forward)
                continue
            norm = norms[0] if norms else None
            folded, site = layer.folded(norm), vars(norm)[FOLDED_SITE] if norms else vars(layer)[SITE]
            self.folded.append((folded, sources(layer, norm)))
            self.steps.append(lambda x, call=folded.call, site=site: call(site, x))
        self.kept: list[Any] = []  # what the snapshot points to
        self.snapshot = extension.Snapshot(modules, _GLOBAL_HOOKS, self.kept)  # behind what folding keeps in modules

    def holds(self) -> bool:
        """Whether the layers would still compute what it does."""
        return self.snapshot.holds() and all(folded.holds(made_of) for folded, made_of in self.folded)

    def call(self, x: Tensor) -> Tensor | None:
        """What the layers compute; None where they have to be called."""
        if torch.is_grad_enabled() and (
            x.requires_grad or any(t.requires_grad for _, made_of in self.folded for t in made_of)
        ):
            return None
        if torch._C._get_tracing_state() is not None or not self.holds():
            return None
        y: Tensor | None = x
        for step in self.steps:
            y = step(y)  # type: ignore[arg-type]
            if y is None:  # PyTorch's convolution has to compute it
                return None
        return y
