"""MobileNetV2. Sandler et al., Inverted Residuals and Linear Bottlenecks, 2018 (arXiv:1801.04381)."""

from torch import Tensor, nn

from cnnkern.models.layers import Chain, grouped_conv2d, layer_set
from cnnkern.models.registry import register


def _conv_norm_relu6(
    in_channels: int, out_channels: int, kernel_size: int, fused: bool, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    layers = layer_set(fused)
    conv = grouped_conv2d(
        *(layers, in_channels, out_channels, kernel_size, stride, kernel_size // 2), groups=groups, bias=False
    )
    return nn.Sequential(conv, layers.BatchNormAct2d(out_channels, act="relu6"))


class InvertedResidual(nn.Module):
    """1x1 up to ``expansion`` times the channels, depthwise 3x3, 1x1 down without an activation.

    (N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride); the input is added where the shape stays.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int, fused: bool = True) -> None:
        super().__init__()
        layers = layer_set(fused)
        hidden = in_channels * expansion
        self.adds = stride == 1 and in_channels == out_channels
        self.conv = Chain(
            *([_conv_norm_relu6(in_channels, hidden, 1, fused)] if expansion != 1 else []),
            _conv_norm_relu6(hidden, hidden, 3, fused, stride, groups=hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            layers.BatchNormAddAct2d(out_channels, act="none") if self.adds else layers.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, x) if self.adds else self.conv(x)


class MobileNetV2(nn.Module):
    """A 3x3 stem, 17 inverted residuals, a 1x1 convolution to 1280 channels, one linear layer."""

    # expansion, channels, blocks, stride of the first: table 2 of the paper
    stages = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, num_classes: int = 1000, in_channels: int = 3, fused: bool = True, dropout: float = 0.2) -> None:
        super().__init__()
        blocks: list[nn.Module] = [_conv_norm_relu6(in_channels, 32, 3, fused, stride=2)]
        channels = 32
        for expansion, width, depth, stride in self.stages:
            for i in range(depth):
                blocks.append(InvertedResidual(channels, width, stride if i == 0 else 1, expansion, fused))
                channels = width
        self.features = nn.Sequential(*blocks, _conv_norm_relu6(channels, 1280, 1, fused))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(1280, num_classes))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")
            elif isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, 0, 0.01)
                nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


@register(3, 224, 224)
def mobilenet_v2(**kwargs) -> MobileNetV2:
    """MobileNetV2: inverted residuals with depthwise 3x3 convolutions. Input 3x224x224, 3,504,872 parameters.

    Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, 2018 (arXiv:1801.04381). Shapes: stem
    32x112x112; stages 16x112x112, 24x56x56, 32x28x28, 64x14x14, 96x14x14, 160x7x7, 320x7x7; head 1280x7x7.
    """
    return MobileNetV2(**kwargs)
