"""Checkpoints of a training run: written all or not at all, read without running code, refused where damaged."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor, nn

from cnnkern.models import create_model

KEYS = {
    **dict.fromkeys(("arguments", "state", "optimizer", "settings", "environment"), dict),
    **dict.fromkeys(("history", "steps", "classes"), list),
    "model": str,
    "epoch": int,
}
# A row of the history, which is a row of epochs.csv.
ROW = ("epoch", "loss", "accuracy", "test_loss", "test_accuracy", "images_per_second", "learning_rate")


class CheckpointError(Exception):
    """The checkpoint is missing, damaged or of another run; the message says which."""


class _Watched:
    """A file that remembers the first error of a write: torch and others put errors of their own in its place."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = self.error or error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Calls ``write`` with a file that takes the place of ``path`` once it is complete and on the disk.

    Raises OSError, with the path, where that cannot be done, on a full disk for one: what was at ``path`` is kept.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    file = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as opened:
            file = _Watched(opened)
            write(cast(IO[bytes], file))
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(unfinished, path)
    except Exception as error:
        refused = file.error if file is not None and file.error else error
        if not isinstance(refused, OSError):
            raise
        kept = "; the one of before is kept" if path.exists() else ""
        raise OSError(f"{path} cannot be written: {refused.strerror or refused}{kept}") from error
    finally:  # after Ctrl-C too: nothing is left beside `path`
        unfinished.unlink(missing_ok=True)


def save(path: Path, checkpoint: dict[str, Any]) -> None:
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def load(path: str | Path) -> dict[str, Any]:
    """The dictionary of a checkpoint, on the CPU. Raises CheckpointError where it is missing or damaged.

    Nothing in the file is run: it is read with ``weights_only=True``.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums that torch.save wrote
            changed = archive.testzip()
        checkpoint = None if changed else torch.load(path, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"the checkpoint {path} is damaged: it is no whole file of torch.save") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a checkpoint of cnnkern train: it contains more than tensors and text"
        ) from error
    except Exception as error:  # a damaged file raises whatever the archive's or the pickle's reader met
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"the checkpoint {path} is damaged: {reason}") from error
    if changed:
        raise CheckpointError(f"the checkpoint {path} is damaged: the checksum of {changed} in it is another")
    if problem := _problem(checkpoint):
        raise CheckpointError(f"{path} is not a checkpoint of cnnkern train: {problem}")
    return cast(dict[str, Any], checkpoint)


def _problem(checkpoint: Any) -> str | None:
    """What of a checkpoint has another type or form than :class:`cnnkern.trainer.Run` writes; None for a good one.

    The settings are options of `cnnkern train`: cnnkern/options.py looks at them.
    """
    if not isinstance(checkpoint, dict):
        return f"it holds a {type(checkpoint).__name__}, not a dict"
    for key, kind in KEYS.items():
        if key not in checkpoint:
            return f"it has no {key!r}"
        if not _is(checkpoint[key], kind):
            return f"its {key!r} is a {type(checkpoint[key]).__name__}, not a {kind.__name__}"
    arguments, history, epoch = checkpoint["arguments"], checkpoint["history"], checkpoint["epoch"]
    numbers = {name: arguments.get(name) for name in ("num_classes", "in_channels")}
    if not isinstance(arguments.get("fused"), bool) or not all(_is(n, int) and n > 0 for n in numbers.values()):
        return f"its 'arguments' are {arguments}"
    if not all(isinstance(name, str) and isinstance(t, Tensor) for name, t in checkpoint["state"].items()):
        return "its 'state' contains more than tensors by name"
    if not all(_is(name, str) and _is(n, int) and n > 0 for name, n in checkpoint["environment"].items()):
        return f"its 'environment' is {checkpoint['environment']}"
    if not all(isinstance(name, str) for name in checkpoint["classes"]):
        return "its 'classes' are no names"
    if epoch < 1 or len(history) != epoch:
        return f"it has {len(history)} rows of history for {epoch} epochs"
    if not all(isinstance(row, dict) and tuple(row) == ROW and all(map(_is_number, row.values())) for row in history):
        return f"its 'history' has other columns than numbers for {', '.join(ROW)}"
    if not checkpoint["steps"] or not all(map(_is_number, checkpoint["steps"])):
        return "its 'steps' are no losses"
    return None


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _is_number(value: Any) -> bool:
    return _is(value, int) or _is(value, float)


def load_model(path: str | Path, fused: bool | None = None) -> nn.Module:
    """The trained model of a checkpoint, in eval mode; ``fused=False`` or ``True`` chooses its layers anew.

    Raises CheckpointError where the checkpoint is missing or damaged.
    """
    checkpoint = load(path)
    arguments = checkpoint["arguments"] | ({} if fused is None else {"fused": fused})
    try:
        model = create_model(checkpoint["model"], **arguments)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: more than memory holds
        raise CheckpointError(f"the checkpoint {path} does not fit: {str(error).splitlines()[0]}") from error
    restore(path, model, checkpoint)
    return model.eval()


def restore(
    path: str | Path, model: nn.Module, checkpoint: dict[str, Any], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Loads model and optimiser; CheckpointError where they do not fit."""
    try:
        model.load_state_dict(checkpoint["state"])
        if optimizer is not None:
            made = [_hyperparameters(group) for group in optimizer.param_groups]
            optimizer.load_state_dict(checkpoint["optimizer"])
            _check_optimizer(optimizer, made)
    except Exception as error:  # torch raises whatever it meets in the state of an optimiser
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"the checkpoint {path} does not fit: {reason}") from error


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    """All that a step reads of a group but the learning rate, which the schedule sets before each step."""
    return {name: value for name, value in group.items() if name not in ("params", "lr")}


def _check_optimizer(optimizer: torch.optim.Optimizer, made: list[dict[str, Any]]) -> None:
    """ValueError where what was loaded would fail, or go another way, in the next step."""
    for group, expected in zip(optimizer.param_groups, made, strict=True):
        found = _hyperparameters(group)
        if repr(found) != repr(expected):  # repr: a tensor or a text in a number's place is another, too
            other = sorted(n for n in {*found, *expected} if repr(found.get(n)) != repr(expected.get(n)))
            said = ", ".join(f"{n} {found.get(n)!r} (now {expected.get(n)!r})" for n in other)
            raise ValueError(f"the optimiser has {said}")
        moments = {"momentum_buffer"} if isinstance(optimizer, torch.optim.SGD) else {"exp_avg", "exp_avg_sq"}
        if not expected.get("momentum", True):
            continue  # plain gradient descent remembers nothing
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            shapes = {n: getattr(state.get(n), "shape", None) for n in moments}
            step = state.get("step", torch.zeros(()) if isinstance(optimizer, torch.optim.SGD) else None)
            if any(shape != parameter.shape for shape in shapes.values()) or getattr(step, "shape", None) != ():
                raise ValueError(f"the optimiser's state of a parameter {list(parameter.shape)} has another form")
