"""The curves of a training run as tables and as a picture."""

import csv
import io
from pathlib import Path

from cnnkern.checkpoint import write_atomically


def write(folder: Path, history: list[dict[str, float]], losses: list[float]) -> None:
    """Writes epochs.csv and curves.png from the rows of ``history``, and steps.csv from the loss of every step."""
    _table(folder / "epochs.csv", list(history[0]), [list(row.values()) for row in history])
    _table(folder / "steps.csv", ["step", "loss"], list(enumerate(losses, start=1)))

    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    per_epoch = len(losses) / len(history)
    left.plot([(i + 1) / per_epoch for i in range(len(losses))], losses, color="0.8", label="training, each step")
    left.plot(epochs, [row["loss"] for row in history], marker=".", label="training")
    left.plot(epochs, [row["test_loss"] for row in history], marker=".", label="test")
    left.set(xlabel="epoch", ylabel="cross entropy", yscale="log")
    right.plot(epochs, [100 * row["accuracy"] for row in history], marker=".", label="training")
    right.plot(epochs, [100 * row["test_accuracy"] for row in history], marker=".", label="test")
    right.set(xlabel="epoch", ylabel="accuracy, %")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    write_atomically(folder / "curves.png", lambda file: figure.savefig(file, format="png", dpi=120))


def _table(path: Path, columns: list[str], rows: list) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([columns, *rows])
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))
