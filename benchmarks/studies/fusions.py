"""What `cnnkern.convert` fuses in the models of other packages, after one call in training.

`python -m benchmarks.studies.fusions [PACKAGE ...] [--size N] [--most N] [--check] [--list]` gives two small images to
models of the packages that `packages.py` lists, those that are installed or named, without weights. First each model is
run unconverted, and every operator is watched to tell which batch norms have an activation or an addition behind them
that cnnkern computes (`census.py`). Then it is converted and runs again. For each package it prints:

- `norms`: calls of batch norms;
- `act`: those whose output goes to a supported activation alone, and the share of them that was fused with it;
- `add`: additions to a batch norm's output that goes to nothing else, and the share that was fused, with the activation
  behind the sum where there is one;
- `several`: outputs that go to one of these and to something else too, of which none is fused;
- `differ`: with `--check`, models whose outputs or gradients are not those of the unconverted model in float64.

`--list` says why the others were not fused, what the outputs of batch norms go to that cnnkern does not compute, and
which models failed.
"""

import argparse
import contextlib
import copy
import importlib
import io
import random
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import cnnkern

from .census import ACTIVATIONS, SEVERAL, Census, is_fusible
from .packages import PACKAGES, Model

CLOSE = 1e-6  # relative to the norm: float64 through a hundred layers, on which two images leave two values per channel


@dataclass
class Found:
    """Counts of a package's batch norms."""

    models: int = 0
    norms: int = 0
    expected: Counter = field(default_factory=Counter)  # "act" and "add": those with one behind
    fused: Counter = field(default_factory=Counter)
    missed: Counter = field(default_factory=Counter)  # by the reason
    others: Counter = field(default_factory=Counter)  # by what their outputs go to
    differing: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    leaving: dict[str, int] = field(default_factory=dict)  # models in which something was missed


def step(model: nn.Module, x: Tensor, backward: bool, census: Census | None = None) -> list[Tensor]:
    """Outputs of one call in training, and gradients."""
    torch.manual_seed(0)
    random.seed(0)
    with census or contextlib.nullcontext():
        outputs = [t for t in leaves(model(x)) if t.is_floating_point()]
    if census:
        census.returned(outputs)
    wanted = [t for t in outputs if t.requires_grad]
    if wanted and backward:
        torch.stack([t.square().mean() for t in wanted]).sum().backward()
    return [t.detach() for t in outputs] + [p.grad for p in model.parameters() if p.grad is not None]


def leaves(value: object) -> list[Tensor]:
    return [
        t for t in tree_leaves(value if not hasattr(value, "to_tuple") else value.to_tuple()) if isinstance(t, Tensor)
    ]


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest, relative to what is expected, or to the largest of that where it is 0 but for rounding."""
    if len(found) != len(expected):
        return float("inf")
    scale = max((float(t.norm()) for t in expected), default=1.0)
    return max(
        (
            float((a - b).norm()) / max(float(b.norm()), 1e-3 * scale, 1e-30)
            for a, b in zip(found, expected, strict=True)
        ),
        default=0.0,
    )


def count(found: Found, name: str, census: Census, converted: nn.Module) -> None:
    modules = dict(converted.named_modules())
    sites = {path: modules[path].__dict__.get("_cnnkern_site") for path, _ in census.kinds()}
    left = {path: Counter(site.fusions() if site else {}) for path, site in sites.items()}

    def why(path: str) -> str:
        if sites[path] is None:
            return f"{type(modules[path]).__module__}.{type(modules[path]).__name__} is not converted"
        reasons = sites[path].alone() or {"it was fused with something else": 1}
        return max(reasons, key=lambda reason: reasons[reason])

    def note(sort: str, kind: str, paths: list[str]) -> None:
        found.expected[sort] += 1
        path = next((path for path in paths if left[path][kind] > 0), None)
        if path is not None:
            left[path][kind] -= 1
            found.fused[sort] += 1
        else:
            found.missed[f"{kind}: {' / '.join(sorted({why(path) for path in paths}))}"] += 1
            found.leaving[name] = found.leaving.get(name, 0) + 1

    for total in census.additions:
        if total.is_alone:
            note("add", total.kind, [term.norm for term in total.terms if term.norm])
    for (path, kind), calls in census.kinds().items():
        found.norms += calls
        for _ in range(calls):
            if kind in ACTIVATIONS:
                note("act", kind, [path])
            elif not is_fusible(kind):
                found.others[kind] += 1


def is_larger(model: Model, most: float) -> bool:
    """Whether it has more parameters than so many millions, where that can be told without making them."""
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in model.build().parameters()) > most * 1e6
    except Exception:  # it looks at values when it is made
        return sum(p.numel() for p in model.build().parameters()) > most * 1e6


def examine(found: Found, model: Model, size: int, most: float, check: bool) -> None:
    if is_larger(model, most):
        found.failed[model.name] = "left out for its size"
        return
    torch.manual_seed(0)
    plain = model.build()
    plain.train()  # mmengine's returns nothing
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in plain.modules()):
        return
    converted = cnnkern.convert(copy.deepcopy(plain), inplace=True)
    shape = model.shape or (2, 3, *getattr(plain, "in_size", (size, size)))  # pytorchcv's say what they take
    x = torch.randn(shape)
    for dtype in (torch.float64, torch.float32) if check else (torch.float32,):
        try:
            census = Census(plain)
            expected = step(plain.to(dtype), x.to(dtype), check, census)
            break
        except Exception:
            if dtype == torch.float32:
                raise
    off = difference(step(converted.to(dtype), x.to(dtype), check), expected)
    if dtype == torch.float64 and not off <= CLOSE:
        found.differing[model.name] = off
    found.models += 1
    count(found, model.name, census, converted)


def survey(models: Iterator[Model], size: int, most: float, check: bool) -> Found:
    found = Found()
    for model in models:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                examine(found, model, size, most, check)
            except Exception as error:  # of the model's own: another size, a download
                found.failed[model.name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


def share(part: int, whole: int) -> str:
    return f"{whole:6} {part / whole:7.1%}" if whole else f"{whole:6} {'':7}"


def show(package: str, found: Found, everything: bool) -> None:
    shares = " ".join(share(found.fused[sort], found.expected[sort]) for sort in ("act", "add"))
    print(
        f"{package:28} {found.models:6} {found.norms:6} {shares} {found.others[SEVERAL]:7} {len(found.differing):6}",
        flush=True,
    )
    for name, off in found.differing.items():
        print(f"    {name} differs by {off:.1e}")
    if not everything:
        return
    for reason, n in found.missed.most_common():
        print(f"    {n:6} missed: {reason}")
    for kind, n in found.others.most_common(12):
        print(f"    {n:6} go to {kind}")
    for name, n in found.leaving.items():
        print(f"    {name}: {n} missed")
    for name, error in found.failed.items():
        print(f"    {name} failed: {error[:110]}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.fusions", description=__doc__)
    parser.add_argument(
        "packages",
        nargs="*",
        choices=[*PACKAGES, []],
        metavar="PACKAGE",
        help="one of the packages named above (default: all)",
    )
    parser.add_argument(
        "--size", type=int, default=96, metavar="N", help="the height and width of an image (default: 96)"
    )
    parser.add_argument(
        "--most", type=float, default=12, metavar="N", help="the most parameters of a model, in millions (default: 12)"
    )
    parser.add_argument("--check", action="store_true", help="also compare results and gradients in float64")
    parser.add_argument("--list", action="store_true", help="also list reasons and failures")
    arguments = parser.parse_args(argv)
    print(f"{'package':28} models  norms {'act':>6} {'fused':>7} {'add':>6} {'fused':>7} several differ")
    for package in arguments.packages or PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError:
            print(f"{package:28} is not installed")
            continue
        found = survey(PACKAGES[package](), arguments.size, arguments.most, arguments.check)
        show(package, found, arguments.list)


if __name__ == "__main__":
    main()
