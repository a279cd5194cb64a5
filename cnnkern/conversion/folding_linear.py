"""The linear layer of a folded model as a layer: its activation and the residual addition run in its kernel."""

from typing import Any

from torch import Tensor, nn

from cnnkern.conversion.folding import FoldingLayer, folding_classes
from cnnkern.nn.folded_linear import folded_linear


class _FoldingLinear(FoldingLayer):
    kind = "Linear"

    def settings(self, norm: nn.Module | None) -> tuple:
        return ()

    def make(self, norm: nn.Module | None, sources: list[Tensor]) -> Any:
        bias = None if self.bias is None else self.bias.detach().clone()
        return folded_linear(self.weight.detach().clone(), bias, sources)


LINEARS = folding_classes(_FoldingLinear, (nn.Linear,), __name__)
globals().update({made.__name__: made for made in LINEARS.values()})
