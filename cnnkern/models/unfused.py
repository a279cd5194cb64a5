"""The layers of :mod:`cnnkern.nn` in PyTorch's own operators, one after another: the models' baseline and reference.

Each class has the constructor, the parameters and the state-dict keys of its namesake there.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import BatchNorm2d, LayerNorm, MaxPool2d
from torch.nn import Conv2d as GroupedConv2d
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

__all__ = [
    "BatchNorm2d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAddAct2d",
    "BatchNormAddReLU2d",
    "BatchNormReLU1d",
    "BatchNormReLU2d",
    "DenseBlock",
    "GroupedConv2d",
    "LayerNorm",
    "LayerNorm2d",
    "LazyBatchNormReLU2d",
    "MaxPool2d",
]

# In place, as a model that is written by hand has it, so that the baseline is no slower than need be.
_ACTIVATIONS = {
    "none": lambda x: x,
    "relu": torch.relu_,
    "relu6": lambda x: F.relu6(x, inplace=True),
    "sigmoid": torch.sigmoid_,
    "silu": lambda x: F.silu(x, inplace=True),
}


class _ThenAct(_BatchNorm):
    def __init__(self, num_features: int, *args, act: str = "relu", **kwargs) -> None:
        super().__init__(num_features, *args, **kwargs)
        self.act = act

    def forward(self, input: Tensor) -> Tensor:
        return _ACTIVATIONS[self.act](super().forward(input))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act}"


class BatchNormAct1d(_ThenAct, nn.BatchNorm1d):
    """Batch norm, then the activation. Input (N, C) or (N, C, L)."""


class BatchNormAct2d(_ThenAct, nn.BatchNorm2d):
    """Batch norm, then the activation. Input (N, C, H, W)."""


class BatchNormAddAct2d(nn.BatchNorm2d):
    """Batch norm, then the addition of the residual, then the activation: ``m(x, residual)``."""

    def __init__(self, num_features: int, *args, act: str = "relu", **kwargs) -> None:
        super().__init__(num_features, *args, **kwargs)
        self.act = act

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        return _ACTIVATIONS[self.act](super().forward(input).add_(residual))


class BatchNormReLU1d(BatchNormAct1d):
    """Batch norm, then ReLU. Input (N, C) or (N, C, L)."""


class BatchNormReLU2d(BatchNormAct2d):
    """Batch norm, then ReLU. Input (N, C, H, W)."""


class BatchNormAddReLU2d(BatchNormAddAct2d):
    """Batch norm, then the addition of the residual, then ReLU: ``m(x, residual)``."""


class LazyBatchNormReLU2d(_LazyNormBase, BatchNormReLU2d):
    """Batch norm, then ReLU, with the channels of the first input."""

    cls_to_become = BatchNormReLU2d


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over C of (N, C, H, W): moved last, normalised, moved back."""

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__(num_channels, eps)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class DenseBlock(nn.ModuleDict):
    """Layers that each see the input and the outputs of all layers before, concatenated."""

    def __init__(self, layers: Mapping[str, nn.Module], growth: int) -> None:
        super().__init__(layers)

    def forward(self, input: Tensor) -> Tensor:
        features = [input]
        for layer in self.values():
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)
