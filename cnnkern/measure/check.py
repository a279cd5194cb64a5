"""Compares another form of a model with the original: outputs, gradients and running statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from cnnkern.measure.steps import AMP, Setting, forward
from cnnkern.measure.values import cast, one_line, results_of

IMAGES = 8  # that are looked at: a model in float64 takes its time
EXACT = 1e-7  # float64: of the largest value
# In the timed dtype, relative to the root mean square: four times eager's error, plus this. A rounding that switches a
# ReLU on or off changes a gradient by far more than a rounding.
FACTOR, ON_TOP = 4.0, {"outputs": 1e-6, "gradients": 1e-2, "running statistics": 1e-6}
DRAWS = 2  # of roundings of the input, for eager's own error, and to try again

Make = Callable[[nn.Module], nn.Module]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Check:
    """The result of a comparison. `lines` says how large the differences are, and how large they may be."""

    ok: bool
    images: int
    lines: list[str] = field(default_factory=list)


def check(original: nn.Module, forms: dict[str, Make], arguments: tuple[Any, ...], setting: Setting) -> Check:
    """Compares every form, made from a copy of `original`, with it, on at most IMAGES images, without dropout.

    In float64 all tensors have to agree to EXACT, which checks what was replaced. In the timed dtype, errors against
    float64 have to be as small as eager's, which checks the kernels. One of a few inputs that differ by roundings has
    to pass: with others a rounding may switch a ReLU on or off, but a wrong kernel fails with all of them.
    """
    judge = _Judge(original, _first_images(arguments), setting)
    lines, fits = list(judge.notes), True
    for name, make in forms.items():
        for right, said in (*judge.in_float64(make), *judge.in_timed_type(make)):
            fits &= right
            lines.append(f"{name}, {said}{'' if right else ': WRONG'}")
    return Check(fits, judge.images, lines)


Verdict = tuple[bool, str]


class _Judge:
    """The original's results in float64 and in the timed dtype, and its own errors: the reference of a comparison."""

    def __init__(self, original: nn.Module, arguments: tuple[Any, ...], setting: Setting) -> None:
        self.base, self.setting, self.notes = _without_chance(copy.deepcopy(original)), setting, list[str]()
        self.images = max((len(a) for a in arguments if isinstance(a, Tensor) and a.dim()), default=1)
        self.inputs = [arguments, *(_rounded(arguments, setting, seed) for seed in range(DRAWS))]
        self.runs_in_float64 = True
        try:
            truth = self._in_float64(self.base, arguments)
        except RuntimeError as error:
            self.runs_in_float64 = False
            self.notes.append(f"float64: not compared, the model itself does not run in it: {one_line(error)[:120]}")
        found = [_results(self.base, inputs, setting) for inputs in self.inputs]
        self.truth = truth if self.runs_in_float64 else found[0]
        self.own = {kind: max(_distance(kind, f, self.truth) for f in found) for kind in ON_TOP}

    def in_float64(self, make: Make) -> list[Verdict]:
        if not self.runs_in_float64:
            return []
        form = make(copy.deepcopy(self.base).double())
        worst, where = _largest_difference(self._in_float64(form, self.inputs[0]), self.truth)
        return [(worst <= EXACT, f"float64: largest difference {worst:.1e} ({where}), allowed {EXACT:.0e}")]

    def in_timed_type(self, make: Make) -> list[Verdict]:
        """A verdict for each kind of result, on the first input with which all are correct, else on the last."""
        form, verdicts = make(copy.deepcopy(self.base)), list[Verdict]()
        for i, inputs in enumerate(self.inputs):
            truth = self.truth if i == 0 else self._truth_of(inputs)
            verdicts = list(self._verdicts(_results(form, inputs, self.setting), truth))
            if all(right for right, _ in verdicts):
                break
        return verdicts

    def _verdicts(self, found: Tensors, truth: Tensors) -> Iterator[Verdict]:
        for kind, on_top in ON_TOP.items():
            if any(_kind(name) == kind for name in found):
                allowed = FACTOR * self.own[kind] + max(on_top, 0.0 if kind == "gradients" else _eps(self.setting))
                off = _distance(kind, found, truth)
                said = f"{kind} differ by {off:.1e}, eager's by {self.own[kind]:.1e}, allowed {allowed:.1e}"
                yield off <= allowed, f"{self.setting.amp or 'float32'}: {said}"

    def _truth_of(self, inputs: tuple[Any, ...]) -> Tensors:
        if self.runs_in_float64:
            return self._in_float64(self.base, inputs)
        return _results(self.base, inputs, self.setting)

    def _in_float64(self, model: nn.Module, inputs: tuple[Any, ...]) -> Tensors:
        exact = replace(self.setting, amp=None)
        return _results(copy.deepcopy(model).double(), cast(inputs, torch.float64), exact)


def _first_images(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Every tensor cut to IMAGES, if all have the same number of images."""
    counts = {len(a) for a in arguments if isinstance(a, Tensor) and a.dim()}
    if len(counts) != 1:
        return arguments
    return tuple(a[:IMAGES] if isinstance(a, Tensor) and a.dim() else a for a in arguments)


def _without_chance(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in ("p", "drop_prob"):  # torchvision's StochasticDepth, timm's DropPath
            if type(module).__name__ in ("StochasticDepth", "DropPath") and hasattr(module, name):
                setattr(module, name, 0.0)
    return model


def _eps(setting: Setting) -> float:
    return torch.finfo(AMP[setting.amp] if setting.amp else torch.float32).eps


def _rounded(arguments: tuple[Any, ...], setting: Setting, seed: int) -> tuple[Any, ...]:
    """The arguments with every number changed by about a rounding, up or down."""
    generator = torch.Generator().manual_seed(seed)

    def move(a: Any) -> Any:
        if not isinstance(a, Tensor) or not a.is_floating_point():
            return a
        sign = torch.randint(0, 2, a.shape, generator=generator).to(a) * 2 - 1
        return a * (1 + _eps(setting) * sign)

    return tuple(move(a) for a in arguments)


def _results(model: nn.Module, arguments: tuple[Any, ...], setting: Setting) -> Tensors:
    """Outputs, in training gradients of parameters for random gradients of the outputs, and running statistics."""
    model = setting.place(copy.deepcopy(model))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outputs = results_of(type(model).__name__, forward(model, arguments, setting))
    found = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    if setting.training:
        generator = torch.Generator().manual_seed(0)
        incoming = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in outputs]
        pairs = [(t, g) for t, g in zip(outputs, incoming, strict=True) if t.requires_grad]
        if pairs:
            torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
        found |= {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
        found |= {f"buffer {n}": b for n, b in model.named_buffers() if b.is_floating_point()}
    return found


def _kind(name: str) -> str:
    return {"output": "outputs", "gradient": "gradients", "buffer": "running statistics"}[name.partition(" ")[0]]


def _distance(kind: str, found: Tensors, truth: Tensors) -> float:
    """The norm of the difference over the norm of the truth, of all tensors of a kind together."""
    if not found.keys() >= {n for n in truth if _kind(n) == kind}:
        return float("inf")
    difference = length = 0.0
    for name, expected in truth.items():
        if _kind(name) == kind and expected.numel():
            expected = expected.double()
            difference += (found[name].double() - expected).square().sum().item()
            length += expected.square().sum().item()
    if difference == 0.0:
        return 0.0
    return (difference / length) ** 0.5 if length else float("inf")


def _largest_difference(found: Tensors, truth: Tensors) -> tuple[float, str]:
    """The largest difference relative to the tensor's size, and the tensor's name. The size is the largest value: for
    gradients of all of them, for a running mean that of the standard deviations too. A gradient, or the mean of a batch
    norm after a batch norm and a convolution, may be zero but for roundings."""
    missing = [n for n in truth if n not in found]
    if missing:
        return float("inf"), f"no {missing[0]}"
    gradients = max(
        (t.abs().max().item() for n, t in truth.items() if _kind(n) == "gradients" and t.numel()), default=0.0
    )
    worst, where = 0.0, "none"
    for name, expected in truth.items():
        if not expected.numel():
            continue
        largest = gradients if _kind(name) == "gradients" else expected.abs().max().item()
        variance = truth.get(name.removesuffix("running_mean") + "running_var")
        if name.endswith("running_mean") and variance is not None:
            largest = max(largest, variance.max().item() ** 0.5)
        difference = (found[name] - expected).abs().max().item()
        share = difference / largest if largest else difference
        if not share <= worst:  # NaN too
            worst, where = share if share == share else float("inf"), name
    return worst, where
