"""A step of the set-up: runs a command, shows its progress in short, and says in one line why it failed."""

from __future__ import annotations

import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

PYTHON_RANGE = "Python 3.10 to 3.13"


class SetupError(Exception):
    """One line that says what is wrong and what to do."""


logs: set[Path] = set()  # that this call has begun


def condense_pip(line: str) -> str | None:
    if match := re.search(r"(Downloading|Using cached) (\S+?)-(\d[^-]*)-\S+\.whl \((\d\d+[\d.]* MB|\S+ GB)\)", line):
        return f"{match[1].lower()} {match[2]} {match[3]} ({match[4]})"
    if match := re.search(r"Installing collected packages: (.*)", line):
        return f"installing {len(match[1].split(', '))} packages"
    return "no answer from the package index: trying again" if "WARNING: Retrying" in line else None


def condense_build(line: str) -> str | None:
    match = re.search(r"(\[\d+/\d+\]) .* -c (?:\S*?/(?=csrc/))?(\S+)", line)
    capability = re.search(r"-DCPU_CAPABILITY=(\w+)", line)
    return match and f"{match[1]} {match[2]}" + (f" ({capability[1]})" if capability else "")


class Progress:
    """One line per piece of work; on a terminal the last line also counts the seconds."""

    def __init__(self, title: str, usually: str):
        self.said = self.started = time.monotonic()
        self.terminal = sys.stdout.isatty()
        print(f"{title} (usually {usually})", flush=True)

    def show(self, text: str) -> None:
        self.said = time.monotonic()
        print(f"{self.clear()}  [{self.said - self.started:3.0f} s] {text}", flush=True)

    def tick(self) -> None:
        now = time.monotonic()
        if self.terminal:
            print(f"{self.clear()}  [{now - self.started:3.0f} s] ...", end="", flush=True)
        elif now - self.said > 30:
            self.show("still at work")

    def clear(self) -> str:
        return "\r\033[K" if self.terminal else ""


def run_step(
    title: str, usually: str, command: list, log: Path, condense: Callable[[str], str | None], env: dict | None = None
) -> None:
    """Runs `command` with its output in `log`, shows the condensed lines; SetupError says why it failed."""
    progress, lines = Progress(title, usually), queue.Queue()
    log.parent.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # What the user's shell points to must not count as installed in .venv.
        env={k: v for k, v in {**os.environ, **(env or {})}.items() if k not in ("PYTHONPATH", "PYTHONHOME")},
        cwd=log.parents[1],
    )

    def read() -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    output = []
    with process, log.open("a" if log in logs else "w") as file:
        logs.add(log)
        file.write(f"$ {' '.join(map(str, command))}\n")
        while True:
            try:
                line = lines.get(timeout=1)
            except queue.Empty:
                progress.tick()
                continue
            if line is None:
                break
            output.append(line)
            file.write(line)
            file.flush()
            if short := condense(line):
                progress.show(short)
    failed = process.returncode != 0
    progress.show("failed" if failed else "done")
    if failed:
        raise SetupError(f"{diagnose(''.join(output))}; the whole output is in {log}")


NO_NETWORK = (
    "NewConnectionError|NameResolutionError|Temporary failure in name resolution|Max retries exceeded|ConnectTimeout"
    "|ReadTimeout|Connection refused|Connection reset|Network is unreachable|ProxyError|CERTIFICATE_VERIFY_FAILED"
)


def diagnose(output: str) -> str:
    """What to do about a step that ended with this output, without a line break."""
    if re.search(r"No space left on device|Errno 28\b|Disk quota exceeded", output):
        return "no space left on the disk: free about 10 GB, or clone into a larger file system"
    if re.search(r"Killed signal terminated|cannot allocate memory|virtual memory exhausted", output, re.IGNORECASE):
        return "the compiler ran out of memory: `MAX_JOBS=1 make` compiles one file at a time"
    if re.search(r"Python\.h: No such file", output):
        return "Python.h is missing: `apt-get install python3-dev`, or PYTHON=... for another interpreter"
    if match := re.search(r"^.*?(\S+: (?:fatal )?error: .*|\S+\(\d+\): (?:catastrophic )?error.*)$", output, re.M):
        return f"compiler error: {match[1].strip()}"
    if match := re.search(r"^\s*(cnnkern: .*)$", output, re.M):  # setup.py's own words
        return match[1]
    if re.search(NO_NETWORK, output):
        return (
            "the package index cannot be reached: check the network, proxy and pip's index settings, then run it again"
        )
    if match := re.search(r"No matching distribution found for (\S+)", output):
        return f"the package index has no {match[1]} for this interpreter and machine: try another of {PYTHON_RANGE}"
    if re.search(r"ResolutionImpossible|conflicting dependencies|conflict is caused by", output):
        return "the pins of requirements.txt conflict with each other or with a constraints file (`pip config list`)"
    if re.search(r"No module named '?(pip|ensurepip|venv)\b", output):
        return NO_PIP
    said = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in said if re.match(r"(ERROR|error|\w*Error)\b", line)]
    return (errors or said or ["it said nothing"])[-1]


NO_PIP = "this Python has no pip: `apt-get install python3-pip`, or PYTHON=... for another interpreter"
