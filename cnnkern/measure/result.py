"""What `cnnkern.benchmark` found: in Python, as a table, in JSON and as a page."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cnnkern.measure.check import Check
from cnnkern.measure.machine import Activity, Machine


@dataclass(frozen=True)
class Contender:
    """A form of the model that was timed, in the same rounds as all others.

    `seconds` of eager is the median of its rounds, that of another is eager's over its ratio, so that times and ratios
    agree. `ratio` is the median over rounds of eager's time by this one's.
    """

    name: str  # eager, converted, folded, torch.compile, converted + torch.compile
    seconds: float  # of a step on the wall's clock
    spread: float  # the middle half of its rounds, as a share of the median
    ratio: float  # times as fast as eager
    chance: float  # how far off the ratio may be by chance, as a share
    peak_bytes: int  # the most that tensors held during a step, beyond what was there before
    event_seconds: float | None = None  # on a GPU: of a step between two events of its stream
    kernel_seconds: float | None = None  # on a GPU: of a step's kernels

    @property
    def waits(self) -> float:
        """The share of a step in which the GPU waits for the host; 0 on a CPU."""
        return 0.0 if self.kernel_seconds is None else max(0.0, 1 - self.kernel_seconds / self.seconds)


@dataclass(frozen=True)
class BenchmarkResult:
    """What :func:`cnnkern.benchmark` returns. Times are seconds, memory is bytes, shares are between 0 and 1.

    ``str()`` gives the tables, :meth:`to_json` and :meth:`to_html` write files.
    """

    model: str
    inputs: list[list[int]]  # the shapes of the model's arguments
    batch: int  # images of a step
    mode: str  # training (forward, backward, SGD with momentum) or inference (forward)
    dtype: str  # float32, or that of autocast: bfloat16, float16
    layout: str  # contiguous or channels_last
    device: str
    threads: int  # of PyTorch on the CPU
    machine: Machine
    activity: Activity  # what else the machine did
    tuned: bool  # whether a table of `cnnkern tune` was in use, by which PyTorch computes some of the calls
    fused: dict[str, int]  # layers that were replaced, by kind
    check: Check
    rounds: int = 0  # 0 where results were wrong, and nothing was timed
    noise: float = 0.0  # eager's ratio to itself: its distance from 1 and its chance
    contenders: list[Contender] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # implementations that could not be run, and why
    breakdown: dict[str, dict[str, float]] = field(default_factory=dict)  # seconds of a step by kind: eager, converted
    bound: float = 1.0  # times as fast as eager, if norms, activations, additions and grouped convolutions took no time

    @property
    def ok(self) -> bool:
        """Whether the results were right."""
        return self.check.ok

    def within_noise(self, contender: Contender) -> bool:
        """Whether this ratio may as well be 1: it is no farther from it than eager's own, or than its chance."""
        return abs(contender.ratio - 1) <= max(self.noise, contender.ratio * contender.chance)

    def images_per_second(self, contender: Contender) -> float:
        return self.batch / contender.seconds

    @property
    def host_bound(self) -> bool:
        """Whether a GPU waits for the host in a fifth of eager's step or more."""
        return any(c.name == "eager" and c.waits > 0.2 for c in self.contenders)

    def to_json(self, path: str | Path | None = None) -> str:
        """All fields as JSON, which is also written to `path` where one is given."""
        text = json.dumps(asdict(self) | {"ok": self.ok, "host_bound": self.host_bound}, indent=1)
        if path is not None:
            Path(path).write_text(text + "\n")
        return text

    def to_html(self, path: str | Path | None = None) -> str:
        """The tables as a page of its own, which is also written to `path` where one is given."""
        from cnnkern.measure import show

        text = show.page(self)
        if path is not None:
            Path(path).write_text(text)
        return text

    def __str__(self) -> str:
        from cnnkern.measure import show

        return show.text(self)
