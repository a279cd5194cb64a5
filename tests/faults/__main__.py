"""`make faults`: plants every fault of this package, each in a copy of the tree, and expects its tests to turn red.

`python -m faults [--jobs N] [WORD ...]`: of all faults, those whose backend, operator or name contain every WORD. The
same tests are also asked of kernels without a fault: they have to be green, or their red would say nothing.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import cpu_kernels
import emulator

from faults import ROOT, Fault, all_faults
from tests.child import run_child

SECONDS = 900  # more than any of them takes on a busy machine
REPORTS = re.compile(r"(?:WARNING|ERROR): \w+Sanitizer: ([\w -]+?)(?= \(|\n| on )|runtime error: ([^\n]+)")


def tree_in(folder: Path) -> Path:
    """A copy of what the tests run on, with the extension as it is."""
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
    """What asks a fault's tests, and what there is in its environment."""
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


def asked(tree: Path, fault: Fault) -> str:
    """What notices it, by the tests' own words; nothing if all are green."""
    command, added = command_of(fault)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    added |= {"PYTHONPATH": f"{tree}:{tree / 'tests'}", "CCACHE_BASEDIR": str(tree), "CCACHE_NOHASHDIR": "1"}
    done = run_child(command, cwd=tree, env=kept | added, timeout=SECONDS)
    said = done.stdout + done.stderr
    if done.returncode == 0:
        if not re.search(r"\d+ passed", said):
            raise RuntimeError(f"no test was asked: {' '.join(fault.tests)}\n{said[-2000:]}")
        return ""
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.M)
    report = REPORTS.search(said)
    if "this does not build" in said or not (failed or report):
        raise RuntimeError(f"exit status {done.returncode} of {' '.join(command)}\n{said[-6000:]}")
    reported = f"{report[1] or report[2]}, says the sanitizer" if report else ""
    return "; ".join(part for part in (failed[0] if failed else "", reported) if part)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    chosen = [f for f in all_faults() if all(w in f"{f.backend} {f.operator} {f.name}" for w in options.words)]
    # Those that are built and asked alike go together: one is asked without the fault first.
    groups = defaultdict(list)
    for fault in chosen:
        groups[fault.backend, sources_of(fault), fault.tool, fault.tests].append(fault)
    green, broken, began = [], [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        trees: Queue[Path] = Queue()
        for i in range(options.jobs):
            trees.put(tree_in(Path(folder) / str(i)))

        def prove(faults: list[Fault]) -> None:
            tree = trees.get()
            try:
                if by := asked(tree, faults[0]):
                    raise RuntimeError(f"without a fault {' '.join(faults[0].tests)} are red: {by}")
                for fault in faults:
                    text = fault.plant(tree)
                    by = asked(tree, fault)
                    (tree / fault.path).write_text(text)
                    if not by:
                        green.append(fault)
                    what = f"{fault.backend:6}  {fault.operator:14}  {fault.name}"
                    print(f"[{time.monotonic() - began:4.0f} s] {'red  ' if by else 'GREEN'}  {what}: {by}", flush=True)
            finally:
                for fault in faults:
                    shutil.copy2(ROOT / fault.path, tree / fault.path)
                trees.put(tree)

        for faults, future in [(faults, pool.submit(prove, faults)) for faults in groups.values()]:
            try:
                future.result()
            except Exception as error:  # of one group: the others are asked all the same, and the run fails at its end
                broken.append(faults)
                print(f"BROKEN {faults[0].backend} {faults[0].operator} {faults[0].name}: {error}", flush=True)
    print(f"{len(chosen)} faults, {len(green)} green, {len(broken)} groups of tests that could not be asked")
    return int(bool(green or broken or not chosen))


if __name__ == "__main__":
    sys.exit(main())
