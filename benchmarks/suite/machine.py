"""The machine and the versions of a run, and its two malloc settings."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import cnnkern
from cnnkern import _C, memory

from .options import Options
from .place import ROOT

CPUINFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

# glibc maps blocks of more than 32 MB afresh on every call: with its defaults a large output costs more in page faults
# than the kernel that writes it. These are what `cnnkern.tune_malloc` sets, as the environment of a new process.
TUNED_MALLOC = {f"MALLOC_{option}_": str(value) for option, value in memory.TUNED.items()}


def malloc_settings(device: str) -> tuple[str, ...]:
    """The settings that matter on this machine: both with glibc on the CPU."""
    return ("tuned", "default") if device == "cpu" and platform.libc_ver()[0] == "glibc" else ("default",)


def malloc_environment(setting: str) -> dict[str, str]:
    """This process's environment with this malloc setting."""
    clean = {n: v for n, v in os.environ.items() if n not in TUNED_MALLOC}
    return clean | (TUNED_MALLOC if setting == "tuned" else {})


def malloc_setting() -> str:
    """The setting with which this process was started."""
    given = {n: os.environ.get(n) for n in TUNED_MALLOC}
    if given == TUNED_MALLOC:
        return "tuned"
    return "default" if set(given.values()) == {None} else "custom"


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")


def model_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    if CPUINFO.exists():
        facts = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", CPUINFO.read_text(), re.MULTILINE))
        name = facts.get("model name")
        if name and not re.search(r"\d", name) and {"cpu family", "model"} <= facts.keys():
            # Under a hypervisor the name may be the same for every generation.
            return f"{name} family {facts['cpu family']} model {facts['model']}"
        if name:
            return name
    return platform.processor() or platform.machine()


def cache_bytes(device: str) -> int | None:
    """The size of the last-level cache; None if not known."""
    if device == "cuda":
        return torch.cuda.get_device_properties().L2_cache_size
    sizes = [path.read_text() for path in CACHES.glob("index*/size")]
    found = [re.fullmatch(r"(\d+)K", size.strip()) for size in sizes]
    return max((int(match[1]) * 1024 for match in found if match), default=None)


def commit() -> str:
    """CNNKERN_COMMIT, else the short hash of the source tree, with '-dirty' if it has changes."""
    named = os.environ.get("CNNKERN_COMMIT")
    if named or ROOT is None:
        return named or "unknown"

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def kernels(options: Options) -> str:
    """Which kernels run: those for an instruction set, or on a GPU those of a backend."""
    if options.device == "cpu":
        return _C.cpu_capability()
    if options.backend == "triton":
        return f"Triton {importlib.metadata.version('triton')}"
    return f"CUDA C++ {_C.build_info()['cuda']}"


def describe(options: Options) -> dict[str, str | int | None]:
    """The columns of a row that identify the machine and the versions."""
    return {
        "machine": slug(model_name(options.device)),
        "device": options.device,
        "cpu_capability": kernels(options),
        "threads": options.threads,
        "torch": torch.__version__,
        "cnnkern": cnnkern.__version__,
        "commit": commit(),
        "cache_bytes": cache_bytes(options.device),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
