"""What came back from a GPU, as published results."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..suite import files, rows
from ..suite.bandwidth import Bandwidth

SCHEMA = 1
# Published run -> the sections that it is made of.
RUNS = {
    "models": ("models", "graphed", "compile"),
    "operators": ("grouped", "batch_norm", "depthwise", "layer_norm"),
    "tf32": ("tf32",),
    "kernels": ("kernels",),
}


@dataclass
class Sections:
    """The files of one session on a GPU, by section."""

    created: str = ""
    where: dict[str, Any] = field(default_factory=dict)
    found: dict[str, dict[str, Any]] = field(default_factory=dict)


def read(folder: Path) -> Sections:
    """Raises ValueError with one line where the folder has no results, or not of one session."""
    result = Sections()
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text())
            if content["schema"] != SCHEMA:
                raise ValueError(f"schema {content['schema']}, this version reads {SCHEMA}")
            if content["dry_run"]:
                raise ValueError("it is of a dry run, whose figures mean nothing")
            if result.where and content["where"] != result.where:
                raise ValueError("it is of another machine or commit than the others")
            result.where, result.created = content["where"], max(result.created, content["created"])
            result.found[content["section"]] = content
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"cannot read {path}: {error}") from error
    if not result.found:
        raise ValueError(f"no results of a section in {folder}")
    return result


def merge(folders: list[Path], prefix: str) -> list[Path]:
    """Publishes the sections in `folders` as one run for each of RUNS: `prefix`-models, `prefix`-operators and so on.

    A section that several folders have is taken from the last of them: what was repeated when its kernels had changed.
    """
    sessions = {name: session for session in map(read, folders) for name in session.found}
    measured = sessions["bandwidth"].found["bandwidth"]["bandwidths"] if "bandwidth" in sessions else []
    bandwidths = [Bandwidth(**b) for b in measured]
    written = []
    for name, parts in RUNS.items():
        there = [part for part in parts if part in sessions]
        made: list[rows.Row] = []
        for part in there:
            content, where = sessions[part].found[part], sessions[part].where
            made += rows.from_records(content["records"], content["refused"], bandwidths, "default", where)
        if any(r.status == "ok" for r in made):
            if "bandwidth" in sessions:
                made += rows.bandwidth_rows(bandwidths, sessions["bandwidth"].where)
            created = max(sessions[part].created for part in there)
            written.append(files.publish(f"{prefix}-{name}", files.Run(made, created)))
    return written
