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

    Attributes:
        name: eager, converted, folded, torch.compile, or converted + torch.compile.
        seconds: Wall-clock time of a step: of eager the median over rounds, of the others that divided by ``ratio``.
        spread: The interquartile range of its rounds, divided by their median.
        ratio: The speedup: the median over rounds of eager's time divided by this one's.
        chance: The relative uncertainty of ``ratio``.
        peak_bytes: The peak memory of tensors during a step, in addition to what existed before it.
        event_seconds: On a GPU, the time of a step between two events of its stream.
        kernel_seconds: On a GPU, the time of a step's kernels.
    """

    name: str
    seconds: float
    spread: float
    ratio: float
    chance: float
    peak_bytes: int
    event_seconds: float | None = None
    kernel_seconds: float | None = None

    @property
    def waits(self) -> float:
        """The share of a step in which the GPU waits for the host; 0 on a CPU."""
        return 0.0 if self.kernel_seconds is None else max(0.0, 1 - self.kernel_seconds / self.seconds)


@dataclass(frozen=True)
class BenchmarkResult:
    """What :func:`cnnkern.benchmark` returns. Times are in seconds, memory in bytes, shares between 0 and 1.

    ``str()`` gives the tables, :meth:`to_json` and :meth:`to_html` write files.

    Attributes:
        model: The name of the model.
        inputs: The shapes of its arguments.
        batch: The number of images per step.
        mode: training (forward, backward, SGD with momentum) or inference (forward).
        dtype: float32, or that of autocast: bfloat16 or float16.
        layout: contiguous or channels_last.
        device: The device.
        threads: PyTorch's CPU threads.
        machine: The machine, torch and cnnkern.
        activity: Other load of the machine.
        tuned: Whether a table of `cnnkern tune` was in use, by which PyTorch computes some of the calls.
        fused: The number of replaced layers by kind.
        check: The comparison of results.
        rounds: The number of rounds; 0 if results were wrong and nothing was timed.
        noise: The noise floor: how far eager's ratio to itself is from 1, plus its uncertainty.
        contenders: What was timed.
        failed: Implementations that could not run, and why.
        breakdown: Seconds of a step by kind of operator, of eager and of the converted model.
        bound: The speedup if norms, activations, additions and grouped convolutions took no time.
    """

    model: str
    inputs: list[list[int]]
    batch: int
    mode: str
    dtype: str
    layout: str
    device: str
    threads: int
    machine: Machine
    activity: Activity
    tuned: bool
    fused: dict[str, int]
    check: Check
    rounds: int = 0
    noise: float = 0.0
    contenders: list[Contender] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    breakdown: dict[str, dict[str, float]] = field(default_factory=dict)
    bound: float = 1.0

    @property
    def ok(self) -> bool:
        """Whether the results agree."""
        return self.check.ok

    def within_noise(self, contender: Contender) -> bool:
        """Whether this ratio differs from 1 by no more than the noise floor, or than its own uncertainty."""
        return abs(contender.ratio - 1) <= max(self.noise, contender.ratio * contender.chance)

    def images_per_second(self, contender: Contender) -> float:
        """Images per second of a contender."""
        return self.batch / contender.seconds

    @property
    def host_bound(self) -> bool:
        """Whether a GPU waits for the host in more than 20 % of eager's step."""
        return any(c.name == "eager" and c.waits > 0.2 for c in self.contenders)

    def to_json(self, path: str | Path | None = None) -> str:
        """All fields as JSON, which is also written to `path` if it is given."""
        text = json.dumps(asdict(self) | {"ok": self.ok, "host_bound": self.host_bound}, indent=1)
        if path is not None:
            Path(path).write_text(text + "\n")
        return text

    def to_html(self, path: str | Path | None = None) -> str:
        """The tables as an HTML page, which is also written to `path` if it is given."""
        from cnnkern.measure import show

        text = show.page(self)
        if path is not None:
            Path(path).write_text(text)
        return text

    def __str__(self) -> str:
        from cnnkern.measure import show

        return show.text(self)
