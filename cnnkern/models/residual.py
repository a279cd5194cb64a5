"""Residual blocks to build with, and three small networks of them.

He et al., Deep Residual Learning for Image Recognition, 2015 (arXiv:1512.03385). The blocks keep their convolutions'
biases unless told otherwise, and their projections are a convolution alone.
"""

from torch import Tensor, nn

from cnnkern.models.layers import Chain, layer_set
from cnnkern.models.registry import register


def conv2d(in_channels: int | None, out_channels: int, kernel_size: int, **kwargs) -> nn.Conv2d:
    """A convolution that keeps the side at stride 1, and learns its input channels from the first input if None."""
    kwargs["padding"] = kernel_size // 2
    if in_channels is None:
        return nn.LazyConv2d(out_channels, kernel_size, **kwargs)
    return nn.Conv2d(in_channels, out_channels, kernel_size, **kwargs)


def out_channels_of(block: str, channels: int | None, out_channels: int | None) -> int:
    """``out_channels``, by default the input's; ValueError where neither is known."""
    if out_channels is not None:
        return out_channels
    if channels is None:
        raise ValueError(f"{block}: with lazy input channels (channels=None) give out_channels")
    return channels


class ResidualBlock(nn.Module):
    """``num_convs`` 3x3 convolutions with batch norm and ReLU, and the input added before the last ReLU.

    (N, channels, H, W) -> (N, out_channels, H / stride, W / stride); ``channels=None`` learns it from the first input.
    The input goes through a 1x1 convolution where stride or channels change; ``projection`` says it where the channels
    are learnt. Raises ValueError for another ``num_convs`` than 2, 3 or 4.
    """

    def __init__(
        self,
        channels: int | None,
        out_channels: int | None = None,
        stride: int = 1,
        num_convs: int = 2,
        *,
        bias: bool = True,
        projection: bool | None = None,
        fused: bool = True,
    ) -> None:
        super().__init__()
        if num_convs not in (2, 3, 4):
            raise ValueError(f"ResidualBlock: num_convs must be 2, 3 or 4; got {num_convs}")
        layers = layer_set(fused)
        width = out_channels_of("ResidualBlock", channels, out_channels)
        self.body = Chain(
            conv2d(channels, width, 3, stride=stride, bias=bias),
            layers.BatchNormReLU2d(width),
        )
        for _ in range(num_convs - 2):
            self.body.extend([conv2d(width, width, 3, bias=bias), layers.BatchNormReLU2d(width)])
        self.body.extend([conv2d(width, width, 3, bias=bias), layers.BatchNormAddReLU2d(width)])
        if projection is None:
            projection = stride != 1 or channels not in (None, width)
        self.projection = conv2d(channels, width, 1, stride=stride, bias=bias) if projection else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x, self.projection(x))


class BottleneckBlock(nn.Module):
    """1x1 down to ``channels / reduction``, 3x3, 1x1 up again, and the input added before the last ReLU.

    (N, channels, H, W) -> (N, out_channels, H / stride, W / stride), with the projection and the lazy input channels
    of :class:`ResidualBlock`. With 256 channels it has 69,632 convolution weights; two 3x3 have 1,179,648.
    """

    def __init__(
        self,
        channels: int | None,
        reduction: int = 4,
        out_channels: int | None = None,
        stride: int = 1,
        *,
        bias: bool = True,
        projection: bool | None = None,
        fused: bool = True,
    ) -> None:
        super().__init__()
        layers = layer_set(fused)
        out_channels = out_channels_of("BottleneckBlock", channels, out_channels)
        if out_channels % reduction:
            raise ValueError(f"BottleneckBlock: {out_channels} channels cannot be reduced by {reduction}")
        width = out_channels // reduction
        self.body = Chain(
            conv2d(channels, width, 1, bias=bias),
            layers.BatchNormReLU2d(width),
            conv2d(width, width, 3, stride=stride, bias=bias),
            layers.BatchNormReLU2d(width),
            conv2d(width, out_channels, 1, bias=bias),
            layers.BatchNormAddReLU2d(out_channels),
        )
        if projection is None:
            projection = stride != 1 or channels not in (None, out_channels)
        self.projection = conv2d(channels, out_channels, 1, stride=stride, bias=bias) if projection else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x, self.projection(x))


@register(3, 32, 32)
def bn_lenet_residual(num_classes: int = 10, in_channels: int = 3, fused: bool = True) -> nn.Sequential:
    """LeNet's plan with batch norm and one residual block per stage. Input 3x32x32, 255,130 parameters.

    The blocks are of He et al., Deep Residual Learning for Image Recognition, 2015 (arXiv:1512.03385). Shapes:
    16x32x32, pooled 16x16x16; 32x16x16, pooled 32x8x8; 64x8x8, pooled 64x4x4; then 1024, 120, 84.
    """
    layers = layer_set(fused)
    stages: list[nn.Module] = []
    for channels in (16, 32, 64):
        stages += [
            conv2d(in_channels, channels, 3, bias=False),
            layers.BatchNormReLU2d(channels),
            ResidualBlock(channels, bias=False, fused=fused),
            layers.MaxPool2d(2),
        ]
        in_channels = channels
    return nn.Sequential(
        *stages,
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 120, bias=False),
        layers.BatchNormReLU1d(120),
        nn.Linear(120, 84, bias=False),
        layers.BatchNormReLU1d(84),
        nn.Linear(84, num_classes),
    )


@register(3, 32, 32)
def res_lenet(num_classes: int = 10, in_channels: int = 3, fused: bool = True) -> nn.Sequential:
    """A 5x5 convolution, five residual blocks of 16, 32 and 64 channels. Input 3x32x32, 171,162 parameters.

    The blocks are of He et al., Deep Residual Learning for Image Recognition, 2015 (arXiv:1512.03385). Shapes:
    16x32x32, pooled 16x16x16; 32x8x8, pooled 32x4x4; 64x2x2, pooled 64x1x1.
    """
    layers = layer_set(fused)
    return nn.Sequential(
        conv2d(in_channels, 16, 5, bias=False),
        layers.BatchNormReLU2d(16),
        ResidualBlock(16, bias=False, fused=fused),
        layers.MaxPool2d(2),
        ResidualBlock(16, 32, stride=2, bias=False, fused=fused),
        ResidualBlock(32, bias=False, fused=fused),
        layers.MaxPool2d(2),
        ResidualBlock(32, 64, stride=2, bias=False, fused=fused),
        ResidualBlock(64, bias=False, fused=fused),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, num_classes),
    )


@register(1, 28, 28)
def simple_resnet(num_classes: int = 10, in_channels: int = 1, fused: bool = True) -> nn.Sequential:
    """A convolution and three residual blocks of 32 channels. Input 1x28x28, 56,586 parameters.

    The blocks are of He et al., Deep Residual Learning for Image Recognition, 2015 (arXiv:1512.03385). Shapes: stem and
    blocks 32x28x28; pooled 32x1x1.
    """
    return nn.Sequential(
        conv2d(in_channels, 32, 3),
        layer_set(fused).BatchNormReLU2d(32),
        *(ResidualBlock(32, fused=fused) for _ in range(3)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, num_classes),
    )
