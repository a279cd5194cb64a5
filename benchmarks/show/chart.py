"""The chart of README.md: the speedup over eager PyTorch of models and operators, on a CPU and on a GPU.

`python -m benchmarks.show.chart` makes it from the published results, for light and dark pages. The numbers
that it shows are also stored in the PNG, as its description, so that a test can tell whether it is current.
"""

import argparse
import io
import json
import sys

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ..suite import files
from ..suite.files import Run
from ..suite.models import FOLDED
from ..suite.place import ROOT
from ..suite.timing import geometric_mean
from .means import NO_NETWORKS

# Title, published run, suite.
PANELS = (
    ("Whole models, CPU", "cpu-models", "models"),
    ("Whole models, H100", "cuda-h100-minutes-models", "models"),
    ("Operators, CPU", "cpu-all-networks", "operators"),
    ("Operators, H100", "cuda-h100-minutes-operators", "operators"),
)
MODES = {"training": "a training step", "inference": "inference (models folded)"}
TITLE = "Speedup over eager PyTorch: longer bars are faster, the vertical line is eager"
NOTHING = "every published row\nis too noisy so far"
COMPILED = "torch.compile"
# Ink, page, and a colour for each mode, of a light and a dark page.
THEMES = {"light": ("#1f2328", "#ffffff", "#0969da", "#7fb2ee"), "dark": ("#e6edf3", "#0d1117", "#4493f8", "#1f4b86")}
SIZE, DPI = (12, 7), 100  # 1200 by 700 pixels
FOLDER = "docs/images"

Bars = dict[str, dict[str, dict[str, float]]]  # model or operator -> contender -> mode -> speedup over eager


def bars(run: Run, suite: str) -> Bars:
    """Geometric means of rows that count, over layouts, malloc settings, shapes and networks. Single images, shapes
    that belong to no network, and operators whose eager is out of place are left out."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for r in run.rows:
        alone = r.network.endswith(" batch 1") or r.network in NO_NETWORKS or r.shape.startswith("1x")
        if r.suite == suite and r.counts and not alone and r.operator not in run.out_of_place:
            found.setdefault((r.operator, r.contender, r.mode), []).append(r.ratio or 1.0)
    result: Bars = {}
    for (operator, contender, mode), ratios in found.items():
        shown = FOLDED if (suite, mode) == ("models", "inference") else "cnnkern"
        name = "cnnkern" if contender == shown else contender
        if contender in (shown, COMPILED) and mode in MODES and (suite == "models" or contender == shown):
            result.setdefault(operator, {}).setdefault(name, {})[mode] = round(geometric_mean(ratios), 2)
    return {name: of for name, of in result.items() if "cnnkern" in of and "(" not in name}


def everything() -> dict[str, Bars]:
    """The bars by the title of the panel."""
    published = files.RESULTS / "published"
    return {title: bars(files.load(published / f"{name}.csv"), suite) for title, name, suite in PANELS}


def draw(found: dict[str, Bars], theme: str) -> bytes:
    """The PNG's bytes."""
    ink, paper, *colours = THEMES[theme]
    style = {"text.color": ink, "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink, "axes.edgecolor": ink}
    with plt.rc_context(style | {"figure.facecolor": paper, "axes.facecolor": paper, "font.size": 11}):
        heights = [max(1, *(len(found[PANELS[i][0]]) for i in pair)) for pair in ((0, 1), (2, 3))]
        figure, axes = plt.subplots(2, 2, figsize=SIZE, layout="constrained", height_ratios=heights)
        for panel, (title, of) in zip(axes.flat, found.items(), strict=True):
            _panel(panel, title, of, ink, dict(zip(MODES, zip(colours, (paper, ink), strict=True), strict=True)))
        key = [Patch(color=c, label=f"cnnkern, {m}") for c, m in zip(colours, MODES.values(), strict=True)]
        key.append(Line2D([], [], color=ink, marker="D", linestyle="", markersize=5, label=COMPILED))
        figure.legend(handles=key, loc="outside lower center", ncols=3, frameon=False)
        figure.suptitle(TITLE, x=0.01, ha="left", fontsize=14, weight="bold")
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=DPI, metadata={"Description": json.dumps(found), "Software": None})
        plt.close(figure)
    return image.getvalue()


def _panel(axes: Axes, title: str, of: Bars, ink: str, colours: dict[str, tuple[str, str]]) -> None:
    """`colours` has for each mode those of its bars and of the figures in them."""
    for i, contenders in enumerate(of.values()):
        modes = [m for m in MODES if m in contenders["cnnkern"]]
        for j, mode in enumerate(modes):
            y, height = i - 0.4 + 0.8 * (j + 0.5) / len(modes), 0.8 / len(modes)
            ratio, other = contenders["cnnkern"][mode], contenders.get(COMPILED, {}).get(mode)
            bar, figure = colours[mode]
            axes.barh(y, ratio, height * 0.92, color=bar)
            axes.text(0.02, y, f"{ratio:.2f}x", va="center", fontsize=10, color=figure)
            if other is not None:
                axes.plot(other, y, "D", color=ink, markersize=4)
    if of:
        axes.axvline(1.0, color=ink, linewidth=1)
    else:
        axes.text(0.5, 0.5, NOTHING, transform=axes.transAxes, ha="center", va="center", style="italic")
    axes.set_yticks(range(len(of)), list(of))
    axes.set_ylim(len(of) - 0.4, -0.6)
    axes.set_xlim(0, max((r for c in of.values() for m in c.values() for r in m.values()), default=1.0) * 1.05)
    axes.set_title(title, loc="left", fontsize=12, weight="bold")
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.xaxis.set_visible(False)


def described(image: bytes) -> dict[str, Bars]:
    """The numbers in a picture's description."""
    from PIL import Image

    return json.loads(Image.open(io.BytesIO(image)).text["Description"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.show.chart", description=__doc__)
    parser.parse_args(argv)
    if ROOT is None:
        parser.error("the picture is a checkout's, and this is an installed package")
    found = everything()
    (ROOT / FOLDER).mkdir(exist_ok=True)
    for theme in THEMES:
        path = ROOT / FOLDER / f"speed-{theme}.png"
        files.write(path, draw(found, theme))
        print(f"written: {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
