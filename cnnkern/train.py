"""`cnnkern train MODEL`: the command line of the training loop in :mod:`cnnkern.trainer`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from cnnkern import checkpoint as checkpoints
from cnnkern import data
from cnnkern.memory import tune_malloc
from cnnkern.trainer import LEARNING_RATES, SCHEDULES, Run, TrainingError, processes


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `cnnkern train` with these arguments; returns the exit status: 0, 1 for an error, 130 after Ctrl-C."""
    options = parse(arguments)
    run = None
    try:
        with processes(options.device) as group:
            if options.threads:
                torch.set_num_threads(options.threads)
            tune_malloc()
            run = Run(options, group)
            if options.compare:
                run.compare()
            else:
                run.train()
    except (data.DataError, checkpoints.CheckpointError, TrainingError, OSError) as error:
        print(f"cnnkern: {one_line(error)}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(
            f"cnnkern: {options.device} has too little memory for {options.model} with --batch-size "
            f"{options.batch_size}{f' and --resize {options.resize}' if options.resize else ''}: lower them",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        last = options.output / "checkpoint.pt"
        finished = run is not None and run.epoch > 0 and last.exists()
        kept = f"{last} has the last whole epoch: go on with --resume" if finished else "no epoch was finished"
        print(f"\ncnnkern: interrupted; {kept}", file=sys.stderr)
        return 130
    return 0


def one_line(error: Exception) -> str:
    """The message; PyTorch puts the traceback of a process that reads ahead (--workers) in front of it."""
    said = str(error)
    return said.splitlines()[-1].partition(": ")[2] if said.startswith("Caught ") else said


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory was refused; on the CPU PyTorch has no class of its own for that."""
    said = ("can't allocate memory", "not enough memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in str(error) for text in said)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    def number(kind: type, zero: bool = False, most: float | None = None) -> Callable[[str], Any]:
        most = most or (2**31 - 1 if kind is int else 1e30)  # beyond, what PyTorch computes in overflows

        def parsed(text: str) -> Any:
            value = kind(text)
            if most < value < math.inf:
                raise argparse.ArgumentTypeError(f"must be at most {most}; got {text}")
            if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
                raise argparse.ArgumentTypeError(f"must {'not be below' if zero else 'be above'} zero; got {text}")
            return value

        parsed.__name__ = kind.__name__  # argparse names it where the text is no number at all
        return parsed

    def device(text: str) -> str:
        try:
            torch.zeros(1, device=text).item()
        except (RuntimeError, AssertionError) as error:  # NotImplementedError too, of one without memory
            raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {str(error).splitlines()[0]}") from error
        return text

    parser = argparse.ArgumentParser(prog="cnnkern train", description="Trains a model of the zoo.")
    add = parser.add_argument
    add("model", metavar="MODEL", help="a model of `cnnkern zoo`")
    add("--dataset", nargs="+", default=["digits"], metavar="NAME", help=f"{', '.join(data.DATASETS)} (folder PATH)")
    add("--data-dir", metavar="DIR", help="where the files of the dataset are")
    add("--resize", type=number(int), metavar="SIDE", help="side of the images; default: the model's usual input")
    add("--epochs", type=number(int), default=5)
    add("--batch-size", type=number(int), default=64, help="of all processes together")
    add("--lr", type=number(float), help="default: " + ", ".join(f"{v} for {k}" for k, v in LEARNING_RATES.items()))
    add("--optimizer", choices=sorted(LEARNING_RATES), default="adam")
    add("--momentum", type=number(float, zero=True), default=0.9, help="of sgd")
    add("--weight-decay", type=number(float, zero=True), default=0.0)
    add("--schedule", choices=sorted(SCHEDULES), help="of the learning rate; default: constant")
    add("--amp", choices=["bf16"], help="autocast")
    add("--float64", action="store_true", help="double precision, for comparisons of runs")
    add("--channels-last", action="store_true")
    add("--compile", action="store_true", help="torch.compile")
    add("--eager", action="store_true", help="the unfused twin, on PyTorch's operators")
    add("--sync-bn", action="store_true", help="batch statistics over all processes")
    add("--compare", action="store_true", help="print images a second of fused and eager training steps, and stop")
    add("--seed", type=number(int, zero=True), default=0)
    add("--threads", type=number(int, most=1024), help="of the CPU; default: PyTorch's choice")
    add("--augment", action="store_true", help="turn, shift and scale each training image a little, at random")
    add("--workers", type=number(int, zero=True, most=1024), default=0, help="processes that read image files ahead")
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output", type=Path, metavar="DIR", help="of checkpoint and curves; default: runs/MODEL")
    add("--resume", nargs="?", const=True, metavar="FILE", help="go on from FILE, by default from the output's own")
    options = parser.parse_args(arguments)
    options.dataset, *folder = options.dataset
    if options.dataset not in data.DATASETS:
        parser.error(f"argument --dataset: {options.dataset!r} is none of {', '.join(data.DATASETS)}")
    if len(folder) > (options.dataset == "folder"):
        parser.error("argument --dataset: takes one name (and `folder` a path): give MODEL first")
    if options.data_dir and (folder or options.dataset == "digits"):
        parser.error(f"--data-dir: {options.dataset} {'has its path already' if folder else 'needs none'}")
    options.data_dir = folder[0] if folder else options.data_dir
    options.output = options.output or Path("runs") / options.model
    if options.float64 and options.amp:
        parser.error("--float64 and --amp exclude each other")
    if options.sync_bn and options.eager:
        parser.error("--sync-bn needs the fused layers: leave --eager out")
    return options
