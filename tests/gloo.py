"""What the programs of tests over several processes do when they are run: `torchrun dtensor_worker.py TASK`."""

import os
import sys
import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist


def run_task(tasks: dict[str, Callable[[], None]]) -> None:
    """Runs the task that the command line names, one thread per process, with gloo; does not return.

    The process ends here with a task that failed as well: gloo's threads may end the interpreter's own exit with an
    abort, whose status would take the place of the error's.
    """
    status = 1
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        tasks[sys.argv[1]]()
        dist.barrier()  # nobody leaves while another process still talks to it
        dist.destroy_process_group()
        status = 0
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
