"""The training loop of `cnnkern train`, in one process or, under torchrun, in several.

Every epoch draws its order and its dropout from a seed of its own, (seed, epoch, process), and its learning rate from
its place in the schedule. A checkpoint therefore holds all that the next epoch depends on, and resuming continues bit
by bit; and n processes train on the batches that one process would have.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from cnnkern import checkpoint as checkpoints
from cnnkern import curves, data, memory
from cnnkern.models import create_model, get_builder
from cnnkern.nn import convert_sync_batchnorm
from cnnkern.options import SETTINGS
from cnnkern.output import CHECKPOINT
from cnnkern.processes import Processes
from cnnkern.recomputation import switch_on
from cnnkern.schedule import SCHEDULES


class TrainingError(Exception):
    """The run cannot start or go on; the message says why and what to change."""


class Run:
    """One training run: its data, its model and the epochs done, from the options of :func:`cnnkern.train.parse`."""

    def __init__(self, options: argparse.Namespace, group: Processes) -> None:
        self.options, self.group = options, group
        self.dtype = torch.float64 if options.float64 else torch.float32
        self.layout = torch.channels_last if options.channels_last else torch.contiguous_format
        self.console = Console(highlight=False, quiet=group.rank > 0)
        builder = get_builder(options.model)
        for line in options.notes:
            self._warn(line)
        self.data = data.load(options.dataset, options.data_dir, options.resize or builder.input_size[-1])
        options.resize = self.data.size
        for line in self.data.warnings:
            self._warn(line)
        self.arguments = {"num_classes": len(self.data.classes), "in_channels": self.data.channels}
        self._check_sizes(builder.input_size)
        # What has no option, or only a default, and is said where it has changed on --resume.
        self.environment = {
            "training images": len(self.data.train),
            "test images": len(self.data.test),
            "processes": group.count,
            "threads": torch.get_num_threads(),
        }
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
        self.saved = False  # whether the checkpoint in the output folder is of this run
        if options.checkpoint:
            self._resume(options.path, options.checkpoint)

    def _warn(self, line: str) -> None:
        plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)  # a file's name
        self.console.print(f"warning: {plain}", style="yellow", markup=False, soft_wrap=True)

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
        try:
            elements = _saved_elements(options.model, self.arguments, shape)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            if "more than 1 value per channel" in reason and self.data.size >= usual[-1]:
                advice = "a larger --batch-size" + (" or --sync-bn" if group.count > 1 and not options.sync_bn else "")
            elif "overflow" in reason:  # more elements than can be counted
                advice = f"--resize {usual[-1]} or a smaller --batch-size"
            else:
                advice = f"--resize {usual[-1]}"
            raise TrainingError(
                f"{options.model} cannot train on {'x'.join(map(str, shape))} ({reason}); "
                f"its usual input is {'x'.join(map(str, usual))}: try {advice}"
            ) from error
        needed = elements * options.batch_size / group.count / together * (2 if options.amp else self.dtype.itemsize)
        present = memory.total(options.device)
        if present is not None and needed > present:
            raise TrainingError(
                f"{options.device} has too little memory for {options.model} with --batch-size {options.batch_size} "
                f"and --resize {self.data.size}: lower them (a step keeps at least {needed / 1e9:,.0f} GB for its "
                f"backward pass, and {present / 1e9:,.0f} GB are there)"
            )

    def _build(self, fused: bool) -> nn.Module:
        torch.manual_seed(self.options.seed)
        model = create_model(self.options.model, fused=fused, **self.arguments)
        if self.options.sync_bn:
            convert_sync_batchnorm(model)
        if self.options.recompute and fused:
            switch_on(model)
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
        options, last = self.options, self.options.output / CHECKPOINT
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
            self.group.first(self._save)
        self.console.print(f"{last}, curves.png, epochs.csv and steps.csv in the same folder", soft_wrap=True)

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

    def _save(self) -> None:
        checkpoints.save(self.options.output / CHECKPOINT, self._checkpoint())
        self.saved = True
        curves.write(self.options.output, self.history, self.losses)

    def _checkpoint(self) -> dict[str, Any]:
        return {
            "model": self.options.model,
            "arguments": self.arguments | {"fused": not self.options.eager},
            "state": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "history": self.history,
            "steps": self.losses,
            "settings": {name: getattr(self.options, name) for name in SETTINGS},
            "environment": self.environment,
            "classes": self.data.classes,
        }

    def _resume(self, path: Path, found: dict[str, Any]) -> None:
        if found["classes"] != self.data.classes:
            raise checkpoints.CheckpointError(
                f"{path} is of other classes: {', '.join(found['classes'])}; this data has "
                f"{', '.join(self.data.classes)}"
            )
        checkpoints.restore(path, self.model, found, self.optimizer)
        self.epoch, self.history, self.losses = found["epoch"], found["history"], found["steps"]
        self.saved = is_own_checkpoint(self.options)
        for name, now in self.environment.items():
            if (before := found["environment"].get(name)) not in (None, now):
                self._warn(f"{now} {name} from here on, {before} before")

    def compare(self, rounds: int = 9) -> dict[str, float]:
        """Prints and returns images per second of training steps on one batch, fused and eager, rounds interleaved."""
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


def is_own_checkpoint(options: argparse.Namespace) -> bool:
    """Whether the run continues the one that its output folder has."""
    return options.path is not None and options.path.resolve() == (options.output / CHECKPOINT).resolve()


def _saved_elements(name: str, arguments: dict[str, Any], shape: tuple[int, ...]) -> int:
    """How many numbers a step keeps for its backward pass at least: the inputs of convolutions and linear layers.

    Runs a training step's forward pass without memory, and raises what that raises, RuntimeError or ValueError.
    """
    inputs: dict[int, Tensor] = {}  # which keeps them, so that no two have the same id

    def look(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        inputs[id(given[0])] = given[0]

    with torch.device("meta"):
        model = create_model(name, fused=False, **arguments)
        for layer in model.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.register_forward_pre_hook(look)
        model(torch.empty(shape))
    return sum(t.numel() for t in inputs.values())
