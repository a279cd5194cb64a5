"""GPU time of an operator's training step, kernel by kernel: cnnkern's beside eager's.

`python -m benchmarks.studies.gpu_kernels [--dtype bfloat16] [--kernels]` prints the sums of the kernels' own times as
PyTorch's profiler has them, means of ten steps on a cold L2; with --kernels also the five longest. The host's time, and
the pauses between kernels, are in none of them.
"""

import argparse
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

import cnnkern
from cnnkern.testing import CASES, Layer

from ..suite import operators, timing
from ..suite.groups import LAYOUTS

STEPS = 10
SHAPES = {
    "bn_act": ((32, 64, 112, 112), (32, 256, 56, 56), (32, 128, 28, 28), (32, 512, 7, 7), (32, 2048, 7, 7)),
    "bn_add_act": ((32, 256, 56, 56), (32, 1024, 14, 14)),
    "layer_norm": ((1953, 512), (97, 1024)),
    "layer_norm2d": ((16, 768, 7, 7), (16, 96, 56, 56)),
}


def microseconds(step: Callable[[], object]) -> dict[str, float]:
    """kernel -> its time in one step, without what flushes the L2."""
    for _ in range(2):
        step()
    timing.synchronize("cuda")
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(STEPS):
            timing.flush()
            step()
        timing.synchronize("cuda")
    found = {e.key: e.self_device_time_total / STEPS for e in profiled.key_averages()}
    return {k: t for k, t in found.items() if t > 0 and "signed char" not in k and "memset" not in k.lower()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.gpu_kernels", description=__doc__)
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="the dtype (default: float32)"
    )
    parser.add_argument("--kernels", action="store_true", help="also print the five longest kernels of each step")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA device on this machine")
    cnnkern.backend("cuda")
    dtype = getattr(torch, arguments.dtype)
    print(
        "| operator | shape | layout | eager, us | cnnkern, us | vs eager |\n| --- | --- | --- | ---: | ---: | ---: |"
    )
    for case, shape in ((CASES[operator], shape) for operator, shapes in SHAPES.items() for shape in shapes):
        bench = operators.OperatorBench(
            operators.Drawn(case, Layer(shape), dtype, case.bench_variant, "cuda"), mode="training"
        )
        for layout in LAYOUTS[: 2 if len(shape) == 4 else 1]:
            inputs, dy = bench.placed(layout)
            eager, ours = (
                microseconds(operators.timed(function, case, inputs, dy, "training"))
                for function in (case.reference, case.function)
            )
            sums = [sum(found.values()) for found in (eager, ours)]
            columns = (case.name, str(Layer(shape)), layout, *(f"{s:.1f}" for s in sums), f"{sums[0] / sums[1]:.2f}x")
            print(f"| {' | '.join(columns)} |")
            for found in (eager, ours) if arguments.kernels else ():
                for kernel, time in sorted(found.items(), key=lambda item: -item[1])[:5]:
                    print(f"    {time:8.1f} us {kernel[:100]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
