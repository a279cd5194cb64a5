"""Layers on DTensors, in two processes that torchrun starts: see dtensor_worker.py."""

import os
import sys
from pathlib import Path

import pytest

from tests.child import run_child

WORKER = Path(__file__).with_name("dtensor_worker.py")


@pytest.mark.parametrize(
    "task",
    ["every_layer_is_the_layer_of_one_process", "sequence_parallel_layer_norms", "fully_sharded_parameters"],
)
def test_in_two_processes(task):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER), task]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parent.parent)}
    done = run_child(command, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
