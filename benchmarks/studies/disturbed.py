"""Whether the summary holds on a busy machine: the same rows timed as the machine is, and beside a process that keeps a
core busy.

`python -m benchmarks.studies.disturbed [--seconds S] [--busy N] [--threads N] [--filter TEXT]` prints both means of
each operator, mode and layout, how many rows of each count, and how far the means are apart; it fails where a mean that
is not marked is off by more than 15 %. The busy processes are stress-ng's where that is installed, else Python's.
`--record FILE` keeps the rounds of both.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import cnnkern

from ..suite import load, machine, operators, rows, timing
from ..suite.groups import Refused, Session, select
from ..suite.options import Options

ALLOWED = 0.15  # of a mean, relative
FILTER = "bn_act resnet50,add_relu resnet50,bn_add_act resnet50,layer_norm2d convnext_tiny,grouped_conv2d mobilenet_v2"
SPIN = "while True: pass"

Records = list[dict[str, Any]]  # what was timed, with its rounds, as `rows.from_records` takes it


@contextmanager
def busy(processes: int) -> Iterator[None]:
    stress = shutil.which("stress-ng")
    command = [stress, "--quiet", "--cpu", "1"] if stress else [sys.executable, "-c", SPIN]
    started = [subprocess.Popen(command) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.terminate()
            process.wait()


def records(options: Options) -> Records:
    """The rounds of every contender that has any."""
    plan = select(operators.groups(options, compiled=False), options.filter, "tuned")
    session = Session(plan, options, lambda event: None)
    return [
        {"extra_info": group.identity(contender) | session.conditions[contender], "stats": {"data": samples}}
        for group in plan
        for contender, samples in session.results_of(group).items()
        if not isinstance(samples, Refused)
    ]


Means = dict[tuple[str, str, str], tuple[float | None, int, int]]  # operator, mode, layout -> mean, counted, timed


def means(found: Records, threads: int) -> Means:
    """Of cnnkern's rows that count."""
    where = machine.describe(Options(threads=threads))
    grouped: dict[tuple[str, str, str], list[rows.Row]] = {}
    for row in rows.from_records(found, [], [], "tuned", where):
        if row.contender == "cnnkern":
            grouped.setdefault((row.operator, row.mode, row.layout), []).append(row)
    result: Means = {}
    for key, timed in grouped.items():
        ratios = [r.ratio for r in timed if r.counts and r.ratio is not None]
        result[key] = (timing.geometric_mean(ratios) if ratios else None, len(ratios), len(timed))
    return result


def compare(quiet: Means, disturbed: Means) -> Iterator[tuple[list[str], bool]]:
    """(cells of a line, whether the mean holds or is marked) for everything that was timed in both."""
    for key in quiet.keys() & disturbed.keys():
        (before, *counts), (after, *others) = quiet[key], disturbed[key]
        shown = ["noisy" if mean is None else f"{mean:.2f}x" for mean in (before, after)]
        marked = rows.is_spoilt(*counts) or rows.is_spoilt(*others)
        off = None if before is None or after is None else after / before - 1
        verdict = "marked" if marked else "" if off is None else f"{off:+.0%}"
        cells = [*key, shown[0], "{} of {}".format(*counts), shown[1], "{} of {}".format(*others), verdict]
        yield cells, marked or (off is not None and abs(off) <= ALLOWED)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.disturbed", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="the time of each of the two runs (default: 60)")
    parser.add_argument(
        "--busy", type=int, default=1, help="the number of processes that keep a core busy (default: 1)"
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: PyTorch's choice)"
    )
    parser.add_argument("--filter", default=FILTER, help=f"the rows to time (default: {FILTER})")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the figures to FILE")
    arguments = parser.parse_args(argv)
    cnnkern.tune_malloc()
    torch.set_num_threads(arguments.threads)
    options = Options(quick=True, seconds=arguments.seconds, filter=arguments.filter, threads=arguments.threads)
    print(load.before_a_run())
    quiet = records(options)
    with busy(arguments.busy):
        print(load.before_a_run())
        disturbed = records(options)
    if arguments.record:
        arguments.record.write_text(json.dumps({"quiet": quiet, "disturbed": disturbed}))
    lines = sorted(compare(means(quiet, arguments.threads), means(disturbed, arguments.threads)))
    print("| operator | mode | layout | as it is | rows | beside a busy process | rows | apart |")
    print("|---|---|---|---:|---:|---:|---:|---:|")
    for cells, _ in lines:
        print(f"| {' | '.join(cells)} |")
    failed = sum(not holds for _, holds in lines)
    print(f"{len(lines) - failed} of {len(lines)} means are within {ALLOWED:.0%} or marked")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
