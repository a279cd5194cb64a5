"""ResNet with pre-activation. He et al., Identity Mappings in Deep Residual Networks, 2016 (arXiv:1603.05027)."""

from torch import Tensor, nn

from cnnkern.models.layers import layer_set
from cnnkern.models.registry import register


class PreActBasicBlock(nn.Module):
    """Twice batch norm, ReLU and a 3x3 convolution; the input is added to what comes out, with no ReLU behind it.

    (N, in_channels, H, W) -> (N, channels, H / stride, W / stride).
    """

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int = 1, fused: bool = True) -> None:
        super().__init__()
        layers = layer_set(fused)
        self.bn1 = layers.BatchNormReLU2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = layers.BatchNormReLU2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.projection = _projection(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.bn1(x)
        identity = x if self.projection is None else self.projection(activated)
        return self.conv2(self.bn2(self.conv1(activated))) + identity


class PreActBottleneck(nn.Module):
    """Batch norm, ReLU and convolution, 1x1, 3x3 and 1x1; the input is added to what comes out.

    (N, in_channels, H, W) -> (N, 4 * channels, H / stride, W / stride).
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int = 1, fused: bool = True) -> None:
        super().__init__()
        layers = layer_set(fused)
        self.bn1 = layers.BatchNormReLU2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn2 = layers.BatchNormReLU2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn3 = layers.BatchNormReLU2d(channels)
        self.conv3 = nn.Conv2d(channels, channels * self.expansion, 1, bias=False)
        self.projection = _projection(in_channels, channels * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.bn1(x)
        identity = x if self.projection is None else self.projection(activated)
        x = self.conv2(self.bn2(self.conv1(activated)))
        return self.conv3(self.bn3(x)) + identity


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


class PreActResNet(nn.Module):
    """A 7x7 stem, four stages of ``depths`` blocks, batch norm and ReLU, global average pooling, one linear layer."""

    def __init__(
        self,
        block: type[PreActBasicBlock] | type[PreActBottleneck],
        depths: tuple[int, int, int, int],
        num_classes: int = 1000,
        in_channels: int = 3,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.maxpool = layer_set(fused).MaxPool2d(3, stride=2, padding=1)
        in_channels = 64
        stages = []
        for i, depth in enumerate(depths):
            blocks = []
            for j in range(depth):
                blocks.append(block(in_channels, 64 * 2**i, stride=2 if i > 0 and j == 0 else 1, fused=fused))
                in_channels = 64 * 2**i * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.bn = layer_set(fused).BatchNormReLU2d(in_channels)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(in_channels, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.maxpool(self.conv1(x)))
        return self.fc(self.avgpool(self.bn(x)).flatten(1))


@register(3, 224, 224)
def preact_resnet18(**kwargs) -> PreActResNet:
    """Pre-activation ResNet-18: batch norm and ReLU before each convolution. Input 3x224x224, 11,687,720 parameters.

    He et al., Identity Mappings in Deep Residual Networks, 2016 (arXiv:1603.05027). Shapes: stem 64x56x56; stages
    64x56x56, 128x28x28, 256x14x14, 512x7x7.
    """
    return PreActResNet(PreActBasicBlock, (2, 2, 2, 2), **kwargs)


@register(3, 224, 224)
def preact_resnet34(**kwargs) -> PreActResNet:
    """Pre-activation ResNet-34: batch norm and ReLU before each convolution. Input 3x224x224, 21,795,880 parameters.

    He et al., Identity Mappings in Deep Residual Networks, 2016 (arXiv:1603.05027). Shapes: stem 64x56x56; stages
    64x56x56, 128x28x28, 256x14x14, 512x7x7.
    """
    return PreActResNet(PreActBasicBlock, (3, 4, 6, 3), **kwargs)


@register(3, 224, 224)
def preact_resnet50(**kwargs) -> PreActResNet:
    """Pre-activation ResNet-50: batch norm and ReLU before each convolution. Input 3x224x224, 25,549,352 parameters.

    He et al., Identity Mappings in Deep Residual Networks, 2016 (arXiv:1603.05027). Shapes: stem 64x56x56; stages
    256x56x56, 512x28x28, 1024x14x14, 2048x7x7.
    """
    return PreActResNet(PreActBottleneck, (3, 4, 6, 3), **kwargs)
