"""Grouped and depthwise convolutions as modules."""

from collections.abc import Callable

from torch import Tensor, fx, nn
from torch.nn import functional as F

from cnnkern.nn.traced import NotScriptable, leaf
from cnnkern.ops.grouped_conv1d import conv1d
from cnnkern.ops.grouped_conv2d import conv2d
from cnnkern.ops.grouped_conv3d import conv3d


class _GroupedConv(NotScriptable, nn.modules.conv._ConvNd):
    """The forward pass of a torch.nn convolution, by a function of cnnkern."""

    convolve: Callable[..., Tensor]

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return leaf(self, input)
        if not isinstance(self, _GroupedConv):  # a wrapper of this method was put on the layer before it was reverted
            return type(self).forward(self, input)
        return super().forward(input)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: int | str | tuple[int, ...] = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return self.convolve(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class GroupedConv1d(_GroupedConv, nn.Conv1d):
    """``nn.Conv1d`` that is fast for many groups: depthwise, or groups of a few channels.

    Constructor, parameters, ``padding_mode`` and checkpoints are those of :class:`torch.nn.Conv1d`.
    Input (N, C_in, L) or (C_in, L), output (N, C_out, L') or (C_out, L').
    """

    convolve = staticmethod(conv1d)


class GroupedConv2d(_GroupedConv, nn.Conv2d):
    """``nn.Conv2d`` that is fast for many groups: depthwise, or groups of a few channels.

    Constructor, parameters, ``padding_mode`` and checkpoints are those of :class:`torch.nn.Conv2d`.
    Input (N, C_in, H, W) or (C_in, H, W), output (N, C_out, H', W') or (C_out, H', W').
    """

    convolve = staticmethod(conv2d)


class GroupedConv3d(_GroupedConv, nn.Conv3d):
    """``nn.Conv3d`` that is fast on a CPU for many groups: depthwise, or groups of a few channels.

    Constructor, parameters, ``padding_mode`` and checkpoints are those of :class:`torch.nn.Conv3d`.
    Input (N, C_in, T, H, W) or (C_in, T, H, W), output (N, C_out, T', H', W') or (C_out, T', H', W').
    """

    convolve = staticmethod(conv3d)
