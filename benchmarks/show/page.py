"""report.html: a result as one page that works offline, light or dark as the reader's system."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..suite.machine import TUNED_MALLOC
from ..suite.rows import Row
from ..suite.timing import geometric_mean
from . import figures, means, remarks, tables
from .comparison import Comparison

RANKED = 8  # rows of the best and of the worst


@dataclass(frozen=True)
class Bar:
    label: str
    kind: str  # its colour: cnnkern, compile or other
    ratio: float
    note: str = ""


@dataclass(frozen=True)
class Bars:
    """Bars of one chart on a common scale from 0, with eager's speed at 1."""

    title: str
    groups: dict[str, list[Bar]]

    @property
    def end(self) -> float:
        return max(1.5, *(b.ratio for bars in self.groups.values() for b in bars)) * 1.02

    @property
    def one(self) -> float:
        """The position of eager's speed, in percent of the width."""
        return 100 / self.end

    def width(self, bar: Bar) -> float:
        return 100 * bar.ratio / self.end


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis; places are in percent of its length."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]

    def place(self, value: float) -> float:
        return 100 * math.log(value / self.low) / math.log(self.high / self.low)


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    kind: str
    title: str


@dataclass(frozen=True)
class Roofline:
    x: Axis
    y: Axis
    band: str  # the measured bandwidths as an SVG path in a square of 100 by 100; empty where there are none
    points: list[Point]


def render(rows: list[Row], created: str, changes: Comparison | None = None) -> str:
    """The whole page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    ranked = means.ranked(rows)
    return environment.get_template("report.html.jinja").render(
        created=created,
        origin=remarks.origin(rows, created),
        load=remarks.load_line(rows),
        cards=_cards(rows),
        charts=[*_operator_bars(rows), *_model_bars(rows)],
        models=_models(rows),
        overhead=tables.overhead_lines(rows),
        roofline=_roofline(rows),
        bandwidths=_bandwidths(rows),
        best=ranked[:RANKED] if len(ranked) > 2 * RANKED else [],
        worst=ranked[-RANKED:] if len(ranked) > 2 * RANKED else [],
        listings=remarks.listings(rows),
        changes=changes,
        environment=_environment(rows[0], created),
        malloc=TUNED_MALLOC,
        header=tables.DETAILS,
        details=tables.detail_lines(rows),
        figures=figures,
        tables=tables,
    )


def _cards(rows: list[Row]) -> list[tuple[str, str, str]]:
    """(label, value, explanation) of the figures at the top of the page."""
    cards = []
    found = means.ranked(rows)
    for suite, mode in dict.fromkeys((r.suite, r.mode) for r in rows if r.suite in ("operators", "models")):
        ratios = [r.ratio for r in found if (r.suite, r.mode) == (suite, mode) and r.ratio is not None]
        if ratios:
            mean = figures.times(geometric_mean(ratios))
            cards.append((f"{suite}, {mode}", mean, f"geometric mean of {len(ratios)} rows, vs eager"))
    if found:
        won = sum(not r.lost for r in found)
        noisy = len(means.left_out(rows))
        cards.append(
            (
                "faster than eager",
                f"{won} of {len(found)}",
                f"rows; {noisy} more are left out for noise or a busy machine",
            )
        )
    copies = [r for r in rows if r.suite == "bandwidth" and r.operator == "copy"]
    if copies:
        largest = max(copies, key=lambda r: int(r.shape))
        cards.append(("copy bandwidth", f"{largest.gb_s:.0f} GB/s", f"over {int(largest.shape) >> 20} MiB, this run"))
    return cards


def _kind(contender: str) -> str:
    return "compile" if contender.startswith("torch.compile") else contender if contender == "cnnkern" else "other"


def _operator_bars(rows: list[Row]) -> list[Bars]:
    charts = []
    for malloc in tables.settings(rows):
        groups: dict[str, list[Bar]] = {}
        for m in sorted(means.means(rows), key=lambda m: m.contender != "cnnkern"):
            if m.malloc == malloc and m.contender != "eager" and m.ratio is not None:
                label = f"{m.layout}, {m.contender}"
                shapes = f"{m.shapes} shape{'s' * (m.shapes > 1)}"
                share = "" if m.bandwidth_share is None else f", {m.bandwidth_share:.0%} of bandwidth"
                bar = Bar(label, _kind(m.contender), m.ratio, shapes + share)
                groups.setdefault(f"{m.operator}, {m.network}, {m.mode}", []).append(bar)
        if groups:
            charts.append(Bars(f"Operators, {malloc} malloc", groups))
    return charts


def _model_bars(rows: list[Row]) -> list[Bars]:
    groups: dict[str, list[Bar]] = {}
    for r in rows:
        if r.suite == "models" and r.ratio is not None and r.counts and r.contender != "eager":
            bar = Bar(f"{r.layout}, {r.contender}, {r.malloc} malloc", _kind(r.contender), r.ratio)
            groups.setdefault(f"{r.operator}, {r.shape}, {r.mode}", []).append(bar)
    return [Bars("Models", groups)] if groups else []


def _models(rows: list[Row]) -> list[list[str]]:
    """Lines of every contender of the models: what, median, noise, images per second, the most memory held, ratios."""
    lines = []
    for r in rows:
        if r.suite == "models" and r.median_ms is not None and r.ratio is not None:
            what = [r.operator, r.shape, r.mode, r.layout, r.malloc, r.contender]
            held = figures.mebibytes(r.peak_bytes)
            timed = [figures.duration(r.median_ms), figures.noise(r), figures.images(r), held]
            lines.append([*what, *timed, figures.times(r.ratio_to_compile), figures.to_eager(r)])
    return lines


SIZE_TICKS = [2**e for e in range(10, 41, 4)]
SPEED_TICKS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000]


def _axis(values: list[float], ticks: list[float], label: Any) -> Axis:
    low, high = min(values) / 1.25, max(values) * 1.25
    return Axis(low, high, tuple((t, label(t)) for t in ticks if low <= t <= high))


def _size(value: float) -> str:
    for unit, exponent in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if value >= 2**exponent:
            return f"{value / 2**exponent:.0f} {unit}"
    return f"{value:.0f} B"


def _roofline(rows: list[Row]) -> Roofline | None:
    """Achieved bandwidth by the least bytes of a call, with the bandwidth of plain kernels in the same run."""
    rated = [r for r in rows if r.suite == "operators" and r.gb_s is not None and r.bytes is not None]
    if not rated:
        return None
    measured: dict[int, list[float]] = {}
    for r in rows:
        if r.suite == "bandwidth" and r.gb_s is not None:
            measured.setdefault(int(r.shape), []).append(r.gb_s)
    x = _axis([float(r.bytes or 0) for r in rated] + [float(s) for s in measured], SIZE_TICKS, _size)
    speeds = [r.gb_s or 0.0 for r in rated] + [v for values in measured.values() for v in values]
    y = _axis(speeds, SPEED_TICKS, lambda v: f"{v:g}")
    # Outside the measured sizes the nearest one is used, as for a row's share of the bandwidth.
    edges = [(0.0, measured[min(measured)]), *((x.place(s), measured[s]) for s in sorted(measured))] if measured else []
    edges += [(100.0, measured[max(measured)])] if measured else []
    upper = [f"{at:.2f} {100 - y.place(max(values)):.2f}" for at, values in edges]
    lower = [f"{at:.2f} {100 - y.place(min(values)):.2f}" for at, values in reversed(edges)]
    points = [
        Point(x.place(r.bytes or 1), 100 - y.place(r.gb_s or 1), _kind(r.contender), _point_title(r)) for r in rated
    ]
    return Roofline(x, y, f"M{' L'.join(upper + lower)} Z" if edges else "", _cnnkern_last(points))


def _point_title(r: Row) -> str:
    return f"{r.contender}: {figures.name(r)}, {r.gb_s:.1f} GB/s"


def _cnnkern_last(points: Iterable[Point]) -> list[Point]:
    return sorted(points, key=lambda p: ("other", "compile", "cnnkern").index(p.kind))


def _bandwidths(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """(header, lines): GB/s of each mix at each size."""
    measured = {(r.operator, int(r.shape)): r.gb_s for r in rows if r.suite == "bandwidth" and r.gb_s is not None}
    sizes = sorted({size for _, size in measured})
    lines = [
        [mix, *(f"{measured[mix, size]:.1f}" if (mix, size) in measured else figures.MISSING for size in sizes)]
        for mix in dict.fromkeys(mix for mix, _ in measured)
    ]
    return ["GB/s", *(_size(size) for size in sizes)], lines


def _environment(row: Row, created: str) -> dict[str, Any]:
    names = ("machine", "device", "cpu_capability", "threads", "dtype", "torch", "cnnkern", "commit")
    return {n.replace("_", " "): asdict(row)[n] for n in names} | {"created": created}
