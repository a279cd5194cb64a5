"""One row per measurement: the columns of the results, and how rows come from samples."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from . import timing
from .bandwidth import MIXES, Bandwidth, least_seconds
from .groups import AGAIN, compiles_reference

# A row's ratio counts where its noise is at most QUIET, or at most a THIRD of what it gains or loses and no more than
# LOUD: 3.0x within a fifth is a result, 1.1x within a fifth is none.
QUIET, LOUD, THIRD = 0.10, 0.25, 1 / 3
# Cores that a row's threads may lack. Where one of two threads shares its core with others, each call waits for it: a
# call of microseconds takes the scheduler's milliseconds, every time, and no spread tells.
LACKING = 0.25


@dataclass(frozen=True)
class Row:
    suite: str  # operators, models, overhead or bandwidth
    operator: str
    network: str
    shape: str
    mode: str
    api: str
    layout: str
    malloc: str
    contender: str
    status: str  # ok, or why there are no times: not available, wrong, failed, out of time
    note: str  # on the status, or why torch.compile is so slow
    rounds: int
    median_ms: float | None
    min_ms: float | None
    iqr_ms: float | None
    bytes: int | None  # the least traffic
    bandwidth_share: float | None  # the least time that the measured bandwidth allows, over the median
    ratio: float | None  # eager's time in the same layout over this one, median of the rounds; above 1 is faster
    dtype: str
    machine: str
    device: str
    cpu_capability: str  # whose kernels answered: an instruction set, or on a GPU a backend
    threads: int
    torch: str
    cnnkern: str
    commit: str
    # Relative, of the ratio: how far its 95 % interval reaches, or eager's against itself in the same rounds, which is
    # what stands here in eager's row. None where it is not known.
    noise: float | None = None
    copy_gb_s: float | None = None  # of a plain copy of 64 MiB, before and after the rounds of this row's group
    peak_bytes: int | None = None  # that a call of a model holds at once, beyond its weights
    # The time of the fastest compiled form of the reference over this one, median of the rounds; None where there is no
    # such form, or this is one.
    ratio_to_compile: float | None = None
    others: float | None = None  # cores that other processes, or other machines of the host, kept busy meanwhile
    cache_bytes: int | None = None  # of the machine's last-level cache
    cores: int | None = None  # that this process may use

    @property
    def is_crowded(self) -> bool:
        """Whether others kept cores busy that several of this process's threads needed at once."""
        if self.others is None or self.cores is None or self.threads == 1 or self.device != "cpu":
            return False
        return self.others > max(0, self.cores - self.threads) + LACKING

    @property
    def counts(self) -> bool:
        """Whether the machine and noise leave something of the ratio; rows of which no noise is known count."""
        if self.ratio is None or self.is_crowded:
            return False
        if self.noise is None:
            return True
        gained = max(self.ratio, 1 / self.ratio) - 1
        return self.noise <= max(QUIET, min(LOUD, THIRD * gained))

    @property
    def lost(self) -> bool:
        """cnnkern, slower than eager, and not by noise alone."""
        return self.contender == "cnnkern" and self.counts and (self.ratio or 1.0) < 1

    @property
    def gb_s(self) -> float | None:
        """The least traffic over the median."""
        return self.bytes / self.median_ms / 1e6 if self.bytes and self.median_ms else None

    @property
    def images_s(self) -> float | None:
        """Of a model, whose shape begins with the batch size; None of anything else."""
        if self.suite != "models" or not self.median_ms:
            return None
        return int(self.shape.split("x")[0]) / self.median_ms * 1e3


def is_spoilt(counted: int, timed: int) -> bool:
    """Whether a mean over the rows that count is marked: noise has taken more than a quarter, and what is left of a
    network's shapes may have another mean than all of them."""
    return 4 * counted < 3 * timed


TOGETHER = ("suite", "operator", "network", "shape", "mode", "api", "layout")  # what is timed in the same rounds
Key = tuple[str, ...]


def from_records(
    records: Iterable[dict[str, Any]],
    refused: Iterable[dict[str, Any]],
    bandwidths: list[Bandwidth],
    malloc: str,
    where: dict[str, Any],
) -> list[Row]:
    """Rows of one worker: `records` as pytest-benchmark writes them, with what Group.identity says in extra_info."""

    def key(what: dict[str, Any]) -> Key:
        return tuple(what[n] for n in TOGETHER)

    timed = [(dict(record["extra_info"]), record["stats"]["data"]) for record in records]
    eager = {key(what): samples for what, samples in timed if what["contender"] == "eager"}
    again = {key(what): samples for what, samples in timed if what["contender"] == AGAIN}
    compiled: dict[Key, list[float]] = {}  # the fastest
    for what, samples in timed:
        if compiles_reference(what["contender"]):
            compiled[key(what)] = min(compiled.get(key(what), samples), samples, key=statistics.median)
    rows = []
    for what, samples in timed:
        if what["contender"] == AGAIN:
            continue
        base, floor = eager[key(what)], 0.0
        if key(what) in again:
            low, high = timing.ratio_interval(base, again[key(what)])
            floor = max(high, 1 / low) - 1
        low, high = timing.ratio_interval(base, samples)
        what["noise"] = max(floor, (high / low) ** 0.5 - 1) if len(samples) > 1 else None
        if key(what) in compiled and not compiles_reference(what["contender"]):
            what["ratio_to_compile"] = timing.ratio(compiled[key(what)], samples)
        rows.append(_row(what, samples, timing.ratio(base, samples), bandwidths, malloc, where))
    missed = (dict(r) for r in refused if r["contender"] != AGAIN)
    return rows + [_row(r, [], None, bandwidths, malloc, where) for r in missed]


def _row(
    what: dict[str, Any],
    samples: list[float],
    ratio: float | None,
    bandwidths: list[Bandwidth],
    malloc: str,
    where: dict[str, Any],
) -> Row:
    read, written = what.pop("bytes_read"), what.pop("bytes_written")
    whole, median = read + written, statistics.median(samples) if samples else None
    rated = whole > 0 and median is not None and bandwidths
    quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else None
    return Row(
        **{"status": "ok", "note": ""} | what,
        malloc=malloc,
        rounds=len(samples),
        median_ms=None if median is None else median * 1e3,
        min_ms=min(samples) * 1e3 if samples else None,
        iqr_ms=(quartiles[2] - quartiles[0]) * 1e3 if quartiles else None,
        bytes=whole or None,
        bandwidth_share=least_seconds(bandwidths, read, written) / median if rated else None,
        ratio=ratio,
        **where,
    )


def bandwidth_rows(bandwidths: Iterable[Bandwidth], where: dict[str, Any]) -> list[Row]:
    """The measured bandwidths as rows of the same table: mix as operator, bytes touched as shape."""
    return [
        Row(
            suite="bandwidth",
            operator=b.mix,
            network="none",
            shape=str(b.size),
            mode="none",
            api="none",
            layout="contiguous",
            malloc="none",  # nothing is allocated while the clock runs
            contender="machine",
            status="ok",
            note="reads {:.2f}, writes {:.2f} of it".format(*MIXES[b.mix]),
            rounds=0,
            median_ms=b.size / b.gb_s / 1e6,
            min_ms=None,
            iqr_ms=None,
            bytes=b.size,
            bandwidth_share=None,
            ratio=None,
            dtype="float32",
            **where,
        )
        for b in bandwidths
    ]
