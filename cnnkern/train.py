"""`cnnkern train MODEL`: runs the training loop in :mod:`cnnkern.trainer`, and says in a line what went wrong."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence

import torch

from cnnkern import checkpoint as checkpoints
from cnnkern import data
from cnnkern.memory import tune_malloc
from cnnkern.models.registry import list_models, unknown_model
from cnnkern.options import file_stamp, parse
from cnnkern.output import CHECKPOINT, OutputError, claimed, refuse_existing
from cnnkern.processes import FailedElsewhere, processes
from cnnkern.trainer import Run, TrainingError, is_own_checkpoint


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `cnnkern train` with these arguments; returns the exit status: 0, 1 for an error, 130 after Ctrl-C."""
    options = run = None
    try:
        options = parse(arguments)
        if options.model not in list_models():
            raise TrainingError(unknown_model(options.model, "`cnnkern zoo` lists the models"))
        with processes(options.device) as group, contextlib.ExitStack() as stack:
            if not options.compare:
                group.first(lambda: claim(options, stack))
            if options.threads:
                torch.set_num_threads(options.threads)
            tune_malloc()
            run = Run(options, group)
            if options.compare:
                run.compare()
            else:
                run.train()
    except FailedElsewhere:  # which the process that failed says
        return 1
    except (data.DataError, checkpoints.CheckpointError, OutputError, TrainingError, OSError) as error:
        print(f"cnnkern: {one_line(error)}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if options is None or not is_out_of_memory(error):
            raise
        side = f" and --resize {run.data.size if run else options.resize}" if run or options.resize else ""
        print(
            f"cnnkern: {options.device} has too little memory for {options.model} with --batch-size "
            f"{options.batch_size}{side}: lower {'them' if side else 'it'}",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        last = None if options is None else options.output / CHECKPOINT
        finished = run is not None and run.saved
        kept = f"{last} has the last whole epoch: go on with --resume" if finished else "no epoch was finished"
        print(f"\ncnnkern: interrupted; {kept}", file=sys.stderr)
        return 130
    return 0


def claim(options: argparse.Namespace, stack: contextlib.ExitStack) -> None:
    """Keeps other runs out of the output folder until `stack` is closed; OutputError where there is one already."""
    stack.enter_context(claimed(options.output))
    if is_own_checkpoint(options):
        if file_stamp(options.path) != options.stamp:
            raise OutputError(f"{options.path} was replaced by another run in this moment: start again")
    elif not options.overwrite:
        refuse_existing(options.output)


def one_line(error: Exception) -> str:
    """The message; PyTorch puts the traceback of a process that reads ahead (--workers) in front of it."""
    said = str(error)
    return said.splitlines()[-1].partition(": ")[2] if said.startswith("Caught ") else " ".join(said.split())


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory was refused; on the CPU PyTorch has no class of its own for that."""
    said = ("can't allocate memory", "not enough memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in str(error) for text in said)
