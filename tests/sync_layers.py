"""The synchronised layers that sync_worker.py and sync_converted_worker.py look at, and what they are given."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cnnkern import reference, testing
from cnnkern.conversion.layers import ConvertedSyncBatchNorm
from cnnkern.nn import SyncBatchNorm, SyncBatchNormAddReLU, SyncBatchNormReLU

SPLITS = {2: ((3, 3), (5, 1), (6, 0)), 3: ((2, 2, 2), (4, 0, 2), (1, 4, 1))}
CHANNELS = 5


def silu(*arguments, **keywords) -> SyncBatchNorm:
    module = SyncBatchNorm(*arguments, **keywords)
    module.act = "silu"
    return module


def add_silu(*arguments, **keywords) -> SyncBatchNorm:
    module = SyncBatchNormAddReLU(*arguments, **keywords)
    module.act = "silu"
    return module


class Converted(ConvertedSyncBatchNorm):
    """A layer of a converted model, and what it waits for."""

    def forward(self, x: Tensor, *residual: Tensor) -> Tensor:
        return reference.ACTIVATIONS[self.act](sum(residual, super().forward(x)))


class ConvertedAdd(Converted):
    pass


def converted_silu(*arguments, **keywords) -> SyncBatchNorm:
    module = Converted(*arguments, **keywords)
    module.act = "silu"
    return module


def converted_add_relu(*arguments, **keywords) -> SyncBatchNorm:
    module = ConvertedAdd(*arguments, **keywords)
    module.act = "relu"
    return module


FUSED = (SyncBatchNorm, SyncBatchNormReLU, SyncBatchNormAddReLU, silu, add_silu)
KINDS = (*FUSED, converted_silu, converted_add_relu)
ADDING = (SyncBatchNormAddReLU, add_silu, converted_add_relu)


def drawn(kind: Callable, dtype: torch.dtype, layout: str = "contiguous", **keywords) -> tuple[nn.Module, list[Tensor]]:
    """A layer, and x, dy and where it adds the residual of the whole batch. Parameters are float32 at least."""
    g = torch.Generator().manual_seed(1)
    module = kind(CHANNELS, dtype=torch.promote_types(dtype, torch.float32), **keywords)
    x, dy, r = (testing.with_layout(testing.randn((6, CHANNELS, 4, 7), g, dtype), layout) for _ in range(3))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(testing.randn((CHANNELS,), g, parameter.dtype))
    return module, [x, dy, r] if kind in ADDING else [x, dy]


def of_this_process(t: Tensor, layout: str = "contiguous", split: tuple[int, ...] | None = None) -> Tensor:
    rank, world = dist.get_rank(), dist.get_world_size()
    split = split or SPLITS[world][1]
    return testing.with_layout(t[sum(split[:rank]) : sum(split[: rank + 1])], layout)
