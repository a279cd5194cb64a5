"""`cnnkern.benchmark`: checks, times and profiles a model: eager, converted, folded and compiled."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cnnkern.conversion.convert import check_module, conversion_report, convert
from cnnkern.conversion.fold import fold
from cnnkern.measure import clock, machine, profile
from cnnkern.measure.check import Make, check
from cnnkern.measure.clock import Sample, Step
from cnnkern.measure.result import BenchmarkResult, Contender
from cnnkern.measure.steps import AMP, Setting, forward, step
from cnnkern.measure.values import ModelError, by_x, mean_loss, one_line, placed, results_of, shapes
from cnnkern.ops import tuned
from cnnkern.recomputation import switch_on

EAGER, AGAIN, CONVERTED, RECOMPUTE, FOLDED = "eager", "eager, again", "converted", "recompute", "folded"
COMPILED, BOTH = "torch.compile", "converted + torch.compile"


def benchmark(
    model: nn.Module,
    example: Tensor | tuple[Any, ...],
    *,
    training: bool = True,
    amp: str | None = None,
    channels_last: bool = False,
    device: str = "cpu",
    compile: bool = False,
    recompute: bool = False,
    seconds: float = 30.0,
    loss: Callable[[Any], Tensor] | None = None,
    converted: nn.Module | None = None,
    name: str | None = None,
) -> BenchmarkResult:
    """Compares a model with its converted form on this machine: results, times, memory, and where the time goes.

    A training step is the forward pass, the backward pass and a step of SGD with momentum. In inference on a CPU the
    model of :func:`cnnkern.fold` is timed too. If results differ, nothing is timed, and :attr:`BenchmarkResult.ok` is
    False. ``model`` is not changed.

    Args:
        model: The model.
        example: Its input, or a tuple of its arguments. The first dimension of the first tensor is the batch.
        training: Whether to time training steps or inference.
        amp: ``"bf16"`` or ``"fp16"``: autocast, without a gradient scaler.
        channels_last: Whether to use channels_last for the model and the example.
        device: The device to run on.
        compile: Whether to also time the model and the converted model under :func:`torch.compile`.
        recompute: Whether to also measure the converted model with :func:`cnnkern.recompute`, in training.
        seconds: For the timing alone. Checks, compilation and at least five rounds come in addition.
        loss: A function of the model's output. By default it is the sum of the means of all floating-point tensors in
            the output, which may be in sequences, mappings and dataclasses.
        converted: A converted form of the model, to be measured instead of that of :func:`cnnkern.convert`.
        name: The name of the model in the tables.

    Raises ValueError for an unknown ``amp``, negative ``seconds``, an example that the model does not accept, and a
    model that returns no floating-point tensor; TypeError if ``model`` is not an ``nn.Module``.
    """
    check_module("benchmark", model)
    if amp is not None and amp not in AMP:
        raise ValueError(f"cnnkern.benchmark: amp must be one of {', '.join(AMP)}; got {amp!r}")
    if not seconds >= 0:
        raise ValueError(f"cnnkern.benchmark: seconds must not be negative; got {seconds}")
    name = name or type(model).__name__
    setting = Setting(training, device, amp, channels_last, loss or mean_loss)
    arguments = placed(example if isinstance(example, tuple) else (example,), device, channels_last)
    base = setting.place(copy.deepcopy(model))
    _try(name, base, arguments, setting)

    forms = _forms(converted, setting, recompute)
    found = BenchmarkResult(
        model=name,
        inputs=shapes(arguments),
        batch=next((shape[0] for shape in shapes(arguments) if shape), 1),
        mode="training" if training else "inference",
        dtype=str(AMP[amp] if amp else torch.float32).removeprefix("torch."),
        layout="channels_last" if channels_last else "contiguous",
        device=device,
        threads=torch.get_num_threads(),
        machine=machine.describe(device),
        activity=machine.Watch().activity(),
        tuned=tuned.table is not None,
        fused=_fused(base, converted, arguments, setting),
        check=check(base, forms, arguments, setting),
    )
    return _timed(found, base, forms, arguments, setting, compile, seconds) if found.ok else found


def _try(name: str, model: nn.Module, arguments: tuple[Any, ...], setting: Setting) -> None:
    """Raises ModelError if the model does not accept these arguments, or returns nothing to measure."""
    if any(is_lazy(p) for p in (*model.parameters(), *model.buffers())):
        raise ModelError(f"{name} has lazy layers that have no parameters yet: call it once before")
    try:
        output = forward(copy.deepcopy(model), arguments, setting)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, NotImplementedError) as error:
        given = " and ".join(by_x(shape) for shape in shapes(arguments))
        raise ModelError(f"{name} does not accept an input of {given}: {one_line(error)}") from error
    found = results_of(name, output)
    if setting.training and not any(t.requires_grad for t in found):
        raise ModelError(f"{name} has nothing to train: no output depends on a parameter that requires a gradient")


def _forms(converted: nn.Module | None, setting: Setting, recompute: bool) -> dict[str, Make]:
    """The forms to compare with the model: functions of a copy of it."""

    def by_author(model: nn.Module) -> nn.Module:
        assert converted is not None
        form = copy.deepcopy(converted)
        form.load_state_dict(model.state_dict())
        dtype = next((p.dtype for p in model.parameters()), torch.float32)
        return setting.place(form.to(dtype))

    forms: dict[str, Make] = {CONVERTED: (lambda m: convert(m, inplace=True)) if converted is None else by_author}
    if recompute and setting.training:
        forms[RECOMPUTE] = lambda m: switch_on(forms[CONVERTED](m))
    if not setting.training and torch.device(setting.device).type == "cpu":
        forms[FOLDED] = fold if converted is None else lambda m: fold(by_author(m))
    return forms


def _fused(
    base: nn.Module, converted: nn.Module | None, arguments: tuple[Any, ...], setting: Setting
) -> dict[str, int]:
    if converted is None:
        model = convert(copy.deepcopy(base), inplace=True)
        forward(model, arguments, setting)  # it is known after a run what is fused
        return {kind: n for kind, n in conversion_report(model).counts.items() if kind != "not converted"}
    from cnnkern.zoo import fused_layers

    return dict(fused_layers(converted))


def _timed(
    found: BenchmarkResult,
    base: nn.Module,
    forms: dict[str, Make],
    arguments: tuple[Any, ...],
    setting: Setting,
    compile: bool,
    seconds: float,
) -> BenchmarkResult:
    models = {EAGER: base} | {n: setting.place(make(copy.deepcopy(base))) for n, make in forms.items()}
    steps = {name: step(model, arguments, setting) for name, model in models.items()}
    failed: dict[str, str] = {}
    if compile:
        for name, plain in ((COMPILED, EAGER), (BOTH, CONVERTED)):
            try:
                steps[name] = _compiled(models[plain], arguments, setting)
            except Exception as error:  # of a compiler, whatever it is
                failed[name] = one_line(error)[:200]
    for one in steps.values():
        one()
    watch = machine.Watch()
    timer = clock.timer_for(setting.device)
    samples = clock.interleave({EAGER: steps[EAGER], AGAIN: steps[EAGER]} | steps, timer, seconds=seconds)
    activity = replace(watch.activity(), load=found.activity.load)  # before the start: later the load is this process
    on_gpu = torch.device(setting.device).type == "cuda"
    looked_into = (
        steps if on_gpu else {n: steps[n] for n in (EAGER, CONVERTED)}
    )  # there for the time of kernels, of all
    profiles = profile.profiled(looked_into, setting.device, seconds / 5)
    peaks = {n: profile.peak_bytes(one, setting.device) for n, one in steps.items()}
    contenders = [_contender(n, samples, peaks[n], profiles[n].busy if on_gpu else None) for n in steps]
    by_name = {c.name: c for c in contenders}
    parts = {n: profile.breakdown(profiles[n], by_name[n].seconds, on_gpu) for n in (EAGER, CONVERTED)}
    return replace(
        found,
        activity=activity,
        rounds=len(samples[EAGER]),
        noise=clock.noise_floor(clock.ratio(_walls(samples[EAGER]), _walls(samples[AGAIN]))),
        contenders=contenders,
        failed=failed,
        breakdown=parts,
        bound=profile.bound(parts[EAGER]),
    )


def _compiled(model: nn.Module, arguments: tuple[Any, ...], setting: Setting) -> Step:
    torch._dynamo.reset()
    one = step(torch.compile(copy.deepcopy(model), dynamic=False), arguments, setting)  # type: ignore[arg-type]
    one()
    return one


def _walls(samples: list[Sample]) -> list[float]:
    return [s.wall for s in samples]


def _contender(name: str, samples: dict[str, list[Sample]], peak: int, kernels: float | None) -> Contender:
    """Times that are consistent with the ratios: eager's median, and for others that divided by the ratio."""
    eager, mine = _walls(samples[EAGER]), _walls(samples[name])
    ratio = clock.ratio(eager, mine)
    events = [s.events for s in samples[name] if s.events is not None]
    return Contender(
        name=name,
        seconds=statistics.median(eager) / ratio.value,
        spread=clock.spread(mine),
        ratio=ratio.value,
        chance=0.0 if name == EAGER else ratio.chance,
        peak_bytes=peak,
        event_seconds=statistics.median(events) if events else None,
        kernel_seconds=kernels,
    )
