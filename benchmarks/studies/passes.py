"""Each pass of the grouped convolutions of six networks by itself: forward, dx, dweight, and dx with dweight.

`python -m benchmarks.studies.passes [--batch N] [--threads N] [--only TEXT] [--seconds S] [--default-malloc]
[--widths]` prints a table of eager's and cnnkern's milliseconds, the speedup, and GFLOP/s in forward, dx and dweight;
for depthwise 3x3, which is memory-bound, the GB/s as well, and their share of what a plain copy of about as many bytes
reached in the same run. Geometric means follow, of the speedup and of the share of the peak: what the faster of a
matrix product and a dense convolution reached before and after all of it. `--widths` has groups of 2, 12, 20, 24, 40
and 48 channels instead, which none of the networks has.
"""

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable

import torch

import cnnkern
from cnnkern import testing
from cnnkern.testing import Layer
from cnnkern.testing.shapes import GROUPED_LAYERS

from ..suite import bandwidth, timing
from ..suite.bandwidth import Bandwidth
from ..suite.groups import LAYOUTS

CASE = testing.CASES["grouped_conv2d"]
PEAK = "the fastest of a matrix product and a dense convolution"
PASSES = {"forward": None, "dx": (True, False), "dweight": (False, True), "dx and dweight": (True, True)}


def layers(batch: int) -> list[Layer]:
    """The layers of all networks, each once."""
    every = itertools.chain.from_iterable(v for n, v in GROUPED_LAYERS.items() if not n.endswith("batch 1"))
    found = {str(layer): Layer((batch, *layer.shape[1:]), layer.arguments) for layer in every}
    return list(found.values())


def other_widths(batch: int) -> list[Layer]:
    """3x3 over about 240 channels in groups as wide as no network here has them."""
    return [
        Layer(
            (batch, max(240 // width, 4) * width, plane, plane),
            {"width": width, "kernel": 3, "padding": 1, "bias": False, "stride": stride},
        )
        for width in (2, 12, 20, 24, 40, 48)
        for plane in (28, 14)
        for stride in (1, 2)
    ]


def kind(layer: Layer) -> str:
    width, kernel = layer.arguments["width"], layer.arguments["kernel"]
    return f"depthwise {kernel}x{kernel}" if width == 1 else f"width {width}"


def steps(
    layer: Layer, layout: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[tuple[str, str], Callable[[], object]]:
    """(contender, pass) -> a call, after results have been compared."""
    tf32 = device == "cuda" and torch.backends.cudnn.allow_tf32  # whose factors have 10 bits of mantissa
    close = 2e-2 if dtype != torch.float32 else 1e-2 if tf32 else 1e-4
    generator = torch.Generator(device).manual_seed(0)
    inputs = CASE.inputs(layer.shape, dtype, generator=generator, **layer.arguments)
    x, weight = (testing.with_layout(inputs[name], layout) for name in ("input", "weight"))
    settings = [(v, v) for v in (inputs["stride"], inputs["padding"], inputs["dilation"])]
    groups = inputs["groups"]
    eager, ours = torch.ops.aten.convolution, torch.ops.cnnkern.grouped_conv2d
    eager_backward, ours_backward = torch.ops.aten.convolution_backward, torch.ops.cnnkern.grouped_conv2d_backward
    y = eager(x, weight, None, *settings, False, (0, 0), groups)
    dy = testing.with_layout(testing.randn(y.shape, generator, dtype), layout)
    torch.testing.assert_close(ours(x, weight, None, *settings, groups), y, rtol=close, atol=close)

    def backward(which: tuple[bool, bool], mine: bool):
        if mine:
            return ours_backward(dy, x, weight, *settings, groups, [*which, False])
        return eager_backward(dy, x, weight, None, *settings, False, (0, 0), groups, [*which, False])

    for a, b in zip(backward((True, True), True)[:2], backward((True, True), False)[:2], strict=True):
        assert (a - b).abs().max() <= close * b.abs().max()
    found: dict[tuple[str, str], Callable[[], object]] = {}
    for name, which in PASSES.items():
        if which is None:
            found["eager", name] = lambda: eager(x, weight, None, *settings, False, (0, 0), groups)
            found["cnnkern", name] = lambda: ours(x, weight, None, *settings, groups)
        else:
            found["eager", name] = lambda which=which: backward(which, False)
            found["cnnkern", name] = lambda which=which: backward(which, True)
    return found


def flops(layer: Layer) -> int:
    """Of one pass; padding counts as if it were multiplied."""
    return 2 * math.prod(CASE.output_shape(layer)) * layer.arguments["width"] * layer.arguments["kernel"] ** 2


def traffic(layer: Layer) -> dict[str, int]:
    """The least bytes that a pass reads and writes; weights are small beside them."""
    x, y = math.prod(layer.shape) * 4, math.prod(CASE.output_shape(layer)) * 4
    return dict.fromkeys(("forward", "dx", "dweight"), x + y)  # two of x, y and their gradients each


def peak_gflops(seconds: float = 1.0) -> float:
    """What the fastest of a matrix product and a dense convolution reaches, by PyTorch's libraries.

    On some processors oneDNN's convolution is more than twice as fast as the matrix product.
    """
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    image = torch.randn(16, 256, 28, 28).to(memory_format=torch.channels_last)
    weight = torch.randn(256, 256, 3, 3).to(memory_format=torch.channels_last)
    work = {"product": 2 * 1024**3, "convolution": 2 * image.numel() * weight[0].numel()}
    with torch.no_grad():
        samples = timing.interleave(
            {"product": lambda: a @ b, "convolution": lambda: torch.conv2d(image, weight, padding=1)},
            deadline=time.perf_counter() + seconds,
            min_rounds=5,
            max_rounds=500,
        )
    return max(work[name] / statistics.median(values) / 1e9 for name, values in samples.items())


def copy_shares(layer: Layer, ms: dict[tuple[str, str], float], bandwidths: list[Bandwidth]) -> str:
    """cnnkern's GB/s in each pass, and their share of a copy's."""
    cells = []
    for name, moved in traffic(layer).items():
        gb_s = moved / ms["cnnkern", name] / 1e6
        cells.append(f"{gb_s:.1f} ({gb_s / bandwidth.at_size(bandwidths, moved)['copy']:.0%})")
    return ", ".join(cells)


def listed(values: list[float], form: str) -> str:
    return ", ".join(format(v, form) for v in values)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.passes", description=__doc__)
    parser.add_argument("--batch", type=int, default=16, help="the batch size (default: 16)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: PyTorch's choice)"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="time only layers with TEXT in their row")
    parser.add_argument("--seconds", type=float, default=1.0, help="the time per row (default: 1)")
    parser.add_argument("--default-malloc", action="store_true", help="do not call cnnkern.tune_malloc()")
    parser.add_argument("--widths", action="store_true", help="time widths that none of the networks has")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    malloc = "malloc's defaults" if arguments.default_malloc else cnnkern.tune_malloc()
    before, bandwidths = peak_gflops(), bandwidth.measure("cpu", arguments.threads, seconds=2.0)
    print(f"threads: {arguments.threads}; {malloc}; {PEAK}: {before:.0f} GFLOP/s")
    print("a copy: " + ", ".join(f"{b.gb_s:.1f} GB/s over {b.size >> 20} MiB" for b in bandwidths if b.mix == "copy"))
    measured = "GFLOP/s of cnnkern | GB/s of cnnkern (of a copy's)"
    print(f"\n| layer | layout | {' | '.join(f'{p}: eager, cnnkern (ms), ratio' for p in PASSES)} | {measured} |")
    print(f"|---|---|{'---:|' * (len(PASSES) + 2)}")
    ratios: dict[tuple[str, str], list[float]] = {}
    rates: dict[tuple[str, str], list[list[float]]] = {}
    lost = []
    for layer, layout in itertools.product((other_widths if arguments.widths else layers)(arguments.batch), LAYOUTS):
        if arguments.only not in f"{layer} {layout} {kind(layer)}":
            continue
        calls = steps(layer, layout)
        deadline = time.perf_counter() + arguments.seconds
        samples = timing.interleave(calls, deadline=deadline, min_rounds=5, max_rounds=200)
        ms = {key: statistics.median(values) * 1e3 for key, values in samples.items()}
        cells = []
        for name in PASSES:
            theirs, mine = ms["eager", name], ms["cnnkern", name]
            cells.append(f"{theirs:.2f}, {mine:.2f}, {theirs / mine:.2f}x")
            if theirs < mine:
                lost.append(f"{layer} {layout} {name}: {theirs / mine:.2f}x")
        rate = [flops(layer) / ms["cnnkern", name] / 1e6 for name in ("forward", "dx", "dweight")]
        rates.setdefault((kind(layer), layout), []).append(rate)
        cells += [listed(rate, ".0f"), copy_shares(layer, ms, bandwidths) if kind(layer) == "depthwise 3x3" else "-"]
        print(f"| {kind(layer)}: {layer} | {layout} | {' | '.join(cells)} |", flush=True)
        both = ("forward", "dx and dweight")
        step = sum(ms["eager", p] for p in both) / sum(ms["cnnkern", p] for p in both)
        ratios.setdefault((kind(layer), layout), []).append(step)
    after = peak_gflops()
    print(f"\n{PEAK}, afterwards: {after:.0f} GFLOP/s; shares are of the larger")
    share = "share of it: forward, dx, dweight"
    print(f"\n| kind | layout | layers | forward and backward | worst layer | {share} |\n|---|---|---:|---:|---:|---:|")
    for (name, layout), values in sorted(ratios.items()):
        mean = statistics.geometric_mean(values)
        shares = [
            statistics.geometric_mean(passed) / max(before, after) for passed in zip(*rates[name, layout], strict=True)
        ]
        print(f"| {name} | {layout} | {len(values)} | {mean:.2f}x | {min(values):.2f}x | {listed(shares, '.0%')} |")
    print(f"\nSlower than eager: {len(lost)} of {4 * sum(map(len, ratios.values()))} passes", *lost, sep="\n- ")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
