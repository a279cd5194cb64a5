"""`cnnkern zoo compare NAME NAME ...`: trains models on the same images and draws them side by side."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cnnkern import train
from cnnkern.checkpoint import write_atomically
from cnnkern.models.registry import get_builder
from cnnkern.zoo import on_meta

FIGURE = "compare.png"
Rows = list[dict[str, float]]  # a row per epoch, as epochs.csv has it


def compare(names: Sequence[str], *, epochs: int, side: int, output: Path) -> int:
    """Trains each model on digits as `cnnkern train` does, into its folder in `output`, and draws one figure there.

    Images have the model's usual height and width, at most `side` pixels. Returns the exit status: that of the first
    training that failed, else 0.
    """
    curves: dict[str, Rows] = {}
    for name in names:
        folder, pixels = output / name, min(side, get_builder(name).input_size[-1])
        print(f"{name}, {pixels}x{pixels} pixels")
        options = ["--epochs", str(epochs), "--resize", str(pixels), "--output", str(folder), "--overwrite"]
        if status := train.main([name, *options]):
            return status
        curves[name] = read(folder / "epochs.csv")
    built = {name: on_meta(name, num_classes=10, in_channels=1) for name in names}
    parameters = {name: sum(p.numel() for p in model.parameters()) for name, model in built.items()}
    show(curves, parameters, Console(highlight=False))
    draw(curves, parameters, output / FIGURE)
    print(output / FIGURE)
    return 0


def read(path: Path) -> Rows:
    with path.open(newline="") as file:
        return [{column: float(value) for column, value in row.items()} for row in csv.DictReader(file)]


def show(curves: dict[str, Rows], parameters: dict[str, int], console: Console) -> None:
    """A line per model, of its last epoch."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("model", "parameters", "test loss", "test accuracy", "images/s"):
        table.add_column(title, justify="left" if title == "model" else "right")
    for name, rows in curves.items():
        last = rows[-1]
        accuracy, rate = f"{last['test_accuracy']:.2%}", f"{last['images_per_second']:.0f}"
        table.add_row(name, f"{parameters[name]:,}", f"{last['test_loss']:.4f}", accuracy, rate)
    console.print(table)


def draw(curves: dict[str, Rows], parameters: dict[str, int], path: Path) -> None:
    """Loss and accuracy on the test images by epoch, images per second in training, parameters."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    (loss, accuracy), (rate, size) = figure.subplots(2, 2)
    colours = {name: f"C{i % 10}" for i, name in enumerate(curves)}
    for name, rows in curves.items():
        epochs = [row["epoch"] for row in rows]
        loss.plot(epochs, [row["test_loss"] for row in rows], marker=".", color=colours[name], label=name)
        accuracy.plot(epochs, [100 * row["test_accuracy"] for row in rows], marker=".", color=colours[name], label=name)
    loss.set(xlabel="epoch", ylabel="test cross entropy", yscale="log")
    accuracy.set(xlabel="epoch", ylabel="test accuracy, %")
    accuracy.legend()
    rates = [max(row["images_per_second"] for row in rows) for rows in curves.values()]
    for axes, values, title in (
        (rate, rates, "training images per second"),
        (size, list(parameters.values()), "parameters"),
    ):
        bars = axes.barh(list(curves), values, color=list(colours.values()))
        axes.bar_label(bars, [f" {value:,.0f}" for value in values])
        axes.set(xlabel=title, xscale="log", xlim=(min(values) / 2, max(values) * 4))
        axes.invert_yaxis()
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))
