"""Grouped convolutions of sequences and of volumes, which run on the kernels for images, beside PyTorch's.

`python -m benchmarks.studies.sequences [--threads N] [--dtype float32|bfloat16|float16] [--seconds S] [--only TEXT]
[--cpu-time] [--volumes]` prints for each layer PyTorch's milliseconds and the speedup of cnnkern's operator: in the
forward pass, in that of a transposed input (which both copy first), and in forward and backward. Speedups are medians
over interleaved rounds, with their uncertainty (:mod:`cnnkern.measure.clock`). The operator is called directly; the
last column says which layers `cnnkern.functional.conv1d` dispatches to PyTorch. `--cpu-time`, with one thread, reports
CPU time, for a machine that others use. `--volumes` times convolutions of videos instead, in both layouts, by
`cnnkern.functional.conv3d`.
"""

import argparse
import math
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import cnnkern
from cnnkern.measure import clock
from cnnkern.ops.grouped_conv1d import left_to_library

from . import timers

Calls = dict[str, Callable[[], object]]
# (what it is like, N, C, L, channels per group, taps, stride)
SEQUENCES = (
    ("Conformer", 8, 256, 400, 1, 31, 1),
    ("Conformer, one", 1, 512, 300, 1, 31, 1),
    ("long", 1, 64, 16000, 1, 31, 1),
    ("wav2vec 2.0, positions", 2, 512, 500, 32, 128, 1),
    ("depthwise", 16, 192, 200, 1, 3, 1),
    ("depthwise", 16, 192, 200, 1, 3, 2),
    ("depthwise", 16, 192, 200, 1, 5, 1),
    ("depthwise", 16, 192, 200, 1, 5, 2),
    ("depthwise, one", 1, 192, 200, 1, 3, 1),
    ("depthwise, long", 4, 64, 16000, 1, 3, 1),
    ("depthwise, short", 64, 256, 25, 1, 3, 1),
    ("depthwise, shorter", 64, 256, 24, 1, 3, 2),
    ("groups", 8, 256, 400, 2, 3, 1),
    ("groups", 8, 256, 400, 4, 3, 1),
    ("groups", 8, 256, 400, 4, 31, 1),
    ("groups", 8, 256, 400, 8, 3, 1),
    ("groups", 8, 256, 400, 8, 3, 2),
    ("groups", 8, 256, 400, 8, 31, 1),
    ("groups", 8, 256, 400, 16, 3, 1),
    ("groups, short", 64, 256, 24, 16, 3, 2),
    ("groups", 8, 256, 400, 32, 3, 1),
    ("groups, long", 1, 128, 16000, 32, 9, 1),
    ("groups", 8, 256, 40, 64, 9, 1),
)
# (what it is like, N, C, frames, height and width, channels per group, kernel, stride)
VOLUMES = (
    ("X3D", 4, 54, 16, 56, 1, (3, 3, 3), (1, 1, 1)),
    ("X3D", 4, 54, 16, 112, 1, (3, 3, 3), (1, 2, 2)),
    ("X3D", 4, 108, 16, 28, 1, (3, 3, 3), (1, 1, 1)),
    ("X3D", 4, 216, 16, 28, 1, (3, 3, 3), (1, 2, 2)),
    ("X3D", 4, 216, 16, 14, 1, (3, 3, 3), (1, 1, 1)),
    ("X3D", 4, 432, 16, 7, 1, (3, 3, 3), (1, 1, 1)),
    ("X3D, one", 1, 54, 13, 40, 1, (3, 3, 3), (1, 1, 1)),
    ("X3D, one", 1, 432, 13, 5, 1, (3, 3, 3), (1, 1, 1)),
    ("X3D, stem", 4, 24, 16, 112, 1, (5, 1, 1), (1, 1, 1)),
    ("CSN", 2, 64, 8, 56, 1, (3, 3, 3), (1, 1, 1)),
    ("CSN", 2, 128, 8, 28, 1, (3, 3, 3), (2, 2, 2)),
    ("CSN", 2, 256, 4, 14, 1, (3, 3, 3), (1, 1, 1)),
    ("frames alone", 2, 128, 8, 28, 1, (1, 3, 3), (1, 1, 1)),
    ("time alone", 2, 128, 8, 28, 1, (3, 1, 1), (1, 1, 1)),
    ("ResNeXt", 2, 128, 8, 28, 4, (3, 3, 3), (1, 1, 1)),
    ("ResNeXt", 2, 256, 8, 28, 8, (3, 3, 3), (2, 2, 2)),
    ("ResNeXt", 2, 256, 4, 14, 8, (3, 3, 3), (1, 1, 1)),
    ("ResNeXt", 2, 512, 4, 14, 16, (3, 3, 3), (1, 1, 1)),
    ("ResNeXt", 2, 1024, 2, 7, 32, (3, 3, 3), (1, 1, 1)),
)


def convolved(conv: Callable[..., Tensor], x: Tensor, weight: Tensor, *settings: object) -> tuple[Calls, Tensor]:
    """The forward pass, and it with both gradients; and a result."""
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    with torch.no_grad():
        y = conv(x, weight, None, *settings)
    dy = torch.ones_like(y)

    def forward() -> Tensor:
        with torch.no_grad():
            return conv(x, weight, None, *settings)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(conv(*leaves, None, *settings), leaves, dy)

    return {"forward": forward, "step": step}, y


def by_ours(x: Tensor, weight: Tensor, bias: None, stride: int, padding: int, dilation: int, groups: int) -> Tensor:
    """As cnnkern.functional.conv1d calls the operator."""
    row, settings = x.contiguous().unsqueeze(2), ((stride, stride), (0, padding), (1, dilation), groups)
    return torch.ops.cnnkern.grouped_conv2d(row, weight.unsqueeze(2), bias, *settings).squeeze(2)


def timed(calls: Calls, timer: clock.Timer, seconds: float) -> dict[str, list[float]]:
    samples = clock.interleave(calls, timer, seconds=seconds, sample_seconds=0.005)
    return {name: [sample.wall for sample in taken] for name, taken in samples.items()}


def ratio(theirs: list[float], ours: list[float]) -> str:
    found = clock.ratio(theirs, ours)
    return f"{found.value:.2f}x ± {found.chance:.0%}"


def sequences(dtype: torch.dtype, timer: clock.Timer, seconds: float, only: str) -> None:
    print("\n| layer | forward (ms) | forward | forward, transposed | forward and backward | conv1d |")
    print("|---|---:|---:|---:|---:|---|")
    for name, n, c, length, width, taps, stride in SEQUENCES:
        row = f"{name}: {n}x{c}x{length} width {width} kernel {taps} stride {stride}"
        if only not in row:
            continue
        x = torch.randn(n, c, length).to(dtype)
        weight = (torch.randn(c, width, taps) * (width * taps) ** -0.5).to(dtype)
        settings = (stride, taps // 2, 1, c // width)
        transposed = x.transpose(1, 2).contiguous().transpose(1, 2)
        calls: Calls = {}
        results = []
        for who, conv in (("eager", F.conv1d), ("cnnkern", by_ours)):
            made, y = convolved(conv, x, weight, *settings)
            calls |= {f"{who} {part}": call for part, call in made.items()}
            calls[f"{who} transposed"] = convolved(conv, transposed, weight, *settings)[0]["forward"]
            results.append(y)
        close = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(*results, rtol=close, atol=close)
        ms = timed(calls, timer, seconds)
        cells = [ratio(ms[f"eager {part}"], ms[f"cnnkern {part}"]) for part in ("forward", "transposed", "step")]
        answers = "PyTorch" if left_to_library(x, weight, stride) else "cnnkern"
        print(
            f"| {row} | {statistics.median(ms['eager forward']) * 1e3:.3f} | {' | '.join(cells)} | {answers} |",
            flush=True,
        )


def volumes(dtype: torch.dtype, timer: clock.Timer, seconds: float, only: str) -> None:
    print("\n| layer | layout | forward (ms) | forward | forward and backward |")
    print("|---|---|---:|---:|---:|")
    for name, n, c, frames, side, width, kernel, stride in VOLUMES:
        for kind, layout in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last_3d)):
            row = f"{name}: {n}x{c}x{frames}x{side}x{side} width {width} kernel {'x'.join(map(str, kernel))} stride "
            row += "x".join(map(str, stride))
            if only not in row:
                continue
            x = torch.randn(n, c, frames, side, side).to(dtype).to(memory_format=layout)
            weight = (torch.randn(c, width, *kernel) * (width * math.prod(kernel)) ** -0.5).to(dtype)
            settings = (stride, tuple(k // 2 for k in kernel), (1, 1, 1), c // width)
            theirs, expected = convolved(F.conv3d, x, weight, *settings)
            ours, found = convolved(cnnkern.functional.conv3d, x, weight, *settings)
            close = 1e-4 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(found, expected, rtol=close, atol=close)
            calls = {f"eager {part}": call for part, call in theirs.items()}
            ms = timed(calls | {f"cnnkern {part}": call for part, call in ours.items()}, timer, seconds)
            cells = [ratio(ms[f"eager {part}"], ms[f"cnnkern {part}"]) for part in ("forward", "step")]
            print(
                f"| {row} | {kind} | {statistics.median(ms['eager forward']) * 1e3:.2f} | {' | '.join(cells)} |",
                flush=True,
            )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.sequences", description=__doc__)
    timers.add_options(parser)
    parser.add_argument("--volumes", action="store_true", help="time convolutions of volumes instead")
    arguments = parser.parse_args(argv)
    timer = timers.chosen(parser, arguments)
    print(f"threads: {arguments.threads}; {cnnkern.tune_malloc()}")
    if arguments.volumes:
        volumes(getattr(torch, arguments.dtype), timer, arguments.seconds, arguments.only)
    else:
        sequences(getattr(torch, arguments.dtype), timer, arguments.seconds, arguments.only)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
