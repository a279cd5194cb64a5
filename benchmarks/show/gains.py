"""README's table: whole models in few rows, from several published runs."""

from dataclasses import dataclass
from functools import cache

from ..suite import files
from ..suite.groups import LAYOUTS
from ..suite.models import FOLDED
from ..suite.rows import Row
from .breakdown import Table
from .figures import NOISY, times

NAME = "gains"
HEADER = [
    "model",
    "what is timed",
    *(f"cnnkern, {layout}" for layout in LAYOUTS),
    *(f"torch.compile, {layout}" for layout in LAYOUTS),
]


@dataclass(frozen=True)
class Gain:
    """A row, and the published rows that it shows."""

    model: str
    timed: str
    run: str
    operator: str
    batch: int
    mode: str
    contender: str = "cnnkern"


H100, H200, CPU = "training step, H100, bf16", "training step, H200, bf16", "training step, CPU, float32"
ROWS = (
    Gain("ResNet-50, batch 256", H100, "cuda-h100-minutes-models", "resnet50", 256, "training"),
    Gain("RegNetX-3.2GF, batch 256", H100, "cuda-h100-minutes-models", "regnetx_032", 256, "training"),
    Gain("ResNet-50, batch 256", H200, "cuda-h200-models", "resnet50", 256, "training"),
    Gain("ConvNeXt-T, batch 256", H200, "cuda-h200-models", "convnext_tiny", 256, "training"),
    Gain("ResNet-50, batch 16", CPU, "cpu-models", "resnet50", 16, "training"),
    Gain("MobileNetV2, batch 8", CPU, "cpu-models", "mobilenet_v2", 8, "training"),
    Gain("EfficientNet-B0, batch 8", CPU, "cpu-models", "efficientnet_b0", 8, "training"),
    Gain("ConvNeXt-T, batch 8", CPU, "cpu-models", "convnext_tiny", 8, "training"),
    Gain("ResNet-50, batch 16", "inference, folded, CPU", "cpu-models", "resnet50", 16, "inference", FOLDED),
    Gain("ResNet-50, batch 1", "inference, folded, CPU", "cpu-models", "resnet50", 1, "inference", FOLDED),
)


def table() -> Table:
    """(header, lines): the speedup over eager in the same layout; "-" for what was not timed, "noisy" for rows that do
    not count."""
    return HEADER, [
        [gain.model, gain.timed, *_cells(gain, gain.contender), *_cells(gain, "torch.compile")] for gain in ROWS
    ]


def _cells(gain: Gain, contender: str) -> list[str]:
    found = {r.layout: r for r in _rows(gain.run) if _is_of(gain, r) and r.contender == contender and r.ratio}
    return [_cell(found.get(layout)) for layout in LAYOUTS]


def _cell(row: Row | None) -> str:
    if row is None or row.ratio is None:
        return "-"
    return times(row.ratio) if row.counts else NOISY


def _is_of(gain: Gain, r: Row) -> bool:
    return (r.suite, r.operator, r.mode) == ("models", gain.operator, gain.mode) and r.shape.startswith(
        f"{gain.batch}x"
    )


@cache
def _rows(run: str) -> list[Row]:
    return files.load(files.RESULTS / "published" / f"{run}{files.ENDING}").rows
