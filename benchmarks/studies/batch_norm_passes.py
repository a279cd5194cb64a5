"""What each pass of batch norm + ReLU costs by itself, in time and bytes: where a training step's time goes.

`python -m benchmarks.studies.batch_norm_passes [--threads N] [--dtype TYPE] [--cached]` prints a table. Inputs change
from call to call, so that none is in cache; malloc keeps large blocks (`cnnkern.tune_malloc`). With `--cached` one
image, always the same, stays in the caches: the cost of arithmetic without memory.
"""

import argparse
import itertools
import math
import time

import torch

import cnnkern
from cnnkern import testing

from ..suite import timing
from ..suite.groups import LAYOUTS

SHAPES = ((32, 64, 56, 56), (32, 256, 28, 28), (32, 1024, 14, 14), (32, 2048, 7, 7))
MINIMUM_BYTES = 2**28  # of inputs that take turns
forward, backward = torch.ops.cnnkern.bn_act, torch.ops.cnnkern.bn_act_backward


def steps(shape: tuple[int, ...], layout: str, dtype: torch.dtype, cached: bool) -> dict[str, tuple]:
    """name -> (call, tensors read, tensors written), tensors of the input's size and each counted once."""
    generator = torch.Generator().manual_seed(0)
    count = 1 if cached else max(2, MINIMUM_BYTES // (2 * dtype.itemsize * math.prod(shape)))
    pairs = [
        tuple(testing.with_layout(testing.randn(shape, generator, dtype), layout) for _ in range(2))
        for _ in range(count)
    ]
    turns = itertools.cycle(pairs)
    channels = shape[1]
    vectors = torch.ones(channels), torch.zeros(channels), torch.zeros(channels), torch.ones(channels)
    _, mean, rstd = forward(pairs[0][0], *vectors, True, 0.1, 1e-5, "relu")

    def run_forward(training: bool) -> None:
        forward(next(turns)[0], *vectors, training, 0.1, 1e-5, "relu")

    def run_backward(dx: bool) -> None:
        x, dy = next(turns)
        backward(dy, x, *vectors[:2], mean, rstd, True, "relu", [dx, True, True])

    return {
        "forward, inference: one pass": (lambda: run_forward(False), 1, 1),
        "forward, training: sums, then output": (lambda: run_forward(True), 1, 1),
        "backward, sums only": (lambda: run_backward(False), 2, 0),
        "backward: sums, then dx": (lambda: run_backward(True), 2, 1),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.batch_norm_passes", description=__doc__)
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: PyTorch's choice)"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "float64"))
    parser.add_argument("--cached", action="store_true", help="use one image, always the same, which stays in cache")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    print(cnnkern.tune_malloc())
    print(f"threads: {torch.get_num_threads()}; GB/s count each tensor once, whatever a kernel reads twice\n")
    print("| shape | layout | passes | ms | GB/s |\n|---|---|---|---:|---:|")
    for shape, layout in itertools.product(SHAPES, LAYOUTS):
        shape = (1, *shape[1:]) if arguments.cached else shape
        found = steps(shape, layout, dtype, arguments.cached)
        samples = timing.interleave(
            {name: call for name, (call, _, _) in found.items()},
            deadline=time.perf_counter() + 2.0,
            min_rounds=7,
            max_rounds=200,
            device="cpu",
        )
        for name, (_, read, written) in found.items():
            seconds = sorted(samples[name])[len(samples[name]) // 2]
            rate = (read + written) * dtype.itemsize * math.prod(shape) / seconds / 1e9
            print(f"| {'x'.join(map(str, shape))} | {layout} | {name} | {seconds * 1e3:.3f} | {rate:.1f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
