"""Groups of contenders (implementations) that are timed in the same rounds, and the session that times them."""

import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from cnnkern.measure.profile import peak_bytes

from . import bandwidth, load, reasons, timing
from .options import Options

LAYOUTS = ("contiguous", "channels_last")
OUT_OF_PLACE = "out of place"  # eager, with a new tensor per step; "eager" is in place, as networks are written
AGAIN = "eager, again"  # eager a second time in the same rounds: the difference is the noise floor
# Contenders of the models: the converted model compiled, and the model with only its grouped convolutions replaced.
CONVERTED_AND_COMPILED = "torch.compile, converted"
GROUPED_ALONE = "GroupedConv2d alone"
GROUPED_AND_COMPILED = "torch.compile, GroupedConv2d alone"
MAX_AUTOTUNE = "torch.compile, max-autotune"  # the reference, compiled as fast as torch can; that may take minutes


def is_baseline(contender: str) -> bool:
    return contender in ("eager", AGAIN)


def compiles_reference(contender: str) -> bool:
    """Whether this is torch.compile of the reference, in one of its forms, and not of a model with cnnkern's layers."""
    converted = (CONVERTED_AND_COMPILED, GROUPED_AND_COMPILED)
    return contender.startswith("torch.compile") and not contender.startswith(converted)


@dataclass(frozen=True)
class Contender:
    name: str  # cnnkern, eager, another form of the reference, torch.compile
    layout: str


@dataclass(frozen=True)
class Refused:
    """Why a contender has no time: 'not available', 'wrong', 'failed' or 'out of time', and a line on it."""

    status: str
    note: str


class Unavailable(Exception):
    """Something that a contender needs is missing on this machine; the message is one line."""


class Bench(Protocol):
    """A group's tensors and models, which live while it is timed."""

    code: dict[Contender, str]  # torch.compile's generated code, by compiled contender

    def step(self, contender: Contender, verify: bool) -> Callable[[], object]:
        """What is timed of this contender; with `verify` only after its results were compared with eager's."""


@dataclass(frozen=True, eq=False)
class Group:
    suite: str  # operators, models or overhead
    operator: str  # or the model's name
    network: str  # which has this shape
    shape: str
    mode: str  # training (forward and backward), inference (forward), or a part of training: forward, backward
    api: str  # functional or module
    contenders: tuple[Contender, ...]
    open: Callable[[], Bench]
    weight: float  # its share of the time, in about seconds
    dtype: str = "float32"
    bytes_read: int = 0  # the least memory traffic; 0 if it is not counted
    bytes_written: int = 0
    min_rounds: int = 5
    max_rounds: int = 50
    pause: float = 0.0  # seconds before each sample on the CPU, for other libraries' threads to fall asleep
    peaks: bool = False  # whether the peak memory of a call is measured
    last: bool = False  # timed after all others, which leave time for it
    on_host: bool = False  # the host's time is measured, also on a GPU
    # Contenders by name that need torch.compile's compile time.
    compiled: frozenset[str] = field(default=frozenset({"torch.compile"}))

    @property
    def label(self) -> str:
        return f"{self.suite} {self.operator} {self.network} {self.shape} {self.mode} {self.api}"

    def name_of(self, contender: Contender) -> str:
        """What --filter looks in, and what `Options.verified` lists."""
        return f"{self.label} {contender.layout} {contender.name}"

    def identity(self, contender: Contender) -> dict[str, Any]:
        """The columns of a row that say what was measured."""
        names = ("suite", "operator", "network", "shape", "mode", "api", "dtype", "bytes_read", "bytes_written")
        return {n: getattr(self, n) for n in names} | {"contender": contender.name, "layout": contender.layout}


def select(groups: Iterable[Group], text: str, malloc: str) -> list[Group]:
    """The groups reduced to contenders whose name contains `text` (or one of several, between commas), and the eager
    ones with which they are compared."""
    wanted = [part for part in map(str.strip, text.lower().split(",")) if part] if text else [""]
    chosen = []
    for group in groups:
        names = {c: f"{group.name_of(c)} {malloc} malloc".lower() for c in group.contenders}
        hit = {c for c, name in names.items() if any(part in name for part in wanted)}
        layouts = {c.layout for c in hit}
        kept = tuple(c for c in group.contenders if c in hit or (is_baseline(c.name) and c.layout in layouts))
        if kept:
            chosen.append(replace(group, contenders=kept))
    return chosen


# The time that is reserved for the last groups: what was planned times this factor, or times the overruns of earlier
# groups if these are larger, as on a busy machine; at most this share of all the time.
MARGIN, MOST_KEPT = 1.5, 2 / 3


class Session:
    """Times the groups of a plan in turn, each within its share of the seconds that are left."""

    def __init__(self, plan: list[Group], options: Options, emit: Callable[[dict[str, Any]], None]) -> None:
        self.options, self.emit = options, emit
        self.total = self.weight_left = sum(g.weight for g in plan)
        self.last_left = sum(g.weight for g in plan if g.last)
        self.ended_well = False  # whether the first of them was begun: one is timed even after all time is over
        self.overruns: list[float] = []  # actual over planned time, of groups whose minimum of rounds took too long
        self.deadline = time.perf_counter() + options.seconds
        self.compile_left = options.compile_seconds
        self.copy_gb_s = bandwidth.copy_probe(options.device)
        self.conditions: dict[Contender, dict[str, Any]] = {}  # of the current group: more columns of its rows
        self.current: Group | None = None
        self.results: dict[Contender, list[float] | Refused] = {}

    def results_of(self, group: Group) -> dict[Contender, list[float] | Refused]:
        """Seconds per call, by round, or the reason why there are none. The last group's are cached."""
        if group is not self.current:
            self.emit({"start": group.label, "done": self.total - self.weight_left, "total": self.total})
            self.results, self.current = self._measure(group), group
            self.weight_left -= group.weight
            self.last_left -= group.weight * group.last
            for contender, result in self.results.items():
                if isinstance(result, Refused):
                    row = group.identity(contender) | {"status": result.status, "note": result.note}
                    self.emit({"refused": row})
                else:
                    self.emit({"verified": group.name_of(contender)})
        return self.results

    def _measure(self, group: Group) -> dict[Contender, list[float] | Refused]:
        now = time.perf_counter()
        left = self.deadline - now - (0.0 if group.last else self._kept_back())
        is_owed = group.last and not self.ended_well and self.options.seconds > 0  # whatever the time
        self.ended_well |= is_owed
        if not is_owed and (left <= 0 or (left < group.weight / 2 and not group.last)):
            spent = Refused(
                "out of time", f"too little left of the {self.options.seconds:.0f} s for this malloc setting"
            )
            return dict.fromkeys(group.contenders, spent)
        until = now + max(0.0, left) * group.weight / (self.weight_left - (0.0 if group.last else self.last_left))
        refused: dict[Contender, Refused] = {}
        steps: dict[Contender, Callable[[], object]] = {}
        try:
            bench = group.open()
        except Unavailable as error:
            return dict.fromkeys(group.contenders, Refused("not available", str(error)))
        except Exception as error:
            return dict.fromkeys(group.contenders, failure(error))
        for contender in group.contenders:
            made = self._step(group, bench, contender)
            (refused if isinstance(made, Refused) else steps)[contender] = made
        try:
            before, watch = self.copy_gb_s(), load.Watch()
            samples = timing.interleave(
                steps,
                deadline=until,
                min_rounds=group.min_rounds,
                max_rounds=group.max_rounds,
                stop=max(until, self.deadline - (0.0 if group.last else self._kept_back())),
                device="cpu" if group.on_host else self.options.device,
                pause=group.pause,
            )
            others, ended = watch.others(), time.perf_counter()
            if ended > until:
                self.overruns.append((ended - now) / group.weight)
            copy_gb_s = (before + self.copy_gb_s()) / 2
        except Exception as error:  # errors of GPU kernels are raised only here, without the contender
            return refused | dict.fromkeys(steps, failure(error))
        self.conditions = {contender: {"copy_gb_s": copy_gb_s, "others": others} for contender in steps}
        self._explain(group, bench, steps, samples)
        if group.peaks:
            for contender, step in steps.items():
                self.conditions[contender]["peak_bytes"] = peak_bytes(step, self.options.device)
        return refused | samples

    def _kept_back(self) -> float:
        """Seconds that are reserved for the last groups."""
        pace = max(MARGIN, statistics.median(self.overruns or [1.0]))
        return min(pace * self.last_left, MOST_KEPT * self.options.seconds)

    def _explain(
        self,
        group: Group,
        bench: Bench,
        steps: dict[Contender, Callable[[], object]],
        samples: dict[Contender, list[float]],
    ) -> None:
        """Records why torch.compile is far slower than eager, if it is."""
        for contender in steps:
            eager = Contender("eager", contender.layout)
            if contender.name not in group.compiled or eager not in samples or self.options.device != "cpu":
                continue
            if timing.ratio(samples[eager], samples[contender]) < reasons.SLOW:
                found = reasons.why_slow(steps[contender], steps[eager], bench.code[contender])
                self.conditions[contender]["note"] = found

    def _step(self, group: Group, bench: Bench, contender: Contender) -> Callable[[], object] | Refused:
        start, compiles = time.perf_counter(), contender.name in group.compiled
        if compiles and self.compile_left <= 0:
            return Refused("out of time", f"the {self.options.compile_seconds:.0f} s for torch.compile were spent")
        verify = not is_baseline(contender.name) and group.name_of(contender) not in self.options.verified
        limit = self.compile_left if contender.name == MAX_AUTOTUNE else None
        try:
            with time_limit(limit):
                return bench.step(contender, verify)
        except TimeIsUp:
            spent = (
                f"not compiled within the {limit:.0f} s left of {self.options.compile_seconds:.0f} for torch.compile"
            )
            return Refused("out of time", spent)
        except Unavailable as error:
            return Refused("not available", str(error))
        except AssertionError as error:
            return Refused("wrong", first_line(error))
        except Exception as error:  # a failure is a row of the report; the others are still timed
            return failure(error)
        finally:
            if compiles:
                self.compile_left -= time.perf_counter() - start


def failure(error: Exception) -> Refused:
    """For an exception that is being handled; its traceback goes to the worker's log."""
    traceback.print_exc(file=sys.stderr)
    return Refused("failed", f"{type(error).__name__}: {first_line(error)}")


class TimeIsUp(BaseException):
    """Not an Exception: the compiler would treat that as a failing candidate, and try the next one."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raises TimeIsUp in the block after `seconds`, if given; never on systems without signals."""
    if seconds is None or not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def raise_it(*_: object) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, raise_it)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
