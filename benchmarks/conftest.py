"""The plan as pytest parameters: `python -m pytest benchmarks`, with pytest-benchmark's options and those below.

The driver passes its options in a file instead, and reads progress from a pipe.
"""

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

import cnnkern

from .suite import machine
from .suite.groups import Session
from .suite.options import Options
from .suite.plan import make_plan

FIELDS = ("seconds", "threads", "dtype", "filter", "networks")  # of Options, that are options of pytest
SETTINGS = {"networks": ("resnet50", "all"), "dtype": ("float32", "bfloat16", "float16", "float64")}


def pytest_addoption(parser):
    group, default = parser.getgroup("cnnkern benchmarks"), Options()
    helps = {
        "seconds": "for everything; what comes later is skipped",
        "threads": "of PyTorch",
        "dtype": "of operators; bfloat16 also of models",
        "filter": "TEXT[,TEXT]: only what has TEXT, or one of several, in its name",
        "networks": "whose shapes: resnet50, or all",
    }
    for field in FIELDS:
        value = getattr(default, field)
        group.addoption(
            f"--bench-{field}",
            type=type(value),
            choices=SETTINGS.get(field),
            help=f"{helps[field]} (default: {value or 'everything'})",
        )
    group.addoption("--bench-options", help="file with the JSON of Options, instead of the others")
    group.addoption("--bench-events", type=int, help="file descriptor that takes one line of JSON for each event")


def pytest_configure(config):
    path = config.getoption("--bench-options")
    given = {field: config.getoption(f"--bench-{field}") for field in FIELDS}
    chosen = {field: value for field, value in given.items() if value is not None}
    if path and chosen:
        raise pytest.UsageError(f"--bench-options has the place of --bench-{next(iter(chosen))}: give one of them")
    config.bench_options = Options.load(path) if path else Options(**chosen)
    config.bench_plan = make_plan(config.bench_options, machine.malloc_setting())
    if not config.bench_plan:
        raise pytest.UsageError(f"--bench-filter: no row has {config.bench_options.filter!r} in its name")
    torch.set_num_threads(config.bench_options.threads)
    if config.bench_options.device == "cuda":
        cnnkern.backend(config.bench_options.backend)


def pytest_terminal_summary(terminalreporter, config):
    """How many contenders were not timed for want of time: single reasons stand in a list of hundreds, or nowhere."""
    skipped = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", ())]
    count = sum("out of time" in reason for reason in skipped)
    if count:
        seconds = config.bench_options.seconds
        terminalreporter.write_line(
            f"{count} contenders were not timed: the {seconds:.0f} s for all of them were spent, or those for "
            "torch.compile; --bench-seconds gives more"
        )


def pytest_generate_tests(metafunc):
    if "contender" in metafunc.fixturenames:
        pairs = [(group, contender) for group in metafunc.config.bench_plan for contender in group.contenders]
        metafunc.parametrize(("group", "contender"), pairs, ids=[group.name_of(c) for group, c in pairs])


def _emitter(descriptor: int | None) -> Callable[[dict[str, Any]], None]:
    if descriptor is None:
        return lambda event: None
    os.set_inheritable(descriptor, False)  # a compiler that outlives this process would hold the pipe open
    stream = os.fdopen(descriptor, "w", buffering=1)
    return lambda event: print(json.dumps(event), file=stream)


@pytest.fixture(scope="session")
def bench_session(request):
    config = request.config
    return Session(config.bench_plan, config.bench_options, _emitter(config.getoption("--bench-events")))
