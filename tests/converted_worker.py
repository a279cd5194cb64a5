"""The program that tests/test_convert_used.py runs in each of two processes: `torchrun ... converted_worker.py TASK`.

Each trains a converted model and the original in one way of training over processes, and compares.
"""

import copy
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from gloo import run_task
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import cnnkern


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Net().double()
    return model, cnnkern.convert(copy.deepcopy(model), inplace=True)


def fused(model: nn.Module) -> set[str]:
    sites = [m.__dict__["_cnnkern_site"] for m in model.modules() if "_cnnkern_site" in m.__dict__]
    return {name for site in sites for name, n in site.fusions().items() if n > 0}


def images(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    return torch.randn(4, 3, 10, 10, generator=generator, dtype=torch.float64)


def trained(model: nn.Module, parallel: nn.Module, forward: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """Losses, parameters and buffers of three steps, and an output in eval."""
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1, momentum=0.9)
    found = []
    for step in range(3):
        optimizer.zero_grad()
        loss = (forward or parallel)(images(step)).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    parallel.eval()
    with torch.no_grad():
        found.append(parallel(images(0)))
    found += [full(p.detach()) for p in model.parameters()]
    return found + [b.detach().clone() for b in model.buffers()]


def full(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def compare(wrapped: Callable[[nn.Module], nn.Module], expected_fusions: set[str]) -> None:
    results = []
    for model in pair():
        results.append(trained(model, wrapped(model)))
    assert expected_fusions <= fused(model), fused(model)
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


ALL = {"relu", "silu", "add + relu"}


def data_parallel() -> None:
    compare(nn.parallel.DistributedDataParallel, ALL)
    compare(lambda m: nn.parallel.DistributedDataParallel(m, static_graph=True, gradient_as_bucket_view=True), ALL)
    compare(lambda m: nn.parallel.DistributedDataParallel(m, find_unused_parameters=True, bucket_cap_mb=0.0001), ALL)


def data_parallel_that_checkpoints() -> None:
    """Blocks in non-reentrant checkpoints, where batch norms are not fused."""

    def wrapped(model: nn.Module) -> nn.Module:
        for i, block in enumerate(model.blocks):
            model.blocks[i] = checkpoint_wrapper(block)
        return nn.parallel.DistributedDataParallel(model)

    compare(wrapped, {"relu"})


def data_parallel_that_accumulates() -> None:
    """Gradients of two batches, the first without a word to the other process."""

    def wrapped(model: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(model)

    results = []
    for model in pair():
        parallel = wrapped(model)

        def forward(x: Tensor, parallel: nn.Module = parallel) -> Tensor:
            with parallel.no_sync():
                parallel(x.flip(3)).square().mean().backward()
            return parallel(x)

        results.append(trained(model, parallel, forward))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def fully_sharded() -> None:
    mesh = init_device_mesh("cpu", (2,))

    def wrapped(model: nn.Module) -> nn.Module:
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    compare(wrapped, ALL)


def fully_sharded_norm_by_norm() -> None:
    """Each batch norm a unit by itself, whose parameters are freed before its output is used."""
    mesh = init_device_mesh("cpu", (2,))

    def wrapped(model: nn.Module) -> nn.Module:
        for module in list(model.modules()):
            if isinstance(module, nn.BatchNorm2d):
                fully_shard(module, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    compare(wrapped, set())


def fully_sharded_by_the_older_way() -> None:
    def wrapped(model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            model, auto_wrap_policy=ModuleWrapPolicy({Block}), use_orig_params=True, device_id=torch.device("cpu")
        )

    compare(wrapped, ALL)


if __name__ == "__main__":
    run_task({f.__name__: f for f in (
        data_parallel, data_parallel_that_checkpoints, data_parallel_that_accumulates, fully_sharded,
        fully_sharded_norm_by_norm, fully_sharded_by_the_older_way,
    )})  # fmt: skip
