"""What the models share: the choice between two sets of layers, and the few modules that several families have.

A model's text is written once, on `layers = layer_set(fused)`. Each class of one set has its namesake in the other with
the same constructor, parameters and state-dict keys; only the kernels beneath differ. A layer that is in neither set
(a dense convolution, a pooling) is `torch.nn`'s in both.
"""

from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor, nn

import cnnkern.nn
from cnnkern.models import unfused

M = TypeVar("M", bound=nn.Module)


def layer_set(fused: bool) -> ModuleType:
    """The module whose layers a model is built from: :mod:`cnnkern.nn` or :mod:`cnnkern.models.unfused`."""
    return cnnkern.nn if fused else unfused


def grouped_conv2d(layers: ModuleType, *args, groups: int, **kwargs) -> nn.Conv2d:
    """A convolution of the set where there are groups; a dense one is PyTorch's own."""
    convolution: Callable[..., nn.Conv2d] = layers.GroupedConv2d if groups > 1 else nn.Conv2d
    return convolution(*args, groups=groups, **kwargs)


def init_for_relu(model: M) -> M:
    """The model with the initial weights under which ReLU keeps the signal's size from layer to layer, biases zero.

    A deep network without batch norm does not learn without. Source: He et al., Delving Deep into Rectifiers, 2015
    (arXiv:1502.01852).
    """
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)
    return model


class Chain(nn.Sequential):
    """Layers in sequence, of which the last may take a residual as well: ``m(x)`` or ``m(x, residual)``.

    It lets ``Chain(conv, BatchNormAddReLU2d(...))`` be called as the norm itself is.
    """

    def forward(self, input: Tensor, *residual: Tensor) -> Tensor:
        *first, last = self
        for layer in first:
            input = layer(input)
        return last(input, *residual)


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate in (0, 1) that two 1x1 convolutions derive from all channel means.

    Input and output (N, C, H, W). Source: Hu et al., Squeeze-and-Excitation Networks, 2017 (arXiv:1709.01507).
    """

    def __init__(self, channels: int, squeezed: int, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.activation = act(inplace=True)

    def forward(self, input: Tensor) -> Tensor:
        gate = self.fc2(self.activation(self.fc1(self.avgpool(input))))
        return torch.sigmoid(gate) * input


class StochasticDepth(nn.Module):
    """In training, zeroes an image's whole residual with probability ``p`` and divides the others by ``1 - p``.

    Source: Huang et al., Deep Networks with Stochastic Depth, 2016 (arXiv:1603.09382).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        shape = (input.shape[0],) + (1,) * (input.dim() - 1)
        return input * input.new_empty(shape).bernoulli_(1 - self.p).div_(1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"
