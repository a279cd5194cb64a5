"""What batch norm over processes costs, beside an unfused reference and beside batch norm of one process.

`python -m benchmarks.studies.sync [--processes N] [--seconds S] [--cpu-time]` starts processes of one thread each,
connected by gloo, and prints a table: milliseconds of a training step (forward and backward) of batch norm + ReLU on a
process's own batch. The implementations take turns, in every process in the same order, and start together. With
`--cpu-time` it is the CPU time of the first process, without waiting for the others or for a core: use it on a busy
machine.

    cnnkern     cnnkern.nn.SyncBatchNormReLU
    written out the formula of torch.nn.SyncBatchNorm, which does not run on a CPU, in PyTorch's operators
    alone       cnnkern.nn.BatchNormReLU2d, each process for itself
    sent        the two collectives, on vectors of that size, and nothing else
"""

import argparse
import itertools
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import cnnkern
from cnnkern import testing

from ..suite.groups import LAYOUTS
from ..suite.place import NAME, ROOT

SHAPES = ((8, 16, 8, 8), (16, 64, 56, 56), (16, 256, 28, 28), (16, 2048, 7, 7))
ROUNDS = (5, 200)  # at least and at most


class WrittenOut(torch.autograd.Function):
    """Normalises over all processes, one collective each way."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps):
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        elements = x.numel() // x.shape[1]
        mine = torch.cat([mean, var, mean.new_tensor([elements])])
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        means, variances, counts = torch.stack(everyone).split([x.shape[1], x.shape[1], 1], 1)
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        var = (counts * (variances + (means - mean).square())).sum(0) / total
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * total / (total - 1), momentum)
        rstd = (var + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, rstd, total)
        scale = weight * rstd
        return torch.addcmul((bias - mean * scale)[:, None, None], x, scale[:, None, None])

    @staticmethod
    def backward(ctx, dy):
        x, weight, mean, rstd, total = ctx.saved_tensors
        normalized = (x - mean[:, None, None]) * rstd[:, None, None]
        dbias, dweight = dy.sum((0, 2, 3)), (dy * normalized).sum((0, 2, 3))
        sums = torch.cat([dbias, dweight])
        dist.all_reduce(sums)
        sum_dy, sum_dy_normalized = (sums / total).chunk(2)
        dx = dy - sum_dy[:, None, None] - normalized * sum_dy_normalized[:, None, None]
        return dx * (weight * rstd)[:, None, None], dweight, dbias, None, None, None, None


class SyncWrittenOut(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked.add_(1)
        running = self.running_mean, self.running_var
        return F.relu(WrittenOut.apply(x, self.weight, self.bias, *running, self.momentum, self.eps), inplace=True)


def steps(shape: tuple[int, ...], layout: str) -> dict[str, Callable[[], object]]:
    """A training step of each contender; every process makes the same ones."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    x, dy = (testing.with_layout(testing.randn(shape, generator, torch.float32), layout) for _ in range(2))
    x.requires_grad_()
    vectors = torch.zeros(2 * shape[1] + 1, dtype=torch.float64)
    everyone = [torch.empty_like(vectors) for _ in range(dist.get_world_size())]

    def training(layer: nn.Module) -> Callable[[], object]:
        wanted = [x, *layer.parameters()]
        return lambda: torch.autograd.grad(layer(x), wanted, dy)

    def send() -> None:
        dist.all_gather(everyone, vectors)
        dist.all_reduce(vectors)

    return {
        "cnnkern": training(cnnkern.nn.SyncBatchNormReLU(shape[1])),
        "written out": training(SyncWrittenOut(shape[1])),
        "alone": training(cnnkern.nn.BatchNormReLU2d(shape[1])),
        "sent": send,
    }


def timed(
    calls: dict[str, Callable[[], object]], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each call. Every process draws the same order, and all go on for as long as the first does."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, draw, going = list(calls), random.Random(0), torch.ones(1)
    for call in calls.values():
        call()
    deadline = time.perf_counter() + seconds
    for done in range(ROUNDS[1]):
        going.fill_(done < ROUNDS[0] or time.perf_counter() < deadline)
        dist.broadcast(going, 0)
        if not going:
            break
        draw.shuffle(order)
        for name in order:
            dist.barrier()
            start = clock()
            calls[name]()
            samples[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in samples.items()}


def work(seconds: float, clock: Callable[[], float]) -> None:
    """What each process does; the first one prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    cnnkern.tune_malloc()
    first = dist.get_rank() == 0
    for shape, layout in itertools.product(SHAPES, LAYOUTS):
        found = timed(steps(shape, layout), seconds, clock)
        if first:
            cells = ["x".join(map(str, shape)), layout, *(f"{1e3 * found[name]:.2f}" for name in found)]
            cells += [f"{found['written out'] / found['cnnkern']:.2f}", f"{found['cnnkern'] / found['alone']:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)
    dist.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.sync",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", type=int, default=2, help="the number of processes (default: 2)")
    parser.add_argument("--seconds", type=float, default=2.0, help="the time per row of the table (default: 2)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="report CPU time of the first process instead of wall time"
    )
    arguments = parser.parse_args(argv)
    if "RANK" in os.environ:
        work(arguments.seconds, time.process_time if arguments.cpu_time else time.perf_counter)
        return 0
    header = ["batch per process", "layout", "cnnkern", "written out", "alone", "sent"]
    header += ["written out / cnnkern", "cnnkern / alone"]
    print(f"| {' | '.join(header)} |\n|---|---|{'---:|' * 6}", flush=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    common |= {"WORLD_SIZE": str(arguments.processes)}
    command = [sys.executable, "-m", f"{NAME}.studies.sync", "--seconds", str(arguments.seconds)]
    command += ["--cpu-time"] if arguments.cpu_time else []
    started = [
        subprocess.Popen(command, env=common | {"RANK": str(rank)}, cwd=ROOT) for rank in range(arguments.processes)
    ]
    return max(process.wait() for process in started)


if __name__ == "__main__":
    raise SystemExit(main())
