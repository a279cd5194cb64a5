"""Whether all cores have work: batch norm + ReLU, forward and backward, on one thread and on all of them.

`python -m benchmarks.studies.cores [--threads N]` prints milliseconds and the ratio for few channels of large planes,
which have to be shared within a channel, and for many channels of 7x7, whose planes begin within cache lines. What
limits the ratio where tensors lie beyond the caches is printed too: that of a plain copy of 256 MiB.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch

import cnnkern
from cnnkern import testing

from ..suite import timing
from ..suite.groups import LAYOUTS

SHAPES = ((2, 1, 224, 224), (2, 3, 224, 224), (2, 16, 224, 224), (32, 16, 224, 224), (2, 2048, 7, 7), (32, 2048, 7, 7))
COPIED = 2**26  # floats
forward, backward = torch.ops.cnnkern.bn_act, torch.ops.cnnkern.bn_act_backward


def step(shape: tuple[int, ...], layout: str) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    x, dy = (testing.with_layout(testing.randn(shape, generator, torch.float32), layout) for _ in range(2))
    weight, bias, mean, var = (torch.full((shape[1],), float(v)) for v in (1, 0, 0, 1))

    def run() -> None:
        _, saved_mean, rstd = forward(x, weight, bias, mean, var, True, 0.1, 1e-5, "relu")
        backward(dy, x, weight, bias, saved_mean, rstd, True, "relu", [True, True, True])

    return run


def copy() -> Callable[[], object]:
    source, target = torch.zeros(COPIED), torch.zeros(COPIED)
    return lambda: target.copy_(source)


def milliseconds(call: Callable[[], object], threads: int, seconds: float) -> tuple[float, float]:
    """On one thread, and on `threads`, in turns."""

    def on(count: int) -> Callable[[], object]:
        def run() -> None:
            torch.set_num_threads(count)
            call()

        return run

    samples = timing.interleave(
        {1: on(1), threads: on(threads)}, deadline=time.perf_counter() + seconds, min_rounds=7, max_rounds=200
    )
    one, several = (statistics.median(samples[count]) * 1e3 for count in (1, threads))
    return one, several


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.cores", description=__doc__)
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: PyTorch's choice)"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="the time per row (default: 1)")
    arguments = parser.parse_args(argv)
    if arguments.threads < 2:
        parser.error(f"--threads needs at least 2, got {arguments.threads}")
    print(cnnkern.tune_malloc())
    print(f"\n| shape | layout | one thread, ms | {arguments.threads} threads, ms | ratio |\n|---|---|---:|---:|---:|")
    calls = {f"{'x'.join(map(str, s))} | {layout}": step(s, layout) for s, layout in itertools.product(SHAPES, LAYOUTS)}
    for name, call in (calls | {"a plain copy of 256 MiB | -": copy()}).items():
        one, several = milliseconds(call, arguments.threads, arguments.seconds)
        print(f"| {name} | {one:.3f} | {several:.3f} | {one / several:.2f}x |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
