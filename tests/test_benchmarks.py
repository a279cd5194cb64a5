"""The benchmark suite: its statistics, its rows and reports, a tiny run from end to end, and its errors in one line."""

import csv
import errno
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import cnnkern
from benchmarks import __main__ as driver
from benchmarks import (
    accuracy,
    bandwidth,
    judge,
    machine,
    onednn,
    operators,
    overhead,
    passes,
    report,
    rows,
    sweeps,
    tables,
    timing,
    worker,
)
from benchmarks.bandwidth import Bandwidth
from benchmarks.groups import Contender, Group, Unavailable, select
from benchmarks.options import Options
from cnnkern import testing
from cnnkern.testing import Layer
from tests.results import assert_one_line, measure, some_rows

ROOT = Path(__file__).resolve().parent.parent
CLOCK = timing.ReplayClock()


def test_ratio_is_taken_round_by_round():
    # The machine is ten times slower in the last round: the contender is twice as fast in each all the same.
    assert timing.ratio([2.0, 4.0, 40.0], [1.0, 2.0, 20.0]) == 2.0
    assert timing.ratio([3.0, 1.0, 1.0], [1.0, 1.0, 1.0]) == 1.0
    with pytest.raises(ValueError, match="not timed together"):
        timing.ratio([1.0], [1.0, 2.0])


def test_geometric_mean():
    assert timing.geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert timing.geometric_mean([2.0, 4.0, 8.0]) == pytest.approx(4.0)
    for values in ([], [1.0, 0.0], [-1.0]):
        with pytest.raises(ValueError, match="positive"):
            timing.geometric_mean(values)


@pytest.fixture
def clock(monkeypatch):
    """Time as `timing` sees it: it passes where a test says so."""
    replaced = timing.ReplayClock()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=replaced))
    return replaced


def test_every_round_times_each_step_once(clock):
    called, costs = [], {"a": 0.25, "b": 0.5, "c": 1.0}

    def step(key):
        called.append(key)
        clock.now += costs[key]

    steps = {key: lambda key=key: step(key) for key in costs}
    samples = timing.interleave(steps, deadline=0.0, min_rounds=8, max_rounds=100)
    assert samples == {key: [cost] * 8 for key, cost in costs.items()}
    assert called[:3] == list(costs), "each is called once before the clock counts"
    rounds = [tuple(called[i : i + 3]) for i in range(3, len(called), 3)]
    assert len(rounds) == 8
    assert all(sorted(r) == list(costs) for r in rounds)
    assert len(set(rounds)) > 1, "always the same order"


def test_rounds_end_with_the_deadline_or_their_maximum(clock):
    def step():
        clock.now += 0.25

    for deadline, rounds in ((2.1, 8), (1e9, 20), (0.0, 3)):
        clock.now = 0.0
        samples = timing.interleave({"a": step}, deadline=deadline, min_rounds=3, max_rounds=20)
        assert len(samples["a"]) == rounds, deadline


def test_short_steps_are_called_several_times_a_sample(clock):
    calls = []

    def step():
        calls.append(None)
        clock.now += 1e-4

    samples = timing.interleave({"a": step}, deadline=0.0, min_rounds=4, max_rounds=4)
    assert samples["a"] == pytest.approx([1e-4] * 4)
    assert len(calls) == 2 + 4 * 10


@pytest.mark.benchmark(timer=CLOCK)
def test_replay_hands_the_samples_to_pytest_benchmark(benchmark):
    if benchmark.disabled:
        pytest.skip("pytest-benchmark takes no samples when disabled or in parallel")
    CLOCK.replay(benchmark, [0.25, 0.5, 0.125])
    assert benchmark.stats.stats.data == [0.25, 0.5, 0.125]
    assert benchmark.stats.stats.median == 0.25


def test_least_time_follows_the_mix_and_the_size():
    measured = [
        *(Bandwidth(mix, 2**20, 100.0) for mix in bandwidth.MIXES),
        Bandwidth("read", 2**28, 10.0),
        Bandwidth("write", 2**28, 2.0),
        Bandwidth("copy", 2**28, 4.0),
        Bandwidth("add", 2**28, 8.0),
    ]
    assert bandwidth.least_seconds(measured, 2**19, 2**19) == pytest.approx(2**20 / 100e9)
    assert bandwidth.least_seconds(measured, 2**28, 0) == pytest.approx(2**28 / 8e9)  # the best mix is add
    assert bandwidth.least_seconds(measured, 2**27, 2**27) == pytest.approx(2**27 / 2e9)  # the writes decide


def test_bandwidth_is_measured_for_every_mix_that_this_process_can_run(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", bandwidth.STREAMING)
    found = bandwidth.measure("cpu", threads=1, seconds=0.0, sizes=(2**16, 2**18))
    assert {(b.mix, b.size) for b in found} == set(itertools.product(bandwidth.MIXES, (2**16, 2**18)))
    assert all(b.gb_s > 0 and math.isfinite(b.gb_s) for b in found)
    monkeypatch.delenv("GLIBC_TUNABLES")
    found = bandwidth.measure("cpu", threads=1, seconds=0.0, sizes=(2**16,))
    assert {b.mix for b in found} == set(bandwidth.MIXES) - {"streaming copy"}


def as_results(*tensors):
    return [{"output": t} for t in tensors]


@pytest.mark.parametrize("where", [0, 12345, 599_999])
def test_one_wrong_element_is_found_wherever_it_stands(where):
    generator = torch.Generator().manual_seed(0)
    ref = torch.randn((6, 100, 1000), generator=generator, dtype=torch.float64)
    eager, out = ref.float(), ref.float()
    judge.assert_as_good_as(*as_results(out, eager, ref))
    out.view(-1)[where] += 1e-3
    for verdict in (judge.assert_as_good_as, testing.assert_as_good_as):
        with pytest.raises(AssertionError, match="output: error"):
            verdict(*as_results(out, eager, ref))


def test_values_that_are_not_finite_and_other_shapes_are_judged_too():
    ref = torch.ones((4, 3), dtype=torch.float64)
    broken = ref.float()
    broken[3, 2] = float("nan")
    with pytest.raises(AssertionError, match="NaN"):
        judge.assert_as_good_as(*as_results(broken, ref.float(), ref))
    with pytest.raises(AssertionError, match="shapes"):
        judge.assert_as_good_as(*as_results(ref.float()[:3], ref.float(), ref))
    with pytest.raises(AssertionError, match="float64 against"):
        judge.assert_as_good_as(*as_results(ref, ref.float(), ref))


@pytest.fixture
def tiny_case(monkeypatch):
    """CASES cut down to batch norm on two shapes of a network called toy."""
    case = replace(testing.CASES["bn_act"], bench_layers={"toy": (Layer((2, 3, 5, 7)), Layer((2, 8, 4, 4)))})
    monkeypatch.setattr(testing, "CASES", {"bn_act": case})
    return case


def test_plan_has_both_layouts_and_both_modes(tiny_case):
    plan = operators.groups(Options(), compiled=True)
    assert [(g.shape, g.mode) for g in plan] == [
        (shape, mode) for shape in ("2x3x5x7", "2x8x4x4") for mode in ("training", "inference")
    ]
    assert {c for g in plan for c in g.contenders} == {
        Contender(name, layout)
        for name in ("eager", "ours", "torch.compile")
        for layout in ("contiguous", "channels_last")
    }
    training = plan[0]
    assert (training.bytes_read, training.bytes_written) == (3 * 210 * 4, 2 * 210 * 4)
    with_compile = {g.shape for g in plan if Contender("torch.compile", "contiguous") in g.contenders}
    assert with_compile == {"2x8x4x4"}
    plan = operators.groups(Options(compile_shapes="all"), compiled=True)
    assert all(Contender("torch.compile", "contiguous") in g.contenders for g in plan)
    quick = operators.groups(Options(quick=True), compiled=True)
    assert not any(c.name == "torch.compile" for g in quick for c in g.contenders)


def test_filter_keeps_the_baseline_of_what_it_finds(tiny_case):
    plan = operators.groups(Options(), compiled=True)
    (group, *others) = select(plan, "toy 2x3x5x7 TRAINING functional channels_last ours", "tuned")
    assert not others
    assert set(group.contenders) == {Contender("ours", "channels_last"), Contender("eager", "channels_last")}
    assert len(select(plan, "default malloc", "default")) == len(plan)
    assert select(plan, "default malloc", "tuned") == []
    assert len(select(plan, "default malloc, toy", "tuned")) == len(plan)
    assert {g.shape for g in select(plan, "torch.compile", "tuned")} == {"2x8x4x4"}


def test_quick_run_on_a_tiny_case_from_plan_to_files(tiny_case, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    options = Options(quick=True, filter="toy", seconds=60.0)
    plan = select(operators.groups(options, compiled=True), options.filter, "tuned")
    measured, events = measure(plan, options)
    assert {r.status for r in measured} == {"ok"}, tables.refused_lines(measured)
    assert len(measured) == 2 * 2 * 2 * 2  # shapes, modes, layouts, contenders
    assert [e["start"] for e in events if "start" in e] == [g.label for g in plan]
    for row in measured:
        assert row.rounds >= 5
        assert 0 < row.min_ms <= row.median_ms
        assert row.gb_s == pytest.approx(row.bytes / row.median_ms / 1e6)
        assert row.bandwidth_share == pytest.approx(row.gb_s / 10.0)  # every measured bandwidth is 10 GB/s
        assert row.ratio > 0
        assert row.lost == (row.contender == "ours" and row.ratio < 1)

    assert driver.write(measured, "today", tmp_path, None, quick=True) == []
    stem = f"some-machine_1threads_torch-{torch.__version__}_float32_channels_last+contiguous_tuned-malloc"
    stem += "_abc1234-dirty_quick"
    assert {p.name for p in tmp_path.iterdir()} == {f"{stem}.csv", f"{stem}.json", f"{stem}.png", "report.html"}
    assert rows.from_json((tmp_path / f"{stem}.json").read_text())[0] == measured
    table = list(csv.DictReader(io.StringIO((tmp_path / f"{stem}.csv").read_text())))
    assert list(table[0]) == [f.name for f in fields(rows.Row)]
    assert [float(line["median_ms"]) for line in table] == [r.median_ms for r in measured]
    assert (tmp_path / f"{stem}.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_contender_is_reported_and_not_timed(monkeypatch, tiny_case):
    wrong = replace(tiny_case, function=lambda *args, **kwargs: tiny_case.function(*args, **kwargs) + 1e-3)
    monkeypatch.setattr(testing, "CASES", {"bn_act": wrong})
    plan = select(operators.groups(Options(), compiled=False), "2x8x4x4", "tuned")
    measured, events = measure(plan)
    ours = [r for r in measured if r.contender == "ours"]
    assert {(r.status, r.median_ms, r.rounds) for r in ours} == {("wrong", None, 0)}
    assert all("output: error" in r.note for r in ours)
    assert {r.status for r in measured if r.contender == "eager"} == {"ok"}
    assert not any("ours" in e["verified"] for e in events if "verified" in e)
    (line,) = {re.sub(r"error .*", "", line) for line in tables.refused_lines(measured)}
    assert line.startswith("ours wrong: output: ")


def test_verified_contenders_are_not_compared_again(monkeypatch, tiny_case):
    plan = operators.groups(Options(), compiled=False)[:1]
    names = tuple(plan[0].name_of(c) for c in plan[0].contenders)

    def compare(*args):
        raise AssertionError("compared")

    monkeypatch.setattr(operators, "assert_as_good_as", compare)
    measured, _ = measure(plan, Options(seconds=60.0, verified=names))
    assert {r.status for r in measured} == {"ok"}
    measured, _ = measure(plan, Options(seconds=60.0))
    assert {r.note for r in measured if r.contender == "ours"} == {"compared"}


class Failing:
    def __init__(self, error):
        self.error = error

    def step(self, contender, verify):
        raise self.error


@pytest.mark.parametrize(
    ("error", "status", "note"),
    [
        (Unavailable("no compiler"), "not available", "no compiler"),
        (RuntimeError("first line\nsecond"), "failed", "RuntimeError: first line"),
        (ZeroDivisionError(), "failed", "ZeroDivisionError: ZeroDivisionError"),
    ],
)
def test_what_fails_is_a_row_with_one_line(error, status, note, capsys):
    contender = Contender("ours", "contiguous")
    plan = [Group("models", "m", "m", "1", "training", "module", (contender,), lambda: Failing(error), 1.0)]
    (row,), _ = measure(plan)
    assert (row.status, row.note) == (status, note)
    assert ("Traceback" in capsys.readouterr().err) == (status == "failed")  # the log keeps the whole of it


def test_groups_without_time_left_are_listed(tiny_case):
    measured, _ = measure(operators.groups(Options(), compiled=False), Options(seconds=0.0))
    assert {r.status for r in measured} == {"out of time"}
    assert len(tables.refused_lines(measured)) == 2  # eager and ours, with the number of measurements


def test_overhead_is_timed_for_functions_and_modules():
    measured, _ = measure(overhead.groups(Options()), malloc="default")
    assert {(r.api, r.mode, r.contender, r.status) for r in measured} == {
        (api, mode, contender, "ok")
        for api in ("functional", "module")
        for mode in ("training", "inference")
        for contender in ("eager", "ours")
    }
    assert len(tables.overhead_lines(measured)) == 4


def test_the_driver_runs_workers_and_writes(monkeypatch, tmp_path, capsys):
    """The real thing, in processes of its own, on the smallest part that there is."""
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
        monkeypatch.delenv(name)  # it would tell the worker's pytest that it shares the machine and must not measure
    code = driver.main(["--quick", "--filter", "overhead batch_norm_relu", "--save", "tiny", "--threads", "1"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    published = tmp_path / "published"
    assert (tmp_path / "report.html").read_text().count("batch_norm_relu") > 4
    assert {p.name for p in published.iterdir()} == {"tiny.csv", "tiny.json", "tiny.png"}
    found, _ = rows.from_json((published / "tiny.json").read_text())
    assert {(r.suite, r.malloc, r.threads, r.status) for r in found} == {
        ("overhead", "default", 1, "ok"),
        ("bandwidth", "none", 1, "ok"),
    }
    assert {r.operator for r in found if r.suite == "bandwidth"} >= {"read", "write", "copy", "add"}
    assert "A call on a kilobyte" in printed.out
    assert report.main([str(published / "tiny.json"), "--markdown"]) == 0
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


def full_disk(self, data):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_one_line_and_leaves_no_broken_file(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.setattr(driver, "run", lambda options, settings, scratch, seconds: (some_rows(), []))
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    assert driver.main(["--quick"]) == 1
    printed = capsys.readouterr()
    assert_one_line(printed.err, "No space left on device")
    assert "Times as fast as eager" in printed.out  # what was measured is shown all the same
    assert list(tmp_path.iterdir()) == []


def test_a_results_folder_that_cannot_be_made_is_one_line(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "file")
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


NO_COMPILER = """
import sys
import torch
from benchmarks import operators
from benchmarks.groups import Contender, Unavailable
from cnnkern.testing import CASES, Layer
drawn = operators.Drawn(CASES["bn_act"], Layer((2, 8, 4, 4)), torch.float32, "train relu", "cpu")
bench = operators.OperatorBench(drawn, training=False)
try:
    bench.step(Contender("torch.compile", "contiguous"), verify=True)
except Unavailable as error:
    print(error)
"""


def test_without_a_compiler_torch_compile_is_not_available(tmp_path):
    environment = machine.malloc_environment("default") | {
        "CXX": "/nonexistent/c++",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    command = [sys.executable, "-c", NO_COMPILER]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert "compiler" in done.stdout


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


def test_commit_outside_git_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.commit() == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
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


def test_accuracy_is_ours_against_float64(monkeypatch):
    monkeypatch.setattr(accuracy, "SHAPE", (4, 3, 8, 8))
    monkeypatch.setattr(torch, "compile", lambda function: function)  # what is compiled is another test's matter
    found = accuracy.errors(testing.CASES["bn_act"], "mean of 1e4 deviations")
    assert list(found) == ["ours", "eager", "torch.compile"]
    assert found["torch.compile"] == found["eager"]
    assert max(found["ours"]) < 1e-6 < max(found["eager"])


def test_sweeps_count_every_tensor_once(monkeypatch, capsys):
    monkeypatch.setattr(sweeps, "SHAPES", ((2, 8, 16, 16),))
    monkeypatch.setattr(sweeps, "MINIMUM_BYTES", 2**16)
    monkeypatch.setattr(cnnkern, "tune_malloc", lambda: "malloc left alone")
    clock = {name: [2e-6] for name in sweeps.steps((2, 8, 16, 16), "contiguous", torch.float32, False)}
    monkeypatch.setattr(sweeps.timing, "interleave", lambda steps, **limits: {name: clock[name] for name in steps})
    assert sweeps.main(["--threads", str(torch.get_num_threads())]) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "2x8x16x16" in line]
    assert [line[3] for line in lines[:4]] == ["0.002"] * 4
    # 16 KiB a tensor in two microseconds
    assert [float(line[4].rstrip(" |")) for line in lines[:4]] == [16.4, 16.4, 16.4, 24.6]

    threads = ["--threads", str(torch.get_num_threads())]
    assert sweeps.main([*threads, "--dtype", "bfloat16", "--cached"]) == 0  # one image, of half the bytes
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "1x8x16x16" in line]
    assert [float(line[4].rstrip(" |")) for line in lines[:4]] == [4.1, 4.1, 4.1, 6.1]


def test_passes_print_a_row_a_layer_and_the_lost_ones(monkeypatch, capsys):
    layer = testing.CASES["grouped_conv2d"].bench_layers["mobilenet_v2"][0]
    monkeypatch.setattr(passes, "layers", lambda batch: [Layer((1, 8, 6, 6), layer.arguments)])
    monkeypatch.setattr(passes, "matrix_gflops", lambda: 100.0)
    clock = {key: [2e-3 if key[0] == "eager" else 1e-3] for key in itertools.product(("eager", "ours"), passes.PASSES)}
    clock["ours", "dx"] = [4e-3]
    monkeypatch.setattr(passes.timing, "interleave", lambda steps, **limits: {key: clock[key] for key in steps})
    assert passes.main(["--threads", str(torch.get_num_threads())]) == 0
    out = capsys.readouterr().out
    assert "| depthwise 3x3 | contiguous | 1 | 2.00x | 2.00x |" in out
    assert "dx: 0.50x" in out
    assert "2.00, 1.00, 2.00x" in out


def test_onednn_tells_what_it_chose(monkeypatch, capfd):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch was built without oneDNN")
    layer = testing.CASES["grouped_conv2d"].bench_layers["mobilenet_v2"][0]
    monkeypatch.setattr(onednn, "layers", lambda batch: [Layer((batch, 8, 20, 20), layer.arguments)])
    assert onednn.main(["--batch", "2", "--threads", str(torch.get_num_threads())]) == 0
    _, _, *lines = capfd.readouterr().out.splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines]
    assert [row[1:3] for row in rows] == [[a, b] for a in ("channels_last", "contiguous") for b in onednn.PASSES]
    assert all(row[0] == "depthwise 3x3" and row[3].endswith(" (1)") for row in rows)


def test_an_account_of_onednn_adds_up():
    line = "onednn_verbose,v1,primitive,exec,cpu,{},{},forward,a:b,attr-x:y,,16x8x4x4,{}"
    account = onednn.Account()
    account.add("\n".join([line.format("reorder", "jit:uni", 1.5), line.format("convolution", "jit:avx512_core", 2.0)]))
    account.add(line.format("convolution", "jit:avx512_core", 0.5))
    account.add("onednn_verbose,v1,info,cpu,runtime:OpenMP,nthr:2")
    assert account == onednn.Account({"jit:avx512_core": 2, "not oneDNN": 1}, 2.5, 1.5)
