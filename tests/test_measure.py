"""`cnnkern bench MODEL` and `cnnkern.benchmark`: what is said of a model, and of one that cannot be measured."""

import json
import re
import sys
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import cnnkern
from cnnkern import cli
from cnnkern.measure import profile
from cnnkern.measure.check import Check, check
from cnnkern.measure.command import arguments_for
from cnnkern.measure.load import load
from cnnkern.measure.result import BenchmarkResult
from cnnkern.measure.steps import Setting
from cnnkern.measure.values import ModelError, float_tensors, mean_loss
from tests.child import run_child

X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@dataclass
class Output:
    logits: torch.Tensor
    more: dict


class Small(nn.Module):
    """A batch norm with ReLU, a depthwise convolution, a residual addition, dropout; packs its output as asked."""

    def __init__(self, pack=lambda y, z: z) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise, self.last = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.dropout, self.pack = nn.Dropout(0.3), pack

    def forward(self, x):
        y = torch.relu(self.norm(self.convolution(x)))
        return self.pack(y, self.dropout(torch.relu(self.last(self.depthwise(y)) + y)))


PACKED = {
    "tensor": lambda y, z: z,
    "tuple": lambda y, z: (y, z, z.long()),
    "dict": lambda y, z: {"a": y, "b": [z], "n": 3},
    "dataclass": lambda y, z: Output(y, OrderedDict(z=z)),
}


@pytest.fixture(scope="module")
def trained() -> BenchmarkResult:
    return cnnkern.benchmark(Small(), X, seconds=0.3)


def test_a_model_is_checked_timed_and_taken_apart(trained):
    assert trained.ok
    assert trained.fused == {"BatchNorm + ReLU": 1, "BatchNorm + add + ReLU": 1, "GroupedConv2d": 1}
    assert [c.name for c in trained.contenders] == ["eager", "converted"]
    assert (trained.batch, trained.mode, trained.inputs) == (4, "training", [[4, 3, 12, 12]])
    assert trained.rounds >= 5
    assert all(c.peak_bytes > 0 and c.seconds > 0 for c in trained.contenders)
    assert trained.breakdown["eager"][profile.GROUPED] > 0
    assert trained.breakdown["eager"][profile.NORM] > 0
    assert trained.breakdown["converted"][profile.OPTIMIZER] > 0


def test_figures_do_not_contradict_each_other(trained):
    eager, converted = trained.contenders
    assert converted.seconds == pytest.approx(eager.seconds / converted.ratio)
    assert trained.images_per_second(converted) * converted.seconds == pytest.approx(trained.batch)
    for contender in trained.contenders:
        assert sum(trained.breakdown[contender.name].values()) == pytest.approx(contender.seconds)
    ours = sum(trained.breakdown["eager"][kind] for kind in profile.OURS)
    assert trained.bound == pytest.approx(eager.seconds / (eager.seconds - ours))


def test_the_table_has_at_most_a_hundred_columns_and_files_hold_the_same(trained, tmp_path):
    text = str(trained)
    assert max(map(len, text.splitlines())) <= 100
    assert "machine" in text.splitlines()[0].lower()
    assert f"At most {trained.bound:.2f}x" in text
    trained.to_json(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["contenders"][1]["name"] == "converted"
    assert "converted" in trained.to_html(tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("training", [True, False])
def test_models_may_return_what_they_like(packed, training):
    model = Small(PACKED[packed])
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found = cnnkern.benchmark(model, (X,), training=training, seconds=0.01)
    assert found.ok
    assert ("folded" in [c.name for c in found.contenders]) is not training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_the_loss_is_the_sum_of_means():
    a, b = torch.randn(3, 2), torch.randn(5)
    assert mean_loss({"a": a, "b": (b, [torch.arange(3)])}).item() == pytest.approx((a.mean() + b.mean()).item())
    assert float_tensors("text") == []


def test_bf16_channels_last_and_a_loss_of_ones_own():
    found = cnnkern.benchmark(Small(), X, amp="bf16", channels_last=True, seconds=0.01, loss=lambda y: y.square().sum())
    assert (found.ok, found.dtype, found.layout) == (True, "bfloat16", "channels_last")


@pytest.mark.slow
def test_compiled_contenders():
    found = cnnkern.benchmark(Small(), X, training=False, compile=True, seconds=0.1)
    assert [c.name for c in found.contenders] == [
        "eager",
        "converted",
        "folded",
        "torch.compile",
        "converted + torch.compile",
    ]
    assert not found.failed


def test_results_computed_again_are_a_contender():
    layers = (layer for _ in range(4) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()))
    found = cnnkern.benchmark(nn.Sequential(*layers), torch.randn(4, 8, 12, 12), recompute=True, seconds=0.1)
    assert found.ok
    peaks = {c.name: c.peak_bytes for c in found.contenders}
    assert list(peaks) == ["eager", "converted", "recompute"]
    assert peaks["recompute"] < peaks["converted"]
    assert any(line.startswith("recompute, float64") for line in found.check.lines)


def test_a_compiler_that_fails_is_said(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(torch, "compile", refuse)
    found = cnnkern.benchmark(Small(), X, compile=True, seconds=0.01)
    assert found.failed == {"torch.compile": "no compiler here", "converted + torch.compile": "no compiler here"}
    assert "torch.compile: not timed: no compiler here" in str(found)


# ---- correctness ----

WRONG = {
    "output": lambda m: nn.Sequential(m, nn.Hardtanh(0, 1.5)),
    "statistics": lambda m: setattr(m.norm, "momentum", 0.2) or m,
}


class HalfGradient(Small):
    def forward(self, x):
        y = super().forward(x)
        return y * 0.5 + y.detach() * 0.5


@pytest.mark.parametrize("fault", [WRONG["output"], WRONG["statistics"]], ids=["output", "statistics"])
def test_a_wrong_model_is_found(fault):
    found = check(Small(), {"converted": fault}, (X,), Setting(training=True, device="cpu"))
    assert not found.ok
    assert any("WRONG" in line for line in found.lines)


def test_a_wrong_gradient_is_found():
    def halved(model):
        model.__class__ = HalfGradient
        return model

    right = check(Small(), {"same": lambda m: m}, (X,), Setting(training=True, device="cpu"))
    wrong = check(Small(), {"halved": halved}, (X,), Setting(training=True, device="cpu"))
    assert right.ok
    assert not wrong.ok
    assert [("gradients" in line) or ("gradient of" in line) for line in wrong.lines if "WRONG" in line] == [True, True]


def test_an_error_of_the_timed_type_alone_is_found():
    """As a kernel that is wrong in float32 and right in float64 would make it."""

    class Off(Small):
        def forward(self, x):
            y = super().forward(x)
            return y if y.dtype == torch.float64 else y * (1 + 1e-4)

    def off(model):
        model.__class__ = Off
        return model

    found = check(Small(), {"off": off}, (X,), Setting(training=True, device="cpu"))
    assert [line.split(":")[0] for line in found.lines if "WRONG" in line] == ["off, float32"]


def test_a_model_that_has_no_float64_is_compared_with_eager():
    class Single(Small):
        def forward(self, x):
            return nn.functional.conv2d(x, torch.ones(2, 3, 1, 1)) + super().forward(x).mean()

    found = check(Single(), {"converted": lambda m: cnnkern.convert(m)}, (X,), Setting(training=True, device="cpu"))
    assert found.ok
    assert found.lines[0].startswith("float64: not compared")


def test_a_flipped_activation_is_tried_again():
    """A gradient that is off on one input, and right on those that differ from it by a rounding."""

    class Flips(Small):
        def forward(self, x):
            y = super().forward(x)
            off = y.dtype == torch.float32 and torch.equal(x, X)
            return y * 0.9 + y.detach() * 0.1 if off else y

    def flips(model):
        model.__class__ = Flips
        return model

    found = check(Small(), {"flips": flips}, (X,), Setting(training=True, device="cpu"))
    assert found.ok


def test_wrong_results_are_not_timed():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    other = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=0.5))
    found = cnnkern.benchmark(model, X, converted=other, seconds=0.01)
    assert not found.ok
    assert found.contenders == []
    assert "Nothing was timed" in str(found)


# ---- errors ----


SCRIPTED = """
import torch

def scripted():
    return torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2))
"""


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torchvision:resnet19", "torchvision has no model 'resnet19': did you mean resnet18"),
        ("zoo:lenet_rely", "no model is called 'lenet_rely': did you mean lenet_relu"),
        ("resnet", "expected MODEL to be torchvision:NAME, timm:NAME, zoo:NAME or path/file.py:FUNCTION; got 'resnet'"),
        ("resnet18", "got 'resnet18': did you mean zoo:resnet18?"),
        ("nowhere.py:make", "there is no file nowhere.py"),
        ("{}:absent", "has no function 'absent'"),
        ("{}:fails", "file.py:6: fails() raised ZeroDivisionError: division by zero"),
        ("{}:number", "expected number() of"),
        ("{}:scripted", "returned a torch.jit module, which cannot be converted"),
    ],
)
def test_models_that_there_are_not(spec, message, tmp_path):
    file = tmp_path / "file.py"
    file.write_text("def number():\n    return 3\n\n\ndef fails():\n    return 1 / 0\n" + SCRIPTED)
    with pytest.raises(ModelError, match=re.escape(message)):
        load(spec.format(file))


def test_a_package_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="the package timm, which is not installed: `pip install timm`"):
        load("timm:resnet18")


def test_timm_and_torchvision_models_have_their_usual_size():
    pytest.importorskip("timm")
    assert load("timm:regnety_002").size == (3, 224, 224)
    assert load("torchvision:squeezenet1_1").size == (3, 224, 224)
    assert arguments_for(load("zoo:lenet_relu"), None)[0].shape == (8, 1, 28, 28)


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (Small(), torch.randn(2, 1, 8, 8), "Small does not accept an input of 2x1x8x8: Given groups=1"),
        (Small(lambda y, z: None), X, "Small returned NoneType without a floating-point tensor"),
        (Small().requires_grad_(False), X, "Small has nothing to train"),
        (nn.LazyConv2d(4, 3), X, "LazyConv2d has lazy layers that have no parameters yet"),
    ],
)
def test_what_cannot_be_measured_is_one_line(model, example, message):
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        cnnkern.benchmark(model, example)
    assert "\n" not in str(caught.value)


def test_arguments_are_checked():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module; got int"):
        cnnkern.benchmark(3, X)
    with pytest.raises(ValueError, match="amp must be one of bf16, fp16; got 'half'"):
        cnnkern.benchmark(Small(), X, amp="half")


# ---- the command ----

FILE = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

def with_example():
    return make(), torch.randn(2, 3, 8, 8)
"""


def bench(*arguments, folder):
    return run_child([sys.executable, "-m", "cnnkern", "bench", *arguments], cwd=folder)


def test_the_command_runs_from_anywhere(tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    command = ("--seconds", "0.1", "--infer", "mine.py:with_example", "--json", "r.json", "--html", "r.html")
    done = bench(*command, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Fused: 1 BatchNorm + ReLU" in done.stdout
    assert {"r.json", "r.html"} <= {p.name for p in tmp_path.iterdir()}
    assert json.loads((tmp_path / "r.json").read_text())["mode"] == "inference"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["mine.py:make"], 1, "mine.py:make does not say what its input is: give it with --input N,C,H,W"),
        (["mine.py:make", "--input", "2,1,8,8"], 1, "does not accept an input of 2x1x8x8"),
        (["mine.py:make", "--input", "2,x"], 2, "expected numbers such as 64,3,224,224; got '2,x'"),
        (["mine.py:make", "--device", "tpu"], 2, "must be cpu, cuda or cuda:N, got 'tpu'"),
        (["mine.py:make", "--seconds", "0"], 2, "must be a number above zero"),
        (["mine.py:make", "--infer", "--recompute"], 2, "--recompute is for training: leave --infer out"),
        (["resnet18"], 1, "expected MODEL to be"),
        (["--json", "zoo:resnet18"], 2, "these options need a MODEL: torchvision:NAME"),
    ],
)
def test_errors_of_the_command(arguments, status, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    try:
        found = cli.main(["bench", *arguments])
    except SystemExit as end:
        found = end.code
    assert found == status
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_wrong_results_are_the_exit_status(monkeypatch, capsys, tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    wrong = Check(False, 2, ["converted, float64: WRONG"])
    monkeypatch.setattr("cnnkern.measure.run.check", lambda *_: wrong)
    assert cli.main(["bench", f"{tmp_path}/mine.py:with_example"]) == 1
    said, errors = capsys.readouterr()
    assert "Results DIFFER" in said
    assert errors.endswith("the converted model gives other results\n")


def test_the_help_says_that_a_model_may_be_left_out(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["bench", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "[MODEL]" in said
    assert "Without MODEL: runs the benchmark suite" in said


def test_what_names_a_model():
    assert cli.names_model(["--amp", "bf16", "torchvision:resnet18"])
    assert cli.names_model(["path/file.py:make", "--train"])
    assert not cli.names_model(["--quick", "--filter", "resnet18"])
    assert not cli.names_model([])
