"""Checked by mypy, never run: a user's code, and the types that it sees."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import cnnkern
from cnnkern import functional
from cnnkern.nn import BatchNormAddReLU2d, BatchNormReLU2d, GroupedConv1d, GroupedConv2d, GroupedConv3d, LayerNorm2d

x = torch.randn(2, 8, 4, 4)
mean, var = torch.zeros(8), torch.ones(8)

assert_type(functional.batch_norm_relu(x, mean, var), Tensor)
assert_type(functional.batch_norm_act(x, None, None, training=True, act="silu"), Tensor)
assert_type(functional.batch_norm_add_relu(x, x, mean, var, training=False), Tensor)
assert_type(functional.add_relu(x, x), Tensor)
assert_type(functional.conv2d(x, torch.randn(8, 1, 3, 3), None, padding=1, groups=8), Tensor)
assert_type(functional.conv1d(x[0], torch.randn(8, 1, 3), None, padding="same", groups=8), Tensor)
assert_type(functional.conv3d(x[None], torch.randn(2, 1, 3, 3, 3), None, padding=(1, 1, 1), groups=2), Tensor)
assert_type(functional.layer_norm(x, (4,)), Tensor)
assert_type(functional.layer_norm2d(x), Tensor)

norm: nn.BatchNorm2d = BatchNormReLU2d(8)
add: nn.BatchNorm2d = BatchNormAddReLU2d(8)
of_sequences: nn.Conv1d = GroupedConv1d(8, 8, 3, groups=8)
of_videos: nn.Conv3d = GroupedConv3d(8, 8, 3, groups=8)
convolution: nn.Conv2d = GroupedConv2d(8, 8, 3, groups=8)
layer_norm: nn.Module = LayerNorm2d(8)

model = cnnkern.convert(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()))
report = cnnkern.conversion_report(model)
assert_type(cnnkern.benchmark(model, x, training=False, seconds=0.1), cnnkern.BenchmarkResult)
assert_type(report, cnnkern.ConversionReport)
assert_type(str(report), str)
folded: nn.Module = cnnkern.fold(model.eval())
original: nn.Module = cnnkern.revert(model)
assert_type(cnnkern.models.create_model("resnet18", num_classes=10), nn.Module)
assert_type(cnnkern.models.list_models(), list[str])
tune: Callable[[], object] = cnnkern.tune_malloc
