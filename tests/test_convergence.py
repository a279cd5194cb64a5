"""Fused training runs beside eager ones, step by step and in the end, and the accuracies of docs/training.md.

`CNNKERN_LEARNS=1 pytest tests/test_convergence.py -k learns` runs every command of that page's table, in about ten
minutes on one core.
"""

import os
import re
import shlex
from pathlib import Path

import pytest
import torch

from cnnkern import testing, train
from tests.training import CALM, losses, rows

pytestmark = pytest.mark.usefixtures("malloc_as_it_was")


@pytest.mark.slow
def test_fused_and_eager_runs_follow_each_other_in_float64(tmp_path):
    """Over 66 steps of a network with residuals."""
    assert train.main([*CALM, str(tmp_path / "fused"), "--epochs", "3", "--float64"]) == 0
    assert train.main([*CALM, str(tmp_path / "truth"), "--epochs", "3", "--float64", "--eager"]) == 0
    truth = losses(tmp_path / "truth")
    assert len(truth) == 66
    assert truth[-5:].mean() < 0.5 * truth[0]
    torch.testing.assert_close(losses(tmp_path / "fused"), truth, rtol=1e-9, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "size", "lr", "fall"),
    # Sigmoids have no kink, and rounding does not grow. Behind ReLU it does, by some orders of magnitude in these
    # steps: for the eager runs as well as for the fused one.
    [("bn_lenet", "28", "0.03", 0.5), ("simple_resnet", "8", "0.003", 0.1)],
)
def test_fused_and_eager_runs_follow_each_other_in_float32(tmp_path, model, size, lr, fall):
    """Over 51 steps: the fused run is as near to float64 as the farther of two eager runs that round otherwise."""
    options = [model, "--resize", size, "--lr", lr, "--batch-size", "28", "--epochs", "1"]
    options += ["--optimizer", "sgd", "--momentum", "0", "--output"]
    runs = {"fused": [], "eager": ["--eager"], "eager too": ["--eager", "--channels-last"]}
    for name, others in (runs | {"truth": ["--eager", "--float64"]}).items():
        assert train.main([*options, str(tmp_path / name), *others]) == 0
    truth = losses(tmp_path / "truth")
    assert len(truth) == 51
    assert truth[-5:].mean() < truth[:5].mean() - fall
    fused, *eager = (losses(tmp_path / name) for name in runs)
    farther = max(eager, key=lambda found: (found - truth).abs().max())
    testing.assert_as_good_as(*({"losses": found.float()} for found in (fused, farther)), {"losses": truth})


@pytest.mark.slow
def test_fused_and_eager_runs_reach_the_same_accuracy(tmp_path):
    options = ["res_lenet", "--resize", "16", "--epochs", "3", "--lr", "3e-3", "--schedule", "cosine", "--output"]
    assert train.main([*options, str(tmp_path / "fused")]) == 0
    assert train.main([*options, str(tmp_path / "eager"), "--eager"]) == 0
    fused, eager = (rows(tmp_path / name / "epochs.csv")[-1]["test_accuracy"] for name in ("fused", "eager"))
    assert min(fused, eager) > 0.93
    assert abs(fused - eager) <= 0.015


@pytest.mark.slow
def test_a_compiled_run_follows_an_eager_one(tmp_path):
    assert train.main([*CALM, str(tmp_path / "plain"), "--epochs", "1", "--float64"]) == 0
    assert train.main([*CALM, str(tmp_path / "compiled"), "--epochs", "1", "--float64", "--compile"]) == 0
    torch.testing.assert_close(losses(tmp_path / "compiled"), losses(tmp_path / "plain"), rtol=1e-7, atol=0)


PAGE = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
# Of each command in the page's table: the model, and its arguments.
COMMANDS = {command.split()[0]: shlex.split(command) for command in re.findall(r"\| `cnnkern train (.*?)` \|", PAGE)}
ACCURACY = dict.fromkeys(
    ("resnet18", "densenet_small", "regnet_x_tiny", "nin", "googlenet", "bn_lenet_residual"), 0.97
) | {"lenet_relu": 0.98}


def test_the_page_has_a_command_and_an_accuracy_for_every_model_that_has_to_learn():
    said = re.findall(r"\| `cnnkern train (\w+) .*?` \| ([\d.]+) % \|", PAGE)
    assert COMMANDS.keys() == ACCURACY.keys() == dict(said).keys()
    assert all(float(percent) / 100 >= ACCURACY[model] for model, percent in said)


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("CNNKERN_LEARNS") != "1", reason="takes minutes: CNNKERN_LEARNS=1 runs it")
@pytest.mark.parametrize("model", ACCURACY)
def test_it_learns(model, tmp_path):
    threads = torch.get_num_threads()
    try:
        assert train.main([*COMMANDS[model], "--threads", "1", "--output", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    assert rows(tmp_path / "epochs.csv")[-1]["test_accuracy"] >= ACCURACY[model]
