"""A chart of a result: how many times faster than eager, by operator, network, mode and layout."""

import io

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from ..suite.rows import Row
from .tables import against_eager, means, origin

COLOURS = {"tuned": "#1f77b4", "default": "#9ecae1", "custom": "#6baed6"}
COMPILE_COLOUR = "#ff7f0e"


def bars(rows: list[Row]) -> list[tuple[str, str, float, str]]:
    """(label, series, ratio, what stands beside it) of every bar: operators by geometric mean, models each.

    A mean says over how many shapes it goes: torch.compile's goes over fewer than ours.
    """
    found = []
    for m in means(rows):
        if m.contender != "eager":
            label = f"{m.operator} {m.network}, {m.mode}, {m.layout}"
            shapes = f"{m.shapes} shape" + "s" * (m.shapes > 1)
            found.append((label, f"{m.contender}, {m.malloc} malloc", m.ratio, f"{m.ratio:.2f}, {shapes}"))
    for suite in ("models", "overhead"):
        for _, r in against_eager(rows, suite):
            label = f"{r.operator} {r.shape}, {r.mode}, {r.layout if suite == 'models' else r.api}"
            found.append((label, f"ours, {r.malloc} malloc", r.ratio, f"{r.ratio:.2f}"))
    return found


def draw(rows: list[Row], created: str) -> bytes:
    """The PNG's bytes."""
    found = bars(rows)
    labels = list(dict.fromkeys(label for label, *_ in found))
    series = sorted({s for _, s, *_ in found}, key=lambda s: (s.startswith("torch"), s))
    height = 0.8 / max(1, len(series))
    figure, axes = plt.subplots(figsize=(10, 1.6 + 0.16 * len(labels) * (1 + len(series))), layout="constrained")
    for i, one in enumerate(series):
        points = [(labels.index(label) + i * height, ratio) for label, s, ratio, _ in found if s == one]
        malloc = one.split(", ")[1].removesuffix(" malloc")
        colour = COMPILE_COLOUR if one.startswith("torch") else COLOURS[malloc]
        drawn = axes.barh([y for y, _ in points], [x for _, x in points], height, label=one, color=colour)
        axes.bar_label(drawn, [text for _, s, _, text in found if s == one], padding=2, fontsize=7)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks([i + height * (len(series) - 1) / 2 for i in range(len(labels))], labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)  # room for the text beside the longest bar
    axes.set_xlabel("times as fast as eager in the same layout (geometric mean over a network's shapes)")
    axes.set_title(origin(rows, created), fontsize=8)
    if series:
        axes.legend(fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    plt.close(figure)
    return image.getvalue()
