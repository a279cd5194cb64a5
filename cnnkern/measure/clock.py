"""Interleaved rounds, the medians of their pairwise ratios, and the noise of these."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Step = Callable[[], object]
SAMPLE_SECONDS, MAX_CALLS = 0.02, 200


@dataclass(frozen=True)
class Sample:
    """Seconds of one call: wall time and, on a GPU, the time between two events of its stream."""

    wall: float
    events: float | None = None


class Timer(Protocol):
    """Times so many calls of a step, one after the other; seconds are of one call."""

    def sample(self, step: Step, calls: int) -> Sample: ...


class HostTimer:
    """For calls that are complete when they return."""

    def sample(self, step: Step, calls: int) -> Sample:
        start = time.perf_counter()
        for _ in range(calls):
            step()
        return Sample((time.perf_counter() - start) / calls)


class CudaTimer:
    """For calls that return before the GPU has finished: wall time includes a synchronisation, events are recorded.

    `cuda` is `torch.cuda`, or what has its Event and synchronize.
    """

    def __init__(self, cuda: Any = torch.cuda, clock: Callable[[], float] = time.perf_counter) -> None:
        self.cuda, self.clock = cuda, clock

    def sample(self, step: Step, calls: int) -> Sample:
        first, last = (self.cuda.Event(enable_timing=True) for _ in range(2))
        self.cuda.synchronize()
        start = self.clock()
        first.record()
        for _ in range(calls):  # without waiting in between, as in a loop that trains
            step()
        last.record()
        self.cuda.synchronize()
        wall = (self.clock() - start) / calls
        return Sample(wall, first.elapsed_time(last) / 1e3 / calls)


def timer_for(device: str) -> Timer:
    return CudaTimer() if torch.device(device).type == "cuda" else HostTimer()


def calls_of(timer: Timer, step: Step, sample_seconds: float) -> int:
    """The number of calls per sample. Makes two calls that are not counted first."""
    seconds = min(timer.sample(step, 1).wall for _ in range(2))
    return max(1, min(MAX_CALLS, round(sample_seconds / max(seconds, 1e-9))))


def interleave(
    steps: Mapping[str, Step],
    timer: Timer,
    *,
    seconds: float,
    sample_seconds: float = SAMPLE_SECONDS,
    min_rounds: int = 5,
    max_rounds: int = 200,
) -> dict[str, list[Sample]]:
    """One sample of each step per round, in a new random order, until `seconds` have passed.

    So other load of the machine affects all steps alike. All lists have the same length: index i is a round.
    """
    draw, order = random.Random(0), list(steps)
    calls = {name: calls_of(timer, step, sample_seconds) for name, step in steps.items()}
    samples: dict[str, list[Sample]] = {name: [] for name in steps}
    deadline = time.perf_counter() + seconds
    collects = gc.isenabled()
    gc.disable()
    try:
        for done in range(max_rounds):
            if done >= min_rounds and time.perf_counter() > deadline:
                break
            draw.shuffle(order)
            for name in order:
                samples[name].append(timer.sample(steps[name], calls[name]))
            gc.collect(0)  # only this round's cycles: a full collection would take longer than many samples
    finally:
        if collects:
            gc.enable()
    return samples


@dataclass(frozen=True)
class Ratio:
    """A speedup over the baseline (a median), and its relative uncertainty."""

    value: float
    chance: float

    def is_beyond(self, value: float) -> bool:
        """Whether it is larger than this, and significantly larger than 1."""
        return self.value > value and self.value * (1 - self.chance) > 1


def ratio(baseline: Sequence[float], samples: Sequence[float]) -> Ratio:
    """The median of baseline over sample, round by round; its chance is 1.57 quartile ranges over the root of the
    rounds, as the notches of a box plot have it (McGill, Tukey and Larsen, 1978)."""
    pairs = [b / s for b, s in zip(baseline, samples, strict=True)]
    middle = statistics.median(pairs)
    return Ratio(middle, 1.57 * quartile_range(pairs) / middle / len(pairs) ** 0.5)


def noise_floor(again: Ratio) -> float:
    """The noise floor from a step's ratio to itself: the distance from 1, plus its uncertainty."""
    return abs(again.value - 1) + again.chance


def quartile_range(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return third - first


def spread(values: Sequence[float]) -> float:
    """The interquartile range divided by the median."""
    return quartile_range(values) / statistics.median(values)
