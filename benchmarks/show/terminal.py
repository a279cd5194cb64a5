"""A result, or what changed between two, on a terminal: tables that fit into 100 columns."""

import itertools
from collections.abc import Iterable, Iterator

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table

from ..suite.rows import Row
from . import means, remarks, tables
from .comparison import AGREEMENT, Agreement, Comparison
from .figures import MISSING, duration, name, times

WIDTH, DETAILS_WIDTH = 100, 240
NAMES = ("implementation", "model", "setting")  # columns that break between words only
RANKED = 5  # rows of the best and of the worst
LISTED = 10  # rows slower than eager, before the others are counted only


def console() -> Console:
    """At most 100 columns wide, whether it is a terminal, a pipe or a file."""
    found = Console()
    return Console(width=min(found.width, WIDTH) if found.is_terminal else WIDTH)


def show(rows: list[Row], created: str, console: Console, details: bool = False) -> None:
    """Prints means, the best and the worst rows, models and a call's overhead; with `details` each row as well."""
    if details:
        wide = Console(width=DETAILS_WIDTH, file=console.file)
        print_table(wide, "Every measurement", tables.DETAILS, tables.detail_lines(rows))
    console.print(remarks.load_line(rows), markup=False, highlight=False)
    for malloc in tables.settings(rows):
        header, lines = tables.summary(rows, malloc)
        if lines:
            title = f"Speedup over eager, and share of bandwidth: geometric means, {malloc} malloc"
            print_table(console, title, header, lines)
    for title, header, lines in tables.sections(rows, details=False):
        if title == "Models":
            for part in _narrow(header, lines):
                print_table(console, *part)
        elif not header[0].startswith("operator"):
            print_table(console, title, header, lines)
    ranked = means.ranked(rows)
    if len(ranked) > 2 * RANKED:
        print_table(console, "Best rows", ["what", "median", "vs eager"], map(_ranked, ranked[:RANKED]))
        print_table(console, "Worst rows", ["what", "median", "vs eager"], map(_ranked, ranked[-RANKED:]))
    for title, lines in remarks.listings(rows):
        print_list(console, title, lines, len(lines) if details else LISTED)
    for line in (remarks.bandwidth_line(rows), remarks.origin(rows, created), remarks.verdict(rows)):
        console.print(line, markup=False, highlight=False)


def _narrow(header: list[str], lines: list[list[str]]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(title, header, lines) of two tables: the models' table with one column for the model and one for its setting,
    and a table of the other implementations."""
    which = [[" ".join(line[:2]), " ".join(line[2:5])] for line in lines]
    measured = slice(5, len(header) - (header[-1] == tables.OTHERS))
    yield (
        "Models",
        ["model", "setting", *header[measured]],
        [w + line[measured] for w, line in zip(which, lines, strict=True)],
    )
    if header[-1] == tables.OTHERS:
        others = [[*w, line[-1]] for w, line in zip(which, lines, strict=True) if line[-1] != MISSING]
        yield "Models, other implementations", ["model", "setting", tables.OTHERS], others


def _ranked(r: Row) -> list[str]:
    return [name(r), duration(r.median_ms), times(r.ratio)]


def print_table(console: Console, title: str, header: list[str], lines: Iterable[list[str]]) -> None:
    lines = list(lines)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for column, cells in zip(header, zip(*lines, strict=True), strict=True):
        justify: JustifyMethod = "right" if tables.is_number(column) else "left"
        table.add_column(column, justify=justify, overflow="fold", width=_width(column, cells))
    for line in lines:
        table.add_row(*line, style="red" if line[-1].endswith("lost") else "")
    console.print(table)


def _width(column: str, cells: Iterable[str]) -> int | None:
    """The width at which numbers need no line break, and names break between words. None: any width."""
    words = column.split()
    if not tables.is_number(column):
        if column not in NAMES:
            return None
        cells = itertools.chain.from_iterable(cell.split() for cell in cells)
    return max(map(len, itertools.chain(words, cells)))


def print_list(console: Console, title: str, lines: list[str], most: int) -> None:
    if lines:
        console.print(f"{title}:", style="bold")
        for line in lines[:most] + [f"and {len(lines) - most} more, in the CSV file"] * (len(lines) > most):
            console.print(f"  {line}", markup=False, highlight=False)


CHANGES = ["what", "before", "now", "change", "noise"]


def show_changes(found: Comparison, console: Console) -> None:
    """Prints what has become slower and faster by more than its noise, and how the means moved."""
    for title, changes in (("Slower than before", found.slower), ("Faster than before", found.faster)):
        if changes:
            print_table(console, title, CHANGES, (c.line() for c in changes))
    moved = [[operator, mode, str(count), f"{factor - 1:+.1%}"] for operator, mode, count, factor in found.moved()]
    if moved:
        print_table(console, "Means of the changes", ["operator", "mode", "rows", "change"], moved)
    for line in [*found.broken, *found.notes, found.verdict()]:
        console.print(line, markup=False, highlight=False)


def show_agreement(found: Agreement, console: Console) -> None:
    """Prints the variation of two runs by operator, and the rows that differ most."""
    print_table(console, "Speedup over eager in two runs, geometric means", AGREEMENT, found.lines())
    print_list(console, "Furthest apart", found.worst_lines(), LISTED)
    console.print(found.verdict(), markup=False, highlight=False)
