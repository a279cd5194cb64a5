"""A result in at most WIDTH columns, on a terminal and as a page."""

from __future__ import annotations

import io

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cnnkern.measure import profile
from cnnkern.measure.result import BenchmarkResult, Contender
from cnnkern.measure.values import by_x

WIDTH = 100


def text(result: BenchmarkResult) -> str:
    console = Console(file=io.StringIO(), width=WIDTH, highlight=False, color_system=None)
    with console.capture() as captured:
        console.print(_all(result))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def page(result: BenchmarkResult) -> str:
    console = Console(file=io.StringIO(), width=WIDTH, highlight=False, record=True)
    console.print(_all(result))
    return console.export_html(inline_styles=True)


def _all(result: BenchmarkResult) -> RenderableType:
    parts: list[RenderableType] = [*_head(result), Text()]
    if not result.contenders:
        parts.append(Text("Nothing was timed: the converted model does not compute what the original does."))
        return Group(*parts)
    parts += [_times(result), *_notes(result), Text(), _breakdown(result), *_bound(result)]
    return Group(*parts)


def _head(result: BenchmarkResult) -> list[RenderableType]:
    where, threads = result.machine, f", threads: {result.threads}" if result.device == "cpu" else ""
    inputs = " and ".join(by_x(shape) for shape in result.inputs)
    fused = ", ".join(f"{n} {kind}" for kind, n in sorted(result.fused.items())) or "nothing in this model"
    lines = [
        str(result.activity),
        f"{result.model}: {result.mode}, input {inputs}, {result.dtype}, {result.layout}, {result.device}{threads}",
        f"{where.device_name} ({where.kernels}), torch {where.torch}, cnnkern {where.cnnkern}",
        f"Fused: {fused}",
        *(["By this machine's table (cnnkern tune) PyTorch computes some of these calls."] if result.tuned else []),
        f"Results {'agree' if result.ok else 'DIFFER'}, on {result.check.images} images, without dropout:",
        *(f"  {line}" for line in result.check.lines),
    ]
    return [Text(line) for line in lines]


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def in_milliseconds(seconds: float, largest: float) -> str:
    """With as many decimals as give the largest of a column about four digits."""
    decimals = 3 if largest < 0.01 else 2 if largest < 0.1 else 1
    return f"{seconds * 1e3:.{decimals}f}"


def _times(result: BenchmarkResult) -> RenderableType:
    on_gpu = any(c.kernel_seconds is not None for c in result.contenders)
    more = ("events, ms", "kernels, ms") if on_gpu else ()
    table = _table("", "step, ms", "spread", "speedup", "images/s", "peak, MiB", *more)
    largest = max(c.seconds for c in result.contenders)
    for c in result.contenders:
        cells = [c.name, in_milliseconds(c.seconds, largest), f"{c.spread:.0%}", _ratio(result, c)]
        cells += [f"{result.images_per_second(c):.1f}", f"{c.peak_bytes / 2**20:.1f}"]
        if on_gpu:
            cells += ["" if s is None else in_milliseconds(s, largest) for s in (c.event_seconds, c.kernel_seconds)]
        table.add_row(*cells)
    return table


def _ratio(result: BenchmarkResult, contender: Contender) -> str:
    if contender.name == "eager":
        return "1.00x"
    return f"{'~' if result.within_noise(contender) else ''}{contender.ratio:.2f}x"


def _notes(result: BenchmarkResult) -> list[RenderableType]:
    lines = [
        f"{result.rounds} interleaved rounds; ratios are medians over rounds, times are eager's median over the ratio. "
        f"Eager timed against itself: off by {result.noise:.1%}; ~ marks ratios that are within this, or within their "
        "own uncertainty.",
        f"Peak: {profile.CPU_PEAK if result.device == 'cpu' else profile.GPU_PEAK}.",
    ]
    lines += [f"{name}: not timed: {why}" for name, why in result.failed.items()]
    if result.host_bound:
        waits = next(c.waits for c in result.contenders if c.name == "eager")
        lines.append(
            f"HOST-BOUND: in eager's step the GPU waits for the host {waits:.0%} of the time. Faster kernels cannot "
            "shorten that; larger batches, torch.compile or CUDA graphs can."
        )
    return [Text(line) for line in lines]


def _breakdown(result: BenchmarkResult) -> RenderableType:
    columns = [f"{name}, {unit}" for name in result.breakdown for unit in ("ms", "%")]
    table = _table("where a step's time goes", *columns)
    largest = max(sum(found.values()) for found in result.breakdown.values())
    for kind in profile.KINDS:
        if any(found[kind] > 0 for found in result.breakdown.values()):
            cells = []
            for found in result.breakdown.values():
                cells += [in_milliseconds(found[kind], largest), f"{100 * found[kind] / sum(found.values()):.1f}"]
            table.add_row(kind, *cells)
    return table


def _bound(result: BenchmarkResult) -> list[RenderableType]:
    ours = sum(result.breakdown["eager"][kind] for kind in profile.OURS) / sum(result.breakdown["eager"].values())
    lines = [
        f"At most {result.bound:.2f}x: norms, activations, additions and grouped convolutions are {ours:.0%} of "
        "eager's step. That is the speedup of a step if they took no time."
    ]
    converted = next((c for c in result.contenders if c.name == "converted"), None)
    if converted is not None and converted.ratio > result.bound:
        lines.append("Converted measures above that: by what it saves elsewhere, or by noise.")
    return [Text(line) for line in lines]
