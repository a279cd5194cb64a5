"""Interleaved rounds, and the statistics taken from them."""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cache, partial
from typing import Any, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)

SAMPLE_SECONDS, MAX_LOOPS = 1e-3, 200
FEWEST = 2  # rounds, which have a spread
FLUSHED_BYTES = 2**29  # written before each sample on a GPU: several times its L2, and time for the host to run ahead


def synchronize(device: str) -> None:
    """Waits for what `device` still has to do; nothing on the CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """What `step` lets the GPU do, as a CUDA graph: without the host's work, of which small kernels wait."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # allocations, choices of algorithms and compilations are not for the graph
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(step: Callable[[], object] = step) -> None:  # keeps `step`, and so the tensors that the graph reads
        graph.replay()

    return replay


def interleave(
    steps: dict[Key, Callable[[], object]],
    *,
    deadline: float,
    min_rounds: int,
    max_rounds: int,
    stop: float = math.inf,
    device: str = "cpu",
    pause: float = 0.0,
    seed: int = 0,
) -> dict[Key, list[float]]:
    """Seconds a call of each step, one sample a round; all lists have one length, and index i is one round.

    Every round times each step once, in an order drawn anew: what else the machine does, or has left in its caches,
    falls on all of them alike. On the CPU a step much shorter than SAMPLE_SECONDS is called several times a sample. On
    a GPU a sample is one call between two events, on a cold L2, and the host, which does not wait within a round, is
    ahead of it: what is timed is the GPU's work. `pause` is how many seconds pass before each sample on the CPU, and
    before a call that wakes its own threads and is not timed: the waiting threads of another library spin for a while,
    and would slow down the next step. Stops after `max_rounds`, after `min_rounds` once `time.perf_counter()` has
    passed `deadline`, or after FEWEST once it has passed `stop`.
    """
    order, draw = list(steps), random.Random(seed)
    samples: dict[Key, list[float]] = {key: [] for key in steps}
    loops = {key: _loops(step, device) for key, step in steps.items()}
    sample_round = _on_gpu if device == "cuda" else partial(_on_cpu, pause=pause)
    collects = gc.isenabled()
    gc.disable()
    try:
        for done in range(max_rounds):
            now = time.perf_counter()
            if (done >= min_rounds and now > deadline) or (done >= FEWEST and now > stop):
                break
            draw.shuffle(order)
            for key, seconds in sample_round([(key, steps[key], loops[key]) for key in order]):
                samples[key].append(seconds)
    finally:
        if collects:
            gc.enable()
    return samples


Round = list[tuple[Key, Callable[[], object], int]]  # with the calls a sample


def _on_cpu(steps: Round, pause: float) -> Iterator[tuple[Key, float]]:
    for key, step, loops in steps:
        if pause:
            time.sleep(pause)
            step()
        start = time.perf_counter()
        for _ in range(loops):
            step()
        yield key, (time.perf_counter() - start) / loops


def _on_gpu(steps: Round) -> Iterator[tuple[Key, float]]:
    events = []
    for key, step, _ in steps:
        flush()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        events.append((key, start, end))
    torch.cuda.synchronize()
    for key, start, end in events:
        yield key, start.elapsed_time(end) / 1e3


def flush() -> None:
    """Takes from a GPU's L2 what it holds."""
    _flushed().zero_()


@cache
def _flushed() -> torch.Tensor:
    return torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")


def _loops(step: Callable[[], object], device: str) -> int:
    """Calls a sample; the first call, which allocates and fills caches, decides only where it is long already."""
    for _ in range(2):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        seconds = time.perf_counter() - start
        if seconds > 100 * SAMPLE_SECONDS:
            break
    return max(1, min(MAX_LOOPS, round(SAMPLE_SECONDS / seconds)))


def ratio(baseline: Sequence[float], samples: Sequence[float]) -> float:
    """How many times faster than the baseline: the median of baseline over sample, round by round.

    Raises ValueError where the two have not been timed in the same rounds.
    """
    if len(baseline) != len(samples):
        raise ValueError(f"{len(baseline)} rounds against {len(samples)}: not timed together")
    return statistics.median(b / s for b, s in zip(baseline, samples, strict=True))


def ratio_interval(baseline: Sequence[float], samples: Sequence[float]) -> tuple[float, float]:
    """(low, high): the 95 % interval of `ratio`'s median, by the order of the rounds' ratios; all where they are few.

    An interval of order statistics asks nothing of how times are distributed, which on a busy machine is in two heaps.
    """
    found = sorted(b / s for b, s in zip(baseline, samples, strict=True))
    count, tail, outside = len(found), 0.0, 0
    while (tail := tail + math.comb(count, outside) / 2**count) <= 0.025:
        outside += 1
    cut = max(0, outside - 1)
    return found[cut], found[count - 1 - cut]


def geometric_mean(values: Sequence[float]) -> float:
    """Raises ValueError for no values and for values that are not positive."""
    if not values or min(values) <= 0:
        raise ValueError("the geometric mean needs positive values, at least one")
    return math.exp(statistics.fmean(math.log(v) for v in values))


class ReplayClock:
    """A timer for pytest-benchmark that passes by one recorded sample a call.

    pytest-benchmark times one function at a time, and interleaved rounds time several: the samples are taken first,
    and each contender's are then handed to its own benchmark as if they passed now.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, benchmark: Any, samples: Sequence[float]) -> None:
        """Gives `samples` to a `benchmark` fixture whose timer is this clock."""
        remaining = iter(samples)

        def advance() -> None:
            self.now += next(remaining)

        self.now = 0.0  # near zero a float holds microseconds exactly enough
        benchmark.pedantic(advance, rounds=len(samples))
