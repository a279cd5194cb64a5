"""Measures memory leaks of calls."""

import gc
import itertools
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

MAY_STAY = 2**19  # bytes: 65 per call


def _resident() -> int:
    """Bytes in memory now. (The peak would hide a leak that is smaller than what earlier tests used.)"""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def leaked_by_ten_thousand(call: Callable[[int], object]) -> float:
    """Bytes that ``call(0)`` to ``call(9999)`` leave behind, from the two thousandth on: caches have filled by then.

    A leak grows with every call. What the system adds on its own, such as a huge page, comes at once: the median of ten
    stretches counts.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for i in range(2000):
            call(i)
        found = [_resident()]
        for start in range(2000, 10000, 800):
            for i in range(start, start + 800):
                call(i)
            found.append(_resident())
        return 10 * statistics.median(later - earlier for earlier, later in itertools.pairwise(found))
    finally:
        torch.set_num_threads(threads)
