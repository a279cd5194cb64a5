"""AnyNet and RegNet. Radosavovic et al., Designing Network Design Spaces, 2020 (arXiv:2003.13678).

State-dict keys are torchvision's.
"""

import itertools
import math
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from cnnkern.models.layers import Chain, SqueezeExcitation, grouped_conv2d, layer_set
from cnnkern.models.registry import register
from cnnkern.models.residual import conv2d, out_channels_of


class ResNeXtBlock(nn.Module):
    """1x1, grouped 3x3 and 1x1 convolution with batch norm, and the input added before the last ReLU.

    (N, channels, H, W) -> (N, out_channels, H / stride, W / stride). The 3x3 convolution has
    ``out_channels / bottleneck_ratio`` channels in groups of ``group_width``. With ``se_ratio`` the squeeze and
    excitation behind it has that share of the input's channels. The input goes through a 1x1 convolution with batch
    norm where stride or channels change; ``channels=None`` learns them from the first input, and ``projection`` then
    says whether. Raises ValueError where the groups do not fit.
    """

    def __init__(
        self,
        channels: int | None,
        group_width: int,
        bottleneck_ratio: float = 1.0,
        out_channels: int | None = None,
        stride: int = 1,
        se_ratio: float | None = None,
        *,
        bias: bool = True,
        projection: bool | None = None,
        fused: bool = True,
    ) -> None:
        super().__init__()
        layers = layer_set(fused)
        out_channels = out_channels_of("ResNeXtBlock", channels, out_channels)
        width = round(out_channels / bottleneck_ratio)
        if width % group_width:
            raise ValueError(f"ResNeXtBlock: {width} channels do not divide into groups of {group_width}")
        if se_ratio and channels is None:
            raise ValueError("ResNeXtBlock: se_ratio is a share of the input's channels: give channels")
        if projection is None:
            projection = stride != 1 or channels not in (None, out_channels)
        self.proj = (
            nn.Sequential(conv2d(channels, out_channels, 1, stride=stride, bias=bias), layers.BatchNorm2d(out_channels))
            if projection
            else None
        )
        parts: OrderedDict[str, nn.Module] = OrderedDict(
            a=nn.Sequential(conv2d(channels, width, 1, bias=bias), layers.BatchNormReLU2d(width)),
            b=nn.Sequential(
                grouped_conv2d(
                    layers, width, width, 3, stride=stride, padding=1, groups=width // group_width, bias=bias
                ),
                layers.BatchNormReLU2d(width),
            ),
        )
        if se_ratio and channels is not None:
            parts["se"] = SqueezeExcitation(width, round(se_ratio * channels))
        parts["c"] = Chain(conv2d(width, out_channels, 1, bias=bias), layers.BatchNormAddReLU2d(out_channels))
        self.f = Chain(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x, x if self.proj is None else self.proj(x))


class AnyNet(nn.Module):
    """A 3x3 stem of ``stem`` channels, and stages of ResNeXt blocks, each with a stride of 2 in its first block.

    Stage i has ``depths[i]`` blocks of ``widths[i]`` channels, groups of ``group_widths[i]`` channels and the
    bottleneck ratio ``bottleneck_ratios[i]``; a single number stands for all stages. Raises ValueError where the
    stages' numbers do not agree.
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        group_widths: Sequence[int] | int,
        bottleneck_ratios: Sequence[float] | float = 1.0,
        stem: int = 32,
        num_classes: int = 10,
        in_channels: int = 3,
        se_ratio: float | None = None,
        bias: bool = True,
        fused: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(group_widths, int):
            group_widths = [group_widths] * len(depths)
        if isinstance(bottleneck_ratios, (int, float)):
            bottleneck_ratios = [bottleneck_ratios] * len(depths)
        stages = (depths, widths, group_widths, bottleneck_ratios)
        if len({len(numbers) for numbers in stages}) != 1:
            raise ValueError(
                "AnyNet: depths, widths, group_widths and bottleneck_ratios must be of one length; "
                f"got {', '.join(str(len(numbers)) for numbers in stages)}"
            )
        self.stem = nn.Sequential(
            conv2d(in_channels, stem, 3, stride=2, bias=bias), layer_set(fused).BatchNormReLU2d(stem)
        )
        self.trunk_output = nn.Sequential()
        channels = stem
        for i, (depth, width, group_width, ratio) in enumerate(zip(*stages, strict=True), start=1):
            stage = nn.Sequential()
            for j in range(depth):
                block = ResNeXtBlock(
                    channels, group_width, ratio, width, 2 if j == 0 else 1, se_ratio, bias=bias, fused=fused
                )
                stage.add_module(f"block{i}-{j}", block)
                channels = width
            self.trunk_output.add_module(f"block{i}", stage)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                fan_out = m.kernel_size[0] * m.kernel_size[1] * m.out_channels
                nn.init.normal_(m.weight, 0, math.sqrt(2 / fan_out))
            elif isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, 0, 0.01)
                nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk_output(self.stem(x))
        return self.fc(self.avgpool(x).flatten(1))


def quantized_widths(
    initial_width: int, slope: float, multiplier: float, depth: int, group_width: int
) -> tuple[list[int], list[int], list[int]]:
    """(depths, widths, group widths) of a RegNet's stages; equations 2 to 4 of the paper, at bottleneck ratio 1.

    Block j of ``depth`` would have ``u = initial_width + slope * j`` channels. The nearest power of ``multiplier``
    times ``initial_width`` is taken, in multiples of 8, and blocks of one width are a stage; its width is then made a
    multiple of the group width. Raises ValueError for numbers that make no network.
    """
    if initial_width <= 0 or initial_width % 8 or slope < 0 or multiplier <= 1 or depth < 1 or group_width < 1:
        raise ValueError(
            "RegNet: initial_width must be a positive multiple of 8, slope >= 0, multiplier > 1, depth and group_width "
            f">= 1; got {initial_width}, {slope}, {multiplier}, {depth}, {group_width}"
        )
    widths = []
    for j in range(depth):
        power = round(math.log((initial_width + slope * j) / initial_width) / math.log(multiplier))
        widths.append(8 * round(initial_width * multiplier**power / 8))
    stages = [(width, len(list(blocks))) for width, blocks in itertools.groupby(widths)]
    group_widths = [min(group_width, width) for width, _ in stages]
    fitted = [_nearest_multiple(width, g) for (width, _), g in zip(stages, group_widths, strict=True)]
    return [depth for _, depth in stages], fitted, group_widths


def _nearest_multiple(value: int, divisor: int) -> int:
    """Of the multiples of ``divisor`` the nearest, but none that is more than a tenth below ``value``."""
    nearest = max(divisor, (value + divisor // 2) // divisor * divisor)
    return nearest if nearest >= 0.9 * value else nearest + divisor


class RegNet(AnyNet):
    """An AnyNet whose widths grow along a line: five numbers instead of four a stage. No convolution biases."""

    def __init__(
        self,
        initial_width: int,
        slope: float,
        multiplier: float,
        depth: int,
        group_width: int,
        se_ratio: float | None = None,
        num_classes: int = 1000,
        in_channels: int = 3,
        fused: bool = True,
    ) -> None:
        depths, widths, group_widths = quantized_widths(initial_width, slope, multiplier, depth, group_width)
        super().__init__(
            depths,
            widths,
            group_widths,
            num_classes=num_classes,
            in_channels=in_channels,
            se_ratio=se_ratio,
            bias=False,
            fused=fused,
        )


@register(1, 96, 96)
def regnet_x_tiny(num_classes: int = 10, in_channels: int = 1, fused: bool = True) -> AnyNet:
    """Stages of 4 blocks of 32 and 6 of 80 channels in groups of 16. Input 1x96x96, 179,290 parameters.

    After Radosavovic et al., Designing Network Design Spaces, 2020 (arXiv:2003.13678). Shapes: stem 32x48x48; stages
    32x24x24, 80x12x12.
    """
    return AnyNet((4, 6), (32, 80), 16, 1, stem=32, num_classes=num_classes, in_channels=in_channels, fused=fused)


@register(3, 224, 224)
def regnet_x_400mf(**kwargs) -> RegNet:
    """RegNetX-400MF: residual bottlenecks of grouped convolutions. Input 3x224x224, 5,495,976 parameters.

    Radosavovic et al., Designing Network Design Spaces, 2020 (arXiv:2003.13678). Shapes: stem 32x112x112; stages
    32x56x56, 64x28x28, 160x14x14, 400x7x7.
    """
    return RegNet(24, 24.48, 2.54, 22, 16, **kwargs)


@register(3, 224, 224)
def regnet_x_800mf(**kwargs) -> RegNet:
    """RegNetX-800MF: residual bottlenecks of grouped convolutions. Input 3x224x224, 7,259,656 parameters.

    Radosavovic et al., Designing Network Design Spaces, 2020 (arXiv:2003.13678). Shapes: stem 32x112x112; stages
    64x56x56, 128x28x28, 288x14x14, 672x7x7.
    """
    return RegNet(56, 35.73, 2.28, 16, 16, **kwargs)


@register(3, 224, 224)
def regnet_x_1_6gf(**kwargs) -> RegNet:
    """RegNetX-1.6GF: residual bottlenecks of grouped convolutions. Input 3x224x224, 9,190,136 parameters.

    Radosavovic et al., Designing Network Design Spaces, 2020 (arXiv:2003.13678). Shapes: stem 32x112x112; stages
    72x56x56, 168x28x28, 408x14x14, 912x7x7.
    """
    return RegNet(80, 34.01, 2.25, 18, 24, **kwargs)


@register(3, 224, 224)
def regnet_x_3_2gf(**kwargs) -> RegNet:
    """RegNetX-3.2GF: residual bottlenecks of grouped convolutions. Input 3x224x224, 15,296,552 parameters.

    Radosavovic et al., Designing Network Design Spaces, 2020 (arXiv:2003.13678). Shapes: stem 32x112x112; stages
    96x56x56, 192x28x28, 432x14x14, 1008x7x7.
    """
    return RegNet(88, 26.31, 2.25, 25, 48, **kwargs)


@register(3, 224, 224)
def regnet_x_8gf(**kwargs) -> RegNet:
    """RegNetX-8GF: residual bottlenecks of grouped convolutions. Input 3x224x224, 39,572,648 parameters.

    Radosavovic et al., Designing Network Design Spaces, 2020 (arXiv:2003.13678). Shapes: stem 32x112x112; stages
    80x56x56, 240x28x28, 720x14x14, 1920x7x7.
    """
    return RegNet(80, 49.56, 2.88, 23, 120, **kwargs)


@register(3, 224, 224)
def regnet_x_16gf(**kwargs) -> RegNet:
    """RegNetX-16GF: residual bottlenecks of grouped convolutions. Input 3x224x224, 54,278,536 parameters.

    Radosavovic et al., Designing Network Design Spaces, 2020 (arXiv:2003.13678). Shapes: stem 32x112x112; stages
    256x56x56, 512x28x28, 896x14x14, 2048x7x7.
    """
    return RegNet(216, 55.59, 2.1, 22, 128, **kwargs)


@register(3, 224, 224)
def regnet_x_32gf(**kwargs) -> RegNet:
    """RegNetX-32GF: residual bottlenecks of grouped convolutions. Input 3x224x224, 107,811,560 parameters.

    Radosavovic et al., Designing Network Design Spaces, 2020 (arXiv:2003.13678). Shapes: stem 32x112x112; stages
    336x56x56, 672x28x28, 1344x14x14, 2520x7x7.
    """
    return RegNet(320, 69.86, 2.0, 23, 168, **kwargs)


@register(3, 224, 224)
def regnet_y_400mf(**kwargs) -> RegNet:
    """RegNetY-400MF: grouped bottlenecks with squeeze-excitation. Input 3x224x224, 4,344,144 parameters.

    Radosavovic et al., Designing Network Design Spaces, 2020 (arXiv:2003.13678). Shapes: stem 32x112x112; stages
    48x56x56, 104x28x28, 208x14x14, 440x7x7.
    """
    return RegNet(48, 27.89, 2.09, 16, 8, se_ratio=0.25, **kwargs)


@register(3, 224, 224)
def regnet_y_800mf(**kwargs) -> RegNet:
    """RegNetY-800MF: grouped bottlenecks with squeeze-excitation. Input 3x224x224, 6,432,512 parameters.

    Radosavovic et al., Designing Network Design Spaces, 2020 (arXiv:2003.13678). Shapes: stem 32x112x112; stages
    64x56x56, 144x28x28, 320x14x14, 784x7x7.
    """
    return RegNet(56, 38.84, 2.4, 14, 16, se_ratio=0.25, **kwargs)


@register(3, 224, 224)
def regnet_y_1_6gf(**kwargs) -> RegNet:
    """RegNetY-1.6GF: grouped bottlenecks with squeeze-excitation. Input 3x224x224, 11,202,430 parameters.

    Radosavovic et al., Designing Network Design Spaces, 2020 (arXiv:2003.13678). Shapes: stem 32x112x112; stages
    48x56x56, 120x28x28, 336x14x14, 888x7x7.
    """
    return RegNet(48, 20.71, 2.65, 27, 24, se_ratio=0.25, **kwargs)


@register(3, 224, 224)
def regnet_y_3_2gf(**kwargs) -> RegNet:
    """RegNetY-3.2GF: grouped bottlenecks with squeeze-excitation. Input 3x224x224, 19,436,338 parameters.

    Radosavovic et al., Designing Network Design Spaces, 2020 (arXiv:2003.13678). Shapes: stem 32x112x112; stages
    72x56x56, 216x28x28, 576x14x14, 1512x7x7.
    """
    return RegNet(80, 42.63, 2.66, 21, 24, se_ratio=0.25, **kwargs)


@register(3, 224, 224)
def regnet_y_8gf(**kwargs) -> RegNet:
    """RegNetY-8GF: grouped bottlenecks with squeeze-excitation. Input 3x224x224, 39,381,472 parameters.

    Radosavovic et al., Designing Network Design Spaces, 2020 (arXiv:2003.13678). Shapes: stem 32x112x112; stages
    224x56x56, 448x28x28, 896x14x14, 2016x7x7.
    """
    return RegNet(192, 76.82, 2.19, 17, 56, se_ratio=0.25, **kwargs)


@register(3, 224, 224)
def regnet_y_16gf(**kwargs) -> RegNet:
    """RegNetY-16GF: grouped bottlenecks with squeeze-excitation. Input 3x224x224, 83,590,140 parameters.

    Radosavovic et al., Designing Network Design Spaces, 2020 (arXiv:2003.13678). Shapes: stem 32x112x112; stages
    224x56x56, 448x28x28, 1232x14x14, 3024x7x7.
    """
    return RegNet(200, 106.23, 2.48, 18, 112, se_ratio=0.25, **kwargs)


@register(3, 224, 224)
def regnet_y_32gf(**kwargs) -> RegNet:
    """RegNetY-32GF: grouped bottlenecks with squeeze-excitation. Input 3x224x224, 145,046,770 parameters.

    Radosavovic et al., Designing Network Design Spaces, 2020 (arXiv:2003.13678). Shapes: stem 32x112x112; stages
    232x56x56, 696x28x28, 1392x14x14, 3712x7x7.
    """
    return RegNet(232, 115.89, 2.53, 20, 232, se_ratio=0.25, **kwargs)


@register(3, 224, 224)
def regnet_y_128gf(**kwargs) -> RegNet:
    """RegNetY-128GF: grouped bottlenecks with squeeze-excitation. Input 3x224x224, 644,812,894 parameters.

    Radosavovic et al., Designing Network Design Spaces, 2020 (arXiv:2003.13678). Shapes: stem 32x112x112; stages
    528x56x56, 1056x28x28, 2904x14x14, 7392x7x7.
    """
    return RegNet(456, 160.83, 2.52, 27, 264, se_ratio=0.25, **kwargs)
