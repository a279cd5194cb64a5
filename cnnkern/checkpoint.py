"""Checkpoints of a training run: written all or not at all, read without running code, refused where damaged."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from cnnkern.models import create_model

KEYS = {
    **dict.fromkeys(("arguments", "state", "optimizer", "settings"), dict),
    **dict.fromkeys(("history", "steps", "classes"), list),
    "model": str,
    "epoch": int,
}


class CheckpointError(Exception):
    """The checkpoint is missing, damaged or of another run; the message says which."""


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Calls ``write`` with a file that takes the place of ``path`` once it is complete and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:  # after Ctrl-C too: what stood at `path` stays, and nothing beside it
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
            f"{path} is no checkpoint of cnnkern train: it holds more than tensors and text"
        ) from error
    except Exception as error:  # a damaged file raises whatever the archive's or the pickle's reader met
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"the checkpoint {path} is damaged: {reason}") from error
    if changed:
        raise CheckpointError(f"the checkpoint {path} is damaged: the checksum of {changed} in it is another")
    if not isinstance(checkpoint, dict) or any(not isinstance(checkpoint.get(k), t) for k, t in KEYS.items()):
        raise CheckpointError(f"{path} is no checkpoint of cnnkern train")
    return checkpoint


def load_model(path: str | Path, fused: bool | None = None) -> nn.Module:
    """The trained model of a checkpoint, in eval mode; ``fused=False`` or ``True`` chooses its layers anew.

    Raises CheckpointError where the checkpoint is missing or damaged.
    """
    checkpoint = load(path)
    arguments = checkpoint["arguments"] | ({} if fused is None else {"fused": fused})
    try:
        model = create_model(checkpoint["model"], **arguments)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint {path} does not fit: {str(error).splitlines()[0]}") from error
    restore(path, model, checkpoint)
    return model.eval()


def restore(path: str | Path, model: nn.Module, checkpoint: dict[str, Any], optimizer: Any = None) -> None:
    """Loads model and optimiser; CheckpointError where they do not fit."""
    try:
        model.load_state_dict(checkpoint["state"])
        if optimizer is not None:
            optimizer.load_state_dict(checkpoint["optimizer"])
    except (RuntimeError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"the checkpoint {path} does not fit: {str(error).splitlines()[0]}") from error
