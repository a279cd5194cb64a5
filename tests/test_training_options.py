"""The options of `cnnkern train` take effect: what the network computes with, seeds, data files, the progress bar."""

import functools
import io
import re

import pytest
import torch
from rich.console import Console
from torch._utils import ExceptionWrapper

from cnnkern import checkpoint as checkpoints
from cnnkern import cli, data, options, train, trainer
from tests.training import error_of, rows

pytestmark = pytest.mark.usefixtures("malloc_as_it_was")


def test_options_reach_the_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    options = ["--amp", "bf16", "--channels-last", "--compile", "--optimizer", "adamw", "--weight-decay", "0.01"]
    options += ["--schedule", "step", "--lr", "0.01", "--batch-size", "32", "--epochs", "3"]
    assert train.main([tiny, *options, "--output", str(tmp_path)]) == 0
    epochs = rows(tmp_path / "epochs.csv")
    assert epochs[-1]["test_accuracy"] > 0.8
    assert [row["learning_rate"] for row in epochs] == pytest.approx([1e-2, 1e-3, 1e-4])
    assert len(rows(tmp_path / "steps.csv")) == 3 * (1437 // 32)


PLAIN = {"logits": torch.float32, "parameters": torch.float32, "channels_last": False, "layers": "cnnkern.nn"}


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ([], {}),
        (["--amp", "bf16"], {"logits": torch.bfloat16}),
        (["--float64"], {"logits": torch.float64, "parameters": torch.float64}),
        (["--channels-last"], {"channels_last": True}),
        (["--eager"], {"layers": "cnnkern.models.unfused"}),
    ],
)
def test_what_the_network_computes_with(tiny, tmp_path, monkeypatch, options, changed):
    found = []
    build = train.Run._build

    def watched(run, fused):
        model = build(run, fused)

        def look(model, images, logits):
            found.append({"logits": logits.dtype, "parameters": model[0].weight.dtype})

        def look_between(layer, inputs, y):
            layouts = {
                t.is_contiguous(memory_format=torch.channels_last) for t in (*inputs, y, model[2].body[0].weight)
            }
            (channels_last,) = layouts
            package = type(layer).__module__
            package = "cnnkern.nn" if package.startswith("cnnkern.nn") else package
            found.append({"channels_last": channels_last, "layers": package})

        model.register_forward_hook(look)
        model[1].register_forward_hook(look_between)  # batch norm and ReLU
        return model

    monkeypatch.setattr(train.Run, "_build", watched)
    assert train.main([tiny, "--epochs", "1", "--batch-size", "700", *options, "--output", str(tmp_path)]) == 0
    assert len(found) == 2 * (1437 // 700 + 1)  # two steps, and the test images in one
    for between, whole in zip(found[::2], found[1::2], strict=True):
        assert between | whole == PLAIN | changed


def test_a_seed_repeats_bit_by_bit_and_another_differs(tiny, tmp_path):
    options = [tiny, "--epochs", "1", "--augment", "--output"]
    for name, seed in (("one", "7"), ("again", "7"), ("other", "8")):
        assert train.main([*options, str(tmp_path / name), "--seed", seed]) == 0
        torch.manual_seed(99)  # what stands in the global generator is of no influence
    one, again, other = (checkpoints.load(tmp_path / name / "checkpoint.pt") for name in ("one", "again", "other"))
    assert one["steps"] == again["steps"]
    assert all(torch.equal(again["state"][n], v) for n, v in one["state"].items())
    assert one["steps"][0] != other["steps"][0]
    assert not torch.equal(one["state"]["0.weight"], other["state"]["0.weight"])


def test_training_on_the_files_of_mnist_and_cifar(tiny, mnist, cifar, tmp_path):
    folder, _ = mnist  # and CIFAR-10's, beside them
    for name, channels, steps in (("mnist", 1, 3), ("fashion-mnist", 1, 3), ("cifar10", 3, 5)):
        options = ["--dataset", name, "--data-dir", str(folder), "--resize", "8", "--batch-size", "2", "--epochs", "2"]
        assert cli.main(["train", *options, tiny, "--output", str(tmp_path / f"run {name}")]) == 0
        checkpoint = checkpoints.load(tmp_path / f"run {name}" / "checkpoint.pt")
        assert checkpoint["arguments"] == {"num_classes": 10, "in_channels": channels, "fused": True}
        assert checkpoint["state"]["0.weight"].shape == (8, channels, 3, 3)
        assert len(rows(tmp_path / f"run {name}" / "steps.csv")) == 2 * steps


def test_damaged_data_files_are_one_line(tiny, mnist, cifar, tmp_path, capsys):
    folder, _ = mnist
    images = folder / "MNIST" / "raw" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:2000])
    (folder / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"damaged")
    out = ("--output", str(tmp_path / "run"))
    for name, expected in (("mnist", images), ("cifar10", folder / "cifar-10-batches-py" / "data_batch_1")):
        said = error_of(capsys, tiny, "--dataset", name, "--data-dir", str(folder), *out)
        assert said.startswith(f"cnnkern: {name}: the files in {folder} are missing or damaged (")
        assert f"expected: {expected}" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", range(3))
def test_no_option_takes_the_model(place):
    """Wherever MODEL is, and whatever is before it."""
    parser = options.make_parser()
    words = {"--output": "x", "--resize": "8", "--amp": "bf16", "--data-dir": "x", "--resume-from": "x", "--lr": "1"}
    words |= {"--threads": "1"}
    for name, action in parser.actions.items():
        for option in action.option_strings:
            value = [] if action.nargs == 0 else [words.get(option, str(parser.defaults[name]))]
            parts = [["lenet"], [option, *value], ["--seed", "3"]]
            parts[0], parts[place] = parts[place], parts[0]
            namespace = parser.parse_args([word for part in parts for word in part])
            assert namespace.model == "lenet", option
            assert name == "seed" or namespace.seed == 3, option


def test_the_help_has_every_default(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for default in (
        "digits",
        "5",
        "64",
        "0.001 for adam, 0.001 for adamw, 0.05 for sgd",
        "adam",
        "0.9",
        "0",
        "constant",
    ):
        assert f"(default: {default})" in said
    assert said.count("(default: ") == 22


def test_an_error_of_a_process_that_reads_ahead_is_one_line():
    try:
        raise data.DataError("folder: a.png: cannot be read")
    except data.DataError:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(data.DataError, match="Traceback") as caught:
        wrapped.reraise()
    assert train.one_line(caught.value) == "folder: a.png: cannot be read"


def test_the_progress_bar_has_loss_accuracy_and_images_a_second(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    terminal = functools.partial(Console, force_terminal=True, width=160, file=stream)
    monkeypatch.setattr(trainer, "Console", terminal)
    assert train.main([tiny, "--epochs", "1", "--output", str(tmp_path)]) == 0
    said = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    bars = re.findall(r"epoch 1 \S+ +(\d+)/22 loss (\d+\.\d{4})  accuracy (\d+\.\d)%  (\d+) images/s", said)
    done, loss, accuracy, rate = bars[-1]
    assert done == "22"
    (row,) = rows(tmp_path / "epochs.csv")
    assert float(loss) == pytest.approx(row["loss"], abs=1e-4)
    assert float(accuracy) == pytest.approx(100 * row["accuracy"], abs=0.1)
    assert int(rate) > 0
