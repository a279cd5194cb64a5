"""The training loop of `cnnkern train`, in one process or, under torchrun, in several.

Every epoch draws its order and its dropout from a seed of its own, (seed, epoch, process), and its learning rate from
its place in the schedule. A checkpoint therefore holds all that the next epoch depends on, and resuming continues bit
by bit; and n processes train on the batches that one process would have.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from cnnkern import checkpoint as checkpoints
from cnnkern import curves, data
from cnnkern.models import create_model, get_builder
from cnnkern.nn import convert_sync_batchnorm

# Factor of the learning rate by the share of the run that is done.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "step": lambda done: 0.1 ** int(3 * done),
}
# What a run that is resumed must share with the one that it resumes, to be its continuation.
FIXED = ("dataset", "size", "batch_size", "optimizer", "momentum", "weight_decay", "augment", "seed")
FIXED += ("amp", "float64", "eager", "sync_bn")
# What it shares unless it is told otherwise.
RATES = ("lr", "schedule")
LEARNING_RATES = {"adam": 1e-3, "adamw": 1e-3, "sgd": 0.05}


class TrainingError(Exception):
    """The run cannot start or go on; the message says why and what to change."""


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    rank: int = 0
    count: int = 1

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes of a tensor that each has."""
        if self.count > 1:
            dist.all_reduce(values)
            values /= self.count
        return values

    def sum(self, values: Tensor) -> Tensor:
        if self.count > 1:
            dist.all_reduce(values)
        return values


@contextlib.contextmanager
def processes(device: str) -> Iterator[Processes]:
    """The process group that torchrun's environment describes; one process without it."""
    launched = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    count = int(os.environ["WORLD_SIZE"]) if launched else 1  # which others set as well
    if count == 1:
        yield Processes()
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Processes(dist.get_rank(), count)
    finally:
        dist.destroy_process_group()


class Run:
    """One training run: its data, its model and the epochs done, from the options of :func:`cnnkern.train.parse`."""

    def __init__(self, options: argparse.Namespace, group: Processes) -> None:
        self.options, self.group = options, group
        self.dtype = torch.float64 if options.float64 else torch.float32
        self.layout = torch.channels_last if options.channels_last else torch.contiguous_format
        self.console = Console(highlight=False, quiet=group.rank > 0)
        try:
            builder = get_builder(options.model)
        except ValueError as error:
            raise TrainingError(str(error)) from error
        self.data = data.load(options.dataset, options.data_dir, options.resize or builder.input_size[-1])
        for line in self.data.warnings:
            self._warn(line)
        path = options.output / "checkpoint.pt" if options.resume is True else options.resume
        found = checkpoints.load(path) if path else None
        self._choose_rates(found["settings"] if found else {})
        self.arguments = {"num_classes": len(self.data.classes), "in_channels": self.data.channels}
        self._check_sizes(builder.input_size)
        self.settings = {name: getattr(options, name, None) for name in (*FIXED, *RATES)} | {"size": self.data.size}
        self.model = self._build(fused=not options.eager)
        self.optimizer = self._optimizer(self.model)
        self.step = self._wrap(self.model)
        self.sampler = DistributedSampler(
            self.data.train, group.count, group.rank, shuffle=True, seed=options.seed, drop_last=True
        )
        self.train_loader = self._loader(self.data.train, self.sampler, drop_last=True)
        # Every image once, whatever the number of processes; a DistributedSampler would repeat some.
        mine = range(group.rank, len(self.data.test), group.count)
        self.test_loader = self._loader(self.data.test, mine, drop_last=False)
        self.epoch, self.history, self.losses = 0, [], []
        if found:
            self._resume(path, found)

    def _warn(self, line: str) -> None:
        plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)  # a file's name
        self.console.print(f"warning: {plain}", style="yellow", markup=False, soft_wrap=True)

    def _choose_rates(self, before: dict[str, Any]) -> None:
        """Learning rate and schedule: as told, else those of the run that is resumed, else the usual ones."""
        usual = {"lr": LEARNING_RATES[self.options.optimizer], "schedule": "constant"}
        for name in RATES:
            told, old = getattr(self.options, name), before.get(name)
            if told is None:
                setattr(self.options, name, usual[name] if old is None else old)
            elif old not in (None, told):
                self._warn(f"--{name} {told} from here on, {old} before")

    def _check_sizes(self, usual: tuple[int, ...]) -> None:
        options, group = self.options, self.group
        if options.batch_size % group.count:
            raise TrainingError(f"--batch-size {options.batch_size} cannot be divided among {group.count} processes")
        if len(self.data.train) < options.batch_size:
            raise TrainingError(
                f"--batch-size {options.batch_size} is more than the {len(self.data.train)} training images"
            )
        # As many images as batch statistics are taken over: the last layers of a small image may have one pixel.
        together = options.batch_size if options.sync_bn else options.batch_size // group.count
        shape = (together, self.data.channels, self.data.size, self.data.size)
        try:  # on no data: shapes alone
            with torch.device("meta"):
                create_model(options.model, fused=False, **self.arguments)(torch.empty(shape))
        except (RuntimeError, ValueError) as error:
            advice = f"--resize {usual[-1]}"
            if self.data.size >= usual[-1]:
                advice = "a larger --batch-size" + (" or --sync-bn" if group.count > 1 and not options.sync_bn else "")
            raise TrainingError(
                f"{options.model} cannot train on {'x'.join(map(str, shape))} ({str(error).splitlines()[0]}); "
                f"its usual input is {'x'.join(map(str, usual))}: try {advice}"
            ) from error

    def _build(self, fused: bool) -> nn.Module:
        torch.manual_seed(self.options.seed)
        model = create_model(self.options.model, fused=fused, **self.arguments)
        if self.options.sync_bn:
            convert_sync_batchnorm(model)
        return model.to(self.options.device, self.dtype, memory_format=self.layout)

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        options = self.options
        common = {"lr": options.lr, "weight_decay": options.weight_decay}
        if options.optimizer == "sgd":
            return torch.optim.SGD(model.parameters(), momentum=options.momentum, **common)
        return (torch.optim.Adam if options.optimizer == "adam" else torch.optim.AdamW)(model.parameters(), **common)

    def _wrap(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """What a training step calls: the model, distributed and compiled as the options have it."""
        if self.group.count > 1:
            model = nn.parallel.DistributedDataParallel(model)
        return torch.compile(model) if self.options.compile else model

    def _loader(self, dataset: Dataset, sampler: Any, drop_last: bool) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=self.options.batch_size // self.group.count,
            sampler=sampler,
            drop_last=drop_last,  # a batch of one image has no batch statistics
            num_workers=self.options.workers,
            collate_fn=_as_it_is,
        )

    def _place(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        device = self.options.device
        return images.to(device, self.dtype, memory_format=self.layout), labels.to(device)

    def _autocast(self) -> torch.autocast:
        device = torch.device(self.options.device).type
        return torch.autocast(device, dtype=torch.bfloat16, enabled=self.options.amp == "bf16")

    def train(self) -> None:
        """Trains the epochs that are left; after each there are a checkpoint and curves in the output folder."""
        options, last = self.options, self.options.output / "checkpoint.pt"
        options.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=options.output):  # or it cannot be written to, which is better known now
            pass
        if self.epoch >= options.epochs:
            raise TrainingError(f"{self.epoch} epochs are done already: give --epochs {self.epoch + 1} or more")
        while self.epoch < options.epochs:
            started = time.perf_counter()
            losses, correct, seen = self.train_epoch()
            seconds = time.perf_counter() - started
            test_loss, test_accuracy = self.evaluate()
            self.epoch += 1
            self.losses += losses
            row = {
                "epoch": self.epoch,
                "loss": statistics.fmean(losses),
                "accuracy": correct / seen,
                "test_loss": test_loss,
                "test_accuracy": test_accuracy,
                "images_per_second": seen / seconds,
                "learning_rate": self.optimizer.param_groups[0]["lr"],
            }
            self.history.append(row)
            self.console.print(
                f"epoch {self.epoch}/{options.epochs}  loss {row['loss']:.4f}  accuracy {row['accuracy']:.2%}  "
                f"test loss {test_loss:.4f}  test accuracy {test_accuracy:.2%}  {seen / seconds:.0f} images/s",
                soft_wrap=True,
            )
            if self.group.rank == 0:
                checkpoints.save(last, self._checkpoint())
                curves.write(options.output, self.history, self.losses)
        self.console.print(f"{last}, curves.png, epochs.csv and steps.csv beside it", soft_wrap=True)

    def train_epoch(self) -> tuple[list[float], int, int]:
        """One pass over the training images: (loss of each step, images that were classified rightly, images)."""
        options, group = self.options, self.group
        torch.manual_seed((options.seed * 1_000_003 + self.epoch) * group.count + group.rank)
        self.sampler.set_epoch(self.epoch)
        self.model.train()
        steps, losses, correct, seen = len(self.train_loader), [], 0, 0
        started = time.perf_counter()
        with self._progress(steps) as advance:
            for i, (images, labels) in enumerate(self.train_loader):
                images, labels = self._place(data.augment(images) if options.augment else images, labels)
                done = (self.epoch + i / steps) / options.epochs
                for parameters in self.optimizer.param_groups:
                    parameters["lr"] = options.lr * SCHEDULES[options.schedule](done)
                with self._autocast():
                    output = self.step(images)
                    loss = F.cross_entropy(output, labels)
                value = loss.item()
                if not math.isfinite(value):
                    raise TrainingError(f"the loss is {value} in step {i + 1} of epoch {self.epoch + 1}: lower --lr")
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                losses.append(value)
                correct += (output.argmax(1) == labels).sum().item()
                seen += len(labels)
                advance(statistics.fmean(losses), correct / seen, seen * group.count / (time.perf_counter() - started))
        losses = group.mean(torch.tensor(losses, dtype=torch.float64, device=options.device)).tolist()
        correct, seen = group.sum(torch.tensor([correct, seen], device=options.device)).tolist()
        return losses, correct, seen

    @contextlib.contextmanager
    def _progress(self, steps: int) -> Iterator[Callable[[float, float, float], None]]:
        columns = (
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(
                "loss {task.fields[loss]:.4f}  accuracy {task.fields[accuracy]:.1%}  {task.fields[rate]:.0f} images/s"
            ),
            TimeRemainingColumn(),
        )
        # In a log file a bar would only be noise: there the line of each epoch has to do.
        shown = self.console.is_terminal and self.group.rank == 0
        with Progress(*columns, console=self.console, transient=True, disable=not shown) as progress:
            task = progress.add_task("", total=steps, epoch=self.epoch + 1, loss=0.0, accuracy=0.0, rate=0.0)
            yield lambda loss, accuracy, rate: progress.update(task, advance=1, loss=loss, accuracy=accuracy, rate=rate)

    @torch.inference_mode()
    def evaluate(self) -> tuple[float, float]:
        """(mean loss, share classified rightly) on the test images."""
        self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.options.device)
        for images, labels in self.test_loader:
            images, labels = self._place(images, labels)
            with self._autocast():
                output = self.model(images)
            loss = F.cross_entropy(output.to(self.dtype), labels, reduction="sum")
            right = (output.argmax(1) == labels).sum()
            sums += torch.stack([loss.double(), right.double(), right.new_tensor(len(labels)).double()])
        loss, correct, seen = self.group.sum(sums).tolist()
        return loss / seen, correct / seen

    def _checkpoint(self) -> dict[str, Any]:
        return {
            "model": self.options.model,
            "arguments": self.arguments | {"fused": not self.options.eager},
            "state": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "history": self.history,
            "steps": self.losses,
            "settings": self.settings,
            "classes": self.data.classes,
        }

    def _resume(self, path: str | Path, found: dict[str, Any]) -> None:
        if found["model"] != self.options.model:
            raise checkpoints.CheckpointError(f"{path} is of {found['model']}, not of {self.options.model}")
        if found["classes"] != self.data.classes:
            raise checkpoints.CheckpointError(
                f"{path} is of other classes: {', '.join(map(str, found['classes']))}; "
                f"this data has {', '.join(self.data.classes)}"
            )
        if other := [n for n in FIXED if found["settings"].get(n) != self.settings[n]]:
            said = ", ".join(f"{n} {found['settings'].get(n)} (now {self.settings[n]})" for n in other)
            raise checkpoints.CheckpointError(f"{path} was made with {said}: resume with the same options")
        checkpoints.restore(path, self.model, found, self.optimizer)
        self.epoch, self.history, self.losses = found["epoch"], found["history"], found["steps"]

    def compare(self, rounds: int = 9) -> dict[str, float]:
        """Prints and returns images a second of training steps on one batch, fused and eager, rounds interleaved."""
        if self.group.count > 1:
            raise TrainingError("--compare times one process: start it without torchrun")
        images, labels = self._place(*next(iter(self.train_loader)))
        contenders = {}
        for name, fused in (("fused", True), ("eager", False)):
            model = self._build(fused).train()
            contenders[name] = (self._wrap(model), self._optimizer(model))

        def seconds(name: str) -> float:
            step, optimizer = contenders[name]
            started = time.perf_counter()
            with self._autocast():
                loss = F.cross_entropy(step(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()  # waits for the device
            return time.perf_counter() - started

        for name in [*contenders] * 2:  # caches, and the compiler
            seconds(name)
        times = [{name: seconds(name) for name in contenders} for _ in range(rounds)]
        rates = {name: len(labels) / statistics.median(t[name] for t in times) for name in contenders}
        self.console.print(
            f"{self.options.model} on {'x'.join(map(str, images.shape))}, {torch.get_num_threads()} threads: "
            f"fused {rates['fused']:.1f} images/s, eager {rates['eager']:.1f} images/s, "
            f"{rates['fused'] / rates['eager']:.2f}x",
            soft_wrap=True,
        )
        return rates


def _as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The datasets hand out whole batches: there is nothing to collate."""
    return batch
