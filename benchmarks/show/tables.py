"""A result as tables, for a terminal, a page or Markdown."""

from collections.abc import Iterable

from ..suite.rows import Row
from .figures import MISSING, duration, images, mebibytes, noise, percent, times, to_eager
from .means import mean, means, totals
from .remarks import bandwidth_line, listings, load_line, origin


def detail_lines(rows: Iterable[Row]) -> list[list[str]]:
    """One line for each measured row, eager included."""
    lines = []
    for r in rows:
        if r.suite != "bandwidth" and r.status == "ok":
            what = [r.operator, r.network, r.shape, r.mode, r.api, r.layout, r.malloc, r.contender]
            gb_s = MISSING if r.gb_s is None else f"{r.gb_s:.1f}"
            figures = [duration(r.median_ms), noise(r), gb_s, percent(r.bandwidth_share)]
            lines.append([*what, *figures, times(r.ratio_to_compile), to_eager(r) + " lost" * r.lost])
    return lines


DETAILS = [
    "operator",
    "network",
    "shape",
    "mode",
    "api",
    "layout",
    "malloc",
    "implementation",
    "median",
    "noise",
    "GB/s",
    "of bandwidth",
    "vs torch.compile",
    "vs eager",
]
MEANS = ["operator", "network", "shapes", "mode", "layout", "malloc", "implementation", "of bandwidth", "vs eager"]
MODELS = ["model", "input", "mode", "layout", "malloc", "cnnkern, time", "images/s", "vs eager", "noise"]
PEAK = "peak MiB, eager/cnnkern"
OTHERS = "others vs eager"
OVERHEAD = ["call", "mode", "cnnkern, time", "vs eager", "noise"]


def settings(rows: Iterable[Row]) -> list[str]:
    """The malloc settings of the rows, in the order of the run."""
    return list(dict.fromkeys(r.malloc for r in rows if r.suite != "bandwidth"))


def summary(rows: Iterable[Row], malloc: str) -> tuple[list[str], list[list[str]]]:
    """(header, lines) of the means under one malloc setting: a line for each operator, network and contender, and one
    for cnnkern's means against torch.compile over the shapes that it was timed on.

    A cell has the speedup over eager and the share of the memory bandwidth, of one mode and layout. The number after a
    network is the number of shapes. An operator's last lines are over the shapes of all networks.
    """
    rows = [r for r in rows if r.malloc == malloc]
    found = [m for m in [*means(rows), *totals(rows)] if m.contender != "eager"]
    columns = list(dict.fromkeys((m.mode, m.layout) for m in found))
    lines: dict[tuple[str, str, str, int], dict[tuple[str, str], str]] = {}
    for m in sorted(found, key=lambda m: m.contender != "cnnkern"):
        share = "" if m.bandwidth_share is None else f" {m.bandwidth_share:.0%}"
        line = lines.setdefault((m.operator, m.network, m.contender, m.shapes), {})
        line[m.mode, m.layout] = mean(m) + share
    for m in found:
        if m.contender == "cnnkern" and m.ratio_to_compile is not None:
            line = lines.setdefault((m.operator, m.network, "cnnkern, vs torch.compile", m.compiled), {})
            line[m.mode, m.layout] = times(m.ratio_to_compile)
    operators = list(dict.fromkeys(m.operator for m in found))
    networks = list(dict.fromkeys(m.network for m in found))
    table = [
        [
            operator.replace("(train ", "("),
            f"{network} ({shapes})",
            contender,
            *(cells.get(c, MISSING) for c in columns),
        ]
        for (operator, network, contender, shapes), cells in sorted(
            lines.items(), key=lambda item: (operators.index(item[0][0]), networks.index(item[0][1]))
        )
    ]
    header = ["operator", "network (shapes)", "implementation"]
    return header + [f"{mode} {layout}".replace("_", " ") for mode, layout in columns], table


def mean_lines(rows: Iterable[Row]) -> list[list[str]]:
    return [
        [m.operator, m.network, str(m.shapes), m.mode, m.layout, m.malloc, m.contender]
        + [percent(m.bandwidth_share), mean(m)]
        for m in means(rows)
        if m.contender != "eager"
    ]


def against_eager(rows: Iterable[Row], suite: str) -> list[tuple[Row, Row]]:
    """(eager's row, cnnkern's row) for everything in the suite that has both."""
    rows = [r for r in rows if r.suite == suite and r.status == "ok"]

    def key(r: Row) -> tuple[str, ...]:
        return r.operator, r.network, r.shape, r.mode, r.api, r.layout, r.malloc

    eager = {key(r): r for r in rows if r.contender == "eager"}
    return [(eager[key(r)], r) for r in rows if r.contender == "cnnkern" and key(r) in eager]


def model_table(rows: Iterable[Row]) -> tuple[list[str], list[list[str]]]:
    """(header, lines): one per model and setting, with cnnkern's time and its speedup over eager.

    The speedup is the median over rounds, so the ratio of two medians would differ from it: eager's time has no column.
    Peak memory is eager's/cnnkern's. Other implementations share a column; the speedup over torch.compile of the
    unconverted model has its own."""
    rows = [r for r in rows if r.suite == "models"]

    def setting(r: Row) -> tuple[str, ...]:
        return r.operator, r.shape, r.mode, r.layout, r.malloc

    pairs = against_eager(rows, "models")
    peaks = [PEAK] * any(r.peak_bytes is not None for pair in pairs for r in pair)
    compiled = ["vs torch.compile"] * any(r.ratio_to_compile is not None for _, r in pairs)
    others: dict[tuple[str, ...], list[str]] = {}
    for r in rows:
        if r.status == "ok" and r.contender not in ("eager", "cnnkern"):
            to_compile = "" if r.ratio_to_compile is None else f", {times(r.ratio_to_compile)} vs torch.compile"
            others.setdefault(setting(r), []).append(f"{r.contender} {to_eager(r)}{to_compile}")
    lines = []
    for e, r in pairs:
        held = [f"{mebibytes(e.peak_bytes)}/{mebibytes(r.peak_bytes)}"] if peaks else []
        rest = ["; ".join(others.get(setting(r), [MISSING]))] if others else []
        figures = [duration(r.median_ms), images(r), to_eager(r), noise(r)]
        lines.append([*setting(r), *figures, *[times(r.ratio_to_compile)] * len(compiled), *held, *rest])
    return MODELS + compiled + peaks + [OTHERS] * bool(others), lines


def overhead_lines(rows: Iterable[Row]) -> list[list[str]]:
    return [
        [f"{r.operator} {r.shape}, {r.api}", r.mode, duration(r.median_ms), to_eager(r), noise(r)]
        for _, r in against_eager(rows, "overhead")
    ]


def sections(rows: list[Row], details: bool) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, lines) of the tables that have lines."""
    tables = [
        ("Operators, every measurement", DETAILS, detail_lines(r for r in rows if r.suite == "operators")),
        ("Operators, geometric means over a network's shapes", MEANS, mean_lines(rows)),
        ("Models", *model_table(rows)),
        ("Call overhead, on a tensor of one kilobyte", OVERHEAD, overhead_lines(rows)),
    ]
    return [t for t in tables[0 if details else 1 :] if t[2]]


NUMBERS = {"median", "noise", "GB/s", "of bandwidth", "vs eager", "vs torch.compile", "images/s", PEAK, "cnnkern, time"}
NUMBERS |= {"shapes", "eager", "cnnkern", "rows", "within 10 %", "first run", "second run", "difference"}


def is_number(column: str) -> bool:
    return column in NUMBERS or column.split()[0] in ("training", "inference", "forward", "backward", "below")


def markdown_table(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---:" if is_number(column) else "---" for column in header]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines])


def markdown(rows: list[Row], created: str) -> str:
    """Geometric means, models, a call's overhead, and the slower rows."""
    parts = [
        f"**{title}**\n\n{markdown_table(header, lines)}" for title, header, lines in sections(rows, details=False)
    ]
    for title, lines in listings(rows):
        if lines:
            parts.append(f"**{title}**\n\n" + "\n".join(f"- {line}" for line in lines))
    parts.append(
        "`vs eager` is the speedup: eager's time over the implementation's in the same layout, the median over "
        f"interleaved rounds. Above 1 is faster.\nMeasured on {origin(rows, created)}; {bandwidth_line(rows)}; "
        f"{load_line(rows)}."
    )
    return "\n\n".join(parts) + "\n"
