"""A batch norm with its activation, and the depthwise or grouped convolution after it: one after the other, and as one.

`python -m benchmarks.studies.prologue [--network NAME] [--batch N] [--threads N] [--only TEXT] [--seconds S]
[--dtype TYPE] [--act NAME] [--default-malloc] [--cpu-time]` prints a table of speedups of `bn_act_conv2d` over
`bn_act` and `grouped_conv2d`: of the forward pass in training, of it in inference, and of a step, which is forward and
backward pass; the step also over one that computes the activated tensor again, as `cnnkern.recompute` does. `saved` are
the mebibytes that stay until the backward pass: the input, and apart the activated tensor as well. Geometric means
follow. "±" is half of the interval that contains the median with 95 %.
"""

import argparse
import statistics
from collections.abc import Callable

import torch

import cnnkern
from cnnkern import testing
from cnnkern.measure import clock
from cnnkern.testing import Layer
from cnnkern.testing.shapes import GROUPED_LAYERS

from ..suite import timing
from ..suite.groups import LAYOUTS
from . import timers

ops = torch.ops.cnnkern
PARTS = {"forward": "forward", "inference": "inference", "step": "step", "step, recomputed": "step"}


def calls(layer: Layer, layout: str, dtype: torch.dtype, act: str) -> dict[str, Callable[[], object]]:
    """ "apart" and "fused", with the names of PARTS -> a call, after results have been compared."""
    generator = torch.Generator().manual_seed(0)
    n, channels, *image = layer.shape
    width, k, stride, padding = (layer.arguments[name] for name in ("width", "kernel", "stride", "padding"))
    x = testing.with_layout(testing.randn((n, channels, *image), generator, dtype), layout)
    kernel = testing.with_layout(testing.randn((channels, width, k, k), generator, dtype), layout)
    weight, bias = torch.rand(channels, generator=generator) + 0.5, torch.randn(channels, generator=generator)
    statistics = torch.zeros(channels), torch.ones(channels)
    settings = ((stride, stride), (padding, padding), (1, 1), channels // width)
    norm, wanted = (weight, bias, *statistics), [True] * 3

    def apart(training: bool) -> tuple[torch.Tensor, ...]:
        a, mean, rstd = ops.bn_act(x, *norm, training, 0.1, 1e-5, act)
        return ops.grouped_conv2d(a, kernel, None, *settings), a, mean, rstd

    def fused(training: bool) -> tuple[torch.Tensor, ...]:
        return ops.bn_act_conv2d(x, *norm, training, 0.1, 1e-5, act, None, kernel, None, *settings)

    y, _, mean, rstd = apart(True)
    dy = testing.with_layout(testing.randn(y.shape, generator, dtype), layout)
    assert torch.equal(fused(True)[0], y)

    def step_apart(recomputes: bool = False) -> tuple[torch.Tensor, ...]:
        a = apart(True)[1]
        if recomputes:
            del a
            a = ops.sync_bn(x, None, weight, bias, mean, rstd, act)[0]
        da, dkernel, _ = ops.grouped_conv2d_backward(dy, a, kernel, *settings, [True, True, False])
        return *ops.bn_act_backward(da, x, weight, bias, mean, rstd, True, act, wanted), dkernel

    def step_fused() -> tuple[torch.Tensor, ...]:
        fused(True)
        of_norm = (x, weight, bias, mean, rstd, True, act)
        da, dkernel, _ = ops.bn_act_conv2d_backward(dy, *of_norm, None, kernel, *settings, [True, True, False])
        return *ops.bn_act_backward(da, *of_norm, wanted), dkernel

    assert all(map(torch.equal, step_apart(), step_fused()))
    return {
        "apart forward": lambda: apart(True),
        "fused forward": lambda: fused(True),
        "apart inference": lambda: apart(False),
        "fused inference": lambda: fused(False),
        "apart step": step_apart,
        "apart step, recomputed": lambda: step_apart(recomputes=True),
        "fused step": step_fused,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.prologue", description=__doc__)
    parser.add_argument("--network", default="mobilenet_v2", choices=GROUPED_LAYERS, metavar="NAME")
    parser.add_argument("--batch", type=int, default=16, help="the batch size (default: 16)")
    timers.add_options(parser)
    parser.add_argument("--act", default="relu6", help="the activation (default: relu6)")
    parser.add_argument("--default-malloc", action="store_true", help="do not call cnnkern.tune_malloc()")
    arguments = parser.parse_args(argv)
    timer = timers.chosen(parser, arguments)
    dtype = getattr(torch, arguments.dtype)
    malloc = "malloc's defaults" if arguments.default_malloc else cnnkern.tune_malloc()
    print(f"threads: {arguments.threads}; {malloc}; {arguments.dtype}; {arguments.act}\n")
    print("| layer | layout | apart (ms) | forward | inference | step | step, recomputed | saved: apart | fused |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    means: dict[tuple[str, str], list[float]] = {}
    for listed in GROUPED_LAYERS[arguments.network]:
        layer = Layer((arguments.batch, *listed.shape[1:]), listed.arguments)
        for layout in LAYOUTS:
            row = f"| {layer} | {layout} |"
            if arguments.only not in row:
                continue
            with torch.no_grad():
                made = calls(layer, layout, dtype, arguments.act)
                samples = clock.interleave(made, timer, seconds=arguments.seconds, sample_seconds=0.002)
            seconds = {name: [sample.wall for sample in taken] for name, taken in samples.items()}
            cells = []
            for part, ours in PARTS.items():
                found = clock.ratio(seconds[f"apart {part}"], seconds[f"fused {ours}"])
                means.setdefault((layout, part), []).append(found.value)
                cells.append(f"{found.value:.2f}x ± {found.chance:.0%}")
            ms = statistics.median(seconds["apart step"]) * 1e3
            x = torch.Size(layer.shape).numel() * dtype.itemsize / 2**20
            print(row, f"{ms:.2f} | {' | '.join(cells)} | {2 * x:.1f} | {x:.1f} |", flush=True)
    for (layout, part), values in means.items():
        print(f"{layout}, {part}: {timing.geometric_mean(values):.2f}x, worst {min(values):.2f}x")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
