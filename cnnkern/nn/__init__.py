"""Fused layers. Each subclasses its counterpart in torch.nn, with the same constructor, parameters and checkpoints."""

from cnnkern.nn.add import AddReLU
from cnnkern.nn.batchnorm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    BatchNormAddAct1d,
    BatchNormAddAct2d,
    BatchNormAddAct3d,
    BatchNormAddReLU1d,
    BatchNormAddReLU2d,
    BatchNormAddReLU3d,
    BatchNormReLU1d,
    BatchNormReLU2d,
    BatchNormReLU3d,
)
from cnnkern.nn.conv import GroupedConv1d, GroupedConv2d, GroupedConv3d
from cnnkern.nn.dense_block import DenseBlock
from cnnkern.nn.layer_norm import LayerNorm, LayerNorm2d
from cnnkern.nn.lazy import (
    LazyBatchNormAddReLU2d,
    LazyBatchNormReLU1d,
    LazyBatchNormReLU2d,
    LazyBatchNormReLU3d,
    LazyGroupedConv1d,
    LazyGroupedConv2d,
    LazyGroupedConv3d,
)
from cnnkern.nn.pooling import MaxPool2d
from cnnkern.nn.sync import SyncBatchNorm, SyncBatchNormAddReLU, SyncBatchNormReLU, convert_sync_batchnorm

__all__ = [
    "AddReLU",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "BatchNormAddAct1d",
    "BatchNormAddAct2d",
    "BatchNormAddAct3d",
    "BatchNormAddReLU1d",
    "BatchNormAddReLU2d",
    "BatchNormAddReLU3d",
    "BatchNormReLU1d",
    "BatchNormReLU2d",
    "BatchNormReLU3d",
    "DenseBlock",
    "GroupedConv1d",
    "GroupedConv2d",
    "GroupedConv3d",
    "LayerNorm",
    "LayerNorm2d",
    "LazyBatchNormAddReLU2d",
    "LazyBatchNormReLU1d",
    "LazyBatchNormReLU2d",
    "LazyBatchNormReLU3d",
    "LazyGroupedConv1d",
    "LazyGroupedConv2d",
    "LazyGroupedConv3d",
    "MaxPool2d",
    "SyncBatchNorm",
    "SyncBatchNormAddReLU",
    "SyncBatchNormReLU",
    "convert_sync_batchnorm",
]
