"""`cnnkern train` as processes of its own: under torchrun, and interrupted by a signal."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DistributedSampler

from cnnkern import checkpoint as checkpoints
from cnnkern import data, models, train, trainer
from tests.child import refuse_lack_of_memory, run_child
from tests.training import CALM, losses, rows

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
pytestmark = pytest.mark.usefixtures("malloc_as_it_was")


def torchrun(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    return run_child(command, env=ENVIRONMENT, cwd=folder, timeout=240)


def test_two_processes_give_the_loss_curve_of_one(tmp_path):
    options = [*CALM, str(tmp_path / "two"), "--epochs", "2", "--float64", "--sync-bn"]
    done = torchrun("-m", "cnnkern", "train", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("test accuracy") == 2, "one process speaks for both"
    assert train.main([*CALM, str(tmp_path / "one"), "--epochs", "2", "--float64"]) == 0
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-9, atol=0)
    one, two = (rows(tmp_path / name / "epochs.csv") for name in ("one", "two"))
    for mine, theirs in zip(two, one, strict=True):
        assert mine["accuracy"] == theirs["accuracy"]
        assert mine["test_accuracy"] == theirs["test_accuracy"]
        assert mine["test_loss"] == pytest.approx(theirs["test_loss"], rel=1e-9)
    checkpoint = checkpoints.load(tmp_path / "two" / "checkpoint.pt")
    assert list(checkpoint["state"]) == list(models.res_lenet(in_channels=1).state_dict())


def test_two_processes_with_batch_statistics_of_their_own_resume_bit_by_bit(tmp_path):
    options = ["bn_lenet", "--optimizer", "sgd", "--momentum", "0", "--float64", "--output"]
    whole = [*options, "whole", "--epochs", "2"]
    parts = [[*options, "parts", "--epochs", "1"], [*options, "parts", "--epochs", "2", "--resume"]]
    for arguments in (whole, *parts):
        done = torchrun("-m", "cnnkern", "train", *arguments, folder=tmp_path)
        assert done.returncode == 0, done.stderr[-4000:]
    whole, parts = (checkpoints.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    assert len(whole["steps"]) == 2 * 22
    assert whole["steps"] == parts["steps"]
    assert all(torch.equal(parts["state"][n], v) for n, v in whole["state"].items())

    # The first steps by hand: each half of the batch by itself, and the mean of both gradients.
    digits = data.load("digits", size=28).train
    samplers = [DistributedSampler(digits, 2, rank, shuffle=True, seed=0, drop_last=True) for rank in (0, 1)]
    torch.manual_seed(0)
    model = models.bn_lenet().double()
    for i, expected in enumerate(whole["steps"][:3]):
        halves = [digits.__getitems__(list(sampler)[32 * i : 32 * (i + 1)]) for sampler in samplers]
        loss = sum(F.cross_entropy(model(images.double()), labels) for images, labels in halves) / 2
        assert loss.item() == pytest.approx(expected, rel=1e-9)
        for parameter, gradient in zip(
            model.parameters(), torch.autograd.grad(loss, [*model.parameters()]), strict=True
        ):
            parameter.data -= 0.05 * gradient


def test_what_stops_the_first_process_stops_both_at_once(tmp_path):
    """A run that is there already: the first process finds it, and the other does not wait for it for half an hour."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "steps.csv").write_text("of another run")
    done = torchrun("-m", "cnnkern", "train", "lenet_relu", "--output", "run", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("cnnkern: run already has a run (steps.csv): replace it (--overwrite)") == 1
    assert "FailedElsewhere" not in done.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["steps.csv"]


def test_a_batch_that_cannot_be_divided_among_processes():
    options = train.parse(["lenet_relu", "--batch-size", "63"])
    with pytest.raises(train.TrainingError, match="--batch-size 63 cannot be divided among 2 processes"):
        train.Run(options, trainer.Processes(rank=0, count=2))


INTERRUPTED = "interrupted; run/checkpoint.pt has the last whole epoch: go on with --resume\n"


@pytest.mark.parametrize(("sent", "status", "message"), [("SIGINT", 130, [INTERRUPTED]), ("SIGTERM", 143, [])])
def test_a_signal_leaves_the_last_checkpoint_and_nothing_unfinished(tmp_path, sent, status, message):
    command = [sys.executable, "-m", "cnnkern", "train", "lenet_relu", "--epochs", "1000000", "--output", "run"]
    path = tmp_path / "run" / "checkpoint.pt"
    process = subprocess.Popen(
        command,
        env=ENVIRONMENT,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Where a shell started the tests in the background, the signal is ignored, here too unless it is reset.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with process:
        deadline = time.monotonic() + 120
        while not path.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.Signals[sent])
        _, said = process.communicate(timeout=60)
    refuse_lack_of_memory(subprocess.CompletedProcess(process.args, process.returncode, None, said))
    # Python ends by the signal itself, which a shell also shows as 130, if the interruption hit code that is run from a
    # string. Dataclasses and named tuples are made by such code.
    assert process.returncode in (status, -signal.Signals[sent]), said
    assert said.split("cnnkern: ")[1:] == message
    assert "Traceback" not in said
    assert checkpoints.load(path)["epoch"] >= 1
    assert checkpoints.load_model(path)(torch.zeros(1, 1, 28, 28)).isfinite().all()
    assert not [p for p in path.parent.iterdir() if p.name.startswith(".")], "unfinished files"
