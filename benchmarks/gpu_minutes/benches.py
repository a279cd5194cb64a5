"""What the sections time: models that train under autocast, and single passes of grouped convolutions."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from cnnkern.testing import Layer

from ..studies import passes
from ..suite import models, timing
from ..suite.groups import Contender, Unavailable

# Model -> its name in torchvision, and in timm.
MODELS = {
    "resnet50": ("resnet50", "resnet50"),
    "resnext50": ("resnext50_32x4d", "resnext50_32x4d"),
    "regnety_032": ("regnet_y_3_2gf", "regnety_032"),
    "regnetx_032": ("regnet_x_3_2gf", "regnetx_032"),
    "densenet121": ("densenet121", "densenet121"),
    "efficientnet_b0": ("efficientnet_b0", "efficientnet_b0"),
    "mobilenet_v2": ("mobilenet_v2", "mobilenetv2_100"),
    "convnext_tiny": ("convnext_tiny", "convnext_tiny"),
}
TUNED = "eager, cudnn.benchmark"  # cuDNN's kernels are timed and the fastest is taken


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    device: str
    batches: tuple[int, ...]
    size: int  # of an image's sides
    models: tuple[str, ...]
    divide: int = 1  # channels and planes of operators are so much smaller
    repeats: int = 5  # of a profiled step
    most: int | None = None  # groups of a section

    def shape(self, batch: int, channels: int, plane: int) -> tuple[int, int, int, int]:
        return batch if self.divide == 1 else 2, max(8, channels // self.divide), *[max(3, plane // self.divide)] * 2


FULL = Scale("cuda", (256, 128), 224, tuple(MODELS))
DRY = Scale("cpu", (2,), 64, ("mobilenet_v2",), divide=16, repeats=2, most=2)


def build(name: str) -> nn.Module:
    """From torchvision, else from timm. Raises Unavailable where there is neither."""
    of_torchvision, of_timm = MODELS[name]
    try:
        return models.build(of_torchvision)
    except Unavailable:
        pass
    try:
        import timm
    except ImportError as error:
        raise Unavailable(f"the models come with torchvision or timm: {error}") from error
    torch.manual_seed(0)
    return timm.create_model(of_timm)


def pictures(count: int, size: int) -> Tensor:
    """(count, 3, size, size): photographs, over and over; noise where scikit-learn, which has them, is not there."""
    try:
        few = models.photographs(min(count, 16), size)
    except Unavailable:
        few = torch.randn(min(count, 16), 3, size, size, generator=torch.Generator().manual_seed(0))
    return few.repeat(-(-count // len(few)), 1, 1, 1)[:count]


class AutocastBench(models.ModelBench):
    """A training step of a model in bfloat16 under autocast, on a batch of any size; `graphed`: as a CUDA graph."""

    def __init__(self, name: str, batch: int, scale: Scale, graphed: bool = False) -> None:
        self.graphed = graphed and scale.device == "cuda"
        self.training, self.device, self.dtype = True, scale.device, torch.bfloat16
        self.base = build(name).train()
        self.x = pictures(batch, scale.size)
        self.target = torch.arange(batch)
        self.code: dict[Contender, str] = {}

    def step(self, contender: Contender, verify: bool) -> Callable[[], object]:
        step = super().step(contender, verify)
        return timing.captured(step) if self.graphed else step


@dataclass(frozen=True, eq=False)
class Passes:
    """Those of one layer, which share its tensors."""

    layer: Layer
    device: str
    dtype: torch.dtype = torch.bfloat16


@lru_cache(maxsize=2)
def steps_of(of: Passes, layout: str) -> dict[tuple[str, str], Callable[[], object]]:
    """Drawn and compared once. Only those of two layouts are kept: they may be gigabytes."""
    return passes.steps(of.layer, layout, of.dtype, of.device)


class PassBench:
    """One pass of a grouped convolution."""

    def __init__(self, of: Passes, name: str) -> None:
        self.of, self.name, self.device = of, name, of.device
        self.code: dict[Contender, str] = {}

    def step(self, contender: Contender, verify: bool) -> Callable[[], object]:
        who = "cnnkern" if contender.name == "cnnkern" else "eager"
        step = steps_of(self.of, contender.layout)[who, self.name]
        if self.device != "cuda":
            return step
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = contender.name == TUNED
        try:
            return timing.captured(step)  # with the algorithm that is chosen now
        finally:
            torch.backends.cudnn.benchmark = before
