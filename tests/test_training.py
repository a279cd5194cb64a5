"""`cnnkern train`: that it learns, resumes bit by bit and says what is wrong."""

import os
import pickle

import pytest
import torch

from cnnkern import checkpoint as checkpoints
from cnnkern import cli, data, train
from tests.training import CALM, error_of, rows

pytestmark = pytest.mark.usefixtures("malloc_as_it_was")


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


def test_recompute_changes_no_bit_and_resumes(tmp_path, capsys):
    for name, options in (("kept", []), ("again", ["--recompute"])):
        assert train.main([*CALM, str(tmp_path / name), "--epochs", "1", *options]) == 0
    assert (tmp_path / "kept" / "steps.csv").read_bytes() == (tmp_path / "again" / "steps.csv").read_bytes()
    capsys.readouterr()
    assert train.main([*CALM, str(tmp_path / "kept"), "--epochs", "2", "--resume", "--recompute"]) == 0
    assert "--recompute on from here on, off before" in capsys.readouterr().out


def test_interrupted_before_the_first_checkpoint(tiny, tmp_path, monkeypatch, capsys):
    def interrupted(run):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Run, "train_epoch", interrupted)
    assert train.main([tiny, "--output", str(tmp_path)]) == 130
    assert "no epoch was finished" in capsys.readouterr().err


def test_compare_prints_both_rates(tiny, capsys):
    assert train.main([tiny, "--compare", "--batch-size", "16"]) == 0
    said = capsys.readouterr().out
    assert "tiny on 16x1x8x8" in said
    assert said.count("images/s") == 2


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
        (["lenet", "--lr", "1e39"], "argument --lr: must be at most 1e+30; got 1e39"),
        (["lenet", "--weight-decay", "1e40"], "argument --weight-decay: must be at most 1e+30"),
        (["lenet", "--device", "meta"], "argument --device: 'meta' cannot be used"),
        (["lenet", "--data-dir", "x"], "--data-dir: the dataset digits needs none"),
        (["--dataset", "folder", "a", "lenet", "--data-dir", "b"], "--data-dir DIR for the folder of a dataset"),
        (["lenet", "--resume", "run/checkpoint.pt"], "use --resume-from FILE for a checkpoint"),
        (["lenet", "--resume", "--resume-from", "a.pt"], "--resume and --resume-from cannot be combined"),
        (["lenet", "--resume", "--overwrite"], "--resume continues the run that --overwrite would replace"),
        (["lenet", "--resize", "1" + 20 * "0"], "argument --resize: must be at most 2147483647"),
        (["lenet", "--epochs", "1" + 400 * "0"], "argument --epochs: must be at most 2147483647"),
        (["lenet", "--threads", "100000"], "argument --threads: must be at most 1024"),
        (["lenet", "--workers", "100000"], "argument --workers: must be at most 1024"),
        (["lenet", "--workers", "-1"], "argument --workers: must not be below zero"),
        (["lenet", "--dataset", "imagenet"], "argument --dataset: invalid choice: 'imagenet' (choose from"),
        (["lenet", "--dataset", "mnist", "here"], "unrecognized arguments: here"),
        (["lenet", "--amp", "fp8"], "argument --amp: invalid choice: 'fp8'"),
        (["lenet", "--amp", "bf16", "--float64"], "--float64 and --amp cannot be combined"),
        (["lenet", "--sync-bn", "--eager"], "--sync-bn needs the fused layers"),
        (
            ["lenet", "--recompute", "--eager"],
            "--recompute needs the fused layers without torch.compile: leave --eager",
        ),
        (["lenet", "--recompute", "--compile"], "leave --compile out"),
        ([], "the following arguments are required: MODEL"),
    ],
)
def test_impossible_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", *arguments])
    assert message in capsys.readouterr().err


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
    said = error_of(capsys, "bn_lenet", "--batch-size", "1", *out)
    assert "Expected more than 1 value per channel when training" in said
    assert said.endswith("try a larger --batch-size")
    (tmp_path / "file").touch()
    assert "File exists" in error_of(capsys, tiny, "--output", str(tmp_path / "file"))
    (tmp_path / "file").unlink()
    assert "--batch-size 2000 is more than the 1437" in error_of(capsys, tiny, "--batch-size", "2000", *out)
    assert "mnist: say with --data-dir" in error_of(capsys, tiny, "--dataset", "mnist", *out)
    assert "there is no directory /nowhere" in error_of(
        capsys, tiny, "--dataset", "folder", "--data-dir", "/nowhere", *out
    )
    assert "in step" in error_of(capsys, tiny, "--optimizer", "sgd", "--lr", "1e30", *out)
    assert "there is no checkpoint" in error_of(capsys, tiny, "--resume", *out)
    assert not list(tmp_path.iterdir())
    said = error_of(capsys, "res_lenet", "--resize", "2000000", *out)
    assert said.startswith(
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
    assert "1 epochs are done already: give --epochs 2" in error_of(capsys, *options)
    said = error_of(capsys, *options, "--seed", "4", "--batch-size", "32", "--amp", "bf16")
    assert "was made with --batch-size 64 (now 32), --seed 0 (now 4), --amp off (now bf16): leave that out" in said
    assert "is of tiny, not of lenet" in error_of(capsys, "lenet", "--resume-from", str(path), "--resize", "28")
    middle = len(good) // 2
    flipped = good[:middle] + bytes(255 - b for b in good[middle : middle + 200]) + good[middle + 200 :]
    for content in (b"", good[:middle], flipped, b"no checkpoint at all", pickle.dumps(Evil())):
        path.write_bytes(content)
        assert error_of(capsys, *options).startswith("cnnkern: the checkpoint run/checkpoint.pt is damaged: ")
        assert path.read_bytes() == content
    assert not (tmp_path / "made-by-a-checkpoint").exists()
    torch.save({"state": {}}, path)
    assert error_of(capsys, *options).endswith("is not a checkpoint of cnnkern train: it has no 'arguments'")
    path.write_bytes(good)
    checkpoint = checkpoints.load(path)
    checkpoint["state"].popitem()
    checkpoints.save(path, checkpoint)
    assert "does not fit" in error_of(capsys, *options)
    path.write_bytes(good)
    checkpoints.save(path, checkpoints.load(path) | {"classes": ["a", "b"]})
    assert "is of other classes: a, b; this data has 0, 1" in error_of(capsys, *options)
    for key, value in (("model", "nope"), ("arguments", checkpoint["arguments"] | {"colour": 1})):
        path.write_bytes(good)
        checkpoints.save(path, checkpoints.load(path) | {key: value})
        with pytest.raises(checkpoints.CheckpointError, match="does not fit"):
            checkpoints.load_model(path)
    torch.save(torch.nn.ReLU(), path)
    said = error_of(capsys, *options)
    assert said.endswith("is not a checkpoint of cnnkern train: it contains more than tensors and text")


def test_an_output_that_cannot_be_written_to_is_known_before_training(tiny, monkeypatch, capsys):
    monkeypatch.setattr(train.Run, "train_epoch", lambda run: pytest.fail("it has trained"))
    said = error_of(capsys, tiny, "--output", "/proc/self")
    assert said.startswith("cnnkern: cannot write into the output folder /proc/self: ")


def test_a_world_size_of_somebody_else_is_no_torchrun(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train.main([tiny, "--epochs", "1", "--output", str(tmp_path)]) == 0


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
    options = ["--dataset", "folder", "--data-dir", str(tmp_path), "--batch-size", "2", "--epochs", "1"]
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
