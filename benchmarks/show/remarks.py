"""The sentences and lists of a report: the machine, slower rows, rows that are left out, the verdict."""

import re
import statistics
from collections.abc import Callable, Iterable

from ..suite.groups import CONVERTED_AND_COMPILED
from ..suite.load import BUSY_CORES
from ..suite.rows import Row
from ..suite.timing import geometric_mean
from .figures import duration, name, noise, times
from .means import left_out, ranked


def verdict(rows: list[Row]) -> str:
    found, noisy = ranked(rows), left_out(rows)
    if not found:
        spoilt = f"none of the {len(noisy)} rows is clear of noise and of others on the machine"
        return spoilt if noisy else "cnnkern was not timed"

    def by_suite(ratio: Callable[[Row], float | None]) -> str:
        parts = []
        for suite in dict.fromkeys(r.suite for r in rows):
            ratios = [value for r in found if r.suite == suite and (value := ratio(r)) is not None]
            if ratios:
                parts.append(f"{suite} {times(geometric_mean(ratios))}")
        return ", ".join(parts)

    to_compile = by_suite(lambda r: r.ratio_to_compile)
    return (
        f"geometric means over eager, all rows that count: {by_suite(lambda r: r.ratio)}; "
        f"faster than eager in {sum(not r.lost for r in found)} of {len(found)} rows"
        + (f"; vs torch.compile: {to_compile}" if to_compile else "")
        + f"; left out for noise or others on the machine: {len(noisy)} rows"
    )


def lost_lines(rows: Iterable[Row]) -> list[str]:
    return [f"{name(r)}: {duration(r.median_ms)}, {times(r.ratio)}" for r in rows if r.lost]


def lost_to_compile(rows: Iterable[Row]) -> list[str]:
    """cnnkern's rows, and converted models compiled, that torch.compile of the reference is faster than."""
    return [
        f"{name(r)}{'' if r.contender == 'cnnkern' else f', {r.contender}'}: "
        f"{duration(r.median_ms)}, {times(r.ratio_to_compile)} vs torch.compile"
        for r in rows
        if r.contender in ("cnnkern", CONVERTED_AND_COMPILED) and r.counts and (r.ratio_to_compile or 1.0) < 1
    ]


def slow_compiles(rows: Iterable[Row]) -> list[str]:
    """Rows of torch.compile that are far slower than eager, and why: a line per reason and operator."""
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
    """Other load of the machine while the rows were timed."""
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
    """One line per reason, with the number of measurements that it cost."""
    counts: dict[tuple[str, str, str], list[Row]] = {}
    for r in rows:
        if r.status != "ok":
            counts.setdefault((r.contender, r.status, r.note), []).append(r)
    return [
        f"{contender} {status}: {note} ({name(members[0])}{f' and {len(members) - 1} more' if members[1:] else ''})"
        for (contender, status, note), members in counts.items()
    ]


def origin(rows: list[Row], created: str) -> str:
    r, commits = rows[0], dict.fromkeys(r.commit for r in rows if r.suite != "bandwidth" or r is rows[0])
    return (
        f"{r.machine} ({r.cpu_capability}), {r.device}, threads: {r.threads}, torch {r.torch}, "
        f"cnnkern {r.cnnkern}, commit{'s' * (len(commits) > 1)} {', '.join(commits)}, {created}"
    )


def bandwidth_line(rows: Iterable[Row]) -> str:
    measured = [r for r in rows if r.suite == "bandwidth"]
    if not measured:
        return "memory bandwidth not measured"
    largest = max(int(r.shape) for r in measured)
    speeds = ", ".join(f"{r.operator} {r.gb_s:.1f}" for r in measured if int(r.shape) == largest)
    return f"memory bandwidth over {largest // 2**20} MiB, GB/s: {speeds}"


def listings(rows: list[Row]) -> list[tuple[str, list[str]]]:
    """(title, lines) of a report's lists, which may be empty."""
    return [
        ("Slower than eager", lost_lines(rows)),
        ("Slower than torch.compile", lost_to_compile(rows)),
        ("torch.compile far slower than eager", slow_compiles(rows)),
        ("Left out for noise or others on the machine", noisy_lines(rows)),
        ("Not timed", refused_lines(rows)),
    ]
