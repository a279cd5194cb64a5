"""The options of `cnnkern train`, and how those of a run that is resumed come from its checkpoint.

What shapes a run is in its checkpoint (SETTINGS). On --resume an option that is left out is what it was. One that is
given and differs is refused where the run would not be a continuation (FIXED), else it is used, and said.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from cnnkern import checkpoint as checkpoints
from cnnkern import data
from cnnkern.output import CHECKPOINT
from cnnkern.schedule import LEARNING_RATES, SCHEDULES

# What a run that is resumed must share with the one that it continues.
FIXED = (
    *("dataset", "resize", "batch_size", "optimizer", "momentum", "weight_decay", "augment", "seed"),
    *("amp", "float64", "eager", "sync_bn"),
)
# All that shapes a run.
SETTINGS = (
    *FIXED,
    *("epochs", "lr", "schedule", "data_dir", "channels_last", "compile", "recompute", "threads", "device"),
)


class Parser(argparse.ArgumentParser):
    """argparse's, with defaults that the help prints and that are set only after the checkpoint had its say."""

    def __init__(self) -> None:
        super().__init__(
            prog="cnnkern train",
            description="Trains a model of the zoo. With --resume, options that are not given come from the "
            "checkpoint.",
            argument_default=argparse.SUPPRESS,
        )
        self.defaults: dict[str, Any] = {}
        self.said_of_none: dict[str, str] = {}
        self.actions: dict[str, argparse.Action] = {}

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments"):
            message += " (use --resume-from FILE for a checkpoint, --data-dir DIR for the folder of a dataset)"
        super().error(message)

    def add(self, name: str, default: Any = None, said: str = "", help: str = "", **arguments: Any) -> None:
        """An option; `said` is the default where the value does not say it."""
        said = said or ("" if default is None or default is False else str(default))
        text = f"{help} (default: {said})" if said else help
        action = self.add_argument(name, help=text.replace("%", "%%"), **arguments)
        self.defaults[action.dest], self.actions[action.dest] = default, action
        self.said_of_none[action.dest] = said or "none"

    def switch(self, name: str, help: str) -> None:
        """An option that is on, or with `no-` before its name off, as it may have to be on --resume."""
        self.add(name, False, help=help, said="off", action=argparse.BooleanOptionalAction)

    def has(self, name: str, value: Any) -> bool:
        """Whether `value` is one that this option can have."""
        action = self.actions[name]
        if isinstance(action, argparse.BooleanOptionalAction):
            return isinstance(value, bool)
        if value is None:
            return self.defaults[name] is None and name not in ("lr", "schedule", "resize")
        if action.choices is not None:
            return value in list(action.choices)
        if not callable(action.type):
            return isinstance(value, str)
        try:
            parsed = action.type(str(value))
        except (ValueError, argparse.ArgumentTypeError):
            return False
        return type(parsed) is type(value) and parsed == value

    def said(self, name: str, value: Any) -> str:
        """The value as a user would say it."""
        if value is None:
            return self.said_of_none[name]
        return ("on" if value else "off") if isinstance(value, bool) else str(value)


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


def make_parser() -> Parser:
    # No option takes a variable number of values: it would take MODEL, where that comes next.
    parser = Parser()
    parser.add_argument("model", metavar="MODEL", help="the model to train; `cnnkern zoo` lists all")
    add, switch, whole = parser.add, parser.switch, number(int)
    add("--dataset", "digits", choices=data.DATASETS, help="the dataset to train on; digits comes with scikit-learn")
    add("--data-dir", metavar="DIR", help="the folder with the files of the dataset; digits needs none")
    usual = "the model's usual input"
    add("--resize", type=whole, metavar="SIDE", said=usual, help="the height and width that images are resized to")
    add("--epochs", 5, type=whole, help="how many times to go through the training images")
    add("--batch-size", 64, type=whole, help="images per training step, of all processes together")
    rates = ", ".join(f"{rate} for {name}" for name, rate in LEARNING_RATES.items())
    add("--lr", type=number(float), said=rates, help="the learning rate")
    add("--optimizer", "adam", choices=sorted(LEARNING_RATES), help="the optimiser")
    add("--momentum", 0.9, type=number(float, zero=True), help="the momentum of --optimizer sgd")
    add("--weight-decay", 0.0, type=number(float, zero=True), said="0", help="the weight decay of the optimiser")
    add("--schedule", "constant", choices=sorted(SCHEDULES), help="how the learning rate falls over all --epochs")
    add("--amp", choices=["bf16"], said="off", help="mixed precision: run the model under autocast in this dtype")
    switch("--float64", help="compute in float64, for comparisons of runs")
    switch("--channels-last", help="keep images and weights in the channels_last memory format")
    switch("--compile", help="compile the model with torch.compile")
    switch("--recompute", help="recompute the results of norms in the backward pass, to save memory")
    switch("--eager", help="use PyTorch's operators instead of the fused layers")
    switch("--sync-bn", help="synchronise batch statistics over all processes")
    add("--seed", 0, type=number(int, zero=True), help="the seed of weights, order, augmentation and dropout")
    switch("--augment", help="rotate, shift and scale each training image a little, at random")
    threads = number(int, most=1024)
    add("--threads", type=threads, said="PyTorch's choice", help="the number of CPU threads")
    workers = number(int, zero=True, most=1024)
    add("--workers", 0, type=workers, help="the number of processes that read image files ahead")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", best, type=device, help="the device to train on, such as cpu, cuda or cuda:1")
    add(
        "--output",
        type=Path,
        metavar="DIR",
        said="runs/MODEL",
        help="the folder to write checkpoint.pt and the curves to",
    )
    add("--overwrite", False, action="store_true", help="replace the run in the output folder")
    add("--resume", False, action="store_true", help="continue from the checkpoint in the output folder")
    add("--resume-from", type=Path, metavar="FILE", help="continue from this checkpoint, or the one in this folder")
    add("--compare", False, action="store_true", help="only time training steps, with fused and with eager layers")
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a run, with those of the checkpoint that it resumes.

    Beside the options it has `checkpoint`, `path` and `stamp`, the content, place and age of the checkpoint (None for a
    new run), and `notes`, lines that say what differs from the run that is resumed. Raises CheckpointError where that
    cannot be resumed.
    """
    parser = make_parser()
    given = vars(parser.parse_args(arguments))
    if "data_dir" in given:
        given["data_dir"] = str(Path(given["data_dir"]).absolute())  # of whoever resumes it from elsewhere
    given.setdefault("output", Path("runs") / given["model"])
    if given.get("resume") and "resume_from" in given:
        parser.error("--resume and --resume-from cannot be combined")
    if given.get("resume") and given.get("overwrite"):
        parser.error("--resume continues the run that --overwrite would replace: leave one of them out")
    path = given["output"] / CHECKPOINT if given.get("resume") else given.get("resume_from")
    path = path / CHECKPOINT if path and path.is_dir() else path
    stamp = file_stamp(path)
    found = checkpoints.load(path) if path else None
    settings, notes = _settings(parser, given, path, found) if path and found else ({}, [])
    options = argparse.Namespace(**(parser.defaults | settings | given), checkpoint=found, path=path)
    options.stamp, options.notes = stamp, notes
    options.lr = LEARNING_RATES[options.optimizer] if options.lr is None else options.lr
    if options.dataset == "digits" and options.data_dir:
        parser.error("--data-dir: the dataset digits needs none")
    if options.float64 and options.amp:
        parser.error("--float64 and --amp cannot be combined")
    if options.recompute and (options.eager or options.compile):
        other = "--eager" if options.eager else "--compile"
        parser.error(f"--recompute needs the fused layers without torch.compile: leave {other} out")
    if options.sync_bn and options.eager:
        parser.error("--sync-bn needs the fused layers: leave --eager out")
    return options


def _settings(
    parser: Parser, given: dict[str, Any], path: Path, found: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """(settings of the checkpoint, what is said of the options that differ from them)."""
    if found["model"] != given["model"]:
        raise checkpoints.CheckpointError(f"{path} is of {found['model']}, not of {given['model']}")
    settings = found["settings"]
    if missing := [name for name in SETTINGS if name not in settings]:
        raise checkpoints.CheckpointError(
            f"{path} has no {', '.join(missing)} in its settings: another version of cnnkern wrote it"
        )
    settings, notes = {name: settings[name] for name in SETTINGS}, []
    here = settings["device"]
    if "device" not in given and isinstance(here, str) and not parser.has("device", here):
        settings["device"] = parser.defaults["device"]
        notes.append(f"--device {settings['device']} from here on, {here} before, which cannot be used here")
    if wrong := [name for name, value in settings.items() if not parser.has(name, value)]:
        said = ", ".join(f"{name} {settings[name]!r}" for name in wrong)
        raise checkpoints.CheckpointError(f"{path} is not a checkpoint of cnnkern train: its settings have {said}")
    other = {name: settings[name] for name in SETTINGS if name in given and given[name] != settings[name]}
    if fixed := [name for name in FIXED if name in other]:
        said = ", ".join(f"{_option(n)} {parser.said(n, other[n])} (now {parser.said(n, given[n])})" for n in fixed)
        raise checkpoints.CheckpointError(f"{path} was made with {said}: leave that out, or start a new run")
    notes += [
        f"{_option(n)} {parser.said(n, given[n])} from here on, {parser.said(n, before)} before"
        for n, before in other.items()
    ]
    return settings, notes


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def file_stamp(path: Path | None) -> tuple[int, ...] | None:
    """What changes when a file is replaced; None where there is none."""
    if path is None or not path.is_file():
        return None
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size
