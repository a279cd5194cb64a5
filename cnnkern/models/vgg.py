"""VGG. Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, 2014
(arXiv:1409.1556).
"""

from torch import Tensor, nn

from cnnkern.models.layers import layer_set
from cnnkern.models.registry import register


class VGG(nn.Module):
    """Blocks of 3x3 convolutions, ``depths[i]`` of ``64 * 2**i`` channels up to 512, each block ending in max pooling.

    State-dict keys are torchvision's. ``width_mult`` scales the channels of the blocks, not the fully connected layers.
    """

    def __init__(
        self,
        depths: tuple[int, ...],
        batch_norm: bool = False,
        num_classes: int = 1000,
        in_channels: int = 3,
        fused: bool = True,
        dropout: float = 0.5,
        width_mult: float = 1.0,
    ) -> None:
        super().__init__()
        layers = layer_set(fused)
        blocks: list[nn.Module] = []
        for depth, width in zip(depths, (64, 128, 256, 512, 512), strict=True):
            width = round(width * width_mult)
            for _ in range(depth):
                blocks.append(nn.Conv2d(in_channels, width, 3, padding=1))
                # The identity has the place of torchvision's ReLU, so that the layers behind keep their numbers.
                blocks += [layers.BatchNormReLU2d(width), nn.Identity()] if batch_norm else [nn.ReLU(inplace=True)]
                in_channels = width
            blocks.append(layers.MaxPool2d(2))
        self.features = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(in_channels * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, num_classes),
        )
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
            elif isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, 0, 0.01)
                nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(x.flatten(1))


@register(3, 224, 224)
def vgg11(**kwargs) -> VGG:
    """VGG-A: eight 3x3 convolutions. Input 3x224x224, 132,863,336 parameters.

    At 1x224x224 and 10 classes 128,806,154 parameters. No layer to fuse but max pooling.

    Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, 2014 (arXiv:1409.1556).
    Shapes: blocks 64x112x112, 128x56x56, 256x28x28, 512x14x14, 512x7x7; classifier 4096, 4096.
    """
    return VGG((1, 1, 2, 2, 2), **kwargs)


@register(3, 224, 224)
def vgg13(**kwargs) -> VGG:
    """VGG-B: ten 3x3 convolutions. Input 3x224x224, 133,047,848 parameters.

    At 1x224x224 and 10 classes 128,990,666 parameters. No layer to fuse but max pooling.

    Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, 2014 (arXiv:1409.1556).
    Shapes: blocks 64x112x112, 128x56x56, 256x28x28, 512x14x14, 512x7x7; classifier 4096, 4096.
    """
    return VGG((2, 2, 2, 2, 2), **kwargs)


@register(3, 224, 224)
def vgg16(**kwargs) -> VGG:
    """VGG-D: thirteen 3x3 convolutions. Input 3x224x224, 138,357,544 parameters.

    At 1x224x224 and 10 classes 134,300,362 parameters. No layer to fuse but max pooling.

    Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, 2014 (arXiv:1409.1556).
    Shapes: blocks 64x112x112, 128x56x56, 256x28x28, 512x14x14, 512x7x7; classifier 4096, 4096.
    """
    return VGG((2, 2, 3, 3, 3), **kwargs)


@register(3, 224, 224)
def vgg19(**kwargs) -> VGG:
    """VGG-E: sixteen 3x3 convolutions. Input 3x224x224, 143,667,240 parameters.

    At 1x224x224 and 10 classes 139,610,058 parameters. No layer to fuse but max pooling.

    Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, 2014 (arXiv:1409.1556).
    Shapes: blocks 64x112x112, 128x56x56, 256x28x28, 512x14x14, 512x7x7; classifier 4096, 4096.
    """
    return VGG((2, 2, 4, 4, 4), **kwargs)


@register(3, 224, 224)
def vgg11_bn(**kwargs) -> VGG:
    """VGG-A with batch norm after every convolution. Input 3x224x224, 132,868,840 parameters.

    Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, 2014 (arXiv:1409.1556);
    batch norm: Ioffe and Szegedy, Batch Normalization, 2015 (arXiv:1502.03167). Shapes: blocks 64x112x112, 128x56x56,
    256x28x28, 512x14x14, 512x7x7; classifier 4096, 4096.
    """
    return VGG((1, 1, 2, 2, 2), batch_norm=True, **kwargs)


@register(3, 224, 224)
def vgg13_bn(**kwargs) -> VGG:
    """VGG-B with batch norm after every convolution. Input 3x224x224, 133,053,736 parameters.

    Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, 2014 (arXiv:1409.1556);
    batch norm: Ioffe and Szegedy, Batch Normalization, 2015 (arXiv:1502.03167). Shapes: blocks 64x112x112, 128x56x56,
    256x28x28, 512x14x14, 512x7x7; classifier 4096, 4096.
    """
    return VGG((2, 2, 2, 2, 2), batch_norm=True, **kwargs)


@register(3, 224, 224)
def vgg16_bn(**kwargs) -> VGG:
    """VGG-D with batch norm after every convolution. Input 3x224x224, 138,365,992 parameters.

    Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, 2014 (arXiv:1409.1556);
    batch norm: Ioffe and Szegedy, Batch Normalization, 2015 (arXiv:1502.03167). Shapes: blocks 64x112x112, 128x56x56,
    256x28x28, 512x14x14, 512x7x7; classifier 4096, 4096.
    """
    return VGG((2, 2, 3, 3, 3), batch_norm=True, **kwargs)


@register(3, 224, 224)
def vgg19_bn(**kwargs) -> VGG:
    """VGG-E with batch norm after every convolution. Input 3x224x224, 143,678,248 parameters.

    Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, 2014 (arXiv:1409.1556);
    batch norm: Ioffe and Szegedy, Batch Normalization, 2015 (arXiv:1502.03167). Shapes: blocks 64x112x112, 128x56x56,
    256x28x28, 512x14x14, 512x7x7; classifier 4096, 4096.
    """
    return VGG((2, 2, 4, 4, 4), batch_norm=True, **kwargs)
