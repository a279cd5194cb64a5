"""Whole models of torchvision, as they are and after `cnnkern.convert`, on photographs.

Weights are random. Dropout is off: it would draw other numbers in each contender, and takes the same time in all.
"""

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnnkern
from cnnkern.conversion.layers import replace, replacements

from . import peers, reasons
from .groups import (
    AGAIN,
    CONVERTED_AND_COMPILED,
    GROUPED_ALONE,
    GROUPED_AND_COMPILED,
    LAYOUTS,
    MAX_AUTOTUNE,
    Contender,
    Group,
    Unavailable,
    compiles_reference,
    first_line,
)
from .judge import assert_as_good_as
from .options import Options

BATCH_SIZES = {"resnet18": 8, "vgg11_bn": 4}
# With --networks all: a model, and the seconds that one image of a training step takes here.
LARGE = {
    "resnet18": 0.15,
    "resnet50": 0.3,
    "resnext50_32x4d": 0.45,
    "densenet121": 0.4,
    "regnet_y_400mf": 0.15,
    "mobilenet_v2": 0.15,
    "efficientnet_b0": 0.25,
    "convnext_tiny": 0.45,
}
LARGE_BATCH_SIZE, GPU_BATCH_SIZE = 8, 32
GPU_SECONDS = 3.0  # of a group on a GPU, most of them spent on the host: models are built and copied
TRAINED_TWICE = {"resnet50": 16, "densenet121": 16}  # at this batch size as well
LARGE_INFERENCE = (1, 16)  # batch sizes
SIZE = 224
FOLDED = "cnnkern.fold"  # a contender: the model folded for inference
COMPILED = frozenset({"torch.compile", MAX_AUTOTUNE, CONVERTED_AND_COMPILED, GROUPED_AND_COMPILED})
WITH_GROUPS = ("resnext50_32x4d", "regnet_y_400mf", "mobilenet_v2", "efficientnet_b0", "convnext_tiny")
CHECKED, SMALL = 2, 64  # images that are compared, and the side of the patches that gradients are compared on
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of each colour


def groups(options: Options) -> list[Group]:
    """One group per layout: contenders of both together would need 1.5 GB more for weights."""
    if options.peers:
        return peer_groups(options)
    everything = options.networks == "all"
    batch_sizes = (
        {"resnet18": 2} if options.quick else dict.fromkeys(LARGE, LARGE_BATCH_SIZE) if everything else BATCH_SIZES
    )
    if options.device == "cuda":
        batch_sizes = dict.fromkeys(batch_sizes, GPU_BATCH_SIZE)

    tuned = [MAX_AUTOTUNE] * options.max_autotune
    # Half precision is for bfloat16 alone: models are timed in float32 beside operators of other types.
    dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32

    def contenders(name: str, mode: str) -> list[str]:
        if not everything:
            return ["eager", AGAIN, "cnnkern", *tuned]
        groups = [GROUPED_ALONE, GROUPED_AND_COMPILED] if name in WITH_GROUPS else []
        more = groups if mode == "training" else [FOLDED]
        return ["eager", AGAIN, "cnnkern", "torch.compile", *tuned, CONVERTED_AND_COMPILED, *more]

    def runs(name: str, batch: int) -> list[tuple[str, int]]:
        twice = [("training", TRAINED_TWICE[name])] if batch == LARGE_BATCH_SIZE and name in TRAINED_TWICE else []
        sizes = LARGE_INFERENCE if everything else (batch,)
        return [("training", batch), *twice, *(("inference", size) for size in sizes)]

    return [
        Group(
            suite="models",
            operator=name,
            network=name,
            shape=f"{batch}x3x{SIZE}x{SIZE}",
            mode=mode,
            api="module",
            contenders=tuple(Contender(c, layout) for c in contenders(name, mode)),
            open=lambda name=name, batch=batch, mode=mode: ModelBench(
                name, batch, mode == "training", options.device, dtype
            ),
            dtype=str(dtype).removeprefix("torch."),
            weight=weight(options.device, name, batch, mode, len(contenders(name, mode))),
            compiled=COMPILED,
            peaks=True,
            last=True,
            min_rounds=3,
            max_rounds=15,
        )
        for name, size in batch_sizes.items()
        for layout in LAYOUTS[: 1 if options.quick else 2]
        for mode, batch in runs(name, size)
    ]


def peer_groups(options: Options) -> list[Group]:
    """Inference of few models, compared with other packages."""
    names = ("eager", AGAIN, "cnnkern", FOLDED, "torch.compile", MAX_AUTOTUNE, *peers.PEERS)
    return [
        Group(
            suite="models",
            operator=name,
            network=name,
            shape=f"{batch}x3x{SIZE}x{SIZE}",
            mode="inference",
            api="module",
            contenders=tuple(Contender(each, layout) for each in names),
            open=lambda name=name, batch=batch: ModelBench(name, batch, False, options.device),
            weight=20.0 + batch * LARGE.get(name, 0.15) * len(names),
            compiled=COMPILED,
            last=True,
            min_rounds=5,
            max_rounds=25,
            pause=peers.PAUSE,
        )
        for name in (*peers.MODELS, *(peers.MORE if options.networks == "all" else ()))
        for batch in peers.BATCHES
        for layout in LAYOUTS
    ]


def weight(device: str, name: str, batch: int, mode: str, contenders: int) -> float:
    if device == "cuda":
        return GPU_SECONDS
    if name in LARGE:
        return batch * LARGE[name] * contenders * (4 if mode == "training" else 1.5)
    return batch * (1.5 if mode == "training" else 0.6) * (1 if name == "resnet18" else 3.5)


@lru_cache(maxsize=1)
def photographs(count: int, size: int = SIZE) -> Tensor:
    """(count, 3, size, size): patches of the two photographs that scikit-learn ships, normalised as for ImageNet.

    Raises Unavailable without scikit-learn, or where its photographs cannot be read.
    """
    try:
        from sklearn.datasets import load_sample_images

        images = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)  # (2, 3, 427, 640)
    except ImportError as error:
        raise Unavailable(f"the photographs come with scikit-learn: {error}") from error
    rows, columns = (
        torch.linspace(0, n - size, k).int().tolist() for n, k in zip(images.shape[2:], (2, 4), strict=True)
    )
    patches = torch.cat([images[:, :, i : i + size, j : j + size] for i in rows for j in columns])
    patches = torch.cat([patches, patches.flip(-1)])
    if count > len(patches):
        raise ValueError(f"{count} patches of {len(patches)} that there are")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (patches[:count] / 255 - mean) / std


def build(name: str) -> nn.Module:
    try:
        import torchvision
    except ImportError as error:
        raise Unavailable(f"the models come with torchvision: {error}") from error
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None)
    for module in model.modules():
        if isinstance(module, nn.Dropout | torchvision.ops.StochasticDepth):
            module.p = 0.0
    return model


def with_grouped_convolutions(model: nn.Module) -> nn.Module:
    """The model with only its grouped convolutions replaced, as `cnnkern.convert` does it."""
    ours, has_groups = replacements()[nn.Conv2d]
    for module in model.modules():
        if type(module) is nn.Conv2d and has_groups(module):
            replace(module, ours)
    return model


def placed(tensor_or_module, layout: str, device: str):
    channels_last = layout == "channels_last"
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return tensor_or_module.to(device, memory_format=memory_format)


def results(model: nn.Module, x: Tensor, target: Tensor, backward: bool) -> dict[str, Tensor]:
    """Output of one call in the model's mode, in training with running statistics, and parameters' gradients."""
    with torch.set_grad_enabled(backward):
        y = model(x)
    found = {"output": y.detach()}
    if backward:
        names, parameters = zip(*model.named_parameters(), strict=True)
        found |= dict(zip(names, torch.autograd.grad(F.cross_entropy(y, target), parameters), strict=True))
    if model.training:  # a folded model has no statistics any more
        found |= {n: b.clone() for n, b in model.named_buffers() if b.is_floating_point()}
    return found


def by_kind(all_results: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Results with the output, the running means and the running variances of a network as one tensor each, relative to
    the largest value of the truth, which is the last.

    In 16 bits a network's roundings are many and independent. The largest error of a few channels is then a matter of
    chance, in eager too; the largest one in the network is not.
    """
    truth = all_results[-1]
    joined: list[dict[str, Tensor]] = []
    for results in all_results:
        parts: dict[str, list[Tensor]] = {}
        for name, value in results.items():
            scale = truth[name].abs().max().clamp(min=1e-12).to(value.dtype)
            parts.setdefault(name.rpartition(".")[2], []).append((value / scale).reshape(-1))
        joined.append({kind: torch.cat(values) for kind, values in parts.items()})
    return joined


class ModelBench:
    """A model in one mode. In bfloat16 it is trained under autocast, and runs inference as a model of that type."""

    def __init__(self, name: str, batch: int, training: bool, device: str, dtype: torch.dtype = torch.float32) -> None:
        self.training, self.device, self.dtype = training, device, dtype
        self.base = build(name).train(training)
        self.x = photographs(batch)
        self.target = torch.arange(batch)
        self.code: dict[Contender, str] = {}

    def model(self, contender: Contender) -> nn.Module:
        model = copy.deepcopy(self.base)
        if contender.name in (GROUPED_ALONE, GROUPED_AND_COMPILED):
            return with_grouped_convolutions(model)
        if contender.name == FOLDED:
            return cnnkern.fold(model)
        return cnnkern.convert(model) if contender.name in ("cnnkern", CONVERTED_AND_COMPILED) else model

    @property
    def stored(self) -> torch.dtype:
        """Of parameters and input."""
        return torch.float32 if self.training else self.dtype

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, self.dtype, enabled=self.stored != self.dtype)

    def placed(self, tensor_or_module, layout: str):
        return placed(tensor_or_module, layout, self.device).to(self.stored)

    def step(self, contender: Contender, verify: bool) -> Callable[[], object]:
        if verify and contender.name not in COMPILED and contender.name not in peers.PEERS:
            self.verify(contender)
        model: Any = self.placed(self.model(contender), contender.layout)
        x = self.placed(self.x, contender.layout)
        target = self.target.to(self.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        if contender.name in peers.PEERS:
            with torch.no_grad():
                model = peers.load(contender.name, model, x)
                found = {"output": model(x)}
            if verify:
                self.verify_output(found["output"], contender.layout)
        if contender.name in COMPILED:
            mode = "max-autotune-no-cudagraphs" if contender.name == MAX_AUTOTUNE else None
            model = torch.compile(model, dynamic=False, mode=mode)
            try:
                with self.autocast():
                    found, self.code[contender] = reasons.compiling(results, model, x, target, self.training)
            except torch._dynamo.exc.BackendCompilerFailed as error:  # no C++ compiler, for one
                raise Unavailable(first_line(error)) from error
            if verify and not compiles_reference(contender.name):  # what the compiler makes of that is PyTorch's
                self.verify_output(found["output"], contender.layout)

        def training() -> None:
            optimizer.zero_grad(set_to_none=True)
            with self.autocast():
                loss = F.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()

        def inference() -> None:
            with torch.no_grad():
                model(x)

        return training if self.training else inference

    def verify(self, contender: Contender) -> None:
        """Compares outputs and running statistics at the timed size, and in training the gradients as well.

        A rounding that switches a ReLU on or off changes single-precision gradients by far more than a rounding, in
        eager's two layouts as much as in cnnkern. So gradients are compared in float64, on small patches. cnnkern's
        have to be as close to eager's as those of eager in float32 are.
        """
        eager = Contender("eager", contender.layout)

        def run(who: Contender, dtype: torch.dtype, size: int, backward: bool) -> dict[str, Tensor]:
            model = placed(self.model(who), contender.layout, self.device).to(dtype)
            x = placed(self.x[:CHECKED, :, :size, :size].to(dtype), contender.layout, self.device)
            return results(model, x, self.target[:CHECKED].to(self.device), backward)

        with self.autocast():
            timed = [run(who, self.stored, SIZE, False) for who in (contender, eager)]
        timed.append(run(eager, torch.float64, SIZE, False))
        assert_as_good_as(*(by_kind(timed) if self.dtype.itemsize == 2 else timed))
        if self.training:
            ours = {n: t.float() for n, t in run(contender, torch.float64, SMALL, True).items()}
            assert_as_good_as(ours, run(eager, torch.float32, SMALL, True), run(eager, torch.float64, SMALL, True))

    def verify_output(self, output: Tensor, layout: str) -> None:
        """Compares what a call at the timed size returned: in inference for some images, which do not depend on the
        others, in training for all, which share batch norm's statistics."""
        images = slice(None if self.training else CHECKED)
        model, x = copy.deepcopy(self.base), self.x[images]
        with torch.no_grad():
            with self.autocast():
                eager = self.placed(copy.deepcopy(model), layout)(self.placed(x, layout))
            truth = placed(model.double(), layout, self.device)(placed(x.double(), layout, self.device))
        found = {"output": output[images]}
        assert_as_good_as(found, {"output": eager}, {"output": truth})
