"""`cnnkern bench MODEL`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch

import cnnkern
from cnnkern.measure.load import FORMS, Loaded, load
from cnnkern.measure.run import benchmark
from cnnkern.measure.steps import AMP
from cnnkern.measure.values import ModelError

BATCH = 8


def shape(text: str) -> tuple[int, ...]:
    """(64, 3, 224, 224) of "64,3,224,224"."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected numbers such as 64,3,224,224; got {text!r}")
    return tuple(int(part) for part in parts)


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above zero, got {text}")
    return value


def count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"needs a number from 1 to 1024, got {text!r}")
    return int(text)


def device(text: str) -> str:
    """A device of this machine."""
    if text.partition(":")[0] not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
    if text.startswith("cuda") and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("there is no GPU that torch can use")
    return text


def add_model_options(parser: argparse.ArgumentParser, seconds: float) -> None:
    """The options that `cnnkern bench MODEL` and `cnnkern tune MODEL` share."""
    parser.add_argument(
        "--input",
        type=shape,
        action="append",
        metavar="N,C,H,W",
        help="the shape of an input; once per argument of the model (default: 8 images of the model's usual size)",
    )
    parser.add_argument("--amp", choices=tuple(AMP), help="run under autocast in this dtype (default: off)")
    parser.add_argument("--channels-last", action="store_true", help="use channels_last for the model and its input")
    parser.add_argument(
        "--device", type=device, default="cpu", help="the device to run on: cpu, cuda or cuda:N (default: cpu)"
    )
    parser.add_argument(
        "--threads", type=count, metavar="N", help="the number of CPU threads (default: PyTorch's choice)"
    )
    parser.add_argument(
        "--seconds", type=positive, default=seconds, metavar="S", help=f"seconds to time for (default: {seconds:.0f})"
    )


def arguments_for(loaded: Loaded, given: list[tuple[int, ...]] | None) -> tuple[Any, ...]:
    """The model's arguments: tensors of the given shapes, else its example, else images of its usual size."""
    if given:
        shapes = given
    elif loaded.example is not None:
        return loaded.example
    elif loaded.size is not None:
        shapes = [(BATCH, *loaded.size)]
    else:
        raise ModelError(f"{loaded.name} does not say what its input is: give it with --input N,C,H,W")
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(s, generator=generator) for s in shapes)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="cnnkern bench",
        description="With MODEL: compares the model in eager PyTorch with its converted copy: results, times, memory, "
        "and where the time goes. Without MODEL: runs the benchmark suite, which has other options; `cnnkern "
        "bench --quick --help` lists them.",
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help=f"{FORMS} (default: the benchmark suite)")
    add_model_options(parser, seconds=30.0)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--train", action="store_true", help="time training steps (the default)")
    mode.add_argument("--infer", action="store_true", help="time inference; on a CPU also the folded model")
    parser.add_argument("--compile", action="store_true", help="also time both models under torch.compile")
    parser.add_argument("--recompute", action="store_true", help="also measure training with recomputation")
    parser.add_argument(
        "--tune-malloc", action="store_true", help="call cnnkern.tune_malloc() first (eager is timed with it too)"
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures to FILE as JSON")
    parser.add_argument("--html", metavar="FILE", help="write the tables to FILE as an HTML page")
    options = parser.parse_args(arguments)
    if options.model is None:
        parser.error(f"these options need a MODEL: {FORMS}")
    if options.recompute and options.infer:
        parser.error("--recompute is for training: leave --infer out")
    return options


def main(arguments: Sequence[str]) -> int:
    """Runs `cnnkern bench MODEL`. Returns 1 if results are wrong or nothing can be measured."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.tune_malloc:
        cnnkern.tune_malloc()
    try:
        loaded = load(options.model)
        result = benchmark(
            loaded.model,
            arguments_for(loaded, options.input),
            training=not options.infer,
            amp=options.amp,
            channels_last=options.channels_last,
            device=options.device,
            compile=options.compile,
            recompute=options.recompute,
            seconds=options.seconds,
            converted=loaded.converted,
            name=loaded.name,
        )
    except ModelError as error:
        print(f"cnnkern: {error}", file=sys.stderr)
        return 1
    print(result)
    if options.json:
        result.to_json(options.json)
    if options.html:
        result.to_html(options.html)
    if not result.ok:
        print(f"cnnkern: {loaded.name}: the converted model gives other results", file=sys.stderr)
        return 1
    return 0
