"""Figures of rows as text: durations, speedups, shares, memory, and a row's name."""

from ..suite.rows import Row

MISSING = "-"


def duration(ms: float | None) -> str:
    if ms is None:
        return MISSING
    return f"{ms * 1e3:.2f} us" if ms < 0.1 else f"{ms:.2f} ms" if ms < 1 else f"{ms:.1f} ms"


def times(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}x"


NOISY, CROWDED = "noisy", "crowded"


def to_eager(row: Row) -> str:
    """The ratio, marked if it does not count."""
    why = "" if row.ratio is None or row.counts else f" {CROWDED if row.is_crowded else NOISY}"
    return times(row.ratio) + why


def noise(row: Row) -> str:
    """The noise of the row's ratio."""
    return "over 100%" if row.noise is not None and row.noise > 1 else percent(row.noise)


def percent(value: float | None) -> str:
    return MISSING if value is None else f"{value:.0%}"


def images(row: Row) -> str:
    return MISSING if row.images_s is None else f"{row.images_s:.1f}"


def mebibytes(count: int | None) -> str:
    return MISSING if count is None else f"{count / 2**20:.0f}"


def name(row: Row) -> str:
    api = row.api if row.suite == "overhead" else "none"  # elsewhere the suite says which it is
    parts = [row.operator, row.network, row.shape, row.mode, api, row.layout, f"{row.malloc} malloc"]
    return " ".join(dict.fromkeys(p for p in parts if p != "none"))
