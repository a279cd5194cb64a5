"""`cnnkern train`: that it learns, resumes bit by bit, runs in processes and says what is wrong."""

import csv
import functools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cnnkern import checkpoint as checkpoints
from cnnkern import cli, data, models, testing, train, trainer
from cnnkern.models import registry
from cnnkern.models.layers import layer_set

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _malloc_as_it_was(monkeypatch):
    """What tune_malloc sets would stay for the tests behind these."""
    monkeypatch.setattr(train, "tune_malloc", lambda: "")


@pytest.fixture
def tiny(monkeypatch) -> str:
    """A model of 8x8 images with a residual, batch norms and dropout."""

    def tiny(num_classes: int = 10, in_channels: int = 1, fused: bool = True) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(in_channels, 8, 3, padding=1),
            layer_set(fused).BatchNormReLU2d(8),
            models.ResidualBlock(8, fused=fused),
            nn.Dropout(0.2),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * 16, num_classes),
        )

    tiny.input_size = (1, 8, 8)
    monkeypatch.setitem(registry.BUILDERS, "tiny", tiny)
    return "tiny"


def rows(path: Path) -> list[dict[str, float]]:
    with path.open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_it_learns_and_writes_checkpoint_and_curves(tmp_path, capsys):
    assert train.main(["lenet_relu", "--epochs", "4", "--lr", "2e-3", "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.count("test accuracy") == 4
    assert "images/s" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt", "curves.png", "epochs.csv", "steps.csv"]
    epochs, steps = rows(tmp_path / "epochs.csv"), rows(tmp_path / "steps.csv")
    assert [row["epoch"] for row in epochs] == [1, 2, 3, 4]
    assert len(steps) == 4 * (1437 // 64)
    assert epochs[-1]["loss"] < 0.5 * epochs[0]["loss"]
    assert epochs[-1]["test_accuracy"] > 0.85
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    # The checkpoint's model has the accuracy that was written down, fused or not.
    test = data.load("digits", size=28).test
    images, labels = test.__getitems__(list(range(len(test))))
    for fused in (None, True, False):
        model = checkpoints.load_model(tmp_path / "checkpoint.pt", fused)
        with torch.no_grad():
            accuracy = (model(images).argmax(1) == labels).double().mean().item()
        assert accuracy == pytest.approx(epochs[-1]["test_accuracy"])


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_interrupted_and_resumed_is_the_same_bit_by_bit(tiny, tmp_path, monkeypatch, capsys, optimizer):
    options = [tiny, "--epochs", "4", "--optimizer", optimizer, "--schedule", "cosine", "--augment", "--output"]
    assert train.main([*options, str(tmp_path / "whole")]) == 0
    original = train.Run.train_epoch

    def interrupted_in_the_third(run):
        result = original(run)
        if run.epoch == 2:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "train_epoch", interrupted_in_the_third)
        assert train.main([*options, str(tmp_path / "parts")]) == 130
    assert "has the last whole epoch: go on with --resume" in capsys.readouterr().err
    assert checkpoints.load(tmp_path / "parts" / "checkpoint.pt")["epoch"] == 2
    torch.manual_seed(123)  # no generator's state is carried over
    assert train.main([*options, str(tmp_path / "parts"), "--resume"]) == 0
    whole, parts = (checkpoints.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    assert whole["steps"] == parts["steps"]
    for name, value in whole["state"].items():
        assert torch.equal(value, parts["state"][name]), name
    for row, other in zip(whole["history"], parts["history"], strict=True):
        assert {n: v for n, v in row.items() if n != "images_per_second"} == {
            n: v for n, v in other.items() if n != "images_per_second"
        }


def test_interrupted_before_the_first_checkpoint(tiny, tmp_path, monkeypatch, capsys):
    def interrupted(run):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Run, "train_epoch", interrupted)
    assert train.main([tiny, "--output", str(tmp_path)]) == 130
    assert "no epoch was finished" in capsys.readouterr().err


# A learning rate at which rounding does not grow from step to step; without momentum.
CALM = ["res_lenet", "--resize", "16", "--optimizer", "sgd", "--momentum", "0", "--lr", "0.01", "--output"]


def losses(folder: Path) -> torch.Tensor:
    return torch.tensor([row["loss"] for row in rows(folder / "steps.csv")], dtype=torch.float64)


def test_fused_and_eager_runs_follow_each_other(tmp_path):
    """Over 66 steps in float64; in float32, where an activation soon lands on the other side of a kink, over 10."""
    assert train.main([*CALM, str(tmp_path / "fused"), "--epochs", "3", "--float64"]) == 0
    assert train.main([*CALM, str(tmp_path / "truth"), "--epochs", "3", "--float64", "--eager"]) == 0
    truth = losses(tmp_path / "truth")
    assert len(truth) == 66
    assert truth[-5:].mean() < 0.5 * truth[0]
    torch.testing.assert_close(losses(tmp_path / "fused"), truth, rtol=1e-9, atol=0)
    for name in ("fused", "eager"):
        options = ["simple_resnet", "--resize", "12", *CALM[3:], str(tmp_path / name), "--epochs", "1"]
        assert train.main([*options, *(["--eager"] if name == "eager" else [])]) == 0
    assert (
        train.main(["simple_resnet", "--resize", "12", *CALM[3:], str(tmp_path / "t"), "--epochs", "1", "--float64"])
        == 0
    )
    ours, eager, truth = ({"losses": losses(tmp_path / name)[:10].float()} for name in ("fused", "eager", "t"))
    testing.assert_as_good_as(ours, eager, truth)


def test_fused_and_eager_runs_reach_the_same_accuracy(tmp_path):
    options = ["res_lenet", "--resize", "16", "--epochs", "3", "--lr", "3e-3", "--schedule", "cosine", "--output"]
    assert train.main([*options, str(tmp_path / "fused")]) == 0
    assert train.main([*options, str(tmp_path / "eager"), "--eager"]) == 0
    fused, eager = (rows(tmp_path / name / "epochs.csv")[-1]["test_accuracy"] for name in ("fused", "eager"))
    assert min(fused, eager) > 0.93
    assert abs(fused - eager) <= 0.015


def test_options_reach_the_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    options = ["--amp", "bf16", "--channels-last", "--compile", "--optimizer", "adamw", "--weight-decay", "0.01"]
    options += ["--schedule", "step", "--lr", "0.01", "--batch-size", "32", "--epochs", "3"]
    assert train.main([tiny, *options, "--output", str(tmp_path)]) == 0
    epochs = rows(tmp_path / "epochs.csv")
    assert epochs[-1]["test_accuracy"] > 0.8
    assert [row["learning_rate"] for row in epochs] == pytest.approx([1e-2, 1e-3, 1e-4])
    assert len(rows(tmp_path / "steps.csv")) == 3 * (1437 // 32)


@pytest.mark.slow
def test_a_compiled_run_follows_an_eager_one(tmp_path):
    assert train.main([*CALM, str(tmp_path / "plain"), "--epochs", "1", "--float64"]) == 0
    assert train.main([*CALM, str(tmp_path / "compiled"), "--epochs", "1", "--float64", "--compile"]) == 0
    torch.testing.assert_close(losses(tmp_path / "compiled"), losses(tmp_path / "plain"), rtol=1e-7, atol=0)


def test_compare_prints_both_rates(tiny, capsys):
    assert train.main([tiny, "--compare", "--batch-size", "16"]) == 0
    said = capsys.readouterr().out
    assert "tiny on 16x1x8x8" in said
    assert said.count("images/s") == 2


# ---- several processes ------------------------------------------------------------------------------------------


def torchrun(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cnnkern"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, "train", *arguments], env=environment, cwd=folder, capture_output=True, text=True, timeout=240
    )


def test_two_processes_give_the_loss_curve_of_one(tmp_path):
    done = torchrun(*CALM, str(tmp_path / "two"), "--epochs", "2", "--float64", "--sync-bn", folder=tmp_path)
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


def test_a_batch_that_cannot_be_divided_among_processes():
    options = train.parse(["lenet_relu", "--batch-size", "63"])
    with pytest.raises(train.TrainingError, match="--batch-size 63 cannot be divided among 2 processes"):
        train.Run(options, trainer.Processes(rank=0, count=2))


# ---- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lenet", "--epochs", "0"], "argument --epochs: must be above zero; got 0"),
        (["lenet", "--epochs", "two"], "argument --epochs: invalid int value: 'two'"),
        (["lenet", "--batch-size", "-3"], "argument --batch-size: must be above zero; got -3"),
        (["lenet", "--lr", "nan"], "argument --lr: must be above zero; got nan"),
        (["lenet", "--weight-decay", "-1"], "argument --weight-decay: must not be below zero"),
        (["lenet", "--device", "abacus"], "argument --device: 'abacus' cannot be used"),
        (["lenet", "--seed", "1" + 20 * "0"], "argument --seed: must be at most 2147483647; got 1000"),
        (["lenet", "--seed", "-1"], "argument --seed: must not be below zero; got -1"),
        (["lenet", "--resize", "1" + 20 * "0"], "argument --resize: must be at most 2147483647"),
        (["lenet", "--epochs", "1" + 400 * "0"], "argument --epochs: must be at most 2147483647"),
        (["lenet", "--threads", "100000"], "argument --threads: must be at most 1024"),
        (["lenet", "--workers", "100000"], "argument --workers: must be at most 1024"),
        (["lenet", "--workers", "-1"], "argument --workers: must not be below zero"),
        (["lenet", "--dataset", "imagenet"], "argument --dataset: 'imagenet' is none of digits, mnist"),
        (["lenet", "--dataset", "mnist", "here"], "argument --dataset: takes one name"),
        (["lenet", "--amp", "fp8"], "argument --amp: invalid choice: 'fp8'"),
        (["lenet", "--amp", "bf16", "--float64"], "--float64 and --amp exclude each other"),
        (["lenet", "--sync-bn", "--eager"], "--sync-bn needs the fused layers"),
        ([], "the following arguments are required: MODEL"),
    ],
)
def test_impossible_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", *arguments])
    assert message in capsys.readouterr().err


def error_of(capsys, *arguments: str) -> str:
    """The one line that the command ends with."""
    assert train.main(list(arguments)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_errors_of_a_run_are_one_line(tiny, tmp_path, capsys):
    out = ("--output", str(tmp_path))
    assert error_of(capsys, "lenet_rely", *out).startswith(
        "cnnkern: no model is called 'lenet_rely': did you mean lenet"
    )
    said = error_of(capsys, "alexnet", "--resize", "32", *out)
    assert said.startswith("cnnkern: alexnet cannot train on 64x1x32x32")
    assert "try --resize 224" in said
    said = error_of(capsys, "resnet18", "--resize", "32", "--batch-size", "1", *out)
    assert "Expected more than 1 value per channel when training" in said
    (tmp_path / "file").touch()
    assert "File exists" in error_of(capsys, tiny, "--output", str(tmp_path / "file"))
    (tmp_path / "file").unlink()
    assert "--batch-size 2000 is more than the 1437" in error_of(capsys, tiny, "--batch-size", "2000", *out)
    assert "mnist: say with --data-dir" in error_of(capsys, tiny, "--dataset", "mnist", *out)
    assert "there is no directory /nowhere" in error_of(capsys, tiny, "--dataset", "folder", "/nowhere", *out)
    assert "in step" in error_of(capsys, tiny, "--optimizer", "sgd", "--lr", "1e30", *out)
    assert "there is no checkpoint" in error_of(capsys, tiny, "--resume", *out)
    assert not list(tmp_path.iterdir())
    said = error_of(capsys, "res_lenet", "--resize", "2000000", *out)
    assert said == (
        "cnnkern: cpu has too little memory for res_lenet with --batch-size 64 and --resize 2000000: lower them"
    )


class Evil:
    def __reduce__(self):
        return os.mkdir, ("made-by-a-checkpoint",)


def test_damaged_and_foreign_checkpoints(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run" / "checkpoint.pt"
    options = (tiny, "--output", "run", "--resume")
    assert train.main([tiny, "--output", "run", "--epochs", "1"]) == 0
    capsys.readouterr()
    good = path.read_bytes()
    assert "1 epochs are done already: give --epochs 2" in error_of(capsys, *options, "--epochs", "1")
    said = error_of(capsys, *options, "--seed", "4", "--batch-size", "32")
    assert "was made with batch_size 64 (now 32), seed 0 (now 4): resume with the same options" in said
    assert "is of tiny, not of lenet" in error_of(capsys, "lenet", "--resume", str(path), "--resize", "28")
    for content in (b"", good[: len(good) // 2], b"no checkpoint at all", pickle.dumps(Evil())):
        path.write_bytes(content)
        assert error_of(capsys, *options).startswith("cnnkern: the checkpoint run/checkpoint.pt is damaged: ")
        assert path.read_bytes() == content
    assert not (tmp_path / "made-by-a-checkpoint").exists()
    torch.save({"state": {}}, path)
    assert error_of(capsys, *options).endswith("is no checkpoint of cnnkern train")
    path.write_bytes(good)
    checkpoint = checkpoints.load(path)
    checkpoint["state"].popitem()
    checkpoints.save(path, checkpoint)
    assert "does not fit" in error_of(capsys, *options)


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoints.write_atomically(path, lambda file: file.write(b"old"))

    def interrupted(file):
        file.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.write_atomically(path, interrupted)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_unreadable_images_of_a_folder_are_printed(tiny, tmp_path, capsys):
    from PIL import Image

    for part in ("train", "test"):
        for c, colour in (("a", "red"), ("b", "blue")):
            (tmp_path / part / c).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (8, 8), colour).save(tmp_path / part / c / f"{i}.png")
    (tmp_path / "train" / "a" / "broken.png").write_bytes(b"broken")
    options = ["--dataset", "folder", str(tmp_path), "--batch-size", "2", "--epochs", "1"]
    assert train.main([tiny, *options, "--output", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "1 of 7 files cannot be read" in said
    assert str(tmp_path / "train" / "a" / "broken.png") in said


def test_commands_name_the_packages_they_lack(monkeypatch, capsys):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["train", "lenet"]) == 1
    assert "cnnkern train needs torchvision, matplotlib, sklearn: `pip install" in capsys.readouterr().err
    assert cli.main(["zoo", "show", "lenet"]) == 1
    assert "cnnkern zoo show needs torchinfo" in capsys.readouterr().err
