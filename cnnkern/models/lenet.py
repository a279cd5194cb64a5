"""LeNet and its descendants for 28x28 digits.

LeCun et al., Gradient-Based Learning Applied to Document Recognition, 1998.
"""

from torch import nn

from cnnkern.models.layers import layer_set
from cnnkern.models.registry import register


@register(1, 28, 28)
def lenet(num_classes: int = 10, in_channels: int = 1, fused: bool = True) -> nn.Sequential:
    """LeNet with sigmoids and average pooling. Input 1x28x28, 61,706 parameters. No layer to fuse.

    LeCun et al., Gradient-Based Learning Applied to Document Recognition, 1998. Shapes: 6x28x28, pooled 6x14x14;
    16x10x10, pooled 16x5x5; then 400, 120, 84.
    """
    return _lenet(num_classes, in_channels, padding=2, act=nn.Sigmoid, pool=nn.AvgPool2d)


@register(1, 28, 28)
def lenet5_tanh(num_classes: int = 10, in_channels: int = 1, fused: bool = True) -> nn.Sequential:
    """LeNet-5 with tanh and no padding. Input 1x28x28, 44,426 parameters. No layer to fuse.

    LeCun et al., Gradient-Based Learning Applied to Document Recognition, 1998. Shapes: 6x24x24, pooled 6x12x12;
    16x8x8, pooled 16x4x4; then 256, 120, 84.
    """
    return _lenet(num_classes, in_channels, padding=0, act=nn.Tanh, pool=nn.AvgPool2d)


@register(1, 28, 28)
def lenet_relu(num_classes: int = 10, in_channels: int = 1, fused: bool = True) -> nn.Sequential:
    """LeNet with ReLU and max pooling. Input 1x28x28, 61,706 parameters. No layer to fuse.

    After LeCun et al., Gradient-Based Learning Applied to Document Recognition, 1998. Shapes: 6x28x28, pooled 6x14x14;
    16x10x10, pooled 16x5x5; then 400, 120, 84.
    """
    return _lenet(num_classes, in_channels, padding=2, act=nn.ReLU, pool=nn.MaxPool2d)


def _lenet(
    num_classes: int, in_channels: int, padding: int, act: type[nn.Module], pool: type[nn.Module]
) -> nn.Sequential:
    side = (28 + 2 * padding - 4) // 2  # after the first pooling
    side = (side - 4) // 2  # after the second
    return nn.Sequential(
        nn.Conv2d(in_channels, 6, 5, padding=padding),
        act(),
        pool(2),
        nn.Conv2d(6, 16, 5),
        act(),
        pool(2),
        nn.Flatten(),
        nn.Linear(16 * side * side, 120),
        act(),
        nn.Linear(120, 84),
        act(),
        nn.Linear(84, num_classes),
    )


@register(1, 28, 28)
def lenet_wide(num_classes: int = 10, in_channels: int = 1, fused: bool = True) -> nn.Sequential:
    """Three 3x3 convolutions of 32, 64 and 128 channels. Input 1x28x28, 422,026 parameters. No layer to fuse.

    After LeCun et al., Gradient-Based Learning Applied to Document Recognition, 1998. Shapes: 32x28x28, pooled
    32x14x14; 64x14x14, pooled 64x7x7; 128x7x7, pooled 128x3x3; then 1152, 256, 128.
    """
    layers: list[nn.Module] = []
    for channels in (32, 64, 128):
        layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        in_channels = channels
    return nn.Sequential(
        *layers,
        nn.Flatten(),
        nn.Linear(128 * 3 * 3, 256),
        nn.ReLU(),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Linear(128, num_classes),
    )


@register(1, 28, 28)
def bn_lenet(num_classes: int = 10, in_channels: int = 1, fused: bool = True) -> nn.Sequential:
    """LeNet without padding, batch norm before every sigmoid. Input 1x28x28, 44,878 parameters.

    After LeCun et al., Gradient-Based Learning Applied to Document Recognition, 1998, and Ioffe and Szegedy, Batch
    Normalization, 2015 (arXiv:1502.03167). Shapes: 6x24x24, pooled 6x12x12; 16x8x8, pooled 16x4x4; then 256, 120, 84.
    """
    layers = layer_set(fused)
    return nn.Sequential(
        nn.Conv2d(in_channels, 6, 5),
        layers.BatchNormAct2d(6, act="sigmoid"),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5),
        layers.BatchNormAct2d(16, act="sigmoid"),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 120),
        layers.BatchNormAct1d(120, act="sigmoid"),
        nn.Linear(120, 84),
        layers.BatchNormAct1d(84, act="sigmoid"),
        nn.Linear(84, num_classes),
    )
