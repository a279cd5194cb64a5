"""`cnnkern tune`: times a model's calls of cnnkern's operators and of PyTorch's, for :mod:`cnnkern.ops.tuned`.

A convolution is also timed on cnnkern's kernels without the built-in dispatch rule, which may be wrong both ways.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import cnnkern
from cnnkern import functional, reference
from cnnkern.measure import clock
from cnnkern.measure.clock import Step, Timer
from cnnkern.measure.steps import Setting, forward
from cnnkern.ops import tuned
from cnnkern.ops.tuned import Call, Measured

OURS, THEIRS, OWN = "ours", "theirs", "ours, whatever the rule says"
SAMPLE_SECONDS = 0.005
GAIN = 1.02  # the least gain that changes the dispatch


def calls_of(model: nn.Module, arguments: tuple[Any, ...], setting: Setting) -> list[Call]:
    """The calls of :mod:`cnnkern.functional` in one forward pass of a converted model, each once."""
    found: dict[Call, None] = {}

    def note(call: Call) -> bool:
        found.setdefault(call)
        return False

    model = setting.place(model)
    with tuned.using(None):  # batch norms find out what follows them
        forward(model, arguments, setting)
    with tuned.using(note):
        forward(model, arguments, setting)
    return list(found)


def measure(calls: Sequence[Call], device: str, seconds: float, timer: Timer | None = None) -> Iterator[Measured]:
    """Times one call after the other, until `seconds` have passed. Each gets an equal share of the remaining time.

    A call is lost only if a second measurement confirms it. So is a convolution for cnnkern's kernels.
    """
    timer, deadline = timer or clock.timer_for(device), time.perf_counter() + seconds
    for done, call in enumerate(calls):
        left = deadline - time.perf_counter()
        if done and left < 0:
            return
        share = max(left, 0.0) / (len(calls) - done)
        found = _measure(call, device, share, timer)
        if found.lost or found.own:
            found = _agreed(found, _measure(call, device, share, timer))
        yield found


def _agreed(one: Measured, other: Measured) -> Measured:
    """Of two measurements of a call, the one that is closer to the present dispatch."""
    if one.own != other.own:
        return other if one.own else one
    return max(one, other, key=lambda m: m.ratio * (1 + m.chance))


def _measure(call: Call, device: str, seconds: float, timer: Timer) -> Measured:
    torch.manual_seed(0)
    with tuned.using(None), tuned.own_convolutions([]):
        samples = clock.interleave(contenders(call, device), timer, seconds=seconds, sample_seconds=SAMPLE_SECONDS)

    def ratio(baseline: str, other: str) -> clock.Ratio:
        return clock.ratio([s.wall for s in samples[baseline]], [s.wall for s in samples[other]])

    own = OWN in samples and ratio(OURS, OWN).is_beyond(GAIN)
    found = ratio(THEIRS, OWN if own else OURS)
    return Measured(call, found.value, found.chance, own)


def contenders(call: Call, device: str) -> dict[str, Step]:
    """The call by cnnkern's operator and by PyTorch's: forward, and backward too if a gradient is needed.

    A convolution also by cnnkern's kernels without the dispatch rule. In a training step this applies to the backward
    pass only: calls in inference decide what computes the forward pass.
    """
    dtype, layout = getattr(torch, call.dtype), _formats[call.layout] if len(call.shape) == 4 else None

    def make(shape: tuple[int, ...], kind: torch.dtype, format: torch.memory_format | None = None) -> Tensor:
        made = torch.randn(shape, device=device).to(kind)
        made = made if format is None else made.contiguous(memory_format=format)
        return made.requires_grad_(call.training)

    def channels(count: int) -> tuple[Tensor | None, Tensor | None]:
        if call.parameters == "none":
            return None, None
        return make((count,), getattr(torch, call.parameters)), make((count,), getattr(torch, call.parameters))

    x = make(call.shape, dtype, layout)
    arguments = _ARGUMENTS[call.operator](call, x, make, channels)
    wanted = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    ours = getattr(functional, call.operator)
    theirs = _layer_norm2d if call.operator == "layer_norm2d" else getattr(reference, call.operator)
    steps = {name: _step(function, arguments, wanted) for name, function in ((OURS, ours), (THEIRS, theirs))}
    if call.operator == "conv2d":
        steps[OWN] = _on_our_kernels(call, steps[OURS])
    return steps


def _on_our_kernels(call: Call, step: Step) -> Step:
    def run() -> None:
        with tuned.own_convolutions([call]):
            step()

    return run


def _step(function: Callable[..., Tensor], arguments: tuple[Any, ...], wanted: list[Tensor]) -> Step:
    with torch.no_grad():
        dy = torch.randn_like(function(*arguments))

    def inference() -> None:
        with torch.no_grad():
            function(*arguments)

    def training() -> None:
        torch.autograd.grad(function(*arguments), wanted, dy)

    return training if wanted else inference


_formats = {name: format for format, name in tuned.LAYOUTS.items()}


def _layer_norm2d(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return tuned.layer_norm2d_by_pytorch(input, weight, bias, 1e-6)


def _batch_norm(call: Call, x: Tensor, residual: tuple[Tensor, ...], channels: Any) -> tuple[Any, ...]:
    act, training = call.settings
    statistics = torch.zeros(x.shape[1], device=x.device), torch.ones(x.shape[1], device=x.device)
    return (x, *residual, *statistics, *channels(x.shape[1]), training, 0.1, 1e-5, act)


def _convolution(call: Call, x: Tensor, make: Any) -> tuple[Any, ...]:
    *weight, s0, s1, p0, p1, d0, d1, groups, has_bias = call.settings
    bias = make((weight[0],), x.dtype) if has_bias else None
    return x, make(tuple(weight), x.dtype, _formats[call.layout]), bias, (s0, s1), (p0, p1), (d0, d1), groups


def _like(x: Tensor, make: Any) -> Tensor:
    return make(tuple(x.shape), x.dtype, tuned.format_of(x) if x.dim() == 4 else None)


# The arguments of an operator's function, from the call, its input, and functions that create tensors and parameters.
_ARGUMENTS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "add_relu": lambda call, x, make, channels: (x, _like(x, make)),
    "batch_norm_act": lambda call, x, make, channels: _batch_norm(call, x, (), channels),
    "batch_norm_add_act": lambda call, x, make, channels: _batch_norm(call, x, (_like(x, make),), channels),
    "conv2d": lambda call, x, make, channels: _convolution(call, x, make),
    "layer_norm": lambda call, x, make, channels: (x, call.settings, *channels(call.settings[0])),
    "layer_norm2d": lambda call, x, make, channels: (x, *channels(x.shape[1])),
}


def known(device: str) -> list[Measured]:
    """The contents of this machine's table, if there is a valid one."""
    machine = tuned.this_machine(device)
    try:
        return tuned.read(tuned.file_of(machine), machine)
    except tuned.StaleTable:
        return []


def merged(before: list[Measured], measured: list[Measured]) -> list[Measured]:
    """The old measurements that were not repeated, then the new ones."""
    now = {m.call for m in measured}
    return [m for m in before if m.call not in now] + measured


def times_as_fast(one: list[Measured], other: list[Measured]) -> float:
    """The speedup of `one` backend over the other: the geometric mean over calls, from their ratios to PyTorch."""
    ratios = {m.call: m.ratio for m in other}
    return statistics.geometric_mean(m.ratio / ratios[m.call] for m in one if m.call in ratios)


def backends_of(device: str) -> list[str]:
    """Whose kernels can be timed on a device, in the names of :func:`cnnkern.backend`; on a CPU there is no choice."""
    if torch.device(device).type == "cpu":
        return ["cpu"]
    found = []
    for name in ("cuda", "triton"):
        try:
            with cnnkern.backend(name):
                found.append(name)
        except RuntimeError:  # it is not there
            continue
    return found
