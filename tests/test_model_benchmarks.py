"""Benchmarks of whole models: their photographs, their contenders, and what is compared before it is timed."""

import itertools
import sys

import pytest
import torch

import cnnkern
from benchmarks.show import remarks, tables
from benchmarks.studies import steps
from benchmarks.suite import models
from benchmarks.suite.groups import Contender
from benchmarks.suite.options import Options
from cnnkern.measure import profile
from cnnkern.measure.profile import peak_bytes
from tests.results import measure


def test_photographs_are_patches_normalised_as_imagenet():
    pytest.importorskip("sklearn")
    x = models.photographs(12)
    assert x.shape == (12, 3, 224, 224)
    assert x.dtype == torch.float32
    assert len({patch.sum().item() for patch in x}) == 12
    pixels = x * torch.tensor(models.STD).view(3, 1, 1) + torch.tensor(models.MEAN).view(3, 1, 1)
    assert torch.allclose(pixels * 255, (pixels * 255).round(), atol=1e-3)
    assert pixels.min() >= -1e-5
    assert pixels.max() <= 1 + 1e-5


class ConvReLU(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten())
        self.append(torch.nn.AdaptiveAvgPool1d(3))


def test_models_are_compared_with_eager_before_they_are_timed(monkeypatch):
    monkeypatch.setattr(models, "build", lambda name: ConvReLU())
    monkeypatch.setattr(models, "photographs", lambda batch: torch.rand(batch, 3, 32, 32))
    monkeypatch.setattr(models.cnnkern, "convert", lambda model: model)
    options = Options(quick=True)
    measured, _ = measure(models.groups(options), options)
    assert {(r.mode, r.contender, r.status) for r in measured} == set(
        itertools.product(("training", "inference"), ("eager", "cnnkern"), ("ok",))
    ), remarks.refused_lines(measured)
    header, lines = tables.model_table(measured)
    assert header == [*tables.MODELS, tables.PEAK]
    assert len(lines) == 2
    assert all(r.peak_bytes > 0 for r in measured)
    assert all(r.copy_gb_s > 0 for r in measured)

    monkeypatch.setattr(models.cnnkern, "convert", lambda model: torch.nn.Sequential(model, torch.nn.Softplus()))
    measured, _ = measure(models.groups(options), options)
    assert {r.status for r in measured if r.contender == "cnnkern"} == {"wrong"}


@pytest.mark.parametrize("training", [True, False])
def test_bfloat16_is_autocast_in_training_and_the_type_in_inference(training, monkeypatch):
    seen = set()

    class Watched(ConvReLU):
        def forward(self, x):
            out = super().forward(x)
            seen.add((x.dtype, out.dtype, self[0].weight.dtype))
            return out

    monkeypatch.setattr(models, "build", lambda name: Watched())
    monkeypatch.setattr(models, "photographs", lambda batch: torch.rand(batch, 3, 32, 32))
    bench = models.ModelBench("m", 2, training, "cpu", torch.bfloat16)
    steps = [bench.step(Contender(name, "contiguous"), verify=name == "cnnkern") for name in ("eager", "cnnkern")]
    seen.clear()
    for step in steps:
        step()
    stored = torch.float32 if training else torch.bfloat16
    assert seen == {(stored, torch.bfloat16, stored)}
    options = Options(quick=True, dtype="bfloat16")
    assert {g.dtype for g in models.groups(options)} == {"bfloat16"}


def test_in_16_bits_a_network_is_judged_as_a_whole():
    truth = {"output": torch.tensor([2.0]), "a.running_mean": torch.ones(3), "b.running_mean": torch.full((2,), 4.0)}
    eager = truth | {"output": torch.tensor([2.01]), "a.running_mean": torch.tensor([1.0, 1.01, 1.0])}
    ours = truth | {"output": torch.tensor([2.01]), "b.running_mean": torch.tensor([4.0, 4.04])}
    with pytest.raises(AssertionError, match=r"b\.running_mean: error"):
        models.assert_as_good_as(ours, eager, truth)
    models.assert_as_good_as(*models.by_kind([ours, eager, truth]))
    ours["b.running_mean"][1] = 4.1
    with pytest.raises(AssertionError, match=r"^running_mean: error"):
        models.assert_as_good_as(*models.by_kind([ours, eager, truth]))


@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_converted_model_is_compared_with_eager(training, monkeypatch):
    monkeypatch.setattr(models, "build", lambda name: ConvReLU())
    monkeypatch.setattr(models, "photographs", lambda batch: torch.rand(batch, 3, 32, 32))
    off = 0.0
    monkeypatch.setattr(torch, "compile", lambda model, **options: lambda x: model(x) + off)
    monkeypatch.setattr(models, "results", lambda model, x, *_: {"output": model(x).detach()})
    bench = models.ModelBench("m", 3, training, "cpu")
    converted, plain = (Contender(name, "channels_last") for name in (models.CONVERTED_AND_COMPILED, "torch.compile"))
    bench.step(converted, verify=True)
    off = 1e-2
    with pytest.raises(AssertionError, match="output: error"):
        bench.step(converted, verify=True)
    bench.step(converted, verify=False)  # was compared under the other malloc setting
    bench.step(plain, verify=True)  # what the compiler makes of the reference is PyTorch's


def test_large_models_have_more_contenders(monkeypatch):
    class Grouped(ConvReLU):
        def __init__(self):
            super().__init__()
            self[0] = torch.nn.Conv2d(3, 6, 3, groups=3)
            self[1] = torch.nn.BatchNorm2d(6)

    monkeypatch.setattr(models, "LARGE", {"mobilenet_v2": 0.1})
    monkeypatch.setattr(models, "LARGE_BATCH_SIZE", 2)
    monkeypatch.setattr(models, "TRAINED_TWICE", {"mobilenet_v2": 3})
    monkeypatch.setattr(models, "build", lambda name: Grouped())
    monkeypatch.setattr(models, "photographs", lambda batch: torch.rand(batch, 3, 32, 32))
    options = Options(networks="all", compile_seconds=0.0)  # compiling is not what is tested
    measured, _ = measure(models.groups(options), options)
    both = {
        ("eager", "ok"),
        ("cnnkern", "ok"),
        ("torch.compile", "out of time"),
        (models.CONVERTED_AND_COMPILED, "out of time"),
    }
    alone = {(models.GROUPED_ALONE, "ok"), (models.GROUPED_AND_COMPILED, "out of time")}
    for mode, more, shapes in (
        ("training", alone, {"2x3x224x224", "3x3x224x224"}),
        ("inference", {(models.FOLDED, "ok")}, {"1x3x224x224", "16x3x224x224"}),
    ):
        found = [r for r in measured if r.mode == mode]
        assert {(r.contender, r.status) for r in found} == both | more, remarks.refused_lines(measured)
        assert {r.shape for r in found} == shapes
    header, lines = tables.model_table([r for r in measured if r.mode == "training"])
    assert header == [*tables.MODELS, tables.PEAK, tables.OTHERS]
    assert [line[-1].startswith(models.GROUPED_ALONE) for line in lines] == [True] * 4
    swapped = models.with_grouped_convolutions(Grouped())
    assert type(swapped[0]) is cnnkern.nn.GroupedConv2d
    assert swapped.state_dict().keys() == Grouped().state_dict().keys()


def test_without_scikit_learn_models_are_not_available(monkeypatch):
    models.photographs.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setattr(models, "build", lambda name: ConvReLU())
    measured, _ = measure(models.groups(Options(quick=True)))
    assert {r.status for r in measured} == {"not available"}
    lines = remarks.refused_lines(measured)
    assert len(lines) == 2
    assert all("scikit-learn" in line and "\n" not in line for line in lines)


def test_where_the_time_of_a_step_goes(monkeypatch, capsys):
    class Both(ConvReLU):
        def __init__(self):
            super().__init__()
            self.insert(3, torch.nn.Conv2d(4, 4, 3, groups=4))

    monkeypatch.setattr(models, "build", lambda name: Both())
    monkeypatch.setattr(models, "photographs", lambda batch: torch.rand(batch, 3, 64, 64))
    bench = models.ModelBench("both", 3, training=True, device="cpu")
    for who in ("eager", "cnnkern"):
        found = steps.milliseconds(bench, Contender(who, "contiguous"), 1)
        kinds = (profile.DENSE, profile.GROUPED, profile.NORM, profile.OPTIMIZER, profile.REST)
        assert all(found[kind] > 0 for kind in kinds)
        assert found.keys() == set(steps.KINDS)
    assert steps.main(["both", "--batch", "2", "--steps", "1", "--default-malloc"]) == 0
    header, _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:3] for line in lines] == [
        ["| both", layout, who] for layout in ("contiguous", "channels_last") for who in ("eager", "cnnkern")
    ]
    assert all(line.count("|") == header.count("|") for line in lines)


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_the_most_memory_that_a_call_holds(device):
    kept = []

    def step() -> None:
        kept.clear()
        first = torch.zeros(2**20, device=device)  # 4 MiB of float32
        second = torch.zeros(2**21, device=device)
        del first
        kept.append(torch.zeros(2**19, device=device))
        del second

    for _ in range(2):  # the second time 2 MiB are freed first
        peak = peak_bytes(step, device)
    assert peak == 10 * 2**20
