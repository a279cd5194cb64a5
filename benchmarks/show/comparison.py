"""Rows that became faster or slower between two results by more than their noise; and the run-to-run variation of two
runs of the same code.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..suite.rows import Row
from ..suite.timing import geometric_mean
from .figures import name, times

# Two runs of the same code differ by about this much even if their rounds hardly spread.
LEAST_NOISE = 0.05
# Columns that are equal in two rows of the same measurement.
SAME = (
    *("suite", "operator", "network", "shape", "mode", "api", "layout", "malloc", "contender"),
    *("dtype", "device", "threads"),
)
CONDITIONS = ("machine", "cpu_capability", "torch")  # a difference in these is reported


@dataclass(frozen=True)
class Change:
    """cnnkern's speedup over eager in two runs. The ratio, not the time: both contenders share the run's conditions."""

    old: Row
    new: Row
    noise: float  # relative; infinite where it is not known of one of the runs

    @property
    def factor(self) -> float:
        """Above 1: faster than before, compared with eager in the same run."""
        assert self.old.ratio is not None
        assert self.new.ratio is not None
        return self.new.ratio / self.old.ratio

    @property
    def slower(self) -> bool:
        return self.factor < 1 / (1 + self.noise)

    @property
    def faster(self) -> bool:
        return self.factor > 1 + self.noise

    def line(self) -> list[str]:
        change, noise = f"{self.factor - 1:+.0%}", "unknown" if math.isinf(self.noise) else f"{self.noise:.0%}"
        return [name(self.new), times(self.old.ratio), times(self.new.ratio), change, noise]


@dataclass(frozen=True)
class Comparison:
    changes: tuple[Change, ...]
    broken: tuple[str, ...]  # a line per row of cnnkern that had a time, and now is wrong or failed
    notes: tuple[str, ...]  # what the two runs do not share

    @property
    def slower(self) -> list[Change]:
        return sorted((c for c in self.changes if c.slower), key=lambda c: c.factor)

    @property
    def faster(self) -> list[Change]:
        return sorted((c for c in self.changes if c.faster), key=lambda c: -c.factor)

    @property
    def is_regression(self) -> bool:
        return bool(self.slower or self.broken)

    def moved(self) -> Iterator[tuple[str, str, int, float]]:
        """(operator, mode, rows, geometric mean of the factors). It shows small shifts of many rows."""
        grouped: dict[tuple[str, str], list[float]] = {}
        for c in self.changes:
            grouped.setdefault((c.new.operator, c.new.mode), []).append(c.factor)
        for (operator, mode), factors in grouped.items():
            yield operator, mode, len(factors), geometric_mean(factors)

    def verdict(self) -> str:
        same = len(self.changes) - len(self.slower) - len(self.faster)
        return (
            f"rows compared by their speedup over eager: {len(self.slower)} slower, {len(self.faster)} faster, "
            f"{same} within the noise of their rounds (at least {LEAST_NOISE:.0%})"
        )


def compare(old: list[Row], new: list[Row]) -> Comparison:
    """cnnkern's rows in `new` beside the same measurements in `old`. Raises ValueError if they share none."""
    before, now = _by_key(old), _by_key(new)
    shared = [key for key, row in now.items() if row.contender == "cnnkern" and key in before]
    timed = [key for key in shared if before[key].ratio is not None and now[key].ratio is not None]
    broken = [
        f"{name(now[key])}: {now[key].status}, had {times(before[key].ratio)}: {now[key].note}"
        for key in shared
        if before[key].ratio is not None and now[key].status in ("wrong", "failed")
    ]
    if not timed and not broken:
        raise ValueError("no measurement of cnnkern is in both")
    changes = [Change(before[key], now[key], _noise(before[key], now[key])) for key in timed]
    return Comparison(tuple(changes), tuple(broken), tuple(_notes(old, new, len(timed))))


Key = tuple[object, ...]


def _by_key(rows: Iterable[Row]) -> dict[Key, Row]:
    return {tuple(getattr(r, n) for n in SAME): r for r in rows if r.suite != "bandwidth"}


def _noise(*rows: Row) -> float:
    """The noise of both runs' ratios, as independent errors; infinite if one is not known."""
    if any(r.noise is None for r in rows):
        return math.inf
    return max(LEAST_NOISE, math.hypot(*(r.noise or 0.0 for r in rows)))


def _notes(old: list[Row], new: list[Row], shared: int) -> Iterator[str]:
    for column in CONDITIONS:
        values = [", ".join(sorted({str(getattr(r, column)) for r in rows})) for rows in (old, new)]
        if values[0] != values[1]:
            yield f"not the same {column.replace('_', ' ')}: {values[0]} before, {values[1]} now"
    for rows, where in ((old, "before"), (new, "now")):
        alone = sum(r.contender == "cnnkern" and r.ratio is not None for r in rows) - shared
        if alone:
            yield f"rows timed {where} only: {alone}"


AGREED = 0.10  # relative difference of the ratios up to which two runs agree on a row
FURTHEST = 5  # rows that are named
AGREEMENT = ["operator", "mode", "rows", "within 10 %", "first run", "second run", "difference"]


@dataclass(frozen=True)
class Agreement:
    """Speedup over eager in two runs of the same code, of rows that count in both."""

    pairs: tuple[tuple[Row, Row], ...]

    @staticmethod
    def difference(pair: tuple[Row, Row]) -> float:
        """Relative, of the larger ratio to the smaller one."""
        first, second = (r.ratio or 0.0 for r in pair)
        return max(first, second) / min(first, second) - 1

    def share(self, pairs: Iterable[tuple[Row, Row]]) -> float:
        agreed = [self.difference(pair) <= AGREED for pair in pairs]
        return sum(agreed) / len(agreed)

    def lines(self) -> Iterator[list[str]]:
        """A line per operator and mode: the share of rows that agree, and the geometric means in both runs."""
        grouped: dict[tuple[str, str], list[tuple[Row, Row]]] = {}
        for pair in self.pairs:
            grouped.setdefault((pair[0].operator, pair[0].mode), []).append(pair)
        for (operator, mode), pairs in grouped.items():
            means = [geometric_mean([pair[i].ratio or 0.0 for pair in pairs]) for i in range(2)]
            moved = f"{means[1] / means[0] - 1:+.1%}"
            yield [operator, mode, str(len(pairs)), f"{self.share(pairs):.0%}", *map(times, means), moved]

    def worst_lines(self) -> list[str]:
        furthest = sorted(self.pairs, key=self.difference, reverse=True)[:FURTHEST]
        return [f"{name(a)}: {times(a.ratio)} and {times(b.ratio)}" for a, b in furthest]

    def verdict(self) -> str:
        count = sum(self.difference(pair) <= AGREED for pair in self.pairs)
        return (
            f"Speedups over eager in two runs agree within {AGREED:.0%} in {count} of {len(self.pairs)} rows "
            f"({self.share(self.pairs):.0%})"
        )


def agreement(first: list[Row], second: list[Row]) -> Agreement:
    """cnnkern's rows that have a ratio in both. Raises ValueError where there are none."""
    one, other = _by_key(first), _by_key(second)
    pairs = tuple(
        (row, other[key])
        for key, row in one.items()
        if row.contender == "cnnkern" and row.counts and key in other and other[key].counts
    )
    if not pairs:
        raise ValueError("no measurement of cnnkern is in both")
    return Agreement(pairs)
