"""`cnnkern tune [MODEL]`."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

import cnnkern
from cnnkern.conversion.convert import convert
from cnnkern.measure import machine, tune
from cnnkern.measure.command import add_model_options, arguments_for
from cnnkern.measure.load import FORMS, load
from cnnkern.measure.steps import Setting
from cnnkern.measure.values import ModelError, by_x, one_line, placed, shapes
from cnnkern.ops import tuned
from cnnkern.ops.tuned import Call, Measured

DEFAULT = ("zoo:resnet18", "zoo:mobilenet_v2", "zoo:convnext_tiny", "zoo:regnet_y_400mf")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="cnnkern tune",
        description="Times cnnkern's operators against PyTorch's, call by call of a model, and records which is "
        "faster. From then on the faster one computes such calls on this machine.",
        epilog="The environment variable CNNKERN_TUNE=0 turns the table off; `cnnkern doctor` shows the table.",
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help=f"the model: {FORMS} (default: {', '.join(DEFAULT)})")
    add_model_options(parser, seconds=60.0)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--train", action="store_true", help="tune training only (default: training and inference)")
    mode.add_argument("--infer", action="store_true", help="tune inference only")
    parser.add_argument("--forget", action="store_true", help="start a new table instead of adding to this machine's")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Runs `cnnkern tune`; 1 where there is nothing to measure."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        calls = [call for name in ([options.model] if options.model else DEFAULT) for call in _calls(name, options)]
    except ModelError as error:
        print(f"cnnkern: {error}", file=sys.stderr)
        return 1
    calls = list(dict.fromkeys(calls))
    if not calls:
        print(f"cnnkern: {options.model} calls none of cnnkern's operators: nothing to tune", file=sys.stderr)
        return 1
    backends = tune.backends_of(options.device)
    found: dict[str, list[Measured]] = {}
    for backend in backends:
        with contextlib.nullcontext() if backend == "cpu" else cnnkern.backend(backend):
            found[backend] = _tune(calls, options, options.seconds / len(backends))
    if len(found) == 2 and set.intersection(*({m.call for m in ms} for ms in found.values())):
        print(_compared(found))
    tuned.load()
    return 0


def _calls(name: str, options: argparse.Namespace) -> list[Call]:
    loaded = load(name)
    model = convert(loaded.model) if loaded.converted is None else loaded.converted
    given = arguments_for(loaded, options.input)
    arguments = placed(given, options.device, options.channels_last)
    ways = [True] if options.train else [False] if options.infer else [True, False]
    return [call for way in ways for call in _calls_of(name, model, arguments, way, options)]


def _calls_of(
    name: str, model: nn.Module, arguments: tuple[Any, ...], training: bool, options: argparse.Namespace
) -> list[Call]:
    setting = Setting(training, options.device, options.amp, options.channels_last)
    try:
        return tune.calls_of(model, arguments, setting)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, NotImplementedError) as error:
        given = " and ".join(by_x(shape) for shape in shapes(arguments))
        raise ModelError(f"{name} does not accept an input of {given}: {one_line(error)}") from error


def _tune(calls: list[Call], options: argparse.Namespace, seconds: float) -> list[Measured]:
    here, watch = tuned.this_machine(options.device), machine.Watch()
    before = [] if options.forget else tune.known(options.device)
    have = {m.call for m in before}
    calls = sorted(calls, key=lambda call: call in have)  # new ones first, for the time that there is
    found = _with_progress(tune.measure(calls, options.device, seconds), len(calls))
    print(watch.activity())
    print(f"{here['name']} ({here['kernels']}): {_summary(found)}")
    for m in sorted(found, key=lambda m: m.ratio):
        if m.lost or m.own:
            print(f"  {m.ratio:.2f}x +-{m.chance:.0%}  {m.call}" + (", on cnnkern's kernels" if m.own else ""))
    if left := len(calls) - len(found):
        print(f"calls not timed: {left}, because {seconds:.0f} seconds were over: run it again or raise --seconds")
    print(f"Written to {tuned.save(here, tune.merged(before, found))}")
    return found


def _with_progress(measured: Iterator[Measured], total: int) -> list[Measured]:
    """All of them, with a bar on a terminal that is gone at the end."""
    console = Console(stderr=True)
    bar = track(measured, "calls", total=total, console=console, transient=True, disable=not console.is_terminal)
    return list(bar)


def _compared(found: dict[str, list[Measured]]) -> str:
    """Which of two backends is the faster one, and how to choose it."""
    (one, first), (other, second) = found.items()
    ratio = tune.times_as_fast(first, second)
    faster, by = (one, ratio) if ratio >= 1 else (other, 1 / ratio)
    slower = other if faster == one else one
    return (
        f"{faster} is {by:.2f}x as fast as {slower} on these calls (geometric mean): "
        f"cnnkern.backend({faster!r}) selects it; cuda is the default where it is built"
    )


def _summary(found: list[Measured]) -> str:
    lost, own = sum(m.lost for m in found), sum(m.own and not m.lost for m in found)
    said = f"calls timed: {len(found)}"
    if not lost and not own:
        return f"{said}, none of which PyTorch's operators compute faster"
    said += f", of which PyTorch's operators compute {lost} faster, and will from now on"
    return said + (f"; cnnkern's kernels compute {own} that the built-in rule dispatched to PyTorch:" if own else ":")
