"""Worker processes: pytest over the suites under one malloc setting, and the bandwidth measurement."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import bandwidth
from .bandwidth import Bandwidth
from .machine import malloc_environment
from .options import Options
from .place import NAME, PACKAGE, ROOT

PYTEST_FAILED_TESTS = 1


class Failed(Exception):
    """A worker ended without results; the message is one line."""


@dataclass(frozen=True)
class Result:
    records: list[dict[str, Any]]  # as pytest-benchmark writes them
    refused: list[dict[str, Any]]  # identities of contenders without times, with status and note
    verified: tuple[str, ...]  # contenders that have passed the comparison with eager


@contextmanager
def progress(console: Console) -> Iterator[Progress]:
    """A progress bar with the current group and the remaining time; nothing without a terminal."""
    columns = (BarColumn(30), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield bar


def bandwidths(device: str, threads: int, bar: Progress) -> list[Bandwidth]:
    task = bar.add_task("memory bandwidth", total=None)
    environment = malloc_environment("tuned") | {"GLIBC_TUNABLES": bandwidth.STREAMING}
    command = [sys.executable, "-m", f"{NAME}.suite.bandwidth", "--device", device, "--threads", str(threads)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    bar.remove_task(task)
    if done.returncode:
        raise Failed(f"the bandwidth measurement {ending(done.returncode, done.stderr)}")
    return [Bandwidth(**b) for b in json.loads(done.stdout)]


def run(options: Options, malloc: str, scratch: Path, bar: Progress) -> Result:
    """Times the plan in a process with this malloc setting. Raises Failed if that process ends without results."""
    asked, written, log = (scratch / f"{malloc}.{kind}" for kind in ("options", "json", "log"))
    options.save(asked)
    receive, send = os.pipe()
    command = [sys.executable, "-m", "pytest", str(PACKAGE / "suite" / "test_suites.py"), "-q"]
    # The same in a checkout and for an installed package: no one's configuration, and no folder before the library's.
    command += ["-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={PACKAGE}", "--import-mode=append"]
    command += [f"--bench-options={asked}", f"--bench-events={send}", f"--benchmark-json={written}"]
    # A pool of compiler processes would run beside the measurements.
    environment = malloc_environment(malloc) | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    task, current = bar.add_task(f"{malloc} malloc", total=None), "starting"
    refused, verified = [], []
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, pass_fds=[send]
        )
        os.close(send)
        try:
            with os.fdopen(receive) as events:
                for event in map(json.loads, events):
                    if "start" in event:
                        current = event["start"]
                        bar.update(task, description=f"{malloc} malloc: {current}", **counts(event))
                    elif "refused" in event:
                        refused.append(event["refused"])
                    elif "verified" in event:
                        verified.append(event["verified"])
            process.wait()
        finally:
            process.kill()  # an interrupted driver leaves no worker behind
            process.wait()
            bar.remove_task(task)
    if process.returncode not in (0, PYTEST_FAILED_TESTS):
        raise Failed(f"{malloc} malloc: the worker {ending(process.returncode, log.read_text())}, at: {current}")
    found = written.read_text() if written.exists() else ""  # empty where no contender could be timed
    try:
        return Result(json.loads(found)["benchmarks"] if found else [], refused, tuple(verified))
    except ValueError as error:  # a full disk cut it off
        raise Failed(f"{malloc} malloc: the worker's results in {written} are damaged: {error}") from error


def counts(event: dict[str, Any]) -> dict[str, float]:
    return {"completed": event["done"], "total": event["total"]}


def ending(code: int, output: str) -> str:
    """How a process ended, with its last line of output."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    said = output.strip().splitlines()
    return f"ended with code {code}" + (f" ({said[-1].strip()})" if said else "")
