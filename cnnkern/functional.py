"""The operators as functions, with the signatures of `torch.nn.functional`."""

from cnnkern.ops.add_relu import add_relu
from cnnkern.ops.bn_act import batch_norm_act, batch_norm_relu
from cnnkern.ops.bn_add_act import batch_norm_add_act, batch_norm_add_relu
from cnnkern.ops.bn_prelu import batch_norm_prelu
from cnnkern.ops.grouped_conv1d import conv1d
from cnnkern.ops.grouped_conv2d import conv2d
from cnnkern.ops.grouped_conv3d import conv3d
from cnnkern.ops.layer_norm import layer_norm
from cnnkern.ops.layer_norm2d import layer_norm2d
from cnnkern.ops.max_pool2d import max_pool2d
from cnnkern.ops.sync_bn import sync_batch_norm_act

__all__ = [
    "add_relu",
    "batch_norm_act",
    "batch_norm_add_act",
    "batch_norm_add_relu",
    "batch_norm_prelu",
    "batch_norm_relu",
    "conv1d",
    "conv2d",
    "conv3d",
    "layer_norm",
    "layer_norm2d",
    "max_pool2d",
    "sync_batch_norm_act",
]
