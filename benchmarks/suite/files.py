"""The file of a run: a table in CSV, a row per line, with what all rows share in its first line.

    # cnnkern benchmarks: {"schema": 2, "created": "...", "quick": false, "out_of_place": [], "same": {"torch": ...}}
    operator,shape,...
    bn_act,32x64x112x112,...

A cell `^` repeats the one above it. What can be computed from other columns is not written (`Row`'s properties).
Figures have four digits, spreads two.
"""

import csv
import io
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from .place import RESULTS as RESULTS
from .rows import Row

SCHEMA = 2
MARK = "# cnnkern benchmarks: "
ABOVE = "^"
DIGITS, SPREADS = 4, {"iqr_ms": 2, "noise": 2, "others": 2, "copy_gb_s": 3, "bandwidth_share": 3}
ENDING = ".csv"
TYPES = {f.name: next(t for t in (get_args(f.type) or (f.type,)) if t is not type(None)) for f in fields(Row)}
RENAMED = {"ours": "cnnkern"}  # names of contenders in older files -> names now
OPTIONAL = {f.name for f in fields(Row) if type(None) in get_args(f.type)}


@dataclass(frozen=True)
class Run:
    rows: list[Row]
    created: str
    quick: bool = False
    # Operators whose eager returns a new tensor per step: rows from before the baseline was in place.
    out_of_place: tuple[str, ...] = ()


def published() -> list[Path]:
    """The files that are published, by name."""
    return sorted((RESULTS / "published").glob(f"*{ENDING}"))


def file_stem(rows: list[Row], quick: bool) -> str:
    """A name that carries machine, threads, torch, dtype, layouts, malloc settings and commit."""
    measured = [r for r in rows if r.suite != "bandwidth"] or rows

    def values(column: str) -> str:
        return "+".join(sorted({str(getattr(r, column)) for r in measured}))

    parts = [values("machine"), f"{values('threads')}threads", f"torch-{values('torch')}", values("dtype")]
    parts += [values("layout"), f"{values('malloc')}-malloc", values("commit")] + ["quick"] * quick
    return "_".join(parts)


def dumps(run: Run) -> str:
    """The file's text. Raises ValueError for a run without rows."""
    if not run.rows:
        raise ValueError("no rows")
    lines = [{n: _cell(n, v) for n, v in asdict(r).items()} for r in run.rows]
    same = {n: v for n, v in lines[0].items() if all(line[n] == v for line in lines)}
    rest = [n for n in lines[0] if n not in same] or ["contender"]
    head = {"schema": SCHEMA, "created": run.created, "quick": run.quick}
    head |= {"out_of_place": run.out_of_place, "same": same}
    text = io.StringIO()
    text.write(f"{MARK}{json.dumps(head)}\n")
    writer = csv.DictWriter(text, rest, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for above, line in zip([{}, *lines], lines, strict=False):
        writer.writerow({n: ABOVE if len(v) > 1 and above.get(n) == v else v for n, v in line.items()})
    return text.getvalue()


def loads(text: str) -> Run:
    """The run in the text of a file. Raises ValueError for any other text."""
    first, _, table = text.partition("\n")
    try:
        if not first.startswith(MARK):
            raise ValueError(f"it does not begin with {MARK.strip()!r}")
        head = json.loads(first.removeprefix(MARK))
        if head["schema"] != SCHEMA:
            raise ValueError(f"schema {head['schema']}, this version reads {SCHEMA}")
        found, above = [], {}
        for line in csv.DictReader(io.StringIO(table)):
            above = {n: above[n] if v == ABOVE else v for n, v in line.items()}
            found.append(Row(**{n: _value(n, v) for n, v in (head["same"] | above).items()}))
        return Run(found, head["created"], head["quick"], tuple(head["out_of_place"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a result of these benchmarks ({type(error).__name__}: {error})") from error


def load(path: Path) -> Run:
    """Raises ValueError with one line for a file that cannot be read or is no result."""
    try:
        found = loads(path.read_text())
        if not found.rows:
            raise ValueError("no rows")
        return found
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"cannot read {path}: {reason}") from error


def _cell(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.{SPREADS.get(name, DIGITS)}g}"
    return "" if value is None else str(value)


def _value(name: str, cell: str) -> Any:
    if name in OPTIONAL and cell == "":
        return None
    if name == "contender":
        return RENAMED.get(cell, cell)
    return TYPES[name](cell)


def write(path: Path, content: str | bytes) -> None:
    """Writes the whole file or, if that fails, leaves the old one."""
    partial = path.with_name(path.name + ".partial")
    data = content.encode() if isinstance(content, str) else content
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:  # after Ctrl-C too
        partial.unlink(missing_ok=True)


def publish(name: str, run: Run) -> Path:
    """Writes a run to the published results."""
    path = RESULTS / "published" / f"{name}{ENDING}"
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, dumps(run))
    return path
