"""The benchmark suite from plan to rows and files: what is chosen, judged before it is timed, and said of failures."""

import itertools
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as driver
from benchmarks.show import remarks, tables
from benchmarks.suite import files, judge, machine, operators, overhead
from benchmarks.suite.groups import AGAIN, MAX_AUTOTUNE, OUT_OF_PLACE, Contender, Group, Unavailable, select
from benchmarks.suite.options import Options
from cnnkern import testing
from cnnkern.testing import Layer
from tests.child import run_child
from tests.results import measure

ROOT = Path(__file__).resolve().parent.parent


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
    layers = {"toy": (Layer((2, 3, 5, 7)), Layer((2, 8, 4, 4)))}
    case = replace(testing.CASES["bn_act"], bench_layers=layers, bench_forms={})
    monkeypatch.setattr(testing, "CASES", {"bn_act": case})
    return case


def test_plan_has_both_layouts_and_both_modes(tiny_case):
    plan = operators.groups(Options(), compiled=True)
    assert [(g.shape, g.mode) for g in plan] == [
        (shape, mode) for shape in ("2x3x5x7", "2x8x4x4") for mode in ("training", "inference")
    ]
    assert {c for g in plan for c in g.contenders} == {
        Contender(name, layout)
        for name in ("eager", AGAIN, "cnnkern", "torch.compile")
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


def test_other_forms_of_the_reference_are_contenders():
    """Out of place, where eager is in place as networks have it; the layer norm written out, which torch.compile makes
    something else of."""
    names: dict[str, set[str]] = {}
    for group in operators.groups(Options(), compiled=True):
        names.setdefault(group.operator, set()).update(c.name for c in group.contenders)
    assert {n for n, contenders in names.items() if OUT_OF_PLACE in contenders} == {"bn_act", "bn_add_act", "add_relu"}
    assert {n for n, contenders in names.items() if "written out" in contenders} == {"layer_norm2d"}
    compiled = {c for contenders in names.values() for c in contenders if c.startswith("torch.compile")}
    assert compiled == {"torch.compile", "torch.compile, written out"}


def test_in_place_is_the_reference_bit_for_bit(generator):
    for case in (testing.CASES[n] for n in ("bn_act", "bn_add_act", "add_relu")):
        for variant in case.variants.values():
            inputs = case.inputs((3, 8, 5, 5), generator=generator, **variant)
            dy = testing.randn((3, 8, 5, 5), generator, torch.float32)
            plain = testing.run(case.reference, case, inputs, dy)
            for name, value in testing.run(case.bench_forms["in place"], case, inputs, dy).items():
                # In place PyTorch computes ELU's gradient from its result.
                near = {"rtol": 1e-5, "atol": 1e-6} if inputs.get("act") == "elu" else {"rtol": 0, "atol": 0}
                torch.testing.assert_close(value, plain[name], msg=f"{case.name} {variant} {name}", **near)


def test_all_modes_time_the_halves_of_a_training_step(tiny_case):
    options = Options(modes="all", seconds=60.0, filter="2x8x4x4", max_autotune=True, compile_seconds=0.0)
    plan = select(operators.groups(options, compiled=True), options.filter, "tuned")
    assert [g.mode for g in plan] == ["training", "inference", "forward", "backward"]
    assert {c.name for c in plan[0].contenders} == {"eager", AGAIN, "cnnkern", "torch.compile", MAX_AUTOTUNE}
    moved = {g.mode: (g.bytes_read, g.bytes_written) for g in plan}
    assert moved["forward"] == moved["inference"]
    assert moved["training"] == tuple(a + b for a, b in zip(moved["forward"], moved["backward"], strict=True))
    measured, _ = measure(plan, options)
    assert {(r.mode, r.status) for r in measured if r.contender in ("eager", "cnnkern")} == {
        (g.mode, "ok") for g in plan
    }, remarks.refused_lines(measured)
    assert {r.status for r in measured if r.contender == MAX_AUTOTUNE} == {"out of time"}


def test_a_half_does_what_it_says(tiny_case, monkeypatch):
    calls = []

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            calls.append("forward")
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            calls.append("backward")
            return 2 * dy

    inputs, dy = {"input": torch.ones(3)}, torch.ones(3)
    case = replace(tiny_case, differentiable=("input",), mutated=())
    expected = {"forward": ["forward"] * 2, "backward": ["backward"] * 2, "training": ["forward", "backward"] * 2}
    for mode, called in expected.items():
        step = operators.timed(lambda input: Twice.apply(input), case, inputs, dy, mode)
        calls.clear()
        step()
        step()
        assert calls == called


def test_filter_keeps_the_baseline_of_what_it_finds(tiny_case):
    plan = operators.groups(Options(), compiled=True)
    (group, *others) = select(plan, "toy 2x3x5x7 TRAINING functional channels_last cnnkern", "tuned")
    assert not others
    assert set(group.contenders) == {Contender(name, "channels_last") for name in ("cnnkern", "eager", AGAIN)}
    assert len(select(plan, "default malloc", "default")) == len(plan)
    assert select(plan, "default malloc", "tuned") == []
    assert len(select(plan, "default malloc, toy", "tuned")) == len(plan)
    assert {g.shape for g in select(plan, "torch.compile", "tuned")} == {"2x8x4x4"}


def test_quick_run_on_a_tiny_case_from_plan_to_files(tiny_case, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "RESULTS", tmp_path)
    options = Options(quick=True, filter="toy", seconds=60.0)
    plan = select(operators.groups(options, compiled=True), options.filter, "tuned")
    measured, events = measure(plan, options)
    assert {r.status for r in measured} == {"ok"}, remarks.refused_lines(measured)
    assert len(measured) == 2 * 2 * 2 * 2  # shapes, modes, layouts, contenders
    assert [e["start"] for e in events if "start" in e] == [g.label for g in plan]
    for row in measured:
        assert row.rounds >= 5
        assert 0 < row.min_ms <= row.median_ms
        assert row.gb_s == pytest.approx(row.bytes / row.median_ms / 1e6)
        assert row.bandwidth_share == pytest.approx(row.gb_s / 10.0)  # every measured bandwidth is 10 GB/s
        assert row.ratio > 0
        assert row.noise >= 0
        assert row.others >= 0
        assert row.lost == (row.contender == "cnnkern" and row.counts and row.ratio < 1)

    assert driver.write(measured, "today", tmp_path, None, quick=True) == []
    stem = f"some-machine_1threads_torch-{torch.__version__}_float32_channels_last+contiguous_tuned-malloc"
    stem += "_abc1234-dirty_quick"
    assert {p.name for p in tmp_path.iterdir()} == {f"{stem}.csv", "report.html"}
    kept = files.load(tmp_path / f"{stem}.csv")
    assert (kept.created, kept.quick, len(kept.rows)) == ("today", True, len(measured))
    assert [r.median_ms for r in kept.rows] == pytest.approx([r.median_ms for r in measured], rel=1e-3)


def test_a_wrong_contender_is_reported_and_not_timed(monkeypatch, tiny_case):
    wrong = replace(tiny_case, function=lambda *args, **kwargs: tiny_case.function(*args, **kwargs) + 1e-3)
    monkeypatch.setattr(testing, "CASES", {"bn_act": wrong})
    plan = select(operators.groups(Options(), compiled=False), "2x8x4x4", "tuned")
    measured, events = measure(plan)
    ours = [r for r in measured if r.contender == "cnnkern"]
    assert {(r.status, r.median_ms, r.rounds) for r in ours} == {("wrong", None, 0)}
    assert all("output: error" in r.note for r in ours)
    assert {r.status for r in measured if r.contender == "eager"} == {"ok"}
    assert not any("cnnkern" in e["verified"] for e in events if "verified" in e)
    (line,) = {re.sub(r"error .*", "", line) for line in remarks.refused_lines(measured)}
    assert line.startswith("cnnkern wrong: output: ")


def test_verified_contenders_are_not_compared_again(monkeypatch, tiny_case):
    plan = operators.groups(Options(), compiled=False)[:1]
    names = tuple(plan[0].name_of(c) for c in plan[0].contenders)

    def compare(*args):
        raise AssertionError("compared")

    monkeypatch.setattr(operators, "assert_as_good_as", compare)
    measured, _ = measure(plan, Options(seconds=60.0, verified=names))
    assert {r.status for r in measured} == {"ok"}
    measured, _ = measure(plan, Options(seconds=60.0))
    assert {r.note for r in measured if r.contender == "cnnkern"} == {"compared"}


class Failing:
    def __init__(self, error):
        self.error = error

    def step(self, contender, verify):
        raise self.error


class Endless:
    def step(self, contender, verify):
        while True:
            time.sleep(0.01)


def test_a_compilation_that_does_not_end_is_out_of_time():
    contender = Contender(MAX_AUTOTUNE, "contiguous")
    compiled = frozenset({MAX_AUTOTUNE})
    plan = [
        Group("models", "m", "m", "1", "training", "module", (contender,), Endless, 1.0, compiled=compiled)
        for _ in range(2)
    ]
    measured, _ = measure(plan, Options(seconds=60.0, compile_seconds=0.25))
    assert [(r.status, r.note) for r in measured] == [
        ("out of time", "not compiled within the 0 s left of 0 for torch.compile"),
        ("out of time", "the 0 s for torch.compile were spent"),
    ]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("error", "status", "note"),
    [
        (Unavailable("no compiler"), "not available", "no compiler"),
        (RuntimeError("first line\nsecond"), "failed", "RuntimeError: first line"),
        (ZeroDivisionError(), "failed", "ZeroDivisionError: ZeroDivisionError"),
    ],
)
def test_what_fails_is_a_row_with_one_line(error, status, note, capsys):
    contender = Contender("cnnkern", "contiguous")
    plan = [Group("models", "m", "m", "1", "training", "module", (contender,), lambda: Failing(error), 1.0)]
    (row,), _ = measure(plan)
    assert (row.status, row.note) == (status, note)
    assert ("Traceback" in capsys.readouterr().err) == (status == "failed")  # the log keeps the whole of it


@pytest.mark.parametrize("when", ["opened", "timed"])
def test_a_group_that_fails_is_a_row_for_each_contender(when, capsys):
    calls = itertools.count()

    def fails(after=0):
        if next(calls) >= after:
            raise RuntimeError("no memory")

    class FailsWhenTimed:
        def step(self, contender, verify):
            return lambda: fails(after=3)  # as on a GPU, where an error shows some calls later

    contenders = (Contender("eager", "contiguous"), Contender("cnnkern", "contiguous"))
    bench = fails if when == "opened" else FailsWhenTimed
    plan = [Group("models", "m", "m", "1", "training", "module", contenders, bench, 1.0) for _ in range(2)]
    measured, events = measure(plan)
    assert [r.contender for r in measured] == ["eager", "cnnkern"] * 2
    assert {(r.status, r.note) for r in measured} == {("failed", "RuntimeError: no memory")}
    assert capsys.readouterr().err.count("Traceback") == 2  # a group is tried once
    assert not any("verified" in e for e in events)


def test_groups_without_time_left_are_listed(tiny_case):
    measured, _ = measure(operators.groups(Options(), compiled=False), Options(seconds=0.0))
    assert {r.status for r in measured} == {"out of time"}
    assert len(remarks.refused_lines(measured)) == 2  # eager and ours, with the number of measurements


def test_overhead_is_timed_for_functions_modules_and_converted_layers():
    measured, _ = measure(overhead.groups(Options()), malloc="default")
    assert {(r.api, r.mode, r.contender, r.status) for r in measured} == {
        (api, mode, contender, "ok")
        for api in ("functional", "module", "converted")
        for mode in ("training", "inference")
        for contender in ("eager", "cnnkern")
    }
    assert len(tables.overhead_lines(measured)) == 6


NO_COMPILER = """
import sys
import torch
from benchmarks.suite import operators
from benchmarks.suite.groups import Contender, Unavailable
from cnnkern.testing import CASES, Layer
drawn = operators.Drawn(CASES["bn_act"], Layer((2, 8, 4, 4)), torch.float32, "train relu", "cpu")
bench = operators.OperatorBench(drawn, "inference")
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
    done = run_child(command, cwd=ROOT, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert "compiler" in done.stdout
