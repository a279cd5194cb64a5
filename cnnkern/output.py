"""The output folder of a training run: one run at a time writes into it, and none over another by accident."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

CHECKPOINT = "checkpoint.pt"
FILES = (CHECKPOINT, "curves.png", "epochs.csv", "steps.csv")
LOCK = ".lock"


class OutputError(Exception):
    """The folder is in use or holds another run; the message says which, and what to do."""


def refuse_existing(folder: Path) -> None:
    """Raises OutputError where the folder has files of a run."""
    if found := [name for name in FILES if (folder / name).exists()]:
        go_on = "continue it (--resume), " if CHECKPOINT in found else ""
        raise OutputError(
            f"{folder} already has a run ({', '.join(found)}): {go_on}replace it (--overwrite) or choose another "
            "--output"
        )


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Makes the folder, and keeps other runs out of it until the end of the block.

    Raises OutputError where another run has it, or it cannot be made or written to. Folders that were made here and
    are still empty at the end are removed.
    """
    made: list[Path] = []
    try:
        with contextlib.ExitStack() as stack:
            try:
                made += _make(folder)
                stack.enter_context(_locked(folder))
                for name in FILES:  # of a run that was killed while it wrote
                    for unfinished in folder.glob(f".{name}.*"):
                        unfinished.unlink(missing_ok=True)
            except OSError as error:
                raise OutputError(f"cannot write into the output folder {folder}: {error.strerror}") from error
            yield
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # it has files
                path.rmdir()


def _make(folder: Path) -> list[Path]:
    """Makes the folder and its parents; those that were made, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given back by the kernel where a process dies
            if _is_at(descriptor, path):  # else its owner removed it between the two calls
                break
        except BaseException as error:
            owner = os.pread(descriptor, 20, 0).decode(errors="replace")
            os.close(descriptor)
            if isinstance(error, OSError) and error.errno in (errno.EAGAIN, errno.EACCES):
                raise OutputError(
                    f"another run writes into {folder}{f' (process {owner})' if owner.isdecimal() else ''}: wait for "
                    "its end, or choose another --output"
                ) from error
            raise
        os.close(descriptor)
    try:
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
