"""ResNet and ResNeXt.

He et al., Deep Residual Learning for Image Recognition, 2015 (arXiv:1512.03385); Xie et al., Aggregated Residual
Transformations for Deep Neural Networks, 2016 (arXiv:1611.05431). Bottlenecks have their stride in the 3x3 convolution,
as in torchvision, whose state dicts load.
"""

from torch import Tensor, nn

from cnnkern.models.layers import grouped_conv2d, layer_set
from cnnkern.models.registry import register


class BasicBlock(nn.Module):
    """Two 3x3 convolutions. (N, in_channels, H, W) -> (N, channels, H / stride, W / stride)."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        groups: int = 1,
        group_width: int = 64,
        fused: bool = True,
    ) -> None:
        super().__init__()
        layers = layer_set(fused)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = layers.BatchNormReLU2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = layers.BatchNormAddReLU2d(channels)
        self.downsample = _downsample(in_channels, channels, stride, fused)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x))
        return self.bn2(self.conv2(x), identity)


class Bottleneck(nn.Module):
    """1x1, 3x3 (grouped in ResNeXt), 1x1. (N, in_channels, H, W) -> (N, 4 * channels, H / stride, W / stride)."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        groups: int = 1,
        group_width: int = 64,
        fused: bool = True,
    ) -> None:
        super().__init__()
        layers = layer_set(fused)
        width = channels * group_width // 64 * groups
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = layers.BatchNormReLU2d(width)
        self.conv2 = grouped_conv2d(layers, width, width, 3, stride, padding=1, groups=groups, bias=False)
        self.bn2 = layers.BatchNormReLU2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = layers.BatchNormAddReLU2d(out_channels)
        self.downsample = _downsample(in_channels, out_channels, stride, fused)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x))
        x = self.bn2(self.conv2(x))
        return self.bn3(self.conv3(x), identity)


def _downsample(in_channels: int, out_channels: int, stride: int, fused: bool) -> nn.Sequential | None:
    """What brings the input to the output's shape; None where it has it."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), layer_set(fused).BatchNorm2d(out_channels)
    )


class ResNet(nn.Module):
    """A 7x7 stem, four stages of ``depths`` blocks, global average pooling, one linear layer.

    ``groups`` and ``group_width`` (channels per group in the first stage, of 64 with ResNet) make it a ResNeXt.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        groups: int = 1,
        group_width: int = 64,
        num_classes: int = 1000,
        in_channels: int = 3,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = layer_set(fused).BatchNormReLU2d(64)
        self.maxpool = layer_set(fused).MaxPool2d(3, stride=2, padding=1)
        in_channels = 64

        def stage(channels: int, depth: int, stride: int) -> nn.Sequential:
            nonlocal in_channels
            blocks = []
            for i in range(depth):
                blocks.append(block(in_channels, channels, stride if i == 0 else 1, groups, group_width, fused))
                in_channels = channels * block.expansion
            return nn.Sequential(*blocks)

        self.layer1 = stage(64, depths[0], stride=1)
        self.layer2 = stage(128, depths[1], stride=2)
        self.layer3 = stage(256, depths[2], stride=2)
        self.layer4 = stage(512, depths[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(in_channels, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


@register(3, 224, 224)
def resnet18(**kwargs) -> ResNet:
    """ResNet-18: residual blocks of two 3x3 convolutions. Input 3x224x224, 11,689,512 parameters.

    He et al., Deep Residual Learning for Image Recognition, 2015 (arXiv:1512.03385). Shapes: stem 64x56x56; stages
    64x56x56, 128x28x28, 256x14x14, 512x7x7.
    """
    return ResNet(BasicBlock, (2, 2, 2, 2), **kwargs)


@register(3, 224, 224)
def resnet34(**kwargs) -> ResNet:
    """ResNet-34: residual blocks of two 3x3 convolutions. Input 3x224x224, 21,797,672 parameters.

    He et al., Deep Residual Learning for Image Recognition, 2015 (arXiv:1512.03385). Shapes: stem 64x56x56; stages
    64x56x56, 128x28x28, 256x14x14, 512x7x7.
    """
    return ResNet(BasicBlock, (3, 4, 6, 3), **kwargs)


@register(3, 224, 224)
def resnet50(**kwargs) -> ResNet:
    """ResNet-50: residual bottlenecks of 1x1, 3x3 and 1x1 convolutions. Input 3x224x224, 25,557,032 parameters.

    He et al., Deep Residual Learning for Image Recognition, 2015 (arXiv:1512.03385). Shapes: stem 64x56x56; stages
    256x56x56, 512x28x28, 1024x14x14, 2048x7x7.
    """
    return ResNet(Bottleneck, (3, 4, 6, 3), **kwargs)


@register(3, 224, 224)
def resnet101(**kwargs) -> ResNet:
    """ResNet-101: residual bottlenecks of 1x1, 3x3 and 1x1 convolutions. Input 3x224x224, 44,549,160 parameters.

    He et al., Deep Residual Learning for Image Recognition, 2015 (arXiv:1512.03385). Shapes: stem 64x56x56; stages
    256x56x56, 512x28x28, 1024x14x14, 2048x7x7.
    """
    return ResNet(Bottleneck, (3, 4, 23, 3), **kwargs)


@register(3, 224, 224)
def resnet152(**kwargs) -> ResNet:
    """ResNet-152: residual bottlenecks of 1x1, 3x3 and 1x1 convolutions. Input 3x224x224, 60,192,808 parameters.

    He et al., Deep Residual Learning for Image Recognition, 2015 (arXiv:1512.03385). Shapes: stem 64x56x56; stages
    256x56x56, 512x28x28, 1024x14x14, 2048x7x7.
    """
    return ResNet(Bottleneck, (3, 8, 36, 3), **kwargs)


@register(3, 224, 224)
def resnext50_32x4d(**kwargs) -> ResNet:
    """ResNeXt-50 with 32 groups of 4 channels. Input 3x224x224, 25,028,904 parameters.

    Xie et al., Aggregated Residual Transformations for Deep Neural Networks, 2016 (arXiv:1611.05431). Shapes: stem
    64x56x56; stages 256x56x56, 512x28x28, 1024x14x14, 2048x7x7.
    """
    return ResNet(Bottleneck, (3, 4, 6, 3), groups=32, group_width=4, **kwargs)


@register(3, 224, 224)
def resnext101_32x8d(**kwargs) -> ResNet:
    """ResNeXt-101 with 32 groups of 8 channels. Input 3x224x224, 88,791,336 parameters.

    Xie et al., Aggregated Residual Transformations for Deep Neural Networks, 2016 (arXiv:1611.05431). Shapes: stem
    64x56x56; stages 256x56x56, 512x28x28, 1024x14x14, 2048x7x7.
    """
    return ResNet(Bottleneck, (3, 4, 23, 3), groups=32, group_width=8, **kwargs)


@register(3, 224, 224)
def resnext101_64x4d(**kwargs) -> ResNet:
    """ResNeXt-101 with 64 groups of 4 channels. Input 3x224x224, 83,455,272 parameters.

    Xie et al., Aggregated Residual Transformations for Deep Neural Networks, 2016 (arXiv:1611.05431). Shapes: stem
    64x56x56; stages 256x56x56, 512x28x28, 1024x14x14, 2048x7x7.
    """
    return ResNet(Bottleneck, (3, 4, 23, 3), groups=64, group_width=4, **kwargs)
