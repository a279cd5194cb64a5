"""Geometric means of rows, and which rows count for them."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..suite.groups import OUT_OF_PLACE
from ..suite.rows import Row, is_spoilt
from ..suite.timing import geometric_mean
from .figures import NOISY, times


@dataclass(frozen=True)
class Mean:
    """The geometric mean of one contender's speedup over eager, over the shapes of a network that count."""

    operator: str
    network: str
    mode: str
    layout: str
    malloc: str
    contender: str
    shapes: int  # that were timed ...
    counted: int  # ... and those of them that count; if none does, there is no mean
    ratio: float | None
    bandwidth_share: float | None
    compiled: int  # shapes that torch.compile was timed on as well ...
    ratio_to_compile: float | None  # ... and the mean of its time over this contender's


def means(rows: Iterable[Row]) -> list[Mean]:
    grouped: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.suite == "operators" and row.status == "ok" and row.contender != OUT_OF_PLACE:
            key = (row.operator, row.network, row.mode, row.layout, row.malloc, row.contender)
            grouped.setdefault(key, []).append(row)
    found = []
    for key, timed in grouped.items():
        members = [r for r in timed if r.counts]
        shares = [r.bandwidth_share for r in members if r.bandwidth_share is not None]
        to_compile = [r.ratio_to_compile for r in members if r.ratio_to_compile is not None]
        ratio = geometric_mean([r.ratio for r in members if r.ratio is not None]) if members else None
        compared = geometric_mean(to_compile) if to_compile else None
        share = geometric_mean(shares) if shares else None
        compiled = sum(r.ratio_to_compile is not None for r in timed)
        found.append(Mean(*key, len(timed), len(members), ratio, share, compiled, compared))
    return found


NO_NETWORKS = ("widths",)  # shapes that belong to no network
ALL, ALL_OF_BATCH_1 = "all networks", "all networks, batch 1"


def totals(rows: Iterable[Row]) -> list[Mean]:
    """cnnkern's means over the shapes of all networks, separately for single images, of operators with several
    networks."""
    rows = [r for r in rows if r.suite == "operators" and r.contender == "cnnkern" and r.network not in NO_NETWORKS]
    networks: dict[tuple[str, str], set[str]] = {}
    together = []
    for r in rows:
        network = ALL_OF_BATCH_1 if r.network.endswith(" batch 1") else ALL
        networks.setdefault((r.operator, network), set()).add(r.network)
        together.append(replace(r, network=network))
    return means(r for r in together if len(networks[r.operator, r.network]) > 1)


def mean(m: Mean) -> str:
    """Its ratio, with a ~ if more than a quarter of its rows do not count."""
    return NOISY if m.ratio is None else times(m.ratio) + "~" * is_spoilt(m.counted, m.shapes)


def ranked(rows: Iterable[Row]) -> list[Row]:
    """cnnkern's rows whose speedup over eager counts, best first."""
    found = [r for r in rows if r.contender == "cnnkern" and r.counts]
    return sorted(found, key=lambda r: -(r.ratio or 0.0))


def left_out(rows: Iterable[Row]) -> list[Row]:
    """cnnkern's rows that do not count, because of noise or other load."""
    return [r for r in rows if r.contender == "cnnkern" and r.ratio is not None and not r.counts]
