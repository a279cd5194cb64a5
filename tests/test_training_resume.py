"""`cnnkern train --resume`: what shapes a run comes from its checkpoint, and a difference is refused or said."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cnnkern import checkpoint as checkpoints
from cnnkern import options as train_options
from cnnkern import train
from tests.training import error_of, rows

pytestmark = pytest.mark.usefixtures("malloc_as_it_was")


def notes(capsys) -> list[str]:
    """The warnings of a run."""
    return [line.removeprefix("warning: ") for line in capsys.readouterr().out.splitlines() if "warning: " in line]


def interrupt_in(monkeypatch, epoch: int):
    """Ctrl-C in this epoch, counted from zero."""
    original = train.Run.train_epoch

    def interrupted(run):
        if run.epoch == epoch:
            raise KeyboardInterrupt
        return original(run)

    monkeypatch.setattr(train.Run, "train_epoch", interrupted)


def test_options_that_are_left_out_are_those_of_the_checkpoint(tiny, tmp_path, monkeypatch, capsys):
    """A run of eight epochs stays one, with its curve of learning rates, and is the run that was not interrupted."""
    shaped = ["--epochs", "4", "--schedule", "cosine", "--lr", "2e-3", "--optimizer", "adamw", "--weight-decay", "0.02"]
    shaped += ["--batch-size", "100", "--augment", "--seed", "3", "--resize", "9", "--float64", "--channels-last"]
    assert train.main([tiny, *shaped, "--output", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        interrupt_in(patch, 2)
        assert train.main([tiny, *shaped, "--output", str(tmp_path / "parts")]) == 130
    capsys.readouterr()
    assert train.main([tiny, "--resume", "--output", str(tmp_path / "parts")]) == 0
    assert not notes(capsys)
    whole, parts = (checkpoints.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    assert whole["settings"] == parts["settings"]
    assert whole["steps"] == parts["steps"]
    assert all(torch.equal(parts["state"][name], value) for name, value in whole["state"].items())
    rates = [[row["learning_rate"] for row in c["history"]] for c in (whole, parts)]
    assert rates[0] == rates[1]
    assert len(rates[0]) == 4


def test_every_option_that_shapes_a_run_is_in_the_checkpoint():
    """One that is added later has to be sorted: into what shapes a run, or here."""
    others = {"workers", "output", "overwrite", "resume", "resume_from", "compare"}
    assert {*train_options.make_parser().actions} == {*train_options.SETTINGS} | others


@pytest.fixture
def done(tiny, tmp_path, capsys) -> list[str]:
    """The arguments that resume a run of one epoch."""
    options = ["--epochs", "1", "--lr", "3e-3", "--schedule", "cosine", "--batch-size", "256"]
    assert train.main([tiny, *options, "--output", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    return [tiny, "--output", str(tmp_path / "run"), "--resume"]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--lr", "1e-4"], "--lr 0.0001 from here on, 0.003 before"),
        (["--schedule", "constant"], "--schedule constant from here on, cosine before"),
        (["--channels-last"], "--channels-last on from here on, off before"),
        (["--threads", "1"], "--threads 1 from here on, PyTorch's choice before"),
    ],
)
def test_an_option_that_differs_is_used_and_said(done, tmp_path, capsys, option, said):
    before = torch.get_num_threads()
    try:
        assert train.main([*done, "--epochs", "2", *option]) == 0
    finally:
        torch.set_num_threads(before)
    found = notes(capsys)
    assert found[0] == "--epochs 2 from here on, 1 before"
    assert said in found[1:]
    settings = checkpoints.load(tmp_path / "run" / "checkpoint.pt")["settings"]
    name = option[0].strip("-").replace("-", "_")
    assert settings["epochs"] == 2
    assert str(settings[name]) in ([str(float(option[1]))] if name == "lr" else [*option[1:], "True"])
    if name == "lr":
        assert rows(tmp_path / "run" / "epochs.csv")[-1]["learning_rate"] < 1e-4


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--dataset mnist --data-dir x", "--dataset digits (now mnist)"),
        ("--resize 12", "--resize 8 (now 12)"),
        ("--batch-size 32", "--batch-size 256 (now 32)"),
        ("--optimizer sgd", "--optimizer adam (now sgd)"),
        ("--momentum 0.5", "--momentum 0.9 (now 0.5)"),
        ("--weight-decay 0.1", "--weight-decay 0.0 (now 0.1)"),
        ("--augment", "--augment off (now on)"),
        ("--seed 1", "--seed 0 (now 1)"),
        ("--amp bf16", "--amp off (now bf16)"),
        ("--float64", "--float64 off (now on)"),
        ("--eager", "--eager off (now on)"),
        ("--sync-bn", "--sync-bn off (now on)"),
    ],
)
def test_an_option_that_would_make_another_run_is_refused(done, tmp_path, capsys, option, said):
    content = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    assert f"was made with {said}: leave that out" in error_of(capsys, *done, "--epochs", "2", *option.split())
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == content


def test_what_has_no_option_is_said_as_well(done, tmp_path, capsys):
    path = tmp_path / "run" / "checkpoint.pt"
    checkpoint = checkpoints.load(path)
    found = checkpoint["environment"]
    assert (found["training images"], found["test images"], found["processes"]) == (1437, 360, 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = {"training images": 1400, "test images": 300, "processes": 4, "threads": 64}
    checkpoint["settings"] |= {"device": "cuda:99", "epochs": 2}
    checkpoints.save(path, checkpoint | {"environment": before})
    assert train.main(done) == 0
    assert notes(capsys) == [
        f"--device {device} from here on, cuda:99 before, which cannot be used here",
        "1437 training images from here on, 1400 before",
        "360 test images from here on, 300 before",
        "1 processes from here on, 4 before",
        f"{torch.get_num_threads()} threads from here on, 64 before",
    ]


def test_resumed_when_all_is_done_and_into_another_folder(done, tmp_path, capsys):
    assert "1 epochs are done already: give --epochs 2 or more" in error_of(capsys, *done)
    path = tmp_path / "run" / "checkpoint.pt"
    content = path.read_bytes()
    elsewhere = [done[0], "--resume-from", str(path.parent), "--epochs", "2", "--output", str(tmp_path / "other")]
    assert train.main(elsewhere) == 0
    assert path.read_bytes() == content
    assert checkpoints.load(tmp_path / "other" / "checkpoint.pt")["epoch"] == 2
    capsys.readouterr()
    # That folder holds a run of its own now; the file's own folder is continued as by --resume.
    assert "already has a run" in error_of(capsys, *elsewhere)
    assert train.main([*elsewhere, "--overwrite"]) == 0
    assert train.main([done[0], "--resume-from", str(path), "--epochs", "2", "--output", str(tmp_path / "run")]) == 0
    assert checkpoints.load(path)["epoch"] == 2


def altered(part: Any, place: str, value: Any) -> Any:
    """A checkpoint, or part of one, with `value` at a place such as "settings.lr"; "" is the whole."""
    if not place:
        return value
    name, _, rest = place.partition(".")
    if isinstance(part, list):
        return [altered(e, rest, value) if i == int(name) else e for i, e in enumerate(part)]
    key = int(name) if name.isdecimal() else name
    return {**part, key: altered(part.get(key), rest, value)}


WRONG = [
    ("", [1, 2], "it holds a list"),
    *((key, 7.5, f"its '{key}' is a float") for key in checkpoints.KEYS),
    *((key, None, f"its '{key}' is a NoneType") for key in checkpoints.KEYS),
    ("epoch", "two", "its 'epoch' is a str"),
    ("epoch", True, "its 'epoch' is a bool"),
    ("epoch", 2, "1 rows of history for 2 epochs"),
    ("epoch", 0, "1 rows of history for 0 epochs"),
    ("classes.3", 3, "its 'classes' are no names"),
    ("steps.0", "low", "its 'steps' are no losses"),
    ("steps", [], "its 'steps' are no losses"),
    ("history.0", [1], "its 'history' has other columns"),
    ("history.0", {"epoch": 1}, "its 'history' has other columns"),
    ("history.0.loss", "low", "its 'history' has other columns"),
    ("environment.threads", "two", "its 'environment' is"),
    ("arguments.num_classes", "ten", "its 'arguments' are"),
    ("arguments.num_classes", -1, "its 'arguments' are"),
    ("arguments.fused", "yes", "its 'arguments' are"),
    ("state.head", [1.0], "its 'state' contains more than tensors"),
    ("settings", {}, "has no dataset, resize, batch_size"),
    ("settings.lr", "low", "its settings have lr 'low'"),
    ("settings.lr", "0.003", "its settings have lr '0.003'"),
    ("settings.lr", -1.0, "its settings have lr -1.0"),
    ("settings.lr", None, "its settings have lr None"),
    ("settings.lr", torch.tensor(0.1), "its settings have lr tensor"),
    ("settings.schedule", "linear", "its settings have schedule 'linear'"),
    ("settings.schedule", ["cosine"], "its settings have schedule"),
    ("settings.epochs", 2.5, "its settings have epochs 2.5"),
    ("settings.epochs", True, "its settings have epochs True"),
    ("settings.batch_size", 0, "its settings have batch_size 0"),
    ("settings.device", 0, "its settings have device 0"),
    ("settings.dataset", "nothing", "its settings have dataset 'nothing'"),
    ("settings.data_dir", 5, "its settings have data_dir 5"),
    ("settings.compile", "no", "its settings have compile 'no'"),
    ("settings.threads", 1e9, "its settings have threads 1000000000.0"),
    ("settings.amp", "fp8", "its settings have amp 'fp8'"),
    ("settings.seed", -3, "its settings have seed -3"),
    ("optimizer", {}, "does not fit"),
    ("optimizer.param_groups", [], "does not fit"),
    ("optimizer.param_groups.0.betas", "ab", "does not fit: the optimiser has betas 'ab' (now (0.9, 0.999))"),
    ("optimizer.param_groups.0.eps", 1.0, "does not fit: the optimiser has eps 1.0 (now 1e-08)"),
    ("optimizer.state", {}, "does not fit: the optimiser's state of a parameter [8, 1, 3, 3] has another form"),
    ("optimizer.state.0.exp_avg", torch.zeros(3), "does not fit: the optimiser's state of a parameter"),
    ("optimizer.state.0.exp_avg", "none", "does not fit: the optimiser's state of a parameter"),
    ("optimizer.state.0.step", "one", "does not fit: "),
    ("optimizer.state.0.step", torch.zeros(3), "does not fit: the optimiser's state of a parameter"),
    ("state", {}, "does not fit"),
    ("model", "lenet", "is of lenet, not of tiny"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture
def good(folder, tiny, malloc_as_it_was, capsys) -> dict[str, Any]:
    """The checkpoint of a run of one epoch, which is made once."""
    if not (folder / "checkpoint.pt").exists():
        assert train.main([tiny, "--epochs", "1", "--batch-size", "700", "--output", str(folder)]) == 0
        capsys.readouterr()
    return checkpoints.load(folder / "checkpoint.pt")


@pytest.mark.parametrize(("place", "value", "said"), WRONG, ids=[f"{p or 'all'}={str(v)[:12]}" for p, v, _ in WRONG])
def test_a_checkpoint_with_anything_of_another_type_is_one_line(tiny, good, tmp_path, capsys, place, value, said):
    path = tmp_path / "checkpoint.pt"
    torch.save(altered(good, place, value), path)
    content = path.read_bytes()
    line = error_of(capsys, tiny, "--resume", "--epochs", "3", "--output", str(tmp_path))
    assert re.match(rf"cnnkern: .*{re.escape(str(path))}", line)
    assert said in line
    assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_folder_of_images_is_found_again_from_another_place(tiny, tmp_path, monkeypatch, capsys):
    from PIL import Image

    for c, colour in (("a", "red"), ("b", "blue")):
        (tmp_path / "images" / c).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (8, 8), colour).save(tmp_path / "images" / c / f"{i}.png")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    folder = ["--dataset", "folder", "--data-dir", "images", "--batch-size", "4"]
    assert train.main([*folder, tiny, "--epochs", "1", "--output", "run"]) == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    capsys.readouterr()
    assert train.main(["--resume", tiny, "--epochs", "2", "--output", "../run"]) == 0
    assert notes(capsys) == ["--epochs 2 from here on, 1 before"]
    (tmp_path / "images" / "b").rename(tmp_path / "images" / "c")
    said = error_of(capsys, "--resume", tiny, "--epochs", "3", "--output", "../run")
    assert "is of other classes: a, b; this data has a, c" in said
    (tmp_path / "images").rename(tmp_path / "gone")
    said = error_of(capsys, "--resume", tiny, "--epochs", "3", "--output", "../run")
    assert f"there is no directory {tmp_path / 'images'}" in said
