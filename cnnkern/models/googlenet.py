"""GoogLeNet. Szegedy et al., Going Deeper with Convolutions, 2014 (arXiv:1409.4842)."""

import torch
from torch import Tensor, nn

from cnnkern.models.layers import init_for_relu, layer_set
from cnnkern.models.registry import register


def _conv_relu(
    in_channels: int, out_channels: int, kernel_size: int, bn: bool, fused: bool, stride: int = 1
) -> nn.Sequential:
    """A padded convolution, then ReLU, with batch norm between them if wanted."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2)
    return nn.Sequential(conv, layer_set(fused).BatchNormReLU2d(out_channels) if bn else nn.ReLU())


class Inception(nn.Module):
    """Four paths side by side, concatenated: 1x1; 1x1 and 3x3; 1x1 and 5x5; max pooling and 1x1.

    (N, in_channels, H, W) -> (N, c1 + c2[1] + c3[1] + c4, H, W), each c the channels of one path's convolutions.
    ``bn=True`` puts batch norm between every convolution and its ReLU.
    """

    def __init__(
        self,
        in_channels: int,
        c1: int,
        c2: tuple[int, int],
        c3: tuple[int, int],
        c4: int,
        bn: bool = False,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.b1 = _conv_relu(in_channels, c1, 1, bn, fused)
        self.b2 = nn.Sequential(_conv_relu(in_channels, c2[0], 1, bn, fused), _conv_relu(*c2, 3, bn, fused))
        self.b3 = nn.Sequential(_conv_relu(in_channels, c3[0], 1, bn, fused), _conv_relu(*c3, 5, bn, fused))
        self.b4 = nn.Sequential(
            layer_set(fused).MaxPool2d(3, stride=1, padding=1), _conv_relu(in_channels, c4, 1, bn, fused)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.b1(x), self.b2(x), self.b3(x), self.b4(x)], dim=1)


# Channels of the Inception modules, by stage of the network.
_STAGE3 = ((64, (96, 128), (16, 32), 32), (128, (128, 192), (32, 96), 64))
_STAGE4 = (
    (192, (96, 208), (16, 48), 64),
    (160, (112, 224), (24, 64), 64),
    (128, (128, 256), (24, 64), 64),
    (112, (144, 288), (32, 64), 64),
    (256, (160, 320), (32, 128), 128),
)
_STAGE5 = ((256, (160, 320), (32, 128), 128), (384, (192, 384), (48, 128), 128))


class GoogLeNet(nn.Sequential):
    """Three stem convolutions and nine Inception modules, without the paper's auxiliary classifiers."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1, bn: bool = False, fused: bool = True) -> None:
        def pool() -> nn.Module:
            return layer_set(fused).MaxPool2d(3, stride=2, padding=1)

        def stage(in_channels: int, modules: tuple) -> list[Inception]:
            blocks = []
            for c1, c2, c3, c4 in modules:
                blocks.append(Inception(in_channels, c1, c2, c3, c4, bn, fused))
                in_channels = c1 + c2[1] + c3[1] + c4
            return blocks

        super().__init__(
            nn.Sequential(_conv_relu(in_channels, 64, 7, bn, fused, stride=2), pool()),
            nn.Sequential(_conv_relu(64, 64, 1, bn, fused), _conv_relu(64, 192, 3, bn, fused), pool()),
            nn.Sequential(*stage(192, _STAGE3), pool()),
            nn.Sequential(*stage(480, _STAGE4), pool()),
            nn.Sequential(*stage(832, _STAGE5), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            nn.Linear(1024, num_classes),
        )
        init_for_relu(self)


@register(1, 96, 96)
def googlenet(num_classes: int = 10, in_channels: int = 1, fused: bool = True, bn: bool = False) -> GoogLeNet:
    """GoogLeNet without auxiliary classifiers. Input 1x96x96, 5,977,530 parameters.

    Szegedy et al., Going Deeper with Convolutions, 2014 (arXiv:1409.4842). Shapes: stages 64x24x24, 192x12x12, 480x6x6,
    832x3x3; then 1024.

    ``bn=True``: batch norm after every convolution (Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167);
    the batch norms are what is fused.
    """
    return GoogLeNet(num_classes, in_channels, bn, fused)
