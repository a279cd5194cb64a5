"""`make faults`: mutation tests. Each inserts a bug (a fault) into a copy of the source tree; its tests have to fail.

`python -m faults [--jobs N] [WORD ...]` runs those whose backend, operator or name contain every WORD. The same tests
also run without the bug, and have to pass. The output is also written to build/faults.log.
"""

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import cpu_kernels
import emulator

from faults import ROOT, Fault, all_faults
from tests.child import run_child

LOG = ROOT / "build" / "faults.log"
SECONDS = 900  # more than any of them takes on a busy machine
REPORTS = re.compile(r"(?:WARNING|ERROR): \w+Sanitizer: ([\w -]+?)(?= \(|\n| on )|runtime error: ([^\n]+)")


def tree_in(folder: Path) -> Path:
    """A copy of the source tree, with the built extension."""
    tree = folder / "tree"
    left = shutil.ignore_patterns(".*", "build", "dist", "results", "docs", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(ROOT, tree, ignore=left)
    for path in (ROOT / "cnnkern").glob("*.so"):
        shutil.copy2(path, tree / "cnnkern" / path.name)
    for name in ("triton_kernels", "csrc"):  # parts of the package, which would be looked for where it is installed
        (tree / "cnnkern" / name).symlink_to(tree / name)
    return tree


def sources_of(fault: Fault) -> str:
    """The files that are compiled: of the operator, and of the layer norms both, as one calls the other."""
    return "layer_norm*" if fault.operator.startswith("layer_norm") else fault.operator


def command_of(fault: Fault) -> tuple[list[str], dict[str, str]]:
    """The command that runs a fault's tests, and its environment variables."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-s",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        *fault.tests,
    ]
    added = {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "2", "CI": "1"}
    if fault.backend == "cpu":
        command += ["--cpu-tool", fault.tool]
        added |= cpu_kernels.environment(fault.tool)
    elif fault.backend == "cuda":
        command += ["--device", "emulator", "--emulator-tool", fault.tool]
        added |= emulator.environment(fault.tool)
    if fault.backend != "triton":
        added["CNNKERN_KERNELS_OF"] = sources_of(fault)
    return command, added


def failure(tree: Path, fault: Fault) -> str:
    """Runs a fault's tests in the tree. Returns which one fails, or what a sanitizer reports; nothing if all pass."""
    command, added = command_of(fault)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    added |= {"PYTHONPATH": f"{tree}:{tree / 'tests'}", "CCACHE_BASEDIR": str(tree), "CCACHE_NOHASHDIR": "1"}
    done = run_child(command, cwd=tree, env=kept | added, timeout=SECONDS)
    said = done.stdout + done.stderr
    if done.returncode == 0:
        if not re.search(r"\d+ passed", said):
            raise RuntimeError(f"no test ran: {' '.join(fault.tests)}\n{said[-2000:]}")
        return ""
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.M)
    report = REPORTS.search(said)
    if "this does not build" in said or not (failed or report or done.returncode < 0):
        raise RuntimeError(f"exit status {done.returncode} of {' '.join(command)}\n{said[-6000:]}")
    reported = f"{report[1] or report[2]}, says the sanitizer" if report else ""
    # The C library aborts if a kernel corrupted the heap; the system ends a process after an invalid access.
    ended = f"ended by {signal.Signals(-done.returncode).name}" if done.returncode < 0 else ""
    return "; ".join(part for part in (*failed[:1], reported, ended) if part)


def outcome(tree: Path, fault: Fault) -> tuple[str, str]:
    """found, NOT FOUND or BROKEN, with the fault in the tree, and the reason."""
    text = fault.plant(tree)
    try:
        by = failure(tree, fault)
    except Exception as error:  # the other faults still run, and the whole run fails at its end
        return "BROKEN", str(error)
    finally:
        (tree / fault.path).write_text(text)
    return ("found", by) if by else ("NOT FOUND", "all its tests pass")


def outcomes(tree: Path, faults: list[Fault]) -> Iterator[tuple[Fault, str, str]]:
    """Outcomes of faults with the same sources and tests: these run without a fault first."""
    try:
        by = failure(tree, faults[0])
        unsound = by and f"without a fault {' '.join(faults[0].tests)} fail: {by}"
    except Exception as error:  # as above
        unsound = str(error)
    for fault in faults:
        yield fault, *(("BROKEN", unsound) if unsound else outcome(tree, fault))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    chosen = [f for f in all_faults() if all(w in f"{f.backend} {f.operator} {f.name}" for w in options.words)]
    groups = defaultdict(list)
    for fault in chosen:
        groups[fault.backend, sources_of(fault), fault.tool, fault.tests].append(fault)
    count: Counter[str] = Counter()
    began = time.monotonic()
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("w") as log, tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        trees: Queue[Path] = Queue()
        for i in range(options.jobs):
            trees.put(tree_in(Path(folder) / str(i)))

        def say(line: str) -> None:
            for stream in (sys.stdout, log):
                print(line, file=stream, flush=True)

        def prove(faults: list[Fault]) -> None:
            tree = trees.get()
            for fault, how, why in outcomes(tree, faults):
                count[how] += 1
                what = f"{fault.backend:6}  {fault.operator:14}  {fault.name}"
                say(f"[{time.monotonic() - began:4.0f} s] {how:9}  {what}: {why}")
            trees.put(tree)

        list(pool.map(prove, groups.values()))
        minutes = (time.monotonic() - began) / 60
        left = f"{count['NOT FOUND']} not found, {count['BROKEN']} that could not be tested"
        say(f"{count['found']} of {len(chosen)} found, {left}, in {minutes:.0f} minutes")
    return int(not chosen or count["found"] < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
