"""The output folder of `cnnkern train`: full disks, runs that are there already, and runs at the same time."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cnnkern import checkpoint as checkpoints
from cnnkern import output, train
from tests.child import run_child
from tests.training import error_of, rows

pytestmark = pytest.mark.usefixtures("malloc_as_it_was")
FILES = ["checkpoint.pt", "curves.png", "epochs.csv", "steps.csv"]
ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "cnnkern", "train", "lenet_relu", *arguments]


# ---- full disks -------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_is_one_line_and_the_old_checkpoint_is_kept(tmp_path):
    """No file may grow beyond 100 KB in the second process, so that its writes fail as on a full disk."""
    first = run_child(command("--epochs", "1", "--output", "run"), cwd=tmp_path, env=ENVIRONMENT)
    assert first.returncode == 0
    before = {name: (tmp_path / "run" / name).read_bytes() for name in FILES}
    assert len(before["checkpoint.pt"]) > 500_000
    done = run_child(
        command("--epochs", "2", "--output", "run", "--resume"),
        cwd=tmp_path,
        env=ENVIRONMENT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.returncode == 1
    said = "cnnkern: run/checkpoint.pt cannot be written: File too large; the one of before is kept\n"
    assert done.stderr == said
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


class FullDisk:
    """Refuses every write, by way of a device whose writes fail for want of space."""

    def __init__(self, monkeypatch, name: str) -> None:
        self.opened: list[Path] = []
        self.full = True

        def opened(path, *arguments, **options):
            if self.full and path.name.startswith(f".{name}."):
                self.opened.append(path)
                Path(path).touch()
                path = "/dev/full"
            return open(path, *arguments, **options)

        monkeypatch.setattr(checkpoints, "open", opened, raising=False)

    def space_is_made(self) -> None:
        self.full = False


@pytest.mark.parametrize("name", FILES)
def test_every_file_of_a_run_may_meet_a_full_disk(tiny, tmp_path, monkeypatch, capsys, name):
    options = [tiny, "--batch-size", "700", "--output", str(tmp_path)]
    assert train.main([*options, "--epochs", "1"]) == 0
    capsys.readouterr()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    disk = FullDisk(monkeypatch, name)
    said = error_of(capsys, *options, "--epochs", "2", "--resume")
    kept = f"{tmp_path / name} cannot be written: No space left on device; the one of before is kept"
    assert said == f"cnnkern: {kept}"
    assert len(disk.opened) == 1
    after = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() == before.keys()
    assert after[tmp_path / name] == before[tmp_path / name]
    disk.space_is_made()
    assert train.main([*options, "--epochs", "3", "--resume"]) == 0
    assert [row["epoch"] for row in rows(tmp_path / "epochs.csv")] == [1, 2, 3]


def test_a_full_disk_of_the_first_epoch_leaves_nothing(tiny, tmp_path, monkeypatch, capsys):
    FullDisk(monkeypatch, "checkpoint.pt")
    said = error_of(capsys, tiny, "--batch-size", "700", "--output", str(tmp_path / "a" / "b"))
    assert said.endswith("a/b/checkpoint.pt cannot be written: No space left on device")
    assert not list(tmp_path.iterdir())


def test_an_error_that_is_none_of_the_disk_is_not_called_one(tmp_path):
    with pytest.raises(ZeroDivisionError):
        checkpoints.write_atomically(tmp_path / "x", lambda file: 1 / 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [["train", "lenet_relu", "--epochs", "1"], ["zoo", "show", "lenet"], ["doctor"]])
def test_standard_output_on_a_full_disk_is_one_line(tmp_path, command):
    with open("/dev/full", "w") as full:
        done = run_child([sys.executable, "-m", "cnnkern", *command], cwd=tmp_path, env=ENVIRONMENT, stdout=full)
    assert done.returncode == 1
    assert done.stderr == "cnnkern: [Errno 28] No space left on device\n"


# ---- runs that are there already --------------------------------------------------------------------------------


def test_a_run_is_not_replaced_unless_told_so(tiny, tmp_path, monkeypatch, capsys):
    options = [tiny, "--epochs", "1", "--batch-size", "700", "--output", str(tmp_path)]
    assert train.main(options) == 0
    content = (tmp_path / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(train, "Run", lambda *_: pytest.fail("it has begun"))
        assert error_of(capsys, *options, "--seed", "1") == (
            f"cnnkern: {tmp_path} already has a run ({', '.join(FILES)}): continue it (--resume), replace it "
            "(--overwrite) or choose another --output"
        )
    assert (tmp_path / "checkpoint.pt").read_bytes() == content
    assert train.main([*options, "--seed", "1", "--compare"]) == 0, "which writes nothing"
    assert (tmp_path / "checkpoint.pt").read_bytes() == content
    assert train.main([*options, "--seed", "1", "--overwrite"]) == 0
    assert checkpoints.load(tmp_path / "checkpoint.pt")["settings"]["seed"] == 1
    # Other files are nobody's business; curves without a checkpoint are a run's.
    (tmp_path / "checkpoint.pt").unlink()
    (tmp_path / "notes.txt").touch()
    said = error_of(capsys, *options)
    assert "already has a run (curves.png, epochs.csv, steps.csv): replace it (--overwrite) or" in said


def test_interrupted_before_its_first_epoch_beside_an_older_run(tiny, tmp_path, monkeypatch, capsys):
    def interrupted(run):
        raise KeyboardInterrupt

    options = [tiny, "--epochs", "1", "--output", str(tmp_path)]
    assert train.main(options) == 0
    content = (tmp_path / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(train.Run, "train_epoch", interrupted)
    assert train.main([*options, "--seed", "9", "--overwrite"]) == 130
    assert "no epoch was finished" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").read_bytes() == content
    assert train.main([*options[:1], "--epochs", "2", "--resume", *options[3:]]) == 130
    assert "has the last whole epoch: go on with --resume" in capsys.readouterr().err


# ---- runs at the same time --------------------------------------------------------------------------------------


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition(), process.communicate()[1]


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    lock, checkpoint = tmp_path / "run" / output.LOCK, tmp_path / "run" / "checkpoint.pt"
    options = {"cwd": tmp_path, "env": ENVIRONMENT, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    options["text"] = True
    with subprocess.Popen(command("--epochs", "1000000", "--output", "run"), **options) as first:
        try:
            wait_until(lambda: lock.exists() and lock.read_text() != "", first)
            said = (
                f"cnnkern: another run writes into run (process {first.pid}): wait for its end, or choose another "
                "--output\n"
            )
            for other in ([], ["--overwrite"]):
                second = run_child(command(*other, "--output", "run"), **options)
                assert (second.returncode, second.stderr) == (1, said)
            wait_until(checkpoint.exists, first)
            second = run_child(command("--resume", "--output", "run"), **options)
            assert (second.returncode, second.stderr) == (1, said)
        finally:
            first.kill()  # as the system does where memory runs out: nothing is cleared away
    assert first.returncode == -signal.SIGKILL
    (checkpoint.parent / ".checkpoint.pt.123").write_text("half")
    epochs = str(checkpoints.load(checkpoint)["epoch"] + 1)
    done = run_child(command("--resume", "--epochs", epochs, "--output", "run"), **options)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == FILES


def test_a_checkpoint_that_another_run_replaces_meanwhile(tiny, tmp_path, monkeypatch, capsys):
    options = [tiny, "--batch-size", "700", "--output", str(tmp_path)]
    assert train.main([*options, "--epochs", "1"]) == 0
    load = checkpoints.load

    def slowly(path):
        checkpoint = load(path)
        checkpoints.save(path, checkpoint)
        return checkpoint

    monkeypatch.setattr(checkpoints, "load", slowly)
    said = error_of(capsys, *options, "--resume", "--epochs", "2")
    assert said == f"cnnkern: {tmp_path / 'checkpoint.pt'} was replaced by another run in this moment: start again"


def test_a_folder_is_free_again_after_a_run(tmp_path):
    with output.claimed(tmp_path / "a" / "b"):
        with pytest.raises(output.OutputError, match="another run writes into"), output.claimed(tmp_path / "a" / "b"):
            pass
        assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == [output.LOCK]
    assert not list(tmp_path.iterdir())
    with output.claimed(tmp_path / "a"):
        (tmp_path / "a" / "file").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]
