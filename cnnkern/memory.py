"""How much memory there is, and settings of the C library's allocator that decide what a large tensor costs."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import torch

# glibc's malloc.h: mallopt's parameters ...
_PARAMETERS = {"TRIM_THRESHOLD": -1, "TOP_PAD": -2, "MMAP_THRESHOLD": -3}
_LARGEST = 2**31 - 1  # mallopt takes an int
# ... and the values that keep freed memory for the next tensor. The benchmarks start processes with the same ones.
TUNED = {"MMAP_THRESHOLD": _LARGEST, "TRIM_THRESHOLD": _LARGEST, "TOP_PAD": 2**26}


def tune_malloc() -> str:
    """Lets large CPU tensors be reused instead of being mapped and faulted anew; returns what it did, in a sentence.

    glibc gives every block above 32 MiB (sooner, at first) to the kernel and back on each call, which costs a page
    fault for 4 KiB of fresh output: often more than the kernel that fills it. This call raises the thresholds of
    ``mallopt`` so that blocks up to 2 GiB come from the heap and stay there when they are freed.

    The cost: memory that tensors have freed stays with the process, up to 2 GiB at the heap's top and whatever lies
    between live blocks, so resident memory remains near its peak. It holds for the whole process, for PyTorch's own
    operators as well as ours, and cannot be undone. Call it before the first large tensor.

    Without glibc (musl, macOS, Windows) nothing is changed, and the sentence says so.
    """
    try:
        libc = ctypes.CDLL(None)
        version = libc.gnu_get_libc_version
        mallopt = libc.mallopt
    except (OSError, TypeError, AttributeError):
        return "cnnkern: malloc left as it is: this C library is not glibc"
    version.restype = ctypes.c_char_p
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    release = version().decode()
    refused = [f"M_{option}" for option, value in TUNED.items() if mallopt(_PARAMETERS[option], value) != 1]
    if refused:
        return f"cnnkern: malloc left partly as it is: glibc {release} refused mallopt option {', '.join(refused)}"
    return (
        f"cnnkern: glibc {release} now reuses blocks up to 2 GiB instead of mapping them anew; "
        "resident memory stays near its peak"
    )


def total(device: str) -> int | None:
    """The bytes of memory that a process can have at most, swap space included; None where that is not known."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    if device != "cpu" or not Path("/proc/meminfo").exists():
        return None
    found = dict(re.findall(r"^(\w+): +(\d+) kB$", Path("/proc/meminfo").read_text(), re.M))
    return 1024 * (int(found["MemTotal"]) + int(found.get("SwapTotal", 0)))
