"""Tables of a result.

`python -m benchmarks.report FILE` shows a saved one, and with --markdown prints what the README shows.
"""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.rows import Row, from_json
from benchmarks.timing import geometric_mean

MISSING = "-"


@dataclass(frozen=True)
class Mean:
    """The geometric mean of one contender's ratios to eager, over the shapes of a network."""

    operator: str
    network: str
    mode: str
    layout: str
    malloc: str
    contender: str
    shapes: int
    ratio: float
    bandwidth_share: float | None


def means(rows: Iterable[Row]) -> list[Mean]:
    grouped: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.suite == "operators" and row.status == "ok":
            key = (row.operator, row.network, row.mode, row.layout, row.malloc, row.contender)
            grouped.setdefault(key, []).append(row)
    found = []
    for key, members in grouped.items():
        shares = [r.bandwidth_share for r in members if r.bandwidth_share is not None]
        ratio = geometric_mean([r.ratio for r in members])
        found.append(Mean(*key, len(members), ratio, geometric_mean(shares) if shares else None))
    return found


def duration(ms: float | None) -> str:
    if ms is None:
        return MISSING
    return f"{ms * 1e3:.2f} us" if ms < 0.1 else f"{ms:.2f} ms" if ms < 1 else f"{ms:.1f} ms"


def times(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}x"


def percent(value: float | None) -> str:
    return MISSING if value is None else f"{value:.0%}"


def name(row: Row) -> str:
    parts = [row.operator, row.network, row.shape, row.mode, row.api, row.layout, f"{row.malloc} malloc"]
    return " ".join(dict.fromkeys(p for p in parts if p != "none"))


def detail_lines(rows: Iterable[Row]) -> list[list[str]]:
    """One line for each measured row, eager included."""
    lines = []
    for r in rows:
        if r.suite != "bandwidth" and r.status == "ok":
            what = [r.operator, r.network, r.shape, r.mode, r.api, r.layout, r.malloc, r.contender]
            gb_s = MISSING if r.gb_s is None else f"{r.gb_s:.1f}"
            lines.append(
                what + [duration(r.median_ms), gb_s, percent(r.bandwidth_share), times(r.ratio) + " lost" * r.lost]
            )
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
    "GB/s",
    "of bandwidth",
    "to eager",
]
MEANS = ["operator", "network", "shapes", "mode", "layout", "malloc", "contender", "of bandwidth", "to eager"]
MODELS = ["model", "input", "mode", "layout", "malloc", "eager", "ours", "to eager"]
OVERHEAD = ["call", "mode", "eager", "ours", "to eager"]


def mean_lines(rows: Iterable[Row]) -> list[list[str]]:
    return [
        [m.operator, m.network, str(m.shapes), m.mode, m.layout, m.malloc, m.contender]
        + [percent(m.bandwidth_share), times(m.ratio)]
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


def model_lines(rows: Iterable[Row]) -> list[list[str]]:
    return [
        [r.operator, r.shape, r.mode, r.layout, r.malloc, duration(e.median_ms), duration(r.median_ms), times(r.ratio)]
        for e, r in against_eager(rows, "models")
    ]


def overhead_lines(rows: Iterable[Row]) -> list[list[str]]:
    return [
        [f"{r.operator} {r.shape}, {r.api}", r.mode, duration(e.median_ms), duration(r.median_ms), times(r.ratio)]
        for e, r in against_eager(rows, "overhead")
    ]


def lost_lines(rows: Iterable[Row]) -> list[str]:
    return [f"{name(r)}: {duration(r.median_ms)}, {times(r.ratio)} of eager's speed" for r in rows if r.lost]


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
        ("Models", MODELS, model_lines(rows)),
        ("A call on a kilobyte", OVERHEAD, overhead_lines(rows)),
    ]
    return [t for t in tables[0 if details else 1 :] if t[2]]


def show(rows: list[Row], created: str, console: Console) -> None:
    for title, header, lines in sections(rows, details=True):
        table = Table(title=title, title_justify="left")
        for i, column in enumerate(header):
            table.add_column(column, justify="right" if column in NUMBERS else "left", no_wrap=i > 0)
        for line in lines:
            table.add_row(*line, style="red" if line[-1].endswith("lost") else "")
        console.print(table)
    print_list = [("Slower than eager", lost_lines(rows)), ("Not timed", refused_lines(rows))]
    for title, lines in print_list:
        if lines:
            console.print(f"{title}:", style="bold")
            for line in lines:
                console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    console.print(bandwidth_line(rows), highlight=False, soft_wrap=True)
    console.print(origin(rows, created), markup=False, highlight=False, soft_wrap=True)


NUMBERS = {"median", "GB/s", "of bandwidth", "to eager", "shapes", "eager", "ours"}


def markdown(rows: list[Row], created: str) -> str:
    """What the README shows: geometric means, models, a call's overhead, and the rows that we lose."""
    parts = []
    for title, header, lines in sections(rows, details=False):
        rule = ["---:" if column in NUMBERS else "---" for column in header]
        table = "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines])
        parts.append(f"**{title}**\n\n{table}")
    for title, lines in (("Slower than eager", lost_lines(rows)), ("Not timed", refused_lines(rows))):
        if lines:
            parts.append(f"**{title}**\n\n" + "\n".join(f"- {line}" for line in lines))
    parts.append(
        "`to eager` is eager's time over the contender's in the same layout, rounds interleaved, medians: above 1 is "
        f"faster.\nMeasured on {origin(rows, created)}; {bandwidth_line(rows)}."
    )
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("file", type=Path, help="JSON that the benchmarks wrote")
    parser.add_argument("--markdown", action="store_true", help="the README's tables, without single measurements")
    arguments = parser.parse_args(argv)
    try:
        rows, rest = from_json(arguments.file.read_text())
        if not rows:
            raise ValueError("no rows")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        print(f"benchmarks: cannot read {arguments.file}: {reason}", file=sys.stderr)
        return 1
    if arguments.markdown:
        print(markdown(rows, rest["created"]), end="")
    else:
        show(rows, rest["created"], console())
    return 0


def console() -> Console:
    """A terminal of its own width; elsewhere wide enough that no cell is cut."""
    found = Console()
    return found if found.is_terminal else Console(width=200)


if __name__ == "__main__":
    sys.exit(main())
