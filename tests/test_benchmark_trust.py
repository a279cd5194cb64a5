"""Which rows of a benchmark count: the noise of a ratio, a busy machine, the time that whole models are left."""

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.show import figures, means, remarks, tables
from benchmarks.studies import disturbed
from benchmarks.suite import groups, load, reasons, rows, timing
from benchmarks.suite.groups import AGAIN, Contender, Group
from benchmarks.suite.options import Options
from benchmarks.suite.plan import make_plan
from tests.results import measure, row
from tests.test_breakdown import timed

RECORDED = Path(__file__).parent / "data" / "noisy_rounds.json"


@pytest.mark.parametrize(
    ("count", "first", "last"), [(1, 0, 0), (5, 0, 4), (6, 0, 5), (8, 0, 7), (9, 1, 7), (12, 2, 9), (20, 5, 14)]
)
def test_the_interval_of_a_ratio_is_one_of_order_statistics(count, first, last):
    ratios = random.Random(count).sample(range(1, 100), count)
    ordered = sorted(ratios)
    assert timing.ratio_interval(ratios, [1.0] * count) == (ordered[first], ordered[last])


def test_the_interval_holds_the_median_as_often_as_it_says():
    draw = random.Random(0)
    held = 0
    for _ in range(1000):
        low, high = timing.ratio_interval([draw.lognormvariate(0, 0.5) for _ in range(15)], [1.0] * 15)
        held += low <= 1.0 <= high
    assert held >= 940


def of_rounds(**rounds: list[float]) -> dict[str, rows.Row]:
    """Rows by contender; `again` is eager's second timing."""
    names = {"again": AGAIN}
    found = timed({"eager": 1.0, "cnnkern": 1.0})  # what is the same of all
    what = {n: getattr(found[0], n) for n in (*rows.TOGETHER, "dtype")} | {"bytes_read": 0, "bytes_written": 0}
    records = [
        {"extra_info": what | {"contender": names.get(name, name)}, "stats": {"data": samples}}
        for name, samples in rounds.items()
    ]
    where = {
        n: getattr(found[0], n)
        for n in ("machine", "device", "cpu_capability", "threads", "torch", "cnnkern", "commit")
    }
    return {r.contender: r for r in rows.from_records(records, [], [], "tuned", where)}


def test_noise_is_the_wider_of_the_row_s_own_and_of_eager_against_itself():
    quiet = of_rounds(eager=[1.0] * 5, again=[1.0] * 5, cnnkern=[0.5] * 5)
    assert set(quiet) == {"eager", "cnnkern"}, "eager's second timing is no row"
    assert quiet["cnnkern"].noise == 0
    own = of_rounds(eager=[1.0] * 5, again=[1.0] * 5, cnnkern=[0.4, 0.5, 0.5, 0.5, 0.625])
    assert own["cnnkern"].noise == pytest.approx(1.25**0.5 * 1.25**0.5 - 1, rel=0.01)
    floor = of_rounds(eager=[1.0] * 5, again=[1.0, 1.0, 1.0, 1.0, 0.5], cnnkern=[0.5] * 5)
    assert floor["cnnkern"].noise == floor["eager"].noise == pytest.approx(1.0)
    assert of_rounds(eager=[1.0], cnnkern=[0.5])["cnnkern"].noise is None


@pytest.mark.parametrize(
    ("ratio", "noise", "counts"),
    [
        (1.0, 0.02, True),  # as fast as eager is a result
        (1.05, 0.09, True),
        (1.1, 0.2, False),
        (0.5, 0.2, True),
        (3.0, 0.2, True),
        (3.0, 0.3, False),  # beyond that nothing is believed
        (100.0, 3.0, False),
        (1.5, None, True),  # not known, of rows from before
        (None, None, False),
    ],
)
def test_a_row_counts_where_noise_leaves_something_of_its_ratio(ratio, noise, counts):
    ours = replace(row()[1], ratio=ratio, noise=noise)
    assert ours.counts == counts
    assert ours.lost == (counts and ratio < 1)


@pytest.mark.parametrize(
    ("threads", "others", "device", "crowded"),
    [
        (2, 0.1, "cpu", False),
        (2, 0.9, "cpu", True),  # the rounds may agree, each of them waiting for a core
        (1, 0.9, "cpu", False),  # one thread waits for nobody
        (3, 0.9, "cpu", False),
        (3, 1.5, "cpu", True),
        (2, None, "cpu", False),
        (2, 1.9, "cuda", False),
    ],
)
def test_several_threads_beside_others_do_not_count(threads, others, device, crowded):
    cores = 4 if threads == 3 else 2
    ours = replace(row()[1], threads=threads, others=others, device=device, cores=cores, ratio=1000.0, noise=0.0)
    assert ours.is_crowded == crowded
    assert ours.counts != crowded
    assert figures.to_eager(ours) == "1000.00x" + " crowded" * crowded
    assert (
        remarks.noisy_lines([ours])
        == [f"bn_act net 2x2 training contiguous tuned malloc: 1000.00x within 0%, beside {others} busy cores"]
        * crowded
    )


def test_what_does_not_count_is_in_no_mean_and_no_list_but_is_counted():
    good, bad = row(seconds=1e-3), row(seconds=8e-3, shape="4x4")
    bad = [replace(r, noise=0.9, ratio_to_compile=0.5) for r in bad]
    found = good + bad
    (mean,) = (m for m in means.means(found) if m.contender == "cnnkern")
    assert (mean.shapes, mean.counted, mean.ratio) == (2, 1, pytest.approx(2.0))
    assert means.ranked(found) == [good[1]]
    assert remarks.lost_lines(found) == remarks.lost_to_compile(found) == []
    assert remarks.verdict(found).endswith(
        "faster than eager in 1 of 1 rows; left out for noise or others on the machine: 1 rows"
    )
    assert remarks.noisy_lines(found) == ["bn_act net 4x4 training contiguous tuned malloc: 0.25x within 90%"]
    _, ((*_, cell),) = tables.summary(found, "tuned")
    assert cell.startswith("2.00x~ ")
    better = found + [replace(r, shape=shape) for r in good for shape in ("6x6", "8x8")]
    assert tables.summary(better, "tuned")[1][0][-1].startswith("2.00x ")
    assert tables.summary(bad, "tuned")[1][0][-1] == "noisy"
    assert remarks.verdict(bad) == "none of the 1 rows is clear of noise and of others on the machine"


def test_every_group_times_eager_twice():
    for group in make_plan(Options(networks="all"), "tuned") + make_plan(Options(), "default"):
        layouts = {c.layout for c in group.contenders}
        for name in ("eager", AGAIN):
            assert {c.layout for c in group.contenders if c.name == name} == layouts, group.label


@pytest.mark.parametrize("options", [Options(), Options(quick=True)])
def test_a_run_ends_with_whole_models(options):
    plan = make_plan(options, "tuned")
    assert [g.suite for g in plan if g.last] == ["models"] * sum(g.suite == "models" for g in plan)
    assert plan[-1].last
    assert [g.last for g in plan] == sorted(g.last for g in plan)


def test_what_comes_last_is_left_its_time(monkeypatch):
    """On a machine three times as slow as planned, operators would take all of it."""
    now = [0.0]
    monkeypatch.setattr(groups.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(groups.bandwidth, "copy_probe", lambda device: lambda: 1.0)

    class Slow:
        def __init__(self, seconds):
            self.seconds = seconds

        def step(self, contender, verify):
            def call():
                now[0] += self.seconds

            return call

    contenders = (Contender("eager", "contiguous"), Contender("cnnkern", "contiguous"))

    def group(suite, name, weight, last=False):
        bench = Slow(3 * weight / 14)  # seven rounds of two contenders, with the calls before them
        return Group(suite, "o", str(name), "1", "training", "module", contenders, lambda: bench, weight, last=last)

    plan = [group("operators", i, 2.0) for i in range(50)] + [group("models", i, 4.0, last=True) for i in range(3)]
    measured, _ = measure(plan, Options(seconds=60.0))
    statuses = {
        suite: [r.status for r in measured if r.suite == suite and r.contender == "cnnkern"]
        for suite in ("operators", "models")
    }
    assert statuses["models"] == ["ok"] * 3
    assert 0 < statuses["operators"].count("ok") < 50
    assert now[0] < 100
    measured, _ = measure(plan, Options(seconds=0.5))  # the first group alone takes more
    status = [r.status for r in measured if r.suite == "models" and r.contender == "cnnkern"]
    assert status == ["ok", *["out of time"] * 2]


def test_a_busy_machine_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(load, "PROC", tmp_path)
    assert load.before_a_run().startswith("whether the machine is busy is not known")
    (tmp_path / "pressure").mkdir()
    clock, states = itertools.count(), iter([(0, 0), (300, 500_000)])
    monkeypatch.setattr(load.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(load.os, "times", lambda: (0.0, 0.0, 0.0, 0.0, 0.0))
    monkeypatch.setattr(load.os, "sysconf", lambda name: 100)

    def sleep(seconds):
        ticks, waited = next(states)
        (tmp_path / "stat").write_text(f"cpu  {ticks // 3} 0 {ticks // 3} 7 8 0 0 {ticks // 3} 0 0\ncpu0 1\n")
        (tmp_path / "pressure" / "memory").write_text(f"some avg10=0.00 avg60=0.00 avg300=0.00 total={waited}\nfull\n")

    sleep(0)
    monkeypatch.setattr(load.time, "sleep", sleep)
    said = load.before_a_run()
    assert said.startswith("THE MACHINE IS BUSY: others keep 3.0 of ")
    assert "processes wait for memory 50% of the time" in said


def test_the_table_begins_with_what_the_machine_did():
    quiet = [replace(r, others=0.05) for r in row()]
    assert remarks.load_line(quiet) == "the machine was quiet: others kept at most 0.05 cores busy"
    assert remarks.load_line(row()) == "how busy the machine was is not known"
    busy = [replace(r, others=1.5) for r in row()]
    assert remarks.load_line(busy).startswith("THE MACHINE WAS BUSY: while 2 of 2 rows were timed")


def test_this_machine_says_what_it_does():
    watch = load.Watch()
    sum(range(10**6))
    others, _ = watch.rates()
    if Path("/proc/stat").exists():
        assert 0 <= others <= 1.5 * (torch.get_num_threads() + 64)


def test_a_mask_of_bool_is_found_in_what_inductor_generates():
    a, b = (torch.randn(64, requires_grad=True) for _ in range(2))
    step = torch.compile(lambda: torch.autograd.grad(torch.relu(a + b).sum(), (a, b)), backend="eager")
    assert "slow" in reasons.why_slow(step, step, "")
    compiled = torch.compile(lambda a, b: torch.relu(a + b), dynamic=False)
    _, code = reasons.compiling(lambda: torch.autograd.grad(compiled(a, b).sum(), (a, b)))
    assert reasons.MASK.search(code)
    with torch.no_grad():
        _, code = reasons.compiling(lambda: compiled(a, b))
    assert not reasons.MASK.search(code)


def test_loads_of_single_elements_are_found_in_what_inductor_generates():
    x = torch.randn(2, 4, 32, 32)
    with torch.no_grad():
        pooled = torch.compile(lambda: torch.nn.functional.max_pool2d(x, 3, 2, 1), dynamic=False)
        _, code = reasons.compiling(pooled)
        assert "loaded element by element" in reasons.why_slow(pooled, pooled, code)
        _, code = reasons.compiling(torch.compile(lambda: x.relu() + 1, dynamic=False))
    assert not reasons.SCATTERED.search(code)


def test_reasons_are_read_off_a_call():
    x = torch.randn(8, 16, 32, 32)

    def copies():
        return x.contiguous(memory_format=torch.channels_last)

    said = reasons.why_slow(copies, lambda: x.relu(), "kernel(const bool* in)")
    assert said.startswith("slow because ")
    assert "which eager does not make" in said
    assert "a tensor of bool" in said
    a = torch.randn(1024, 1024)
    assert reasons.why_slow(lambda: a @ a, lambda: a @ a, "") == "slow for none of the reasons that are looked for"
    assert "guards and wrappers" in reasons.why_slow(lambda: sum(range(10**6)), lambda: None, "")


def test_notes_of_slow_compilations_are_listed_once_a_reason():
    found = [
        replace(r, contender="torch.compile", note=f"slow because {n} us of a call", ratio=0.1 * n, shape=f"{n}")
        for n in (1, 2)
        for r in row()[1:]
    ]
    assert remarks.slow_compiles(found) == [
        "bn_act, training: 0.10x at worst, 2 rows, slow because 1 us of a call",
    ]


def recorded(which: str) -> list[dict]:
    return json.loads(RECORDED.read_text())[which]


@pytest.mark.parametrize("which", ["busy", "busier"])
def test_means_of_a_busy_machine_are_near_those_of_a_quiet_one_or_marked(which):
    """The judge on rounds that were recorded on two cores, at a load average of 8.5 and beside stress-ng as well; what
    they are held to are the published ratios of the same rows."""
    quiet: dict[tuple, list[float]] = {}
    for _, operator, _, _, mode, _, layout, ratio in recorded("quiet"):
        quiet.setdefault((operator, mode, layout), []).append(ratio)
    truth = {key: (timing.geometric_mean(ratios), len(ratios), len(ratios)) for key, ratios in quiet.items()}
    lines = list(disturbed.compare(truth, disturbed.means(recorded(which), threads=1)))
    assert len(lines) == len(truth) == 12
    assert all(holds for _, holds in lines), lines
    kept = sum(cells[-1] != "marked" for cells, _ in lines)
    assert kept >= {"busy": 4, "busier": 0}[which], lines


def test_without_the_judge_the_same_rounds_would_mislead(monkeypatch):
    monkeypatch.setattr(rows.Row, "counts", property(lambda self: self.ratio is not None))
    quiet = {(o, m, layout): ratio for _, o, _, _, m, _, layout, ratio in recorded("quiet")}
    found = disturbed.means(recorded("busier"), threads=1)
    assert max(abs(found[key][0] / quiet[key] - 1) for key in found) > 0.5
