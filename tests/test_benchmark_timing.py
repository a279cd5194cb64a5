"""The basis of the benchmarks' figures: rounds and ratios, pytest-benchmark's samples, the machine's bandwidth."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks.suite import bandwidth, timing
from benchmarks.suite.bandwidth import Bandwidth

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


def test_few_rounds_do_where_all_time_is_over(clock):
    def step():
        clock.now += 1.0

    for stop, rounds in ((0.0, timing.FEWEST), (5.5, 5), (1e9, 8)):
        clock.now = 0.0
        samples = timing.interleave({"a": step}, deadline=0.0, min_rounds=8, max_rounds=20, stop=stop)
        assert len(samples["a"]) == rounds, stop


def test_short_steps_are_called_several_times_a_sample(clock):
    calls = []

    def step():
        calls.append(None)
        clock.now += 1e-4

    samples = timing.interleave({"a": step}, deadline=0.0, min_rounds=4, max_rounds=4)
    assert samples["a"] == pytest.approx([1e-4] * 4)
    assert len(calls) == 2 + 4 * 10


def test_a_pause_and_a_call_that_is_not_timed_come_before_each_sample(clock, monkeypatch):
    slept, calls = [], []
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: slept.append((seconds, len(calls))), raising=False)

    def step():
        calls.append(None)
        clock.now += 1.0 if slept and slept[-1][1] == len(calls) - 1 else 0.25  # slow just after a pause

    samples = timing.interleave({"a": step}, deadline=0.0, min_rounds=3, max_rounds=3, pause=0.5)
    assert samples == {"a": [0.25] * 3}
    assert [seconds for seconds, _ in slept] == [0.5] * 3


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_keeps_what_its_graph_reads():
    def capture():
        x, out = torch.full((2**23,), 2.0, device="cuda"), torch.zeros(1, device="cuda")
        return timing.captured(lambda: out.copy_(x.mean())), out

    replay, out = capture()
    torch.cuda.empty_cache()  # takes from the graph what nobody else holds, as the capture of the next contender does
    out.zero_()
    replay()
    assert out.item() == 2.0
