"""What `cnnkern.convert` fuses in the models of other packages, after one training step.

`python -m benchmarks.studies.fusions [PACKAGE ...] [--size N] [--list]` converts models of torchvision, timm,
pytorchcv, segmentation_models_pytorch and torchreid, those that are installed or named, without weights, and runs one
training step of two small images. For each package it prints how many batch norms were fused with the activation or the
addition behind them, of those that have one that our kernels compute. `--list` names the models that failed, and says
for each reason how many batch norms were computed alone.
"""

import argparse
import contextlib
import importlib
import io
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import cnnkern

# Operators behind a batch norm that our kernels compute with it, as reports name them.
COMPUTED = ("relu", "relu_", "relu6", "silu", "sigmoid", "hardswish", "hardtanh")
COMPUTED += ("leaky_relu", "elu", "gelu", "mish", "hardsigmoid", "prelu")
Build = Callable[[], nn.Module]


def torchvision_models() -> Iterator[tuple[str, Build]]:
    models = importlib.import_module("torchvision.models")
    for name in models.list_models(module=models):
        extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        yield name, lambda name=name, extra=extra: models.get_model(name, weights=None, **extra)


def timm_models() -> Iterator[tuple[str, Build]]:
    timm = importlib.import_module("timm")
    seen = set()
    for name in timm.list_models():  # one of each module: its others differ in depth and width
        module = timm.models._registry._model_to_module[name]
        family = (module, name.split("_")[0].rstrip("0123456789"))
        if family not in seen:
            seen.add(family)
            yield name, lambda name=name: timm.create_model(name)


def pytorchcv_models() -> Iterator[tuple[str, Build]]:
    provider = importlib.import_module("pytorchcv.model_provider")
    seen = set()
    for name, build in provider._models.items():
        if build.__module__ not in seen:
            seen.add(build.__module__)
            yield name, build


def smp_models() -> Iterator[tuple[str, Build]]:
    smp = importlib.import_module("segmentation_models_pytorch")
    for name in ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "PAN"):
        yield name, lambda name=name: getattr(smp, name)("resnet18", encoder_weights=None)


def torchreid_models() -> Iterator[tuple[str, Build]]:
    models = importlib.import_module("torchreid.models")
    for name in ("resnet50", "osnet_x1_0", "mlfn", "hacnn", "mobilenetv2_x1_0", "densenet121"):
        yield name, lambda name=name: models.build_model(name, 10, pretrained=False)


PACKAGES: dict[str, Callable[[], Iterator[tuple[str, Build]]]] = {
    "torchvision": torchvision_models,
    "timm": timm_models,
    "pytorchcv": pytorchcv_models,
    "segmentation_models_pytorch": smp_models,
    "torchreid": torchreid_models,
}


@dataclass
class Found:
    """Counts of a package's batch norms."""

    models: int = 0
    norms: int = 0
    fused: Counter = field(default_factory=Counter)  # by what they were fused with
    alone: Counter = field(default_factory=Counter)  # by the reason
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def missed(self) -> int:
        """Those whose output goes to an activation that our kernels compute, and which were not computed with it."""
        return sum(n for reason, n in self.alone.items() if reason.split(" ")[0] in COMPUTED)


def step(model: nn.Module, size: int) -> None:
    outputs = model(torch.randn(2, 3, *getattr(model, "in_size", (size, size))))  # pytorchcv's say what they take
    loss = sum(
        t.float().square().mean() for t in tree_leaves(outputs) if isinstance(t, torch.Tensor) and t.requires_grad
    )
    if isinstance(loss, torch.Tensor):
        loss.backward()


def survey(models: Iterator[tuple[str, Build]], size: int) -> Found:
    found = Found()
    for name, build in models:
        try:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = cnnkern.convert(build(), inplace=True)
                norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
                if not norms:
                    continue
                step(model, size)
        except Exception as error:  # of the model's own: another size, a download
            found.failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        found.models += 1
        found.norms += norms
        for entry in cnnkern.conversion_report(model).entries:
            if entry.kind.startswith("BatchNorm"):
                what = entry.kind.partition(" + ")[2]
                (found.fused if what else found.alone)[what or entry.reason] += 1
    return found


def main(arguments: argparse.Namespace) -> None:
    heads = ("models", "norms", "+ act", "+ add", "missed")
    print(f"{'package':28} {' '.join(f'{h:>6}' for h in heads)}  fused, of those with one behind")
    for package in arguments.packages or PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError:
            print(f"{package:28} is not installed")
            continue
        found = survey(PACKAGES[package](), arguments.size)
        adds = sum(n for what, n in found.fused.items() if what.startswith("add"))
        fused = sum(found.fused.values())
        share = f"{fused / max(fused + found.missed, 1):.1%}"
        numbers = (found.models, found.norms, fused - adds, adds, found.missed)
        print(f"{package:28} {' '.join(f'{n:6}' for n in numbers)}  {share}", flush=True)
        if arguments.list:
            for reason, n in found.alone.most_common():
                print(f"    {n:6} alone: {reason}")
            for name, error in found.failed.items():
                print(f"    {name} failed: {error[:100]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.fusions", description=__doc__)
    parser.add_argument("packages", nargs="*", choices=[*PACKAGES, []], metavar="PACKAGE", help="of those named above")
    parser.add_argument("--size", type=int, default=96, metavar="N", help="pixels of an image's side (default: 96)")
    parser.add_argument("--list", action="store_true", help="list reasons and failures too")
    main(parser.parse_args())
