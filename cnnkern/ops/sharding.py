"""Our operators on DTensors: how arguments may be sharded, and how results then are.

Layer norms take shards of their rows, grouped convolutions shards of the batch, max pooling shards of the batch or of
the channels. The other operators have no strategies, and DTensors get PyTorch's there: a batch norm's statistics are
those of the whole batch, and the bits of a ReLU's mask, packed over all of a tensor, are not those of its shards.

Imported with the first DTensor that such an operator meets, and never under torch.compile. The public
`register_sharding` would not do: it takes what it found for one `normalized_shape`, stride or output mask for all.
"""

from typing import Any

import torch
from torch.distributed.tensor import Partial, Placement, Replicate
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor._ops.single_dim_strategy import _ShardingPlaceholder, register_single_dim_strategy

_ops = torch.ops.cnnkern
Placements = list[Placement | _ShardingPlaceholder]  # of results, then of arguments that are tensors


def _present(*parameters: Any) -> Placements:
    return [Replicate() for p in parameters if p is not None]


def _gradients(dim: int, output_mask: list[bool]) -> Placements:
    """Of dx, and of what is summed over shards; those that are not wanted are empty everywhere."""
    wanted: Placements = [_ShardingPlaceholder(dim), Partial("sum"), Partial("sum")]
    return [w if wants else Replicate() for w, wants in zip(wanted, output_mask, strict=True)]


def _layer_norm(dims: range | tuple[int, ...], *parameters: Any) -> list[Placements]:
    # y, mean, rstd, x
    return [[*(_ShardingPlaceholder(d) for _ in range(4)), *_present(*parameters)] for d in dims]


def _layer_norm_backward(dims: range | tuple[int, ...], weight: Any, bias: Any, mask: list[bool]) -> list[Placements]:
    strategies = []
    for d in dims:
        two: Placements = [_ShardingPlaceholder(d), _ShardingPlaceholder(d)]
        strategies.append([*_gradients(d, mask), *two, *_present(weight, bias), *two])  # dy, x, ..., mean, rstd
    return strategies


def _rows(x: Any, normalized_shape: Any) -> range:
    return range(len(x.shape) - len(normalized_shape))


_PIXELS = (0, 2, 3)  # the dimensions of (N, C, H, W) that a layer norm over channels does not join


@register_single_dim_strategy(_ops.layer_norm.default, RuntimeSchemaInfo(1), allow_uneven_sharding=True)
def _(op, args, kwargs):
    x, normalized_shape, weight, bias = args[:4]
    return _layer_norm(_rows(x, normalized_shape), weight, bias)


@register_single_dim_strategy(_ops.layer_norm_backward.default, RuntimeSchemaInfo(2), allow_uneven_sharding=True)
def _(op, args, kwargs):
    _, x, normalized_shape, weight, bias, _, _, output_mask = args
    return _layer_norm_backward(_rows(x, normalized_shape), weight, bias, output_mask)


@register_single_dim_strategy(_ops.layer_norm2d.default, RuntimeSchemaInfo(1), allow_uneven_sharding=True)
def _(op, args, kwargs):
    _, weight, bias = args[:3]
    return _layer_norm(_PIXELS, weight, bias)


@register_single_dim_strategy(_ops.layer_norm2d_backward.default, RuntimeSchemaInfo(2), allow_uneven_sharding=True)
def _(op, args, kwargs):
    _, _, weight, bias, _, _, output_mask = args
    return _layer_norm_backward(_PIXELS, weight, bias, output_mask)


@register_single_dim_strategy(_ops.grouped_conv2d.default, RuntimeSchemaInfo(2), allow_uneven_sharding=True)
def _(op, args, kwargs):
    batch: Placements = [_ShardingPlaceholder(0), _ShardingPlaceholder(0)]  # y, x
    return [[*batch, *_present(*args[1:3])]]


@register_single_dim_strategy(_ops.grouped_conv2d_backward.default, RuntimeSchemaInfo(3), allow_uneven_sharding=True)
def _(op, args, kwargs):
    batch: Placements = [_ShardingPlaceholder(0), _ShardingPlaceholder(0)]  # dy, x
    return [[*_gradients(0, args[-1]), *batch, Replicate()]]


def _images(tensors: int) -> list[Placements]:
    """All sharded over the batch, or over channels."""
    return [[_ShardingPlaceholder(d) for _ in range(tensors)] for d in (0, 1)]


@register_single_dim_strategy(_ops.max_pool2d.default, RuntimeSchemaInfo(1), allow_uneven_sharding=True)
def _(op, args, kwargs):
    return _images(3)  # y, positions, x


@register_single_dim_strategy(_ops.max_pool2d_backward.default, RuntimeSchemaInfo(2), allow_uneven_sharding=True)
def _(op, args, kwargs):
    return _images(3)  # dx, dy, positions
