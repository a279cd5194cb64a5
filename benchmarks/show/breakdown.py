"""A result's rows grouped across networks: layer norms by size, convolutions by kind; the effect of the malloc setting;
and rows with a low share of the memory bandwidth."""

import math
import re
from collections.abc import Callable, Iterable

from ..suite.groups import AGAIN, GROUPED_ALONE, GROUPED_AND_COMPILED
from ..suite.rows import Row, is_spoilt
from ..suite.timing import geometric_mean
from .figures import NOISY, percent, times
from .means import NO_NETWORKS

Table = tuple[list[str], list[list[str]]]

# The least expected shares of the measured bandwidth, beyond the last-level cache and in it.
BEYOND_CACHE, IN_CACHE = 0.85, 0.70
ASSUMED_CACHE = 32 * 2**20  # bytes, of rows that were measured before rows said it


def sizes(rows: Iterable[Row]) -> Table:
    """(header, lines): layer norms over the widths of the benchmark, by the number of elements."""
    rows = [r for r in rows if r.network == "widths"]

    def size(r: Row) -> str:
        return f"10^{round(math.log10(_elements(r)))}"

    def small(r: Row) -> bool:  # and in cache, as float32
        return int(r.shape.split("x")[-1]) <= 512 and _elements(r) <= 1.1e6

    by_size = _by(rows, lambda r: (r.operator, f"elements {size(r)}", r.malloc))
    cut = _by((r for r in rows if small(r)), lambda r: (r.operator, "widths up to 512, elements up to 10^6", r.malloc))
    whole = _by(rows, lambda r: (r.operator, "all", r.malloc))
    return _table(["operator", "size", "malloc"], by_size | cut | whole)


def kinds(rows: Iterable[Row]) -> Table:
    """(header, lines): grouped convolutions of all networks by width or, where that is 1, kernel, and by batch size."""

    def kind(r: Row) -> tuple[str, ...]:
        width, kernel = (int(re.search(rf"\b{word} (\d+)", r.shape)[1]) for word in ("width", "kernel"))
        name = f"depthwise {kernel}x{kernel}" if width == 1 else f"width {width}"
        return name, "1" if r.network.endswith(" batch 1") else "larger", r.malloc

    found = _by((r for r in rows if r.operator == "grouped_conv2d"), kind)

    def order(key: tuple[str, ...]) -> tuple[object, ...]:
        name, batch, malloc = key
        return malloc != "tuned", batch != "larger", name.split()[0], int(re.search(r"\d+", name)[0])

    return _table(["kind", "batch", "malloc"], dict(sorted(found.items(), key=lambda item: order(item[0]))))


Groups = dict[tuple[str, ...], list[Row]]


def _elements(row: Row) -> int:
    return math.prod(map(int, row.shape.split()[0].split("x")))


def _by(rows: Iterable[Row], key: Callable[[Row], tuple[str, ...]], noisy: bool = False) -> Groups:
    """cnnkern's rows that count (or all with a ratio), grouped by `key`."""
    groups: Groups = {}
    for r in rows:
        if r.suite == "operators" and r.contender == "cnnkern" and (r.counts or (noisy and r.ratio is not None)):
            groups.setdefault(key(r), []).append(r)
    return groups


def _table(header: list[str], groups: Groups) -> Table:
    """A line per group, with a column for each mode and layout: the speedup over eager, that over torch.compile where
    it was timed, and the share of bandwidth."""
    columns = list(dict.fromkeys((r.mode, r.layout) for rows in groups.values() for r in rows))
    lines = []
    for key, rows in groups.items():
        cells = {c: [r for r in rows if (r.mode, r.layout) == c] for c in columns}
        shapes = max(map(len, cells.values()))
        lines.append([*key, str(shapes), *(_cell(cells[c]) for c in columns)])
    return [*header, "shapes", *(f"{mode} {layout}".replace("_", " ") for mode, layout in columns)], lines


def _cell(rows: list[Row]) -> str:
    ratios, to_compile, shares = (
        [value for r in rows if (value := getattr(r, column)) is not None]
        for column in ("ratio", "ratio_to_compile", "bandwidth_share")
    )
    if not ratios:
        return "-"
    parts = [times(geometric_mean(ratios))]
    if to_compile:
        parts.append(f"{times(geometric_mean(to_compile))} vs torch.compile")
    if shares:
        parts.append(percent(geometric_mean(shares)))
    return ", ".join(parts)


def malloc(rows: Iterable[Row]) -> Table:
    """(header, lines): for each operator, the time with malloc's defaults over that with malloc tuned, of eager and of
    cnnkern; geometric means over the shapes that have both. The two settings were timed one after the other."""
    times_of: dict[tuple[str | None, ...], dict[str, float]] = {}
    for r in rows:
        if r.suite == "operators" and r.contender in ("eager", "cnnkern") and r.status == "ok" and r.median_ms:
            key = (r.operator, r.contender, r.mode, r.network, r.shape, r.layout, r.api)
            times_of.setdefault(key, {})[r.malloc] = r.median_ms
    gains: dict[str, dict[tuple[str | None, ...], list[float]]] = {}
    for (operator, contender, mode, *_), found in times_of.items():
        if found.keys() == {"tuned", "default"}:
            ratios = gains.setdefault(str(operator), {}).setdefault((contender, mode), [])
            ratios.append(found["default"] / found["tuned"])
    columns = [(contender, mode) for mode in ("training", "inference") for contender in ("eager", "cnnkern")]
    lines = [
        [operator, str(max(map(len, of.values()))), *(_gain(of.get(column, [])) for column in columns)]
        for operator, of in gains.items()
    ]
    return ["operator", "shapes and layouts", *(f"{contender}, {mode}" for contender, mode in columns)], lines


def _gain(ratios: list[float]) -> str:
    return times(geometric_mean(ratios)) if ratios else "-"


def ways(rows: Iterable[Row]) -> Table:
    """(header, lines): inference of a model by each way that was timed, in milliseconds of its faster layout. The
    fastest is bold; ~ marks a time whose spread over the rounds is more than a tenth."""
    timed = [
        r for r in rows if r.suite == "models" and r.mode == "inference" and r.status == "ok" and r.contender != AGAIN
    ]
    names = list(dict.fromkeys(r.contender for r in timed))
    best: dict[tuple[str, str], dict[str, Row]] = {}
    for r in sorted(timed, key=lambda r: -(r.median_ms or 0)):  # the faster layout last
        best.setdefault((r.operator, r.shape), {})[r.contender] = r
    order = list(dict.fromkeys((r.operator, r.shape) for r in timed))
    lines = []
    for model, shape in order:
        found = best[model, shape]
        fastest = min(r.median_ms or math.inf for r in found.values())
        cells = [_milliseconds(found.get(name), fastest) for name in names]
        lines.append([model, shape.split("x")[0], *cells])
    return ["model", "batch", *(f"{name}, ms" for name in names)], lines


def _milliseconds(row: Row | None, fastest: float) -> str:
    if row is None or row.median_ms is None:
        return "-"
    said = f"{row.median_ms:.3g}" if row.median_ms < 1000 else f"{row.median_ms:.0f}"
    loose = "~" if (row.iqr_ms or 0.0) > 0.1 * row.median_ms else ""
    return f"**{said}**{loose}" if row.median_ms == fastest else f"{said}{loose}"


WAYS = [(mode, layout) for mode in ("training", "inference") for layout in ("contiguous", "channels_last")]


def _usual(rows: Iterable[Row]) -> list[Row]:
    """The rows with tuned malloc, if it was timed: with the defaults, page faults dominate."""
    rows = list(rows)
    return [r for r in rows if r.malloc == "tuned"] if any(r.malloc == "tuned" for r in rows) else rows


def operators(rows: Iterable[Row], out_of_place: Iterable[str] = ()) -> Table:
    """(header, lines): one per operator, geometric means of speedup over eager over all networks' shapes that count;
    single images, shapes that belong to no network and other variants have separate lines."""

    def part(r: Row) -> tuple[str, ...]:
        what = "single images" if r.network.endswith(" batch 1") else ""
        what = r.network if r.network in NO_NETWORKS else what
        old = "eager out of place" if r.operator in out_of_place else ""
        return (", ".join(filter(None, [r.operator, what, old])),)

    groups = _by(_usual(rows), part, noisy=True)
    lines = [
        [*key, str(len({(r.network, r.shape) for r in found})), *(_mean(found, way) for way in WAYS)]
        for key, found in groups.items()
    ]
    return ["operator", "shapes", *(" ".join(way).replace("_", " ") for way in WAYS)], lines


def _mean(rows: Iterable[Row], way: tuple[str, str]) -> str:
    timed = [r for r in rows if (r.mode, r.layout) == way]
    ratios = [r.ratio for r in timed if r.counts and r.ratio is not None]
    if not ratios:
        return NOISY if timed else "-"
    return times(geometric_mean(ratios)) + "~" * is_spoilt(len(ratios), len(timed))


LEFT_OUT = ("eager", GROUPED_ALONE, GROUPED_AND_COMPILED)


def models(rows: Iterable[Row]) -> Table:
    """(header, lines): a line per model, input and mode, a column per contender; a cell has the speedup over eager of
    its contiguous and its channels_last row, each in the layout of eager's. Without models in which only grouped
    convolutions are replaced: the tables of every model have those."""
    rows = [r for r in _usual(rows) if r.suite == "models" and r.ratio is not None and r.contender not in LEFT_OUT]
    contenders = list(dict.fromkeys(r.contender for r in rows))
    lines: dict[tuple[str, str, str], dict[tuple[str, str], str]] = {}
    for r in rows:
        ratio = times(r.ratio) if r.counts else NOISY
        lines.setdefault((r.operator, r.shape, r.mode), {})[r.contender, r.layout] = ratio

    def cell(found: dict[tuple[str, str], str], contender: str) -> str:
        both = [found.get((contender, layout), "-") for layout in ("contiguous", "channels_last")]
        return "-" if both == ["-", "-"] else "\u00a0/\u00a0".join(both)  # no line break in narrow columns

    table = [[*key, *(cell(found, c) for c in contenders)] for key, found in lines.items()]
    return ["model", "input", "mode", *contenders], table


def kernels(rows: Iterable[Row]) -> Table:
    """(header, lines): for each model and kind of kernel, the time of all its kernels in one step."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for r in rows:
        if r.suite == "kernels" and r.median_ms is not None:
            found.setdefault((r.network, r.operator, r.shape, r.layout), {})[r.contender] = r
    lines = []
    for (model, kind, *setting), of in found.items():
        ratio = of["cnnkern"].ratio if "cnnkern" in of else None
        figures = [_milliseconds(of.get(name), 0) for name in ("eager", "cnnkern")]
        lines.append([model, kind, *figures, times(ratio), *setting])
    return ["model", "kind of kernel", "eager, ms", "cnnkern, ms", "speedup", "input", "layout"], lines


def slower(rows: Iterable[Row]) -> Table:
    """(header, lines): a line per operator or model and mode that has rows slower than eager, with the slowest."""
    groups: Groups = {}
    for r in rows:
        if r.contender == "cnnkern" and r.counts:
            groups.setdefault((r.suite, r.operator, r.mode), []).append(r)
    lines = []
    for (_, operator, mode), found in groups.items():
        lost = [r for r in found if r.lost]
        if lost:
            worst = min(lost, key=lambda r: r.ratio or 1.0)
            named = f"{worst.network} {worst.shape} {worst.layout}: {times(worst.ratio)}"
            lines.append([operator, mode, f"{len(lost)} of {len(found)}", named])
    return ["what", "mode", "rows slower", "the slowest"], lines


ROOFLINE = ["operator", "network", "below 85 % beyond the cache", "below 70 % in cache", "worst"]


def roofline(rows: Iterable[Row]) -> Table:
    """(header, lines): for each operator and network, how many of cnnkern's rows reach less than the
    expected share of the measured bandwidth, and the worst of them.

    A row is beyond the cache if its least memory traffic exceeds the last-level cache. Compute-bound convolutions are
    left out: all except depthwise 3x3.
    """
    rated = [r for r in rows if r.bandwidth_share is not None and r.bytes is not None and not _is_arithmetic(r)]
    if any(r.malloc == "tuned" for r in rated):  # else page faults dominate
        rated = [r for r in rated if r.malloc == "tuned"]
    lines = []
    for key, members in _by(rated, lambda r: (r.operator, r.network)).items():
        beyond = [r for r in members if _is_beyond_cache(r)]
        inside = [r for r in members if not _is_beyond_cache(r)]
        missed = [[r for r in part if _share(r) < _goal(r)] for part in (beyond, inside)]
        counts = [
            f"{len(short)} of {len(part)}" if part else "-"
            for short, part in zip(missed, (beyond, inside), strict=True)
        ]
        worst = min((r for part in missed for r in part), key=lambda r: _share(r) / _goal(r), default=None)
        named = "-" if worst is None else f"{worst.shape} {worst.mode} {worst.layout}: {percent(_share(worst))}"
        lines.append([*key, *counts, named])
    return ROOFLINE, lines


def _is_arithmetic(r: Row) -> bool:
    return r.operator == "grouped_conv2d" and "width 1 kernel 3 " not in f"{r.shape} "


def _is_beyond_cache(r: Row) -> bool:
    return (r.bytes or 0) > (r.cache_bytes or ASSUMED_CACHE)


def _share(r: Row) -> float:
    return r.bandwidth_share or 0.0


def _goal(r: Row) -> float:
    return BEYOND_CACHE if _is_beyond_cache(r) else IN_CACHE
