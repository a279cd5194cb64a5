"""What a large tensor's memory costs on a CPU: the pool of our results' blocks, the C library's allocator; how much
memory there is."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch

from cnnkern.extension import extension

# glibc's malloc.h: mallopt's parameters ...
_PARAMETERS = {"TRIM_THRESHOLD": -1, "TOP_PAD": -2, "MMAP_THRESHOLD": -3}
_LARGEST = 2**31 - 1  # mallopt takes an int
# ... and the values that keep freed memory for the next tensor. The benchmarks start processes with the same ones.
TUNED = {"MMAP_THRESHOLD": _LARGEST, "TRIM_THRESHOLD": _LARGEST, "TOP_PAD": 2**26}


class PoolSizes(NamedTuple):
    """Bytes of the pool of CPU results.

    Attributes:
        used: Bytes of the blocks of existing results.
        kept: Bytes of blocks that wait for the next results.
        most: The most bytes that results have needed at one time.
    """

    used: int
    kept: int
    most: int


def pool_sizes() -> PoolSizes:
    """The sizes of the pool of CPU results. All are 0 without the compiled extension."""
    return PoolSizes(*(extension.pool_sizes() if extension is not None else (0, 0, 0)))


def empty_cache() -> None:
    """Returns to the system the memory that cnnkern keeps for its next results on a CPU.

    CPU results of cnnkern's operators of 256 KiB or more are allocated from a pool of blocks, like GPU tensors from
    torch.cuda's caching allocator. Without it the system would clear new memory page by page, which often takes longer
    than the kernel that writes it. The pool holds at most 1.5 times the most that results have needed at one time, and
    at most 512 MiB more than that. A block that was unused for ten seconds is freed in the next call, and all unused
    blocks when the system has no memory left.
    ``CNNKERN_POOL=0`` in the environment, or :func:`use_pool`, switches the pool off.
    """
    if extension is not None:
        extension.empty_pool()


def use_pool(on: bool) -> None:
    """Switches the pool of CPU results on or off (see :func:`empty_cache`)."""
    if extension is not None:
        extension.set_pool(bool(on))


def _follow_environment() -> None:
    asked = os.environ.get("CNNKERN_POOL", "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"cnnkern: CNNKERN_POOL must be 0, 1 or unset; got {asked!r}")
    if asked == "0":
        use_pool(False)


_follow_environment()


def tune_malloc() -> str:
    """Raises malloc's thresholds, so that large CPU tensors reuse memory. Returns a sentence that says what it did.

    glibc returns every block above 32 MiB (at first also smaller ones) to the system when it is freed. The next block
    then causes a page fault per 4 KiB, which often takes longer than the kernel that fills it. This call raises the
    thresholds of ``mallopt``, so that blocks up to 2 GiB come from the heap and stay there when they are freed.

    The drawback: freed memory stays with the process, up to 2 GiB at the heap's top and all gaps between live blocks,
    so resident memory stays near its peak. The call applies to the whole process, to PyTorch's operators as well as
    cnnkern's, and cannot be undone. Call it before the first large tensor.

    Without glibc (musl, macOS, Windows) nothing is changed, and the sentence says so.
    """
    try:
        libc = ctypes.CDLL(None)
        version = libc.gnu_get_libc_version
        mallopt = libc.mallopt
    except (OSError, TypeError, AttributeError):
        return "cnnkern: malloc is unchanged: this C library is not glibc"
    version.restype = ctypes.c_char_p
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    release = version().decode()
    refused = [f"M_{option}" for option, value in TUNED.items() if mallopt(_PARAMETERS[option], value) != 1]
    if refused:
        return f"cnnkern: malloc is partly unchanged: glibc {release} refused mallopt option {', '.join(refused)}"
    return (
        f"cnnkern: glibc {release} now reuses blocks up to 2 GiB instead of mapping new pages; "
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
