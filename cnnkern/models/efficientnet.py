"""EfficientNet. Tan and Le, Rethinking Model Scaling for Convolutional Neural Networks, 2019 (arXiv:1905.11946)."""

import math

from torch import Tensor, nn

from cnnkern.models.layers import SqueezeExcitation, StochasticDepth, grouped_conv2d, layer_set
from cnnkern.models.registry import register


def _conv_norm_silu(
    in_channels: int, out_channels: int, kernel_size: int, fused: bool, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    layers = layer_set(fused)
    conv = grouped_conv2d(
        *(layers, in_channels, out_channels, kernel_size, stride, kernel_size // 2), groups=groups, bias=False
    )
    return nn.Sequential(conv, layers.BatchNormAct2d(out_channels, act="silu"))


class MBConv(nn.Module):
    """1x1 up to ``expansion`` times the channels, depthwise convolution, squeeze and excitation, 1x1 down.

    (N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride). Where the shape stays, the input is added to
    what stochastic depth leaves, so that addition and batch norm stay two operators.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        expansion: int = 6,
        drop: float = 0.0,
        fused: bool = True,
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.adds = stride == 1 and in_channels == out_channels
        self.block = nn.Sequential(
            *([_conv_norm_silu(in_channels, hidden, 1, fused)] if expansion != 1 else []),
            _conv_norm_silu(hidden, hidden, kernel_size, fused, stride, groups=hidden),
            SqueezeExcitation(hidden, max(1, in_channels // 4), act=nn.SiLU),
            nn.Sequential(nn.Conv2d(hidden, out_channels, 1, bias=False), layer_set(fused).BatchNorm2d(out_channels)),
        )
        self.stochastic_depth = StochasticDepth(drop)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return self.stochastic_depth(y) + x if self.adds else y


class EfficientNet(nn.Module):
    """A 3x3 stem, 16 MBConv blocks, a 1x1 convolution to 1280 channels, one linear layer: the paper's B0."""

    # expansion, kernel size, stride of the first, channels, blocks: table 1 of the paper
    stages = (
        (1, 3, 1, 16, 1),
        (6, 3, 2, 24, 2),
        (6, 5, 2, 40, 2),
        (6, 3, 2, 80, 3),
        (6, 5, 1, 112, 3),
        (6, 5, 2, 192, 4),
        (6, 3, 1, 320, 1),
    )

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        fused: bool = True,
        dropout: float = 0.2,
        stochastic_depth: float = 0.2,
    ) -> None:
        super().__init__()
        parts: list[nn.Module] = [_conv_norm_silu(in_channels, 32, 3, fused, stride=2)]
        channels, index, total = 32, 0, sum(depth for *_, depth in self.stages)
        for expansion, kernel_size, stride, width, depth in self.stages:
            stage = []
            for i in range(depth):
                drop = stochastic_depth * index / total
                stage.append(MBConv(channels, width, kernel_size, stride if i == 0 else 1, expansion, drop, fused))
                channels, index = width, index + 1
            parts.append(nn.Sequential(*stage))
        self.features = nn.Sequential(*parts, _conv_norm_silu(channels, 1280, 1, fused))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(1280, num_classes))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
            elif isinstance(m, nn.Linear):
                bound = 1 / math.sqrt(m.out_features)
                nn.init.uniform_(m.weight, -bound, bound)
                nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


@register(3, 224, 224)
def efficientnet_b0(**kwargs) -> EfficientNet:
    """EfficientNet-B0: inverted residuals with squeeze-excitation and SiLU. Input 3x224x224, 5,288,548 parameters.

    Tan and Le, EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, 2019 (arXiv:1905.11946).
    Shapes: stem 32x112x112; stages 16x112x112, 24x56x56, 40x28x28, 80x14x14, 112x14x14, 192x7x7, 320x7x7; head
    1280x7x7.
    """
    return EfficientNet(**kwargs)
