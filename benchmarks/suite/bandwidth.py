"""The memory bandwidth that the machine reaches in the same run, and the time that it allows for memory traffic.

`python -m benchmarks.suite.bandwidth --device cpu --threads 2` prints it as JSON. The driver starts it with
GLIBC_TUNABLES = STREAMING, so that the C library's memcpy writes past the caches.
"""

import argparse
import ctypes
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from . import timing

STREAMING = "glibc.cpu.x86_non_temporal_threshold=0x40000"  # bytes
SIZES = (2**22, 2**24, 2**26, 2**28)  # bytes that one call touches: in cache, at its edge, and well beyond
# Bytes (read, written) for each byte touched.
MIXES = {
    "read": (1, 0),
    "write": (0, 1),
    "copy": (1 / 2, 1 / 2),
    "streaming copy": (1 / 2, 1 / 2),
    "add": (2 / 3, 1 / 3),
}


@dataclass(frozen=True)
class Bandwidth:
    mix: str
    size: int  # bytes that one call touches, all its tensors together
    gb_s: float


def measure(device: str, threads: int, seconds: float = 3.0, sizes: Iterable[int] = SIZES) -> list[Bandwidth]:
    """Every mix at every size, medians of interleaved rounds on memory that is mapped already."""
    found, sizes = [], tuple(sizes)
    with ThreadPoolExecutor(threads) as pool:
        for size in sizes:
            steps = _steps(size, device, threads, pool)
            samples = timing.interleave(
                steps,
                deadline=time.perf_counter() + seconds / len(sizes),
                min_rounds=5,
                max_rounds=500,
                device=device,
            )
            found += [Bandwidth(mix, size, size / statistics.median(s) / 1e9) for mix, s in samples.items()]
    return found


def _steps(size: int, device: str, threads: int, pool: ThreadPoolExecutor) -> dict[str, Callable[[], object]]:
    def tensors(count: int) -> list[Tensor]:
        return [torch.ones(size // 4 // count, device=device) for _ in range(count)]

    (whole,), (x, y), (a, b, c) = tensors(1), tensors(2), tensors(3)
    steps: dict[str, Callable[[], object]] = {
        "read": lambda: torch.linalg.vector_norm(whole),
        "write": lambda: whole.fill_(1.0),
        "copy": lambda: y.copy_(x),
        "add": lambda: torch.add(a, b, out=c),
    }
    if device == "cpu" and os.environ.get("GLIBC_TUNABLES") == STREAMING:
        memcpy = ctypes.CDLL(None).memcpy  # releases the GIL
        memcpy.argtypes, memcpy.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_void_p
        nbytes = x.numel() * 4
        share = math.ceil(nbytes / threads / 64) * 64  # whole cache lines
        parts = [(offset, min(share, nbytes - offset)) for offset in range(0, nbytes, share)]

        def copy_part(part: tuple[int, int]) -> None:
            memcpy(y.data_ptr() + part[0], x.data_ptr() + part[0], part[1])

        steps["streaming copy"] = lambda: list(pool.map(copy_part, parts))
    return steps


def copy_probe(device: str, touched: int = 2**26) -> Callable[[], float]:
    """A function that measures the present bandwidth of a plain copy beyond the caches, in GB/s. It varies with the
    load of other virtual machines."""
    x, y = (torch.ones(touched // 8, device=device) for _ in range(2))

    def gb_s() -> float:
        samples = timing.interleave(
            {"copy": lambda: y.copy_(x)}, deadline=0.0, min_rounds=3, max_rounds=3, device=device
        )["copy"]
        return touched / statistics.median(samples) / 1e9

    return gb_s


def at_size(bandwidths: Iterable[Bandwidth], touched: int) -> dict[str, float]:
    """GB/s of each mix at the measured size that is nearest to the bytes that a call touches."""
    bandwidths = list(bandwidths)
    size = min({b.size for b in bandwidths}, key=lambda s: abs(math.log(s / touched)))
    return {b.mix: b.gb_s for b in bandwidths if b.size == size}


def least_seconds(bandwidths: Iterable[Bandwidth], bytes_read: int, bytes_written: int) -> float:
    """max(read / B_read, written / B_write, all / B_mix), bandwidths taken at the measured size nearest to the whole.

    B_mix is the best of the mixes that read and write.
    """
    whole = bytes_read + bytes_written
    best = {mix: gb_s * 1e9 for mix, gb_s in at_size(bandwidths, whole).items()}
    mixed = max(best[mix] for mix in best if all(MIXES[mix]))
    return max(bytes_read / best["read"], bytes_written / best["write"], whole / mixed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(json.dumps([asdict(b) for b in measure(arguments.device, arguments.threads)]))


if __name__ == "__main__":
    main()
