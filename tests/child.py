"""Starts the processes that tests run, and reports it if one ran out of memory."""

import re
import subprocess
from pathlib import Path

# What Python, the C++ library, the sanitizers and PyTorch print if memory cannot be allocated.
NONE_LEFT = re.compile(
    r"\bMemoryError\b|std::bad_alloc|can't allocate memory|Cannot allocate memory|failed to (?:allocate|mmap)"
    r"|out of memory|Resource temporarily unavailable.*thread|exitcode\s*:\s*-9\b|Signal 9 \(SIGKILL\)",
)
KILLED = (-9, 137)  # by the system, and as a shell reports it


class OutOfMemory(AssertionError):
    """A process that a test started ran out of memory."""


def memory() -> str:
    """The free memory of this machine, and the memory of this process."""
    table = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M))
    mine = re.search(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    free, total, own = (int(kilobytes) / 2**20 for kilobytes in (table["MemAvailable"], table["MemTotal"], mine[1]))
    return f"{free:.1f} GB of {total:.1f} GB are free now, and pytest's process has {own:.1f} GB"


def refuse_lack_of_memory(done: subprocess.CompletedProcess[str]) -> None:
    """Raises OutOfMemory if a process was killed, or printed that it got no memory."""
    said = (done.stdout or "") + (done.stderr or "")
    if done.returncode in KILLED:
        how = "was killed (SIGKILL), which the system does to a process when memory has run out"
    elif done.returncode and (found := NONE_LEFT.search(said)):
        how = f"got no memory: it ended with {found[0]!r}"
    else:
        return
    given = done.args if isinstance(done.args, str) else " ".join(map(str, done.args))
    raise OutOfMemory(f"a process that this test has started {how}; {memory()}.\n{given[:400]}\n{said[-1500:]}")


def run_child(command, *, check: bool = False, **options) -> subprocess.CompletedProcess[str]:
    """subprocess.run with the output as text, of both streams unless told otherwise, for every process of a test.

    Raises OutOfMemory if it ran out of memory and, with `check`, AssertionError with its output if it failed.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    done = subprocess.run(command, check=False, **pipes | options | {"text": True})
    refuse_lack_of_memory(done)
    said = f"{(done.stdout or '')[-3000:]}\n{(done.stderr or '')[-4000:]}"
    assert not check or done.returncode == 0, f"exit status {done.returncode}\n{said}"
    return done
