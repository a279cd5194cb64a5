"""The benchmarks' command line: the driver and its workers, and errors in one line."""

import errno
import io
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import cnnkern
from benchmarks import __main__ as driver
from benchmarks.show import report
from benchmarks.studies import gpu_kernels
from benchmarks.suite import files, machine, worker
from benchmarks.suite.options import Options
from cnnkern import memory
from tests.child import run_child
from tests.results import assert_one_line, some_rows


def test_the_driver_runs_workers_and_writes(monkeypatch, tmp_path, capsys):
    """The real thing, in processes of its own, on the smallest part that there is."""
    monkeypatch.setattr(files, "RESULTS", tmp_path)
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
        monkeypatch.delenv(name)  # it would tell the worker's pytest that it shares the machine and must not measure
    code = driver.main(["--quick", "--filter", "overhead batch_norm_relu", "--save", "tiny", "--threads", "1"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    published = tmp_path / "published"
    assert (tmp_path / "report.html").read_text().count("batch_norm_relu") > 4
    assert {p.name for p in published.iterdir()} == {"tiny.csv"}
    found = files.load(published / "tiny.csv").rows
    assert {(r.suite, r.malloc, r.threads, r.status) for r in found} == {
        ("overhead", "default", 1, "ok"),
        ("bandwidth", "none", 1, "ok"),
    }
    assert {r.operator for r in found if r.suite == "bandwidth"} >= {"read", "write", "copy", "add"}
    assert "Call overhead, on a tensor of one kilobyte" in printed.out
    first, *_, last = (line for line in printed.out.splitlines() if line and not line.startswith("written"))
    assert re.match("the machine is quiet: |THE MACHINE IS BUSY: ", first)
    assert "noise" in last
    assert all(r.noise is not None and r.others is not None for r in found if r.suite == "overhead")
    assert report.main([str(published / "tiny.csv"), "--markdown"]) == 0
    assert "| batch_norm_relu 2x8x4x4, module | training |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--threads", "0"], "--threads"),
        (["--threads", "many"], "--threads"),
        (["--device", "tpu"], "--device"),
        (["--save", "../elsewhere"], "--save"),
        (["--nonsense"], "--nonsense"),
        (["--filter"], "--filter"),
        (["--filter", "no such operator"], "no such operator"),
        pytest.param(
            ["--device", "cuda"],
            "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_bad_arguments_are_one_line(arguments, words, capsys):
    try:
        code = driver.main(arguments)
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert_one_line(capsys.readouterr().err, words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_kernels_of_a_gpu_want_one(capsys):
    with pytest.raises(SystemExit) as exit:
        gpu_kernels.main([])
    assert exit.value.code == 2
    assert "torch finds no CUDA device on this machine" in capsys.readouterr().err


def test_kernels_of_a_gpu_are_a_table(monkeypatch, capsys):
    if not torch.cuda.is_available():  # all but the profiler, on the CPU
        longest = itertools.cycle((4.0, 2.0))  # eager's, ours

        def profiled(step):
            step()
            return {"first": next(longest), "second": 2.0}

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(cnnkern, "backend", lambda name: None)
        monkeypatch.setattr(gpu_kernels, "microseconds", profiled)
        drawn = gpu_kernels.operators.Drawn
        monkeypatch.setattr(gpu_kernels.operators, "Drawn", lambda *values: drawn(*values[:-1], "cpu"))
    monkeypatch.setattr(gpu_kernels, "SHAPES", {"bn_act": ((2, 8, 4, 4),), "layer_norm": ((6, 8),)})
    assert gpu_kernels.main(["--dtype", "bfloat16", "--kernels"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [line.strip("| ").split(" | ") for line in lines[2:] if line.startswith("|")]
    assert [row[:3] for row in found] == [
        ["bn_act", "2x8x4x4", "contiguous"],
        ["bn_act", "2x8x4x4", "channels_last"],
        ["layer_norm", "6x8", "contiguous"],
    ]
    for _, _, _, eager, ours, ratio in found:
        assert float(ratio.removesuffix("x")) == pytest.approx(float(eager) / float(ours), abs=0.05)
    if not torch.cuda.is_initialized():
        assert {tuple(row[3:]) for row in found} == {("6.0", "4.0", "1.50x")}


def full_disk(self, data):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_one_line_and_leaves_no_broken_file(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(files, "RESULTS", tmp_path)
    monkeypatch.setattr(driver, "run", lambda options, settings, scratch, seconds: (some_rows(), []))
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    assert driver.main(["--quick"]) == 1
    printed = capsys.readouterr()
    assert_one_line(printed.err, "No space left on device")
    assert "Speedup over eager" in printed.out  # what was measured is shown all the same
    assert list(tmp_path.iterdir()) == []


def test_a_results_folder_that_cannot_be_made_is_one_line(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(files, "RESULTS", tmp_path / "file")
    assert driver.main(["--quick"]) == 1
    assert_one_line(capsys.readouterr().err, "cannot write")


def test_a_worker_that_dies_is_one_line(monkeypatch, tmp_path):
    class Dying(subprocess.Popen):
        def __init__(self, command, **options):
            super().__init__([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], **options)

    monkeypatch.setattr(worker.subprocess, "Popen", Dying)
    with worker.progress(Console(file=io.StringIO())) as bar, pytest.raises(worker.Failed) as caught:
        worker.run(Options(), "tuned", tmp_path, bar)
    assert str(caught.value) == "tuned malloc: the worker was killed by SIGKILL, at: starting"


def test_progress_is_live_on_a_terminal_and_silent_elsewhere():
    event = {"start": "operators bn_act", "done": 3.0, "total": 4.0}
    out = io.StringIO()
    with worker.progress(Console(file=out, force_terminal=True, width=100)) as bar:
        task = bar.add_task("tuned malloc", total=None)
        bar.update(task, description="tuned malloc: operators bn_act", **worker.counts(event))
        bar.refresh()
        assert "tuned malloc: operators bn_act" in out.getvalue()
        assert bar.tasks[0].percentage == 75
    out = io.StringIO()
    with worker.progress(Console(file=out)) as bar:
        bar.add_task("tuned malloc", total=None)
        bar.refresh()
    assert out.getvalue() == ""


def test_malloc_settings_are_told_apart_by_the_environment(monkeypatch):
    for setting in ("tuned", "default"):
        for variable in machine.TUNED_MALLOC:
            monkeypatch.delenv(variable, raising=False)
        for variable, value in machine.malloc_environment(setting).items():
            monkeypatch.setenv(variable, value)
        assert machine.malloc_setting() == setting
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    assert machine.malloc_setting() == "custom"
    assert "MALLOC_TOP_PAD_" not in machine.malloc_environment("default")


def test_the_tuned_setting_is_what_tune_malloc_sets(monkeypatch):
    """glibc reads the environment's names with a MALLOC_ before them and a _ behind."""
    set_by_call = {}

    class Library:
        def gnu_get_libc_version():
            return b"9.9"

        def mallopt(option, value):
            set_by_call[option] = value
            return 1

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: Library)
    assert "reuses blocks" in cnnkern.tune_malloc()
    malloc_h = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_TOP_PAD_": -2, "MALLOC_MMAP_THRESHOLD_": -3}
    assert {malloc_h[name]: int(value) for name, value in machine.TUNED_MALLOC.items()} == set_by_call


@pytest.mark.parametrize(
    ("text", "slug"),
    [
        ("cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n", "amd-epyc-family-26-model-2"),
        ("cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC 9575F 64-Core\n", "amd-epyc-9575f-64-core"),
        (
            "cpu family : 6\nmodel : 143\nmodel name : Intel(R) Xeon(R) Processor\n",
            "intel-xeon-processor-family-6-model-143",
        ),
        ("model name\t: Some Core\n", "some-core"),
    ],
)
def test_a_processor_name_that_says_no_generation_gets_family_and_model(text, slug, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(text * 2)
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert machine.slug(machine.model_name("cpu")) == slug


def test_commit_is_what_the_environment_says_else_gits_else_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.delenv("CNNKERN_COMMIT", raising=False)
    assert machine.commit() == "unknown"
    monkeypatch.setenv("CNNKERN_COMMIT", "1234567")  # of a copy of the tree
    assert machine.commit() == "1234567"
    monkeypatch.delenv("CNNKERN_COMMIT")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    run_child([*git, "init", "-q"], check=True)
    run_child([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    clean = machine.commit()
    assert re.fullmatch(r"[0-9a-f]{7,}", clean)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "new").write_text("")
    assert machine.commit() == clean  # saving a result does not make the next one dirty
    (tmp_path / "other").write_text("")
    assert machine.commit() == f"{clean}-dirty"


def test_options_survive_the_file_that_hands_them_over(tmp_path):
    options = Options(quick=True, filter="x", threads=3, seconds=1.5, verified=("a", "b"))
    options.save(tmp_path / "options")
    assert Options.load(tmp_path / "options") == options
    assert json.loads((tmp_path / "options").read_text())["threads"] == 3


def run_pytest(*options, folder):
    """`python -m pytest benchmarks` as a user starts it."""
    clean = {n: v for n, v in machine.malloc_environment("default").items() if not n.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", *options]
    command += [f"--benchmark-storage=file://{folder}", "--bench-threads=1"]
    return run_child(command, cwd=machine.ROOT, env=clean, timeout=240)


def test_pytest_saves_and_compares_as_pytest_benchmark_does(tmp_path):
    chosen = "--bench-filter=overhead batch_norm_relu none 2x8x4x4 inference functional"
    saved = tmp_path / "saved.json"
    first = run_pytest(
        chosen, "--bench-seconds=3", f"--benchmark-json={saved}", "--benchmark-save=first", folder=tmp_path
    )
    assert first.returncode == 0, first.stdout + first.stderr
    found = json.loads(saved.read_text())["benchmarks"]
    assert {(b["extra_info"]["contender"], len(b["stats"]["data"]) >= 5) for b in found} == {
        ("eager", True),
        ("eager, again", True),
        ("cnnkern", True),
    }
    second = run_pytest(chosen, "--bench-seconds=0", "--benchmark-compare=0001", folder=tmp_path)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "3 contenders were not timed: the 0 s for all of them were spent" in second.stdout
    second = run_pytest(chosen, "--bench-seconds=3", "--benchmark-compare=0001", folder=tmp_path)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "(0001_first)" in second.stdout


def test_pytest_refuses_a_filter_that_finds_nothing(tmp_path):
    done = run_pytest("--bench-filter=no such operator", folder=tmp_path)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "no row has 'no such operator' in its name" in done.stderr
