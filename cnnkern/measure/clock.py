"""Interleaved rounds, and what is read from them: medians of pairwise ratios, and their noise."""

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
    """Seconds of one call: on the clock on the wall and, on a GPU, between two events of its stream."""

    wall: float
    events: float | None = None


class Timer(Protocol):
    """Times so many calls of a step, one after the other; seconds are of one call."""

    def sample(self, step: Step, calls: int) -> Sample: ...


class HostTimer:
    """Of what is done when the call returns."""

    def sample(self, step: Step, calls: int) -> Sample:
        start = time.perf_counter()
        for _ in range(calls):
            step()
        return Sample((time.perf_counter() - start) / calls)


class CudaTimer:
    """Of what a GPU has still to do when a call returns: the wall's clock waits for it, events stand in its stream.

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
    """Calls that fill a sample; two that are not counted come before."""
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
    """A sample of each step in every round, in an order that is drawn anew, until `seconds` have passed.

    What else the machine does falls on all of them alike. All lists have one length, and index i is one round.
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
            gc.collect(0)  # cycles of this round alone: all objects there are would take longer than many a sample
    finally:
        if collects:
            gc.enable()
    return samples


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as the baseline, and how far off this median may be by chance, as a share of it."""

    value: float
    chance: float

    def is_beyond(self, value: float) -> bool:
        """Whether it is larger than this, and larger than 1 by more than chance."""
        return self.value > value and self.value * (1 - self.chance) > 1


def ratio(baseline: Sequence[float], samples: Sequence[float]) -> Ratio:
    """The median of baseline over sample, round by round; its chance is 1.57 quartile ranges over the root of the
    rounds, as the notches of a box plot have it (McGill, Tukey and Larsen, 1978)."""
    pairs = [b / s for b, s in zip(baseline, samples, strict=True)]
    middle = statistics.median(pairs)
    return Ratio(middle, 1.57 * quartile_range(pairs) / middle / len(pairs) ** 0.5)


def noise_floor(again: Ratio) -> float:
    """What a step's ratio to itself says of all ratios: its distance from one, and its own chance."""
    return abs(again.value - 1) + again.chance


def quartile_range(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return third - first


def spread(values: Sequence[float]) -> float:
    """The quartile range as a share of the median."""
    return quartile_range(values) / statistics.median(values)
