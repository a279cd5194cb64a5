"""One row a measurement: the schema of the results, how rows come from samples, and the files that keep them."""

import csv
import io
import json
import os
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from . import timing
from .bandwidth import MIXES, Bandwidth, least_seconds
from .groups import compiles_reference
from .place import RESULTS as RESULTS

SCHEMA = 1


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
    note: str
    rounds: int
    median_ms: float | None
    min_ms: float | None
    iqr_ms: float | None
    bytes: int | None  # the least traffic
    gb_s: float | None  # that traffic over the median
    bandwidth_share: float | None  # the least time that the measured bandwidth allows, over the median
    ratio: float | None  # eager's time in the same layout over this one, median of the rounds; above 1 is faster
    lost: bool  # ours, and slower than eager
    dtype: str
    machine: str
    device: str
    cpu_capability: str  # whose kernels answered: an instruction set, or on a GPU a backend
    threads: int
    torch: str
    cnnkern: str
    commit: str
    copy_gb_s: float | None = None  # of a plain copy of 64 MiB, before and after the rounds of this row's group
    peak_bytes: int | None = None  # that a call of a model holds at once, beyond its weights
    # The time of the fastest compiled form of the reference over this one, median of the rounds; None where there is no
    # such form, or this is one.
    ratio_to_compile: float | None = None
    images_s: float | None = None  # of a model
    cache_bytes: int | None = None  # of the machine's last-level cache


def from_records(
    records: Iterable[dict[str, Any]],
    refused: Iterable[dict[str, Any]],
    bandwidths: list[Bandwidth],
    malloc: str,
    where: dict[str, Any],
) -> list[Row]:
    """Rows of one worker: `records` as pytest-benchmark writes them, with what Group.identity says in extra_info."""
    records = list(records)
    together = ("suite", "operator", "network", "shape", "mode", "api", "layout")

    def key(what: dict[str, Any]) -> tuple[str, ...]:
        return tuple(what[n] for n in together)

    eager: dict[tuple[str, ...], list[float]] = {}
    compiled: dict[tuple[str, ...], list[float]] = {}  # the fastest
    for record in records:
        what, samples = record["extra_info"], record["stats"]["data"]
        if what["contender"] == "eager":
            eager[key(what)] = samples
        elif compiles_reference(what["contender"]):
            best = compiled.get(key(what), samples)
            compiled[key(what)] = min(best, samples, key=statistics.median)
    rows = []
    for record in records:
        what, samples = dict(record["extra_info"]), record["stats"]["data"]
        ratio = timing.ratio(eager[key(what)], samples)
        if key(what) in compiled and not compiles_reference(what["contender"]):
            what["ratio_to_compile"] = timing.ratio(compiled[key(what)], samples)
        rows.append(_row(what, samples, ratio, bandwidths, malloc, where))
    return rows + [_row(dict(r), [], None, bandwidths, malloc, where) for r in refused]


def images_per_second(suite: str, shape: str, median_ms: float | None) -> float | None:
    """Of a model, whose shape begins with the batch size; None of anything else."""
    return int(shape.split("x")[0]) / median_ms * 1e3 if suite == "models" and median_ms else None


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
    median_ms = None if median is None else median * 1e3
    rated = whole > 0 and median is not None
    quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else None
    is_baseline = what["contender"] == "eager"
    return Row(
        **{"status": "ok", "note": ""} | what,
        malloc=malloc,
        rounds=len(samples),
        median_ms=median_ms,
        min_ms=min(samples) * 1e3 if samples else None,
        iqr_ms=(quartiles[2] - quartiles[0]) * 1e3 if quartiles else None,
        bytes=whole or None,
        gb_s=whole / median / 1e9 if rated else None,
        bandwidth_share=least_seconds(bandwidths, read, written) / median if rated and bandwidths else None,
        ratio=1.0 if is_baseline and samples else ratio,
        lost=what["contender"] == "ours" and ratio is not None and ratio < 1,
        images_s=images_per_second(what["suite"], what["shape"], median_ms),
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
            gb_s=b.gb_s,
            bandwidth_share=None,
            ratio=None,
            lost=False,
            dtype="float32",
            **where,
        )
        for b in bandwidths
    ]


def file_stem(rows: list[Row], quick: bool) -> str:
    """A name that carries machine, threads, torch, dtype, layouts, malloc settings and commit."""
    measured = [r for r in rows if r.suite != "bandwidth"] or rows

    def values(column: str) -> str:
        return "+".join(sorted({str(getattr(r, column)) for r in measured}))

    parts = [values("machine"), f"{values('threads')}threads", f"torch-{values('torch')}", values("dtype")]
    parts += [values("layout"), f"{values('malloc')}-malloc", values("commit")] + ["quick"] * quick
    return "_".join(parts)


def to_json(rows: Iterable[Row], created: str, quick: bool) -> str:
    content = {"schema": SCHEMA, "created": created, "quick": quick, "rows": [asdict(r) for r in rows]}
    return json.dumps(content, indent=1)


def from_json(text: str) -> tuple[list[Row], dict[str, Any]]:
    """(rows, the rest of the file). Raises ValueError for a file that is no result of this schema."""
    try:
        content = json.loads(text)
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']}, this version reads {SCHEMA}")
        return [Row(**row) for row in content.pop("rows")], content
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"not a result of these benchmarks ({type(error).__name__}: {error})") from error


def load(path: Path) -> tuple[list[Row], str]:
    """(rows, when they were made). Raises ValueError with one line for a file that cannot be read or is no result."""
    try:
        found, rest = from_json(path.read_text())
        if not found:
            raise ValueError("no rows")
        return found, rest["created"]
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"cannot read {path}: {reason}") from error


def to_csv(rows: Iterable[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(r) for r in rows)
    return text.getvalue()


def write(path: Path, content: str | bytes) -> None:
    """Writes the whole file or, where that fails, leaves what was there."""
    partial = path.with_name(path.name + ".partial")
    data = content.encode() if isinstance(content, str) else content
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:  # after Ctrl-C too
        partial.unlink(missing_ok=True)
