"""What a training step of an operator takes of a GPU, kernel by kernel: ours beside eager's.

`python -m benchmarks.gpu_kernels [--dtype bfloat16] [--kernels]` prints the sums of the kernels' own times as PyTorch's
profiler has them, means of ten steps on a cold L2; with --kernels also the five longest. The host's time, and the
pauses between kernels, are in none of them.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import cnnkern
from benchmarks.groups import LAYOUTS
from cnnkern import testing
from cnnkern.testing import CASES

STEPS = 10
FLUSHED_BYTES = 2**28
SHAPES = {
    "bn_act": ((32, 64, 112, 112), (32, 256, 56, 56), (32, 128, 28, 28), (32, 512, 7, 7), (32, 2048, 7, 7)),
    "bn_add_act": ((32, 256, 56, 56), (32, 1024, 14, 14)),
    "layer_norm": ((1953, 512), (97, 1024)),
    "layer_norm2d": ((16, 768, 7, 7), (16, 96, 56, 56)),
}


def microseconds(step: Callable[[], object]) -> dict[str, float]:
    """kernel -> its time in one step."""
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(STEPS):
            flushed.zero_()
            step()
        torch.cuda.synchronize()
    found = {e.key: e.self_device_time_total / STEPS for e in profiled.key_averages()}
    return {k: t for k, t in found.items() if t > 0 and "signed char" not in k and "memset" not in k.lower()}


def training_step(
    function: Callable[..., Tensor], case: testing.Case, inputs: dict[str, Any], dy: Tensor
) -> Callable[[], object]:
    leaves = {
        n: v.detach().requires_grad_(n in case.differentiable) if isinstance(v, Tensor) else v
        for n, v in inputs.items()
    }
    wanted = [leaves[n] for n in case.differentiable if isinstance(leaves.get(n), Tensor)]
    return lambda: torch.autograd.grad(function(**leaves), wanted, dy)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_kernels", description=__doc__)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--kernels", action="store_true", help="also each step's five longest kernels")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA device on this machine")
    cnnkern.backend("cuda")
    dtype, generator = getattr(torch, arguments.dtype), torch.Generator().manual_seed(0)
    print("| operator | shape | layout | eager, us | ours, us | to eager |\n| --- | --- | --- | ---: | ---: | ---: |")
    for operator, shapes in SHAPES.items():
        case = CASES[operator]
        for shape in shapes:
            inputs = case.inputs(shape, dtype, generator=generator, **case.variants[case.bench_variant])
            inputs = {n: v.cuda() if isinstance(v, Tensor) else v for n, v in inputs.items()}
            dy = testing.randn(shape, generator, dtype).cuda()
            for layout in LAYOUTS[: 2 if len(shape) == 4 else 1]:

                def placed(value, layout=layout):
                    is_image = isinstance(value, Tensor) and value.dim() == 4
                    return testing.with_layout(value, layout) if is_image else value

                there = {n: placed(v) for n, v in inputs.items()}
                eager, ours = (
                    microseconds(training_step(function, case, there, placed(dy)))
                    for function in (case.reference, case.function)
                )
                sums = [sum(found.values()) for found in (eager, ours)]
                name = "x".join(map(str, shape))
                print(f"| {operator} | {name} | {layout} | {sums[0]:.1f} | {sums[1]:.1f} | {sums[0] / sums[1]:.2f}x |")
                for found in (eager, ours) if arguments.kernels else ():
                    for kernel, time in sorted(found.items(), key=lambda item: -item[1])[:5]:
                        print(f"    {time:8.1f} us {kernel[:100]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
