"""A result as lines of text: geometric means, ratios, what is slower than eager, where it was measured."""

import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ..suite.groups import CONVERTED_AND_COMPILED, OUT_OF_PLACE
from ..suite.load import BUSY_CORES
from ..suite.rows import Row, is_spoilt
from ..suite.timing import geometric_mean

MISSING = "-"


@dataclass(frozen=True)
class Mean:
    """The geometric mean of one contender's ratios to eager, over the shapes of a network that count."""

    operator: str
    network: str
    mode: str
    layout: str
    malloc: str
    contender: str
    shapes: int  # that were timed ...
    counted: int  # ... and of those the ones that noise leaves a ratio; none: there is no mean
    ratio: float | None
    bandwidth_share: float | None
    compiled: int  # shapes that torch.compile was timed on as well ...
    ratio_to_compile: float | None  # ... and the mean of its time over this contender's


def means(rows: Iterable[Row]) -> list[Mean]:
    grouped: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.suite == "operators" and row.status == "ok" and row.contender != OUT_OF_PLACE:
            key = (row.operator, row.network, row.mode, row.layout, row.malloc, row.contender)
            grouped.setdefault(key, []).append(row)
    found = []
    for key, timed in grouped.items():
        members = [r for r in timed if r.counts]
        shares = [r.bandwidth_share for r in members if r.bandwidth_share is not None]
        to_compile = [r.ratio_to_compile for r in members if r.ratio_to_compile is not None]
        ratio = geometric_mean([r.ratio for r in members if r.ratio is not None]) if members else None
        compared = geometric_mean(to_compile) if to_compile else None
        share = geometric_mean(shares) if shares else None
        compiled = sum(r.ratio_to_compile is not None for r in timed)
        found.append(Mean(*key, len(timed), len(members), ratio, share, compiled, compared))
    return found


NO_NETWORKS = ("widths",)  # shapes that are no network's
ALL, ALL_OF_BATCH_1 = "all networks", "all networks, batch 1"


def totals(rows: Iterable[Row]) -> list[Mean]:
    """Our means over the shapes of all networks, single images by themselves, of operators that have several."""
    rows = [r for r in rows if r.suite == "operators" and r.contender == "ours" and r.network not in NO_NETWORKS]
    networks: dict[tuple[str, str], set[str]] = {}
    together = []
    for r in rows:
        network = ALL_OF_BATCH_1 if r.network.endswith(" batch 1") else ALL
        networks.setdefault((r.operator, network), set()).add(r.network)
        together.append(replace(r, network=network))
    return means(r for r in together if len(networks[r.operator, r.network]) > 1)


def duration(ms: float | None) -> str:
    if ms is None:
        return MISSING
    return f"{ms * 1e3:.2f} us" if ms < 0.1 else f"{ms:.2f} ms" if ms < 1 else f"{ms:.1f} ms"


def times(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}x"


NOISY, CROWDED = "noisy", "crowded"


def mean(m: Mean) -> str:
    """Its ratio, with a ~ where noise has taken more than a quarter of its rows."""
    return NOISY if m.ratio is None else times(m.ratio) + "~" * is_spoilt(m.counted, m.shapes)


def to_eager(row: Row) -> str:
    """The ratio, and what leaves nothing of it, if anything does."""
    why = "" if row.ratio is None or row.counts else f" {CROWDED if row.is_crowded else NOISY}"
    return times(row.ratio) + why


def noise(row: Row) -> str:
    """Of the row's ratio."""
    return "over 100%" if row.noise is not None and row.noise > 1 else percent(row.noise)


def percent(value: float | None) -> str:
    return MISSING if value is None else f"{value:.0%}"


def images(row: Row) -> str:
    return MISSING if row.images_s is None else f"{row.images_s:.1f}"


def mebibytes(count: int | None) -> str:
    return MISSING if count is None else f"{count / 2**20:.0f}"


def name(row: Row) -> str:
    api = row.api if row.suite == "overhead" else "none"  # elsewhere the suite says which it is
    parts = [row.operator, row.network, row.shape, row.mode, api, row.layout, f"{row.malloc} malloc"]
    return " ".join(dict.fromkeys(p for p in parts if p != "none"))


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
    "contender",
    "median",
    "noise",
    "GB/s",
    "of bandwidth",
    "to torch.compile",
    "to eager",
]
MEANS = ["operator", "network", "shapes", "mode", "layout", "malloc", "contender", "of bandwidth", "to eager"]
MODELS = ["model", "input", "mode", "layout", "malloc", "ours", "images/s", "to eager", "noise"]
OTHERS = "others to eager"
OVERHEAD = ["call", "mode", "ours", "to eager", "noise"]


def settings(rows: Iterable[Row]) -> list[str]:
    """The malloc settings of what was timed, in the order of the run."""
    return list(dict.fromkeys(r.malloc for r in rows if r.suite != "bandwidth"))


def summary(rows: Iterable[Row], malloc: str) -> tuple[list[str], list[list[str]]]:
    """(header, lines) of the means under one malloc setting: a line for each operator, network and contender, and one
    for our means against torch.compile over the shapes that it was timed on.

    A cell has the ratio to eager and the share of the memory bandwidth, of one mode and layout. The number behind a
    network is that of the shapes. An operator's last lines are over the shapes of all networks.
    """
    rows = [r for r in rows if r.malloc == malloc]
    found = [m for m in [*means(rows), *totals(rows)] if m.contender != "eager"]
    columns = list(dict.fromkeys((m.mode, m.layout) for m in found))
    lines: dict[tuple[str, str, str, int], dict[tuple[str, str], str]] = {}
    for m in sorted(found, key=lambda m: m.contender != "ours"):
        share = "" if m.bandwidth_share is None else f" {m.bandwidth_share:.0%}"
        line = lines.setdefault((m.operator, m.network, m.contender, m.shapes), {})
        line[m.mode, m.layout] = mean(m) + share
    for m in found:
        if m.contender == "ours" and m.ratio_to_compile is not None:
            line = lines.setdefault((m.operator, m.network, "ours, to torch.compile", m.compiled), {})
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
    header = ["operator", "network (shapes)", "contender"]
    return header + [f"{mode} {layout}".replace("_", " ") for mode, layout in columns], table


def ours(rows: Iterable[Row]) -> list[Row]:
    """Our rows whose ratio to eager counts, best first."""
    found = [r for r in rows if r.contender == "ours" and r.counts]
    return sorted(found, key=lambda r: -(r.ratio or 0.0))


def left_out(rows: Iterable[Row]) -> list[Row]:
    """Our rows of whose ratio noise, or others on the machine, leave nothing."""
    return [r for r in rows if r.contender == "ours" and r.ratio is not None and not r.counts]


def verdict(rows: list[Row]) -> str:
    found, noisy = ours(rows), left_out(rows)
    if not found:
        spoilt = f"none of our {len(noisy)} rows is clear of noise and of others on the machine"
        return spoilt if noisy else "nothing of ours was timed"

    def by_suite(ratio: Callable[[Row], float | None]) -> str:
        parts = []
        for suite in dict.fromkeys(r.suite for r in rows):
            ratios = [value for r in found if r.suite == suite and (value := ratio(r)) is not None]
            if ratios:
                parts.append(f"{suite} {times(geometric_mean(ratios))}")
        return ", ".join(parts)

    to_compile = by_suite(lambda r: r.ratio_to_compile)
    return (
        f"geometric means over all rows that count, to eager: {by_suite(lambda r: r.ratio)}; "
        f"faster than eager in {sum(not r.lost for r in found)} of {len(found)} rows"
        + (f"; to torch.compile: {to_compile}" if to_compile else "")
        + f"; left out for noise or others on the machine: {len(noisy)} rows"
    )


def mean_lines(rows: Iterable[Row]) -> list[list[str]]:
    return [
        [m.operator, m.network, str(m.shapes), m.mode, m.layout, m.malloc, m.contender]
        + [percent(m.bandwidth_share), mean(m)]
        for m in means(rows)
        if m.contender != "eager"
    ]


def against_eager(rows: Iterable[Row], suite: str) -> list[tuple[Row, Row]]:
    """(eager's row, ours) of everything in the suite that has both."""
    rows = [r for r in rows if r.suite == suite and r.status == "ok"]

    def key(r: Row) -> tuple[str, ...]:
        return r.operator, r.network, r.shape, r.mode, r.api, r.layout, r.malloc

    eager = {key(r): r for r in rows if r.contender == "eager"}
    return [(eager[key(r)], r) for r in rows if r.contender == "ours" and key(r) in eager]


def model_table(rows: Iterable[Row]) -> tuple[list[str], list[list[str]]]:
    """(header, lines): one per model and setting, with our time and the ratio to eager, which is taken round by round:
    a time of eager's beside it would give another. The most memory that a call holds stands as eager's/ours. What else
    was timed has a column, and so has torch.compile of the model as it is."""
    rows = [r for r in rows if r.suite == "models"]

    def setting(r: Row) -> tuple[str, ...]:
        return r.operator, r.shape, r.mode, r.layout, r.malloc

    pairs = against_eager(rows, "models")
    peaks = ["MiB"] * any(r.peak_bytes is not None for pair in pairs for r in pair)
    compiled = ["to torch.compile"] * any(r.ratio_to_compile is not None for _, r in pairs)
    others: dict[tuple[str, ...], list[str]] = {}
    for r in rows:
        if r.status == "ok" and r.contender not in ("eager", "ours"):
            to_compile = "" if r.ratio_to_compile is None else f", {times(r.ratio_to_compile)} to torch.compile"
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


def lost_lines(rows: Iterable[Row]) -> list[str]:
    return [f"{name(r)}: {duration(r.median_ms)}, {times(r.ratio)}" for r in rows if r.lost]


def lost_to_compile(rows: Iterable[Row]) -> list[str]:
    """Our rows, and converted models compiled, that torch.compile of the reference is faster than."""
    return [
        f"{name(r)}{'' if r.contender == 'ours' else f', {r.contender}'}: "
        f"{duration(r.median_ms)}, {times(r.ratio_to_compile)} to torch.compile"
        for r in rows
        if r.contender in ("ours", CONVERTED_AND_COMPILED) and r.counts and (r.ratio_to_compile or 1.0) < 1
    ]


def slow_compiles(rows: Iterable[Row]) -> list[str]:
    """Rows of torch.compile that are far slower than eager, and why: a line a reason and operator."""
    grouped: dict[tuple[str, str, str], list[Row]] = {}
    for r in rows:
        if r.status == "ok" and r.note and r.suite != "bandwidth":
            reason = re.sub(r"\d[\d.e+-]*", "some", r.note)
            grouped.setdefault((r.operator, r.mode, reason), []).append(r)
    return [
        f"{operator}, {mode}: {times(min(r.ratio or 1.0 for r in found))} at worst, {len(found)} rows, {found[0].note}"
        for (operator, mode, _), found in grouped.items()
    ]


def noisy_lines(rows: Iterable[Row]) -> list[str]:
    return [
        f"{name(r)}: {times(r.ratio)} within {noise(r)}"
        + (f", beside {r.others:.1f} busy cores" if r.is_crowded else "")
        for r in left_out(rows)
    ]


def load_line(rows: Iterable[Row]) -> str:
    """What else the machine did while the rows were timed."""
    cores = [r.others for r in rows if r.others is not None]
    if not cores:
        return "how busy the machine was is not known"
    usual, most = statistics.median(cores), max(cores)
    busy = sum(c >= BUSY_CORES for c in cores)
    if not busy:
        return f"the machine was quiet: others kept at most {most:.2f} cores busy"
    said = "THE MACHINE WAS BUSY" if 10 * busy >= len(cores) else "the machine was busy at times"
    return f"{said}: while {busy} of {len(cores)} rows were timed others kept {BUSY_CORES} cores or more busy " + (
        f"(median {usual:.2f}, at most {most:.2f}); --threads can leave them theirs"
    )


def refused_lines(rows: Iterable[Row]) -> list[str]:
    """One line a reason, with the number of measurements that it cost."""
    counts: dict[tuple[str, str, str], list[Row]] = {}
    for r in rows:
        if r.status != "ok":
            counts.setdefault((r.contender, r.status, r.note), []).append(r)
    return [
        f"{contender} {status}: {note} ({name(members[0])}{f' and {len(members) - 1} more' if members[1:] else ''})"
        for (contender, status, note), members in counts.items()
    ]


def origin(rows: list[Row], created: str) -> str:
    r = rows[0]
    return (
        f"{r.machine} ({r.cpu_capability}), {r.device}, threads: {r.threads}, torch {r.torch}, "
        f"cnnkern {r.cnnkern}, commit {r.commit}, {created}"
    )


def bandwidth_line(rows: Iterable[Row]) -> str:
    measured = [r for r in rows if r.suite == "bandwidth"]
    if not measured:
        return "memory bandwidth not measured"
    largest = max(int(r.shape) for r in measured)
    speeds = ", ".join(f"{r.operator} {r.gb_s:.1f}" for r in measured if int(r.shape) == largest)
    return f"memory bandwidth over {largest // 2**20} MiB, GB/s: {speeds}"


def sections(rows: list[Row], details: bool) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, lines) of the tables that have lines."""
    tables = [
        ("Operators, every measurement", DETAILS, detail_lines(r for r in rows if r.suite == "operators")),
        ("Operators, geometric means over a network's shapes", MEANS, mean_lines(rows)),
        ("Models", *model_table(rows)),
        ("Call overhead, on a tensor of one kilobyte", OVERHEAD, overhead_lines(rows)),
    ]
    return [t for t in tables[0 if details else 1 :] if t[2]]


NUMBERS = {"median", "noise", "GB/s", "of bandwidth", "to eager", "to torch.compile", "images/s", "MiB"}
NUMBERS |= {"shapes", "eager", "ours", "rows", "within 10 %", "first run", "second run", "difference"}


def is_number(column: str) -> bool:
    return column in NUMBERS or column.split()[0] in ("training", "inference", "forward", "backward", "below")


def listings(rows: list[Row]) -> list[tuple[str, list[str]]]:
    """(title, lines) of what a report lists; lines may be none."""
    return [
        ("Slower than eager", lost_lines(rows)),
        ("Slower than torch.compile", lost_to_compile(rows)),
        ("torch.compile far slower than eager", slow_compiles(rows)),
        ("Left out for noise or others on the machine", noisy_lines(rows)),
        ("Not timed", refused_lines(rows)),
    ]


def markdown_table(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---:" if is_number(column) else "---" for column in header]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines])


def markdown(rows: list[Row], created: str) -> str:
    """Geometric means, models, a call's overhead, and the rows that we lose."""
    parts = [
        f"**{title}**\n\n{markdown_table(header, lines)}" for title, header, lines in sections(rows, details=False)
    ]
    for title, lines in listings(rows):
        if lines:
            parts.append(f"**{title}**\n\n" + "\n".join(f"- {line}" for line in lines))
    parts.append(
        "`to eager` is eager's time over the contender's in the same layout, the median over interleaved rounds: above "
        f"1 is faster.\nMeasured on {origin(rows, created)}; {bandwidth_line(rows)}; {load_line(rows)}."
    )
    return "\n\n".join(parts) + "\n"
