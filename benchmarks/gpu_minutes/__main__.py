"""What a few minutes on a GPU are spent on, in order of value: models in bfloat16, convolutions pass by pass, where a
step's time goes, norms, and models compiled.

`python -m benchmarks.gpu_minutes --minutes 12 --out DIR` writes a file after every section, so that a run that is cut
off counts. `--merge DIR ...` turns what came back into published results. `--prepare DIR` builds the package here for
the GPU machine's Python and torch, into a folder that is carried there: `PYTHONPATH=DIR/site python3 -m
cnnkern.benchmarks.gpu_minutes`. `--dry-run` goes through all of it on a CPU, on tiny shapes.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch

import cnnkern
from cnnkern.doctor import CORRECT

from ..suite import files, machine
from ..suite.options import Options
from . import merge, prepare
from .benches import DRY, FULL, Scale
from .sections import SECTIONS, Section

WRITING = 5.0  # seconds that are left for the last file and the way back


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_minutes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [section.name for section in SECTIONS]
    parser.add_argument("--minutes", type=float, default=12.0, help="the time for all sections (default: 12)")
    parser.add_argument(
        "--out", type=Path, default=files.RESULTS / "gpu_minutes", metavar="DIR", help="the folder to write to"
    )
    parser.add_argument(
        "--sections", nargs="+", choices=names, default=names, help="run only these sections (default: all)"
    )
    parser.add_argument("--dry-run", action="store_true", help="run tiny shapes on the CPU; the figures mean nothing")
    parser.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="publish the results in these folders, of a section the last ones, and measure nothing",
    )
    parser.add_argument(
        "--name", default="cuda-minutes", help="the beginning of the published results' names (default: cuda-minutes)"
    )
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="build for the GPU machine, and measure nothing")
    parser.add_argument("--torch", default=prepare.TORCH, help=f"torch of the GPU machine (default: {prepare.TORCH})")
    parser.add_argument(
        "--python", default=prepare.PYTHON, help=f"Python of the GPU machine (default: {prepare.PYTHON})"
    )
    parser.add_argument("--arch", default=prepare.ARCHITECTURE, help="architecture of the GPU (default: 9.0, Hopper)")
    arguments = parser.parse_args(argv)
    if not arguments.minutes > 0:
        parser.error(f"--minutes must be above zero, got {arguments.minutes}")
    measures = not (arguments.merge or arguments.prepare)
    if measures and not arguments.dry_run and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device on this machine; --dry-run needs none")
    return arguments


def measure(chosen: list[Section], scale: Scale, minutes: float, out: Path, dry_run: bool) -> int:
    """Every section within its share of the time, and a file of it; the number that failed."""
    end, failed = time.monotonic() + 60 * minutes - WRITING * (not dry_run), 0
    where = machine.describe(Options(device=scale.device))
    out.mkdir(parents=True, exist_ok=True)
    for i, section in enumerate(chosen):
        start = time.monotonic()
        share = (end - start) * section.seconds / sum(s.seconds for s in chosen[i:])
        if share <= 0:
            print(f"{section.name}: no time left", flush=True)
            continue
        content = {
            "schema": merge.SCHEMA,
            "section": section.name,
            "created": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "dry_run": dry_run,
            "where": where,
        }
        try:
            found = section.run(scale, share)
        except Exception as error:  # the sections behind it are worth their time all the same
            print(f"{section.name}: failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            failed += 1
            continue
        content |= asdict(found) | {"seconds": time.monotonic() - start}
        files.write(out / f"{section.name}.json", json.dumps(content))
        print(f"{section.name}: {content['seconds']:.0f} of {share:.0f} s, {counted(content)}", flush=True)
        if scale.device == "cuda":
            torch.cuda.empty_cache()
    return failed


def counted(content: dict) -> str:
    wrong = [f"{name}: {said}" for name, said in content["checks"].items() if said != CORRECT]
    parts = [f"{len(content['records'])} rows", f"{len(content['refused'])} not timed", *wrong]
    return ", ".join(parts)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        if arguments.merge:
            for path in merge.merge(arguments.merge, arguments.name):
                print(f"written: {path}")
            print("`python -m benchmarks.show.published` writes the documents' tables")
            return 0
        if arguments.prepare:
            return prepare.prepare(arguments.prepare, arguments.torch, arguments.python, arguments.arch)
        if not arguments.dry_run:
            cnnkern.backend("cuda")
        chosen = [section for section in SECTIONS if section.name in arguments.sections]
        scale = DRY if arguments.dry_run else FULL
        return int(measure(chosen, scale, arguments.minutes, arguments.out, arguments.dry_run) > 0)
    except (ValueError, OSError, prepare.Missing) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
