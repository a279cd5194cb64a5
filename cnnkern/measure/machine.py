"""The machine on which is measured, and its other load."""

from __future__ import annotations

import os
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import cnnkern

CPUINFO, STAT, PRESSURE = Path("/proc/cpuinfo"), Path("/proc/stat"), Path("/proc/pressure/cpu")
# Above these a machine is called busy: waiting processes per processor, and shares of the time.
LOAD, STOLEN, WAITING = 0.3, 0.02, 0.1


@dataclass(frozen=True)
class Machine:
    """The device's name, the kernels that are used on it, and the versions."""

    device_name: str
    kernels: str  # AVX512, AVX2 or DEFAULT on a CPU; "CUDA C++", "Triton" or "eager PyTorch" on a GPU
    torch: str
    cnnkern: str


@dataclass(frozen=True)
class Activity:
    """Other load. Shares are between 0 and 1, of the time of the measurement; None if not known."""

    load: float | None  # processes that ran or waited in the minute before, by processor
    stolen: float | None  # of all processors' time, taken by other virtual machines
    waiting: float | None  # in which some process waited for a processor

    @property
    def reasons(self) -> list[str]:
        """Why the machine is called busy; empty for a quiet one."""
        found = []
        if self.load is not None and self.load > LOAD:
            found.append(f"load {self.load:.1f} per processor before")
        if self.stolen is not None and self.stolen > STOLEN:
            found.append(f"{self.stolen:.0%} stolen by other machines")
        if self.waiting is not None and self.waiting > WAITING:
            found.append(f"processes waited {self.waiting:.0%} of the time")
        return found

    def __str__(self) -> str:
        if self.reasons:
            return f"BUSY MACHINE ({', '.join(self.reasons)}): mind the noise"
        if self.load is None:
            return "whether the machine is busy is not known here"
        return f"quiet machine (load {self.load:.1f} per processor before)"


def device_name(device: str) -> str:
    """The name of a GPU, or of the processor with family and model: clouds give one name to several generations."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    if not CPUINFO.exists():
        return platform.processor() or platform.machine()
    text = CPUINFO.read_text()
    facts = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", text, re.MULTILINE))
    name = facts.get("model name", platform.machine())
    if {"cpu family", "model"} <= facts.keys():
        name += f" family {facts['cpu family']} model {facts['model']}"
    return name


def describe(device: str) -> Machine:
    kernels = cnnkern.backends.kernels_on(torch.device(device).type)
    return Machine(device_name(device), kernels, torch.__version__, cnnkern.__version__)


class Watch:
    """Observes other load of the machine, from its creation until :meth:`activity` is called."""

    def __init__(self) -> None:
        known = hasattr(os, "getloadavg")  # not on Windows
        self.load = os.getloadavg()[0] / (os.cpu_count() or 1) if known else None
        self.start, self.times, self.waited = time.monotonic(), _times(), _waited()

    def activity(self) -> Activity:
        times, waited, passed = _times(), _waited(), time.monotonic() - self.start
        stolen = waiting = None
        if times and self.times:
            total = sum(times) - sum(self.times)
            stolen = (times[7] - self.times[7]) / total if total else 0.0
        if waited is not None and self.waited is not None:
            waiting = min(1.0, (waited - self.waited) / 1e6 / passed)
        return Activity(self.load, stolen, waiting)


def _times() -> list[int]:
    """Time of all processors by kind: user, nice, system, idle, iowait, irq, softirq, steal."""
    if not STAT.exists():
        return []
    return [int(n) for n in STAT.read_text().splitlines()[0].split()[1:9]]


def _waited() -> int | None:
    """Microseconds since the start of the machine in which some process waited for a processor."""
    if not PRESSURE.exists():
        return None
    found = re.search(r"^some .*total=(\d+)", PRESSURE.read_text(), re.MULTILINE)
    return int(found[1]) if found else None
