"""DenseNet. Huang et al., Densely Connected Convolutional Networks, 2016 (arXiv:1608.06993).

`densenet121`, `169` and `201` have the paper's bottlenecks and torchvision's state-dict keys. `densenet_small` is built
of two plainer blocks, :class:`DenseBlock` and :class:`TransitionBlock`.
"""

from collections import OrderedDict

from torch import Tensor, nn

from cnnkern.models.layers import layer_set
from cnnkern.models.registry import register
from cnnkern.models.residual import conv2d


class DenseLayer(nn.Module):
    """Batch norm, ReLU, 1x1 convolution to ``4 * growth``, and again with a 3x3 to ``growth`` channels."""

    def __init__(self, in_channels: int, growth: int, fused: bool = True) -> None:
        super().__init__()
        layers = layer_set(fused)
        self.norm1 = layers.BatchNormReLU2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, 4 * growth, 1, bias=False)
        self.norm2 = layers.BatchNormReLU2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.norm2(self.conv1(self.norm1(x))))


class DenseNet(nn.Module):
    """A 7x7 stem of ``2 * growth`` channels, four dense blocks with halving transitions between, one linear layer."""

    def __init__(
        self,
        depths: tuple[int, int, int, int],
        growth: int = 32,
        num_classes: int = 1000,
        in_channels: int = 3,
        fused: bool = True,
    ) -> None:
        super().__init__()
        layers = layer_set(fused)
        channels = 2 * growth
        self.features = nn.Sequential(
            OrderedDict(
                conv0=nn.Conv2d(in_channels, channels, 7, stride=2, padding=3, bias=False),
                norm0=layers.BatchNormReLU2d(channels),
                pool0=layers.MaxPool2d(3, stride=2, padding=1),
            )
        )
        for i, depth in enumerate(depths, start=1):
            block = layers.DenseBlock(
                {f"denselayer{j + 1}": DenseLayer(channels + j * growth, growth, fused) for j in range(depth)}, growth
            )
            self.features.add_module(f"denseblock{i}", block)
            channels += depth * growth
            if i < len(depths):
                transition = OrderedDict(
                    norm=layers.BatchNormReLU2d(channels),
                    conv=nn.Conv2d(channels, channels // 2, 1, bias=False),
                    pool=nn.AvgPool2d(2),
                )
                self.features.add_module(f"transition{i}", nn.Sequential(transition))
                channels //= 2
        self.features.add_module("norm5", layers.BatchNormReLU2d(channels))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)
            elif isinstance(m, nn.Linear):
                nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


@register(3, 224, 224)
def densenet121(**kwargs) -> DenseNet:
    """DenseNet-121: each layer reads the outputs of all layers before it. Input 3x224x224, 7,978,856 parameters.

    Huang et al., Densely Connected Convolutional Networks, 2016 (arXiv:1608.06993). Shapes: stem 64x56x56; dense blocks
    and, between them, transitions 256x56x56, 128x28x28, 512x28x28, 256x14x14, 1024x14x14, 512x7x7, 1024x7x7.
    """
    return DenseNet((6, 12, 24, 16), **kwargs)


@register(3, 224, 224)
def densenet169(**kwargs) -> DenseNet:
    """DenseNet-169: each layer reads the outputs of all layers before it. Input 3x224x224, 14,149,480 parameters.

    Huang et al., Densely Connected Convolutional Networks, 2016 (arXiv:1608.06993). Shapes: stem 64x56x56; dense blocks
    and, between them, transitions 256x56x56, 128x28x28, 512x28x28, 256x14x14, 1280x14x14, 640x7x7, 1664x7x7.
    """
    return DenseNet((6, 12, 32, 32), **kwargs)


@register(3, 224, 224)
def densenet201(**kwargs) -> DenseNet:
    """DenseNet-201: each layer reads the outputs of all layers before it. Input 3x224x224, 20,013,928 parameters.

    Huang et al., Densely Connected Convolutional Networks, 2016 (arXiv:1608.06993). Shapes: stem 64x56x56; dense blocks
    and, between them, transitions 256x56x56, 128x28x28, 512x28x28, 256x14x14, 1792x14x14, 896x7x7, 1920x7x7.
    """
    return DenseNet((6, 12, 48, 32), **kwargs)


def norm_relu_conv(in_channels: int | None, out_channels: int, kernel_size: int, fused: bool) -> nn.Sequential:
    """Batch norm, ReLU, convolution; with ``in_channels=None`` it learns its channels from the first input."""
    layers = layer_set(fused)
    norm = layers.LazyBatchNormReLU2d() if in_channels is None else layers.BatchNormReLU2d(in_channels)
    return nn.Sequential(norm, conv2d(in_channels, out_channels, kernel_size))


class DenseBlock(nn.Module):
    """``depth`` times batch norm, ReLU and a 3x3 convolution to ``growth`` channels, each on all that came before.

    (N, C, H, W) -> (N, C + depth * growth, H, W); ``in_channels=None`` learns C from the first input.
    """

    def __init__(self, depth: int, growth: int, in_channels: int | None = None, *, fused: bool = True) -> None:
        super().__init__()
        channels = [None if in_channels is None else in_channels + i * growth for i in range(depth)]
        self.layers = layer_set(fused).DenseBlock(
            {str(i): norm_relu_conv(c, growth, 3, fused) for i, c in enumerate(channels)}, growth
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class TransitionBlock(nn.Sequential):
    """Batch norm, ReLU, a 1x1 convolution to ``out_channels``, and average pooling by 2.

    (N, C, H, W) -> (N, out_channels, H / 2, W / 2); ``in_channels=None`` learns C from the first input.
    """

    def __init__(self, out_channels: int, in_channels: int | None = None, *, fused: bool = True) -> None:
        super().__init__(*norm_relu_conv(in_channels, out_channels, 1, fused), nn.AvgPool2d(2))


@register(1, 96, 96)
def densenet_small(num_classes: int = 10, in_channels: int = 1, fused: bool = True) -> nn.Sequential:
    """Four dense blocks of four layers, growth 32. Input 1x96x96, 758,226 parameters.

    After Huang et al., Densely Connected Convolutional Networks, 2016 (arXiv:1608.06993), without bottlenecks. Shapes:
    stem 64x24x24; dense blocks and, between them, transitions 192x24x24, 96x12x12, 224x12x12, 112x6x6, 240x6x6,
    120x3x3, 248x3x3.
    """
    layers = layer_set(fused)
    blocks: list[nn.Module] = []
    channels = 64
    for i in range(4):
        blocks.append(DenseBlock(4, 32, channels, fused=fused))
        channels += 4 * 32
        if i < 3:
            blocks.append(TransitionBlock(channels // 2, channels, fused=fused))
            channels //= 2
    return nn.Sequential(
        nn.Conv2d(in_channels, 64, 7, stride=2, padding=3),
        layers.BatchNormReLU2d(64),
        layers.MaxPool2d(3, stride=2, padding=1),
        *blocks,
        layers.BatchNormReLU2d(channels),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, num_classes),
    )
