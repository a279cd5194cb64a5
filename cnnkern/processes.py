"""The processes that train together under torchrun; one without it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


class FailedElsewhere(Exception):
    """The first process has failed, and says why; this one ends as well."""


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

    def first(self, action: Callable[[], None]) -> None:
        """Calls `action` in the first process. What it raises there ends the others with FailedElsewhere.

        Else they would wait for that process in their next collective operation.
        """
        failure: Exception | None = None
        if self.rank == 0:
            try:
                action()
            except Exception as error:
                failure = error
        failed = [failure is not None]
        if self.count > 1:
            dist.broadcast_object_list(failed)
        if failed[0]:
            raise failure or FailedElsewhere


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
