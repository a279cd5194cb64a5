"""The plan as pytest parameters. The driver passes its options in a file, and reads progress from a pipe."""

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

import cnnkern
from benchmarks import machine
from benchmarks.groups import Session
from benchmarks.options import Options
from benchmarks.plan import make_plan


def pytest_addoption(parser):
    group = parser.getgroup("cnnkern benchmarks")
    group.addoption("--bench-options", help="file with the JSON of benchmarks.options.Options")
    group.addoption("--bench-events", type=int, help="file descriptor that takes one line of JSON for each event")


def pytest_configure(config):
    path = config.getoption("--bench-options")
    config.bench_options = Options.load(path) if path else Options()
    config.bench_plan = make_plan(config.bench_options, machine.malloc_setting())
    torch.set_num_threads(config.bench_options.threads)
    if config.bench_options.device == "cuda":
        cnnkern.backend(config.bench_options.backend)


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
