"""Shared by the tests of `cnnkern train`: options of runs in which rounding does not grow, a run's losses, an error's
line."""

import csv
from pathlib import Path

import torch

from cnnkern import train

# A learning rate at which rounding does not grow from step to step; without momentum.
CALM = ["res_lenet", "--resize", "16", "--optimizer", "sgd", "--momentum", "0", "--lr", "0.01", "--output"]


def rows(path: Path) -> list[dict[str, float]]:
    with path.open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def losses(folder: Path) -> torch.Tensor:
    return torch.tensor([row["loss"] for row in rows(folder / "steps.csv")], dtype=torch.float64)


def error_of(capsys, *arguments: str) -> str:
    """The line with which the command ends."""
    assert train.main(list(arguments)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line
