"""Layers that learn their number of channels from the first input, as torch.nn's lazy modules do."""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _LazyNormBase

from cnnkern.nn.batchnorm import BatchNormAddReLU2d, BatchNormReLU1d, BatchNormReLU2d, BatchNormReLU3d
from cnnkern.nn.conv import GroupedConv1d, GroupedConv2d, GroupedConv3d


class LazyBatchNormReLU1d(_LazyNormBase, BatchNormReLU1d):
    """:class:`BatchNormReLU1d` whose ``num_features`` is the first input's C. Input (N, C) or (N, C, L)."""

    cls_to_become = BatchNormReLU1d


class LazyBatchNormReLU2d(_LazyNormBase, BatchNormReLU2d):
    """:class:`BatchNormReLU2d` whose ``num_features`` is the first input's C. Input (N, C, H, W)."""

    cls_to_become = BatchNormReLU2d


class LazyBatchNormReLU3d(_LazyNormBase, BatchNormReLU3d):
    """:class:`BatchNormReLU3d` whose ``num_features`` is the first input's C. Input (N, C, D, H, W)."""

    cls_to_become = BatchNormReLU3d


class LazyBatchNormAddReLU2d(_LazyNormBase, BatchNormAddReLU2d):
    """:class:`BatchNormAddReLU2d` whose ``num_features`` is the first input's C. Input and residual (N, C, H, W)."""

    cls_to_become = BatchNormAddReLU2d

    def initialize_parameters(self, input: Tensor, residual: Tensor) -> None:  # type: ignore[override]
        super().initialize_parameters(input)


class LazyGroupedConv1d(nn.LazyConv1d, GroupedConv1d):  # type: ignore[misc]  # as nn.LazyConv1d itself
    """:class:`GroupedConv1d` whose ``in_channels`` is the first input's C. Input (N, C, L) or (C, L)."""

    cls_to_become = GroupedConv1d


class LazyGroupedConv2d(nn.LazyConv2d, GroupedConv2d):  # type: ignore[misc]  # as nn.LazyConv2d itself
    """:class:`GroupedConv2d` whose ``in_channels`` is the first input's C. Input (N, C, H, W) or (C, H, W)."""

    cls_to_become = GroupedConv2d


class LazyGroupedConv3d(nn.LazyConv3d, GroupedConv3d):  # type: ignore[misc]  # as nn.LazyConv3d itself
    """:class:`GroupedConv3d` whose ``in_channels`` is the first input's C. Input (N, C, T, H, W) or (C, T, H, W)."""

    cls_to_become = GroupedConv3d
