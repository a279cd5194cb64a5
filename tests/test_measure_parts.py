"""The parts of `cnnkern.benchmark`: the clock, also of a GPU that is a fake, where time goes, memory, the machine."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import cnnkern
from cnnkern.conversion.deferral import SITE
from cnnkern.measure import check, clock, machine, profile, show
from cnnkern.measure.result import BenchmarkResult, Contender
from cnnkern.measure.steps import Setting, step


@pytest.fixture(scope="module")
def trained() -> BenchmarkResult:
    """A result to be changed: of figures that no test below looks at."""
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    return cnnkern.benchmark(layers, torch.randn(2, 3, 8, 8), seconds=0.01)


# ---- the clock ----


class FakeGPU:
    """Work that takes `kernel` seconds per call once it is queued, and `host` to be queued."""

    def __init__(self, host: float, kernel: float) -> None:
        self.host, self.kernel, self.now, self.done = host, kernel, 0.0, 0.0

    def step(self) -> None:
        self.now += self.host
        self.done = max(self.done, self.now) + self.kernel

    def synchronize(self) -> None:
        self.now = max(self.now, self.done)

    def Event(self, enable_timing: bool):
        event = SimpleNamespace(at=0.0)
        event.record = lambda: setattr(event, "at", max(self.now, self.done))
        event.elapsed_time = lambda other: 1e3 * (other.at - event.at)
        return event


@pytest.mark.parametrize(("host", "kernel"), [(1e-3, 5e-3), (5e-3, 1e-3)])
def test_a_gpus_timer_sees_the_longer_of_host_and_kernels(host, kernel):
    gpu = FakeGPU(host, kernel)
    timer = clock.CudaTimer(gpu, clock=lambda: gpu.now)
    found = clock.interleave({"step": gpu.step}, timer, seconds=0, min_rounds=3)["step"]
    assert len(found) == 3
    for sample in found:
        assert sample.wall == pytest.approx(max(host, kernel), rel=0.3)
        assert sample.events == pytest.approx(sample.wall, rel=0.3)


def _on_gpu(seconds: float, kernels: float, trained: BenchmarkResult) -> BenchmarkResult:
    found = profile.Profiled(dict.fromkeys(profile.KINDS[:-1], kernels / (len(profile.KINDS) - 1)), seconds * 3)
    parts = profile.breakdown(found, seconds, on_gpu=True)
    contender = Contender("eager", seconds, 0.0, 1.0, 0.0, 2**20, seconds, kernels)
    return replace(trained, device="cuda", contenders=[contender], breakdown={"eager": parts})


def test_a_host_bound_step_is_said_to_be_one(trained):
    waits, works = _on_gpu(10e-3, 4e-3, trained), _on_gpu(10e-3, 9.5e-3, trained)
    assert waits.host_bound
    assert not works.host_bound
    assert "HOST-BOUND: in eager's step the GPU waits for the host 60% of the time" in " ".join(str(waits).split())
    assert "HOST-BOUND" not in str(works)
    assert "kernels, ms" in str(works)
    assert waits.breakdown["eager"][profile.IDLE] == pytest.approx(6e-3)
    assert sum(waits.breakdown["eager"].values()) == pytest.approx(10e-3)


def test_kernels_that_overlap_are_no_more_than_the_step(trained):
    overlapping = _on_gpu(10e-3, 14e-3, trained)
    assert sum(overlapping.breakdown["eager"].values()) == pytest.approx(10e-3)
    assert not overlapping.host_bound


def test_ratios_are_medians_of_pairs_and_know_their_noise():
    assert clock.ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == clock.Ratio(2.0, 0.0)
    uneven = clock.ratio([1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0])
    assert uneven.value == 2.5
    assert uneven.chance == pytest.approx(1.57 * 1.5 / 2.5 / 2)
    assert clock.noise_floor(clock.Ratio(0.97, 0.01)) == pytest.approx(0.04)
    with pytest.raises(ValueError, match="zip"):
        clock.ratio([1.0], [1.0, 2.0])


def test_a_ratio_within_the_noise_is_marked(trained):
    found = replace(trained, noise=0.05)
    near, far = (Contender("converted", 1.0, 0.0, r, 0.01, 0) for r in (1.04, 1.06))
    assert found.within_noise(near)
    assert not found.within_noise(far)
    assert show._ratio(found, near) == "~1.04x"
    assert show._ratio(found, far) == "1.06x"


def test_rounds_call_every_step_and_end():
    called = {"a": 0, "b": 0}
    steps = {n: lambda n=n: called.__setitem__(n, called[n] + 1) for n in called}
    found = clock.interleave(steps, clock.HostTimer(), seconds=0, min_rounds=2)
    assert {len(samples) for samples in found.values()} == {2}
    assert min(called.values()) > 2


# ---- where the time goes ----


def event(name, parent=None, inputs=()):
    return SimpleNamespace(name=name, id=0, cpu_parent=parent, concrete_inputs=list(inputs))


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (event("aten::copy_", event("aten::convolution", inputs=[None] * 8 + [1])), profile.DENSE),
        (event("aten::convolution", inputs=[None] * 8 + [32]), profile.GROUPED),
        (event("aten::convolution_backward", inputs=[None] * 9 + [32, None]), profile.GROUPED),
        (event("cnnkern::grouped_conv2d", inputs=[None] * 6 + [4]), profile.GROUPED),
        (event("aten::add_", event("Optimizer.step#SGD.step")), profile.OPTIMIZER),
        (event("aten::add_"), profile.NORM),
        (event("cnnkern::bn_act_backward"), profile.NORM),
        (event("aten::copy_", event("aten::_to_copy")), profile.COPIES),
        (event("cnnkern::layer_norm2d"), profile.LAYER_NORM),
        (event("aten::mm", event("aten::linear")), profile.LINEAR),
        (event("aten::mul"), profile.REST),
    ],
)
def test_the_kind_of_an_operator(found, kind):
    assert profile.kind_of(found) == kind


def test_every_operator_of_ours_has_a_kind():
    for operator in cnnkern.backends.status():
        assert f"cnnkern::{operator}" in profile.KIND_OF or f"cnnkern::{operator}" in profile.GROUPS, operator


def test_the_bound_is_amdahls():
    parts = dict.fromkeys(profile.KINDS, 0.0) | {profile.DENSE: 3.0, profile.NORM: 0.5, profile.GROUPED: 0.5}
    assert profile.bound(parts) == pytest.approx(4 / 3)


def test_a_profile_sees_the_fused_kernels_of_a_converted_model():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(4, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, groups=2)
    )
    converted, x = cnnkern.convert(model), torch.randn(2, 4, 9, 9)
    converted[3] = model[3]  # PyTorch's, whose name does not say that it is grouped

    def step() -> None:
        converted(x).sum().backward()

    step()
    site = converted[1].__dict__[SITE]
    kinds = profile.convolution_kinds(step, "cpu")
    assert kinds["aten::convolution"] == [profile.DENSE, profile.GROUPED]
    assert kinds["aten::convolution_backward"] == [profile.GROUPED, profile.DENSE]
    assert site.fusions() == {"relu": 1}  # under a profile with shapes nothing waits, and nothing counts as missed
    found = profile.profile_once(step, "cpu", kinds)
    assert site.fusions() == {"relu": 2}
    assert all(found.by_kind[kind] > 0 for kind in (profile.DENSE, profile.GROUPED, profile.NORM))
    assert sum(site.alone().values()) == 1


def test_peak_memory_is_what_tensors_hold():
    def hold() -> None:
        a = torch.empty(1000)
        b = torch.empty(2000)
        del a, b
        torch.empty(500)

    assert 12000 <= profile.peak_bytes(hold, "cpu") <= 12000 + 256


def test_gradients_count_as_memory_of_a_step():
    model = nn.Linear(256, 256)
    one = step(model, (torch.randn(4, 256),), Setting(training=True, device="cpu"))
    one()
    assert model.weight.grad is None
    assert profile.peak_bytes(one, "cpu") >= 4 * 256 * 256


# ---- the machine ----


@pytest.mark.parametrize(
    ("activity", "busy"),
    [
        (machine.Activity(0.0, 0.0, 0.0), False),
        (machine.Activity(0.1, None, None), False),
        (machine.Activity(None, None, None), False),
        (machine.Activity(2.0, 0.0, 0.0), True),
        (machine.Activity(0.0, 0.1, 0.0), True),
        (machine.Activity(0.0, 0.0, 0.5), True),
    ],
)
def test_a_busy_machine_is_said(activity, busy):
    assert str(activity).startswith("BUSY MACHINE") is busy


def test_what_others_do_is_read_from_the_system(tmp_path, monkeypatch):
    stat, pressure = tmp_path / "stat", tmp_path / "cpu"
    monkeypatch.setattr(machine, "STAT", stat)
    monkeypatch.setattr(machine, "PRESSURE", pressure)
    stat.write_text("cpu  100 0 0 900 0 0 0 0 0 0\n")
    pressure.write_text("some avg10=0.00 avg60=0.00 avg300=0.00 total=1000000\nfull avg10=0.00 total=0\n")
    watch = machine.Watch()
    stat.write_text("cpu  150 0 0 1000 0 0 0 50 0 0\n")
    pressure.write_text("some avg10=0.00 avg60=0.00 avg300=0.00 total=1000500\nfull avg10=0.00 total=0\n")
    assert watch.activity().stolen == pytest.approx(0.25)
    assert watch.activity().waiting > 0


def test_a_mean_that_is_zero_but_for_roundings_is_no_difference():
    """As that of MobileNetV2's batch norms behind a batch norm and a 1x1 convolution."""
    mean, var, other = "buffer bn.running_mean", "buffer bn.running_var", "buffer other"
    truth = {mean: torch.tensor([1e-17, -2e-17]), var: torch.tensor([4.0, 1.0]), other: torch.tensor([1e-9])}
    found = {mean: torch.tensor([-3e-17, 1e-17]), var: torch.tensor([4.0, 1.0]), other: torch.tensor([1e-9])}
    assert check._largest_difference(found, truth)[0] < 1e-15
    found[mean][0] = 1e-3
    assert check._largest_difference(found, truth) == (pytest.approx(5e-4), mean)
    found[other][0] = 2e-9  # measured by itself
    assert check._largest_difference(found, truth) == (pytest.approx(1.0), other)
