"""The main function of the programs that tests start in several processes: `torchrun dtensor_worker.py TASK`."""

import os
import sys
import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist


def run_task(tasks: dict[str, Callable[[], None]]) -> None:
    """Runs the task that the command line names, one thread per process, with gloo; does not return.

    It also ends the process if the task failed: gloo's threads may abort during the interpreter's exit, which would
    hide the error's exit status.
    """
    status = 1
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        tasks[sys.argv[1]]()
        dist.barrier()  # no process exits while another still communicates with it
        dist.destroy_process_group()
        status = 0
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
