"""Starts the processes that tests are about, and says of one that the system has ended what it was: memory."""

import re
import subprocess
from pathlib import Path

# What the interpreter, the C++ library, the sanitizers and PyTorch say where memory cannot be had.
NONE_LEFT = re.compile(
    r"\bMemoryError\b|std::bad_alloc|can't allocate memory|Cannot allocate memory|failed to (?:allocate|mmap)|out of memory"
    r"|Resource temporarily unavailable.*thread|exitcode\s*:\s*-9\b|Signal 9 \(SIGKILL\)",
)
KILLED = (-9, 137)  # by the system, and as a shell reports it


class OutOfMemory(AssertionError):
    """A process that a test has started ended because there was no memory left."""


def memory() -> str:
    """What is free on this machine now, and what this process has."""
    table = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M))
    mine = re.search(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    free, total, own = (int(kilobytes) / 2**20 for kilobytes in (table["MemAvailable"], table["MemTotal"], mine[1]))
    return f"{free:.1f} GB of {total:.1f} GB are free now, and pytest's process has {own:.1f} GB"


def refuse_lack_of_memory(done: subprocess.CompletedProcess, command: object = None) -> None:
    """Raises OutOfMemory where a process was killed, or says itself that it got no memory."""
    said = "".join(text if isinstance(text, str) else text.decode(errors="replace") for text in (done.stdout, done.stderr) if text)
    if done.returncode in KILLED:
        how = "was killed (SIGKILL), which the system does to a process when memory has run out"
    elif done.returncode and (found := NONE_LEFT.search(said)):
        how = f"got no memory: it ended with {found[0]!r}"
    else:
        return
    given = command if command is not None else done.args
    given = given if isinstance(given, str | bytes) else " ".join(map(str, given))
    raise OutOfMemory(f"a process that this test has started {how}; {memory()}.\n{given[:400]}\n{said[-1500:]}")


def run_child(command, *, check: bool = False, **options) -> subprocess.CompletedProcess:
    """subprocess.run with the output as text, of both streams, for every process that a test starts.

    Raises OutOfMemory for one that memory ran out for; with `check` AssertionError, with what it said, for one that failed.
    """
    if not {"stdout", "stderr"} & options.keys():
        options.setdefault("capture_output", True)
    done = subprocess.run(command, text=True, check=False, **options)
    refuse_lack_of_memory(done)
    assert not check or done.returncode == 0, f"exit status {done.returncode}\n{(done.stdout or '')[-3000:]}\n{(done.stderr or '')[-4000:]}"
    return done
