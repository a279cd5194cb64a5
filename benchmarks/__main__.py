"""The benchmark suite: `cnnkern bench` without a model, also `python -m benchmarks`.

Times cnnkern's operators and converted networks against eager PyTorch and torch.compile, on a CPU with tuned malloc
and with malloc's defaults.
Prints tables, and writes a file of rows and report.html. With --compare it fails if a row of cnnkern has become slower
than in an earlier run by more than the noise of both.
"""

import argparse
import re
import sys
import tempfile
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import torch

from .show import comparison, page, report, terminal
from .suite import files, load, machine, rows, worker
from .suite.options import Options
from .suite.plan import make_plan

# Seconds for everything. The group that is running at the end is finished: up to three rounds of a large model.
FULL_SECONDS, QUICK_SECONDS = 330.0, 50.0
FIRST_SHARE = 0.6  # of them for the first of two settings, which has torch.compile and checks all results
START_SECONDS = 6.0  # until a worker has imported torch and starts to time


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        if message.startswith("unrecognized arguments"):
            message += "; the options of `cnnkern bench --help` need a MODEL, those of the suite are in --quick --help"
        self.exit(2, f"benchmarks: {message}\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    def count(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= 1024:
            raise argparse.ArgumentTypeError(f"needs a number from 1 to 1024, got {text!r}")
        return int(text)

    def file_name(text: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", text):
            raise argparse.ArgumentTypeError(f"needs letters, digits and . _ + -, got {text!r}")
        return text

    def seconds(text: str) -> float:
        value = float(text)
        if not 0 <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be a number and not below zero, got {text}")
        return value

    parser = Parser(prog="cnnkern bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="time few shapes and one model, in about a minute")
    parser.add_argument(
        "--filter",
        default="",
        metavar="TEXT[,TEXT]",
        help="time only rows with TEXT, or one of several texts, in their name: operator, shape, network, ... "
        "(default: all)",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="the device to time (default: cpu)")
    parser.add_argument(
        "--backend", default="cuda", choices=("cuda", "triton"), help="the kernels to time on a GPU (default: cuda)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=files.RESULTS,
        metavar="FOLDER",
        help="the folder to write results to (default: benchmarks/results of a checkout, else ./cnnkern-bench)",
    )
    parser.add_argument(
        "--save", type=file_name, metavar="NAME", help="write the rows to published/NAME.csv in that folder"
    )
    threads = torch.get_num_threads()
    parser.add_argument(
        "--threads", type=count, default=threads, metavar="N", help=f"the number of CPU threads (default: {threads})"
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16", "float64"),
        help="the dtype of the operators' rows; with bfloat16 models train under autocast, else in float32 "
        "(default: float32)",
    )
    parser.add_argument(
        "--networks",
        default="resnet50",
        choices=("resnet50", "all"),
        help="the networks whose shapes are timed (default: resnet50)",
    )
    usual = f"{FULL_SECONDS:.0f}, or {QUICK_SECONDS:.0f} with --quick"
    parser.add_argument(
        "--seconds",
        type=seconds,
        metavar="N",
        help=f"stop after this time and report the remaining rows as not timed (default: {usual})",
    )
    parser.add_argument(
        "--compile-seconds",
        type=seconds,
        default=60.0,
        metavar="N",
        help="the part of that time that torch.compile may take (default: 60)",
    )
    parser.add_argument(
        "--compile-shapes",
        default="one",
        choices=("one", "all"),
        help="the shapes per network that torch.compile is timed on (default: one)",
    )
    parser.add_argument(
        "--max-autotune",
        action="store_true",
        help="also time torch.compile in mode max-autotune, which may take minutes per shape (see --compile-seconds)",
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="time other packages too, if they are installed. On a CPU: only inference of three models, of nine with "
        "--networks all, with onnxruntime, OpenVINO, zentorch, and torch.compile in mode max-autotune. On a GPU: only "
        "operators, with Liger-Kernel, FlagGems, quack, spio, apex and inplace_abn",
    )
    parser.add_argument(
        "--modes",
        default="usual",
        choices=("usual", "all"),
        help="usual: training and inference of operators; all: also the forward and the backward pass of a training "
        "step alone (default: usual)",
    )
    parser.add_argument(
        "--compare", type=Path, metavar="OLD.csv", help="print what is faster or slower than in that run"
    )
    parser.add_argument(
        "--agree",
        type=Path,
        nargs=2,
        metavar=("A.csv", "B.csv"),
        help="measure nothing; print the run-to-run variation of two runs of the same code",
    )
    arguments = parser.parse_args(argv)
    arguments.before = []
    if arguments.compare:
        try:
            arguments.before = files.load(arguments.compare).rows
        except ValueError as error:
            parser.error(f"--compare: {error}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device on this machine")
    return arguments


def one_line(message: str) -> int:
    print(f"benchmarks: {message}", file=sys.stderr)
    return 1


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.agree:
        return report.agree(*arguments.agree)
    options = Options(
        *(arguments.quick, arguments.filter, arguments.device, arguments.backend),
        *(arguments.threads, arguments.dtype, arguments.networks),
        compile_seconds=arguments.compile_seconds,
        compile_shapes=arguments.compile_shapes,
        max_autotune=arguments.max_autotune,
        modes=arguments.modes,
        peers=arguments.peers,
    )
    seconds = arguments.seconds
    if seconds is None:
        seconds = QUICK_SECONDS if options.quick else FULL_SECONDS
    settings = [setting for setting in machine.malloc_settings(options.device) if make_plan(options, setting)]
    if not settings:
        print(f"benchmarks: no row has {options.filter!r} in its name", file=sys.stderr)
        return 2
    folder = arguments.out / "published" if arguments.save else arguments.out
    try:
        folder.mkdir(parents=True, exist_ok=True)
        terminal.console().print(load.before_a_run(), markup=False, highlight=False)
        with tempfile.TemporaryDirectory(prefix="cnnkern-bench-") as scratch:
            measured, problems = run(options, settings, Path(scratch), seconds)
    except OSError as error:
        return one_line(f"cannot write: {error}")
    except KeyboardInterrupt:
        one_line("interrupted, nothing written")
        return 130
    created = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    if measured:
        changes = None
        if arguments.before:
            try:
                changes = comparison.compare(arguments.before, measured)
            except ValueError as error:
                problems.append(f"cannot compare with {arguments.compare}: {error}")
        problems += write(measured, created, arguments.out, arguments.save, options.quick, changes)
        terminal.show(measured, created, terminal.console())
        if changes:
            terminal.show_changes(changes, terminal.console())
            if changes.is_regression:
                problems.append(f"slower than {arguments.compare}, by more than the noise")
    for problem in problems:
        one_line(problem)
    failed = any(r.status in ("wrong", "failed") for r in measured)
    return int(bool(problems) or failed)


def run(options: Options, settings: list[str], scratch: Path, seconds: float) -> tuple[list[rows.Row], list[str]]:
    """Rows of every malloc setting, and a line for each worker that ended before its time."""
    end = time.monotonic() + seconds
    where = machine.describe(options)
    measured: list[rows.Row] = []
    problems: list[str] = []
    verified: tuple[str, ...] = ()
    with worker.progress(terminal.console()) as bar:
        try:
            bandwidths = worker.bandwidths(options.device, options.threads, bar)
        except worker.Failed as error:  # times and ratios do not need it
            problems.append(str(error))
            bandwidths = []
        for setting in settings:
            share = 1.0 if setting == settings[-1] else FIRST_SHARE
            left = max(0.0, (end - time.monotonic()) * share - START_SECONDS)
            try:
                result = worker.run(replace(options, seconds=left, verified=verified), setting, scratch, bar)
            except worker.Failed as error:
                problems.append(str(error))
                continue
            verified += result.verified
            measured += rows.from_records(result.records, result.refused, bandwidths, setting, where)
    if measured:
        measured += rows.bandwidth_rows(bandwidths, where)
    return measured, problems


def write(
    measured: list[rows.Row],
    created: str,
    results: Path,
    name: str | None,
    quick: bool,
    changes: comparison.Comparison | None = None,
) -> list[str]:
    """Writes the file of rows and the page to `results`. Returns a line per file that could not be written."""
    stem, page_file = name or files.file_stem(measured, quick), results / "report.html"
    path = (results / "published" if name else results) / f"{stem}{files.ENDING}"
    try:
        files.write(path, files.dumps(files.Run(measured, created, quick)))
        files.write(page_file, page.render(measured, created, changes))
    except OSError as error:
        return [f"cannot write the results to {path.parent}: {error.strerror or error}"]
    print(f"written: {path}; {page_file}")
    return []


if __name__ == "__main__":
    sys.exit(main())
