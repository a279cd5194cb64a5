"""Where the time of a model's training step goes, layer by kind of layer, and what that leaves to be gained.

`python -m benchmarks.studies.steps [MODEL ...] [--batch N] [--threads N] [--steps N] [--default-malloc]` prints, for
eager and for the converted model in both layouts, milliseconds in dense and grouped convolutions, in norms with their
activations and additions, in the optimizer and in the rest; and the bound: how many times as fast a step would be if
grouped convolutions and norms took no time at all. Times are torch.profiler's, which adds a little to each operator.
"""

import argparse
import itertools
import statistics
from collections.abc import Sequence

import torch
from torch.autograd.profiler_util import FunctionEvent

import cnnkern

from ..suite import timing
from ..suite.groups import LAYOUTS, Contender
from ..suite.models import LARGE, LARGE_BATCH_SIZE, ModelBench

KINDS = ("dense convolution", "grouped convolution", "norm, activation, addition", "optimizer", "rest")
DENSE, GROUPED, NORM, OPTIMIZER, REST = KINDS
# An operator's kind, and where its image and its weight stand among its arguments.
CONVOLUTIONS = {
    "aten::convolution": (0, 1),
    "aten::convolution_backward": (1, 2),
    "cnnkern::grouped_conv2d": (0, 1),
    "cnnkern::grouped_conv2d_backward": (1, 2),
}
ACTIVATIONS = ("relu", "relu_", "hardtanh", "hardtanh_", "silu", "silu_", "sigmoid", "hardswish", "hardswish_", "gelu")
NORMS = {f"aten::{name}" for name in (*ACTIVATIONS, "batch_norm", "layer_norm", "add", "add_")}
NORMS |= {f"aten::{name}_backward" for name in ("threshold", "hardtanh", "silu", "sigmoid", "hardswish", "gelu")}
NORMS |= {f"aten::{name}_backward" for name in ("native_batch_norm", "native_layer_norm")}
NORMS |= {
    f"cnnkern::{name}{half}"
    for name in ("bn_act", "bn_add_act", "add_relu", "layer_norm", "layer_norm2d")
    for half in ("", "_backward")
}


def kind_of(event: FunctionEvent) -> str:
    """Of the operator, or of the nearest one around it that has a kind; within the optimizer always that."""
    around = [event]
    while around[-1].cpu_parent is not None:
        around.append(around[-1].cpu_parent)
    if any(e.name.startswith("Optimizer.step") for e in around):
        return OPTIMIZER
    for e in around:
        if e.name in CONVOLUTIONS:
            image, weight = (e.input_shapes[i] for i in CONVOLUTIONS[e.name])
            return GROUPED if weight[1] < image[1] else DENSE
        if e.name in NORMS:
            return NORM
    return REST


def rounds(bench: ModelBench, contender: Contender, steps: int, device: str = "cpu") -> list[dict[str, float]]:
    """Milliseconds by kind, of each of so many steps; on a GPU those of the kernels that operators launch."""
    step = bench.step(contender, verify=False)
    step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    found: list[dict[str, float]] = []
    for _ in range(steps):
        with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
            step()
            timing.synchronize(device)
        one = dict.fromkeys(KINDS, 0.0)
        for event in profile.events():
            spent = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
            if device != "cuda" or event.device_type == torch.autograd.DeviceType.CPU:  # kernels are their operator's
                one[kind_of(event)] += spent / 1e3
        found.append(one)
    return found


def milliseconds(bench: ModelBench, contender: Contender, steps: int) -> dict[str, float]:
    """By kind, the medians over so many steps."""
    found = rounds(bench, contender, steps)
    return {kind: statistics.median(r[kind] for r in found) for kind in KINDS}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.steps", description=__doc__)
    parser.add_argument("models", nargs="*", default=list(LARGE), metavar="MODEL")
    parser.add_argument("--batch", type=int, default=LARGE_BATCH_SIZE)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--default-malloc", action="store_true", help="without cnnkern.tune_malloc()")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    if not arguments.default_malloc:
        cnnkern.tune_malloc()
    print(f"| model | layout | | {' | '.join(f'{kind}, ms' for kind in KINDS)} | step, ms | bound |")
    print(f"|---|---|---|{'---:|' * (len(KINDS) + 2)}")
    for name, layout in itertools.product(arguments.models, LAYOUTS):
        bench = ModelBench(name, arguments.batch, training=True, device="cpu")
        for who in ("eager", "ours"):
            found = milliseconds(bench, Contender(who, layout), arguments.steps)
            whole = sum(found.values())
            bound = f"{whole / (whole - found[GROUPED] - found[NORM]):.2f}x" if who == "eager" else ""
            cells = " | ".join(f"{found[kind]:.0f}" for kind in KINDS)
            print(f"| {name} | {layout} | {who} | {cells} | {whole:.0f} | {bound} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
