"""Synchronised batch norm in real processes, started by torchrun: see sync_worker.py."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import nn

import cnnkern
from tests.child import refuse_lack_of_memory, run_child

WORKER = Path(__file__).with_name("sync_worker.py")


def torchrun(task: str, processes: int) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parent.parent)}
    return run_child([*command, str(WORKER), task], env=environment, timeout=240)


@pytest.mark.parametrize(
    ("task", "processes"),
    [
        ("equal_to_one_process_on_the_whole_batch", 2),
        pytest.param("equal_to_one_process_on_the_whole_batch", 3, marks=pytest.mark.slow),
        ("synchronised_resnet_under_ddp_is_single_process_training", 2),
        pytest.param("synchronised_resnet_under_ddp_is_single_process_training", 3, marks=pytest.mark.slow),
        ("converted_resnet_under_ddp_is_the_original_under_ddp", 2),
        ("one_collective_each_way", 2),
        ("nothing_is_read_by_the_host_and_memory_is_passed_over_once_a_part", 2),
        ("second_derivatives_are_those_of_one_process_on_the_whole_batch", 2),
        ("second_derivatives_are_those_of_one_process_on_the_whole_batch", 3),
        ("compiles_to_one_graph_equal_to_eager", 2),
        ("saved_tensors_may_come_back_in_another_memory_format", 2),
        ("running_statistics_are_a_cumulative_average", 2),
        ("the_benchmark_s_formula_is_the_layer", 2),
        ("every_process_empty", 2),
        ("one_value_over_all_processes_is_its_own_mean", 2),
        ("an_error_leaves_the_statistics", 2),
    ],
)
def test_in_processes(task, processes):
    done = torchrun(task, processes)
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_process_that_dies_ends_the_others_with_an_error():
    assert torchrun("a_process_that_dies", 2).returncode != 0


def test_a_process_that_dies_ends_the_others_by_itself():
    """Without torchrun, which would end them. Its store is here this process's: no other takes a port that is open."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parent.parent), "WORLD_SIZE": "2"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    command = [sys.executable, str(WORKER), "a_process_that_dies"]
    both = [
        subprocess.Popen(command, env=common | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in both]
    finally:
        for process in both:
            process.kill()
    for process, said in zip(both, errors, strict=True):
        refuse_lack_of_memory(subprocess.CompletedProcess(process.args, process.returncode, None, said))
    assert both[1].returncode == 3
    assert both[0].returncode == 1
    assert "RuntimeError" in errors[0]


def test_without_a_process_group_it_is_the_batch_norm_of_one_process():
    x, r = torch.randn(3, 5, 4, 6), torch.randn(3, 5, 4, 6)
    for name, inputs in (("ReLU", (x,)), ("AddReLU", (x, r))):
        sync = getattr(cnnkern.nn, f"SyncBatchNorm{name}")(5)
        plain = getattr(cnnkern.nn, f"BatchNorm{name}2d")(5)
        assert list(sync.state_dict()) == list(nn.SyncBatchNorm(5).state_dict())
        assert torch.equal(sync(*inputs), plain(*inputs))
        assert torch.equal(sync.running_var, plain.running_var)
        assert list(sync.state_dict()) == list(plain.state_dict())


def test_convert_sync_batchnorm_of_a_converted_model_keeps_results_and_keys():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.SiLU(), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    converted = cnnkern.convert(model)
    x = torch.randn(3, 4, 5, 6)
    expected = converted(x)
    synchronised = cnnkern.nn.convert_sync_batchnorm(cnnkern.convert(model))
    assert all(isinstance(synchronised[i], cnnkern.nn.SyncBatchNorm) for i in (0, 2, 4))
    torch.testing.assert_close(synchronised(x), expected)
    assert list(synchronised.state_dict()) == list(model.state_dict())
    reverted = cnnkern.revert(synchronised)
    assert [type(m) for m in reverted] == [nn.SyncBatchNorm, nn.SiLU, nn.SyncBatchNorm, nn.ReLU, nn.SyncBatchNorm]
    torch.testing.assert_close(reverted.eval()(x), synchronised.eval()(x))
    torchs = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    torch.testing.assert_close(cnnkern.nn.convert_sync_batchnorm(torchs)(x), expected)


class BroadcastResidual(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(x) + x.mean((2, 3), keepdim=True))


@pytest.mark.parametrize("make", [lambda: torchvision.models.resnet18(num_classes=4), BroadcastResidual])
def test_copies_of_a_converted_model_that_was_synchronised(make):
    """Its blocks are rewritten anew, around additions that the synchronised layers compute."""
    model = make().double()
    synchronised = cnnkern.nn.convert_sync_batchnorm(cnnkern.convert(copy.deepcopy(model)))
    x = torch.randn(3, 3 if hasattr(model, "fc") else 4, 32, 32, dtype=torch.float64)
    forms = {
        "synchronised": synchronised,
        "copied": copy.deepcopy(synchronised),
        "pickled": pickle.loads(pickle.dumps(synchronised)),
        "converted again": cnnkern.convert(synchronised),
        "converted in place": cnnkern.convert(synchronised, inplace=True),
        "reverted": cnnkern.revert(synchronised),
    }
    for form, found in forms.items():
        assert list(found.state_dict()) == list(model.state_dict()), form
        norms = [type(m) for m in found.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if form == "reverted":
            assert set(norms) == {nn.SyncBatchNorm}
        else:
            assert norms == [type(m) for m in synchronised.modules() if isinstance(m, cnnkern.nn.SyncBatchNorm)], form
        for training in (True, False):
            if form == "reverted" and training:
                continue  # torch's own does not train on a CPU
            torch.testing.assert_close(
                copy.deepcopy(found).train(training)(x), copy.deepcopy(model).train(training)(x), msg=form
            )
