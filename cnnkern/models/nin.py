"""Network in Network. Lin, Chen and Yan, 2013 (arXiv:1312.4400)."""

from torch import nn

from cnnkern.models.layers import init_for_relu
from cnnkern.models.registry import register


class NiNBlock(nn.Sequential):
    """A convolution and two 1x1 convolutions, each with ReLU. (N, in, H, W) -> (N, out, H', W')."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 1),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 1),
            nn.ReLU(),
        )


@register(1, 224, 224)
def nin(num_classes: int = 10, in_channels: int = 1, fused: bool = True, dropout: float = 0.5) -> nn.Sequential:
    """NiN, without a fully connected layer. Input 1x224x224, 1,992,166 parameters. No layer to fuse.

    Lin, Chen and Yan, Network In Network, 2013 (arXiv:1312.4400). Shapes: blocks 96x54x54, 256x26x26, 384x12x12,
    10x5x5; a global average pool leaves 10.
    """
    classes = NiNBlock(384, num_classes, 3, padding=1)
    model = nn.Sequential(
        NiNBlock(in_channels, 96, 11, stride=4),
        nn.MaxPool2d(3, stride=2),
        NiNBlock(96, 256, 5, padding=2),
        nn.MaxPool2d(3, stride=2),
        NiNBlock(256, 384, 3, padding=1),
        nn.MaxPool2d(3, stride=2),
        nn.Dropout(dropout),
        classes,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    init_for_relu(model)
    # Behind its ReLU a class that starts below zero has no gradient to come back by: all start above.
    for name, parameter in classes[-2].named_parameters():
        if name == "weight":
            nn.init.normal_(parameter, std=0.01)
        else:
            nn.init.ones_(parameter)
    return model
