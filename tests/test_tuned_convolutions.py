"""`cnnkern tune` for convolutions that the built-in rule dispatches to a library that is slower here."""

import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import cnnkern
from cnnkern import backends, cli, functional
from cnnkern.measure import clock, tune
from cnnkern.ops import tuned
from tests.tuning import own_tables  # noqa: F401

GENERATOR = torch.Generator().manual_seed(0)
FORWARD, BACKWARD = "aten::convolution", "aten::convolution_backward"

pytestmark = pytest.mark.skipif(backends.extension is None, reason="the rule is the extension's")


def arguments(batch: int = 2, training: bool = False) -> tuple:
    """Groups of 16 channels on 7x7 pixels in channels_last, which conv_rule.h leaves to oneDNN, all of it."""
    x = torch.randn(batch, 32, 7, 7, generator=GENERATOR).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(32, 16, 3, 3, generator=GENERATOR)
    return x.requires_grad_(training), weight.requires_grad_(training), None, 1, 1, 1, 2


def step(batch: int = 2, training: bool = False) -> list[torch.Tensor]:
    given = arguments(batch, training)
    y = functional.conv2d(*given)
    return [y, *torch.autograd.grad(y, given[:2], torch.ones_like(y))] if training else [y]


def by_library(run) -> set[str]:
    """The passes that PyTorch's convolution computes."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    return {FORWARD, BACKWARD} & {event.name for event in seen.events()}


def call(batch: int = 2, training: bool = False) -> tuned.Call:
    found = []
    with tuned.using(lambda call: found.append(call)):
        step(batch, training)
    return found[0]


class SlowLibrary:
    """A timer by which each pass of PyTorch's convolution takes a second more."""

    def sample(self, step, calls):
        return clock.Sample(1.0 + len(by_library(step)))


MODEL = """
import torch
from torch import nn

def make():
    return nn.Conv2d(32, 32, 3, padding=1, groups=2, bias=False), torch.randn(2, 32, 7, 7)
"""


def test_a_planted_wrong_rule_is_put_right(monkeypatch, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(MODEL)
    monkeypatch.setattr(clock, "timer_for", lambda device: SlowLibrary())
    assert by_library(step) == {FORWARD}
    assert by_library(lambda: step(training=True)) == {FORWARD, BACKWARD}
    assert cli.main(["tune", f"{tmp_path}/mine.py:make", "--channels-last", "--seconds", "60"]) == 0
    said = capsys.readouterr().out
    assert "calls timed: 2, of which PyTorch's operators compute 0 faster" in said
    assert "cnnkern's kernels compute 2 that the built-in rule dispatched to PyTorch:" in said
    assert said.count(", on cnnkern's kernels") == 2
    assert by_library(step) == by_library(lambda: step(training=True)) == set()
    assert by_library(lambda: step(batch=3)) == set()  # of the same class of batches
    assert by_library(lambda: step(batch=4)) == {FORWARD}
    assert cli.main(["doctor"]) == 0
    assert "and cnnkern's kernels 2 that the built-in rule dispatches to PyTorch: " in capsys.readouterr().out
    monkeypatch.setenv("CNNKERN_TUNE", "0")
    tuned.load()
    assert by_library(step) == {FORWARD}


@pytest.mark.parametrize("training", [True, False])
def test_a_mode_that_was_not_tuned_stays_with_the_rule(training):
    with tuned.own_convolutions([call(training=training)]):
        assert by_library(step) == ({FORWARD} if training else set())
        assert by_library(lambda: step(training=True)) == {FORWARD if training else BACKWARD}
    assert by_library(lambda: step(training=True)) == {FORWARD, BACKWARD}


def test_our_kernels_results_are_right():
    torch.manual_seed(0)
    given = arguments(training=True)
    truth = [t.detach().double().requires_grad_() for t in given[:2]]
    expected = torch.nn.functional.conv2d(*truth, *given[2:])
    expected = [expected, *torch.autograd.grad(expected, truth, torch.ones_like(expected))]
    with tuned.own_convolutions([call(), call(training=True)]):
        y = functional.conv2d(*given)
        found = [y, *torch.autograd.grad(y, given[:2], torch.ones_like(y))]
    assert y.is_contiguous(memory_format=torch.channels_last)
    cnnkern.testing.assert_as_good_as(
        *(
            dict(zip("ydw", map(torch.Tensor.detach, tensors), strict=True))
            for tensors in (found, library(given), expected)
        )
    )


def library(given: tuple) -> list[torch.Tensor]:
    y = torch.nn.functional.conv2d(*given)
    return [y, *torch.autograd.grad(y, given[:2], torch.ones_like(y))]


def test_a_convolution_has_to_win_twice(monkeypatch):
    first, second = tuned.Measured(call(), 1.5, 0.01, True), tuned.Measured(call(), 1.2, 0.01, False)
    found = iter([first, second])
    monkeypatch.setattr(tune, "_measure", lambda *_: next(found))
    assert list(tune.measure([call()], "cpu", 1.0)) == [second]


def test_a_gain_within_chance_is_none():
    assert clock.Ratio(1.5, 0.1).is_beyond(1.02)
    assert not clock.Ratio(1.01, 0.001).is_beyond(1.02)
    assert not clock.Ratio(1.5, 0.4).is_beyond(1.02)


def test_all_of_a_class_have_to_win():
    ours, theirs = call(batch=2), call(batch=3)
    here = tuned.this_machine("cpu")
    tuned.save(here, [tuned.Measured(ours, 1.5, 0.01, True), tuned.Measured(theirs, 1.1, 0.01)])
    tuned.load()
    assert by_library(step) == {FORWARD}
    tuned.save(here, [tuned.Measured(ours, 1.5, 0.01, True), tuned.Measured(theirs, 1.1, 0.01, True)])
    tuned.load()
    assert by_library(step) == set()


def test_what_pytorch_computes_faster_still_is_not_ours():
    tuned.save(tuned.this_machine("cpu"), [tuned.Measured(call(), 0.8, 0.01, True)])
    tuned.load()
    assert by_library(step) == {FORWARD}


def test_a_table_of_before_has_none_and_counts():
    here = tuned.this_machine("cpu")
    path = tuned.save(here, [tuned.Measured(call(), 1.5, 0.01, True)])
    found = json.loads(path.read_text())
    for row in found["measured"]:
        del row["own"]
    path.write_text(json.dumps(found))
    assert tuned.read(path, here) == [tuned.Measured(call(), 1.5, 0.01, False)]
