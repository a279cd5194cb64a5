"""ShuffleNet V2. Ma et al., Practical Guidelines for Efficient CNN Architecture Design, 2018 (arXiv:1807.11164)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnkern.models.layers import layer_set
from cnnkern.models.registry import register


class ShuffleBlock(nn.Module):
    """1x1, depthwise 3x3 and 1x1 on half of the channels; the halves are then interleaved.

    Stride 1: (N, out_channels, H, W) keeps its shape and one half passes untouched. Stride 2: both halves are made
    from the whole input, (N, in_channels, H, W) -> (N, out_channels, H / 2, W / 2). Raises ValueError where stride 1
    would change the channels.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, fused: bool = True) -> None:
        super().__init__()
        if stride == 1 and in_channels != out_channels:
            raise ValueError(f"ShuffleBlock: stride 1 keeps the channels; got {in_channels} and {out_channels}")
        layers = layer_set(fused)
        half = out_channels // 2
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1.extend(
                [
                    layers.GroupedConv2d(in_channels, in_channels, 3, stride, 1, groups=in_channels, bias=False),
                    layers.BatchNorm2d(in_channels),
                    nn.Conv2d(in_channels, half, 1, bias=False),
                    layers.BatchNormReLU2d(half),
                ]
            )
        self.branch2 = nn.Sequential(
            nn.Conv2d(in_channels if stride > 1 else half, half, 1, bias=False),
            layers.BatchNormReLU2d(half),
            nn.Identity(),  # has the place of torchvision's ReLU, so that the layers behind keep their numbers
            layers.GroupedConv2d(half, half, 3, stride, 1, groups=half, bias=False),
            layers.BatchNorm2d(half),
            nn.Conv2d(half, half, 1, bias=False),
            layers.BatchNormReLU2d(half),
        )

    def forward(self, x: Tensor) -> Tensor:
        first, second = (x, x) if len(self.branch1) else x.chunk(2, dim=1)
        return F.channel_shuffle(torch.cat([self.branch1(first), self.branch2(second)], dim=1), 2)


class ShuffleNetV2(nn.Module):
    """A 3x3 stem, three stages of 4, 8 and 4 blocks, a 1x1 convolution, one linear layer."""

    def __init__(
        self,
        widths: tuple[int, int, int] = (116, 232, 464),
        num_classes: int = 1000,
        in_channels: int = 3,
        fused: bool = True,
    ) -> None:
        super().__init__()
        layers = layer_set(fused)
        self.conv1 = nn.Sequential(nn.Conv2d(in_channels, 24, 3, 2, 1, bias=False), layers.BatchNormReLU2d(24))
        self.maxpool = layers.MaxPool2d(3, stride=2, padding=1)

        def stage(in_channels: int, width: int, depth: int) -> nn.Sequential:
            first = ShuffleBlock(in_channels, width, stride=2, fused=fused)
            return nn.Sequential(first, *(ShuffleBlock(width, width, fused=fused) for _ in range(depth - 1)))

        self.stage2 = stage(24, widths[0], 4)
        self.stage3 = stage(widths[0], widths[1], 8)
        self.stage4 = stage(widths[1], widths[2], 4)
        self.conv5 = nn.Sequential(nn.Conv2d(widths[2], 1024, 1, bias=False), layers.BatchNormReLU2d(1024))
        self.fc = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.conv1(x))
        x = self.conv5(self.stage4(self.stage3(self.stage2(x))))
        return self.fc(x.mean([2, 3]))


@register(3, 224, 224)
def shufflenet_v2_x1_0(**kwargs) -> ShuffleNetV2:
    """ShuffleNet V2 of width 1. Input 3x224x224, 2,278,604 parameters.

    Ma et al., ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design, 2018 (arXiv:1807.11164).
    Shapes: stem 24x56x56; stages 116x28x28, 232x14x14, 464x7x7; head 1024x7x7.
    """
    return ShuffleNetV2(**kwargs)
