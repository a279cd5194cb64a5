"""Each contender of each group as a benchmark of pytest-benchmark, with samples from interleaved rounds."""

import pytest

from .groups import Refused
from .timing import ReplayClock

CLOCK = ReplayClock()


@pytest.mark.filterwarnings("default")  # the compiler's own warnings are no failure of a measurement
@pytest.mark.benchmark(timer=CLOCK)
def test_contender(benchmark, bench_session, group, contender):
    result = bench_session.results_of(group)[contender]
    if isinstance(result, Refused):
        message = f"{result.status}: {result.note}"
        if result.status in ("wrong", "failed"):
            pytest.fail(f"{group.name_of(contender)}: {message}", pytrace=False)
        pytest.skip(message)  # the same for many, which pytest then counts
    benchmark.group = group.label
    benchmark.extra_info.update(group.identity(contender) | bench_session.conditions[contender])
    CLOCK.replay(benchmark, result)
