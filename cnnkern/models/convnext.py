"""ConvNeXt. Liu et al., A ConvNet for the 2020s, 2022 (arXiv:2201.03545)."""

import torch
from torch import Tensor, nn

from cnnkern.models.layers import StochasticDepth, layer_set
from cnnkern.models.registry import register


class Permute(nn.Module):
    """``x.permute(dims)``."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, then for each pixel layer norm and a perceptron of four times the width; scaled and added.

    (N, channels, H, W) keeps its shape.
    """

    def __init__(self, channels: int, layer_scale: float = 1e-6, drop: float = 0.0, fused: bool = True) -> None:
        super().__init__()
        layers = layer_set(fused)
        self.block = nn.Sequential(
            layers.GroupedConv2d(channels, channels, 7, padding=3, groups=channels),
            Permute(0, 2, 3, 1),
            layers.LayerNorm(channels, eps=1e-6),
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Linear(4 * channels, channels),
            Permute(0, 3, 1, 2),
        )
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), layer_scale))
        self.stochastic_depth = StochasticDepth(drop)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.stochastic_depth(self.layer_scale * self.block(x))


class ConvNeXt(nn.Module):
    """A 4x4 stem of stride 4, four stages of blocks with a 2x2 convolution of stride 2 between, one linear layer."""

    def __init__(
        self,
        depths: tuple[int, ...],
        widths: tuple[int, ...],
        num_classes: int = 1000,
        in_channels: int = 3,
        fused: bool = True,
        stochastic_depth: float = 0.1,
    ) -> None:
        super().__init__()
        layers = layer_set(fused)
        self.features = nn.Sequential(
            nn.Sequential(nn.Conv2d(in_channels, widths[0], 4, stride=4), layers.LayerNorm2d(widths[0], eps=1e-6))
        )
        index, last = 0, sum(depths) - 1
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            if i > 0:
                self.features.append(
                    nn.Sequential(
                        layers.LayerNorm2d(widths[i - 1], eps=1e-6), nn.Conv2d(widths[i - 1], width, 2, stride=2)
                    )
                )
            stage = [
                ConvNeXtBlock(width, drop=stochastic_depth * (index + j) / last, fused=fused) for j in range(depth)
            ]
            self.features.append(nn.Sequential(*stage))
            index += depth
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            layers.LayerNorm2d(widths[-1], eps=1e-6), nn.Flatten(), nn.Linear(widths[-1], num_classes)
        )
        for m in self.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)))


@register(3, 224, 224)
def convnext_tiny(**kwargs) -> ConvNeXt:
    """ConvNeXt-T: depthwise 7x7 convolutions and layer norm. Input 3x224x224, 28,589,128 parameters.

    Liu et al., A ConvNet for the 2020s, 2022 (arXiv:2201.03545). Shapes: stem 96x56x56; stages 96x56x56, 192x28x28,
    384x14x14, 768x7x7; the strides between them are layers of their own.
    """
    return ConvNeXt((3, 3, 9, 3), (96, 192, 384, 768), **kwargs)
