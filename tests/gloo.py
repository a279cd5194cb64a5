"""What the programs of tests over several processes do when they are run: `torchrun dtensor_worker.py TASK`."""

import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist


def run_task(tasks: dict[str, Callable[[], None]]) -> None:
    """Runs the task that the command line names, one thread a process, with gloo; does not return."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    tasks[sys.argv[1]]()
    dist.barrier()  # nobody leaves while another process still talks to it
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may end the interpreter's own exit with an abort
