"""Other load of a machine: cores that other processes or virtual machines use, and processes that wait for memory."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
BUSY_CORES, BUSY_MEMORY = 0.25, 0.01  # above this a machine is called busy
SAMPLE_SECONDS = 0.5


@dataclass(frozen=True)
class Counters:
    """Seconds since the system started; None if not known."""

    at: float
    busy: float | None  # of all processors together
    steal: float | None  # that a hypervisor gave to other machines
    own: float  # of this process and its children that have ended
    memory: float | None  # in which some process waited for memory


def counters() -> Counters:
    busy = steal = memory = None
    if (PROC / "stat").exists():
        ticks = [int(n) for n in (PROC / "stat").read_text().split("\n", 1)[0].split()[1:9]]
        user, nice, system, _, _, irq, softirq, steal_ticks = ticks
        per_second = os.sysconf("SC_CLK_TCK")
        busy, steal = (user + nice + system + irq + softirq) / per_second, steal_ticks / per_second
    pressure = PROC / "pressure" / "memory"
    if pressure.exists():
        memory = int(pressure.read_text().split("total=")[1].split()[0]) / 1e6
    return Counters(time.monotonic(), busy, steal, sum(os.times()[:4]), memory)


class Watch:
    """The load since this object was created."""

    def __init__(self) -> None:
        self.start = counters()

    def rates(self) -> tuple[float | None, float | None]:
        """(cores that others used, share of the time in which some process waited for memory)."""
        start, end = self.start, counters()
        seconds = max(end.at - start.at, 1e-9)
        others = memory = None
        if end.busy is not None and start.busy is not None and end.steal is not None and start.steal is not None:
            taken = end.busy - start.busy - (end.own - start.own) + end.steal - start.steal
            others = max(0.0, taken) / seconds
        if end.memory is not None and start.memory is not None:
            memory = (end.memory - start.memory) / seconds
        return others, memory

    def others(self) -> float | None:
        return self.rates()[0]


def before_a_run() -> str:
    """A line on the machine's load before anything is timed."""
    watch = Watch()
    time.sleep(SAMPLE_SECONDS)
    others, memory = watch.rates()
    if others is None:
        return "whether the machine is busy is not known: there is no /proc/stat"
    waits = "" if memory is None else f", processes wait for memory {memory:.0%} of the time"
    facts = f"others keep {others:.1f} of {os.cpu_count()} cores busy, load average {os.getloadavg()[0]:.1f}{waits}"
    if others >= BUSY_CORES or (memory or 0.0) >= BUSY_MEMORY:
        return f"THE MACHINE IS BUSY: {facts}. Rows that this spoils are marked and left out of the means"
    return f"the machine is quiet: {facts}"
