"""`cnnkern.convert`: everything that a model has is kept; unsupported models are refused."""

import collections
import time

import pytest
import torch
import torchvision
from torch import nn

import cnnkern


def build(name: str) -> nn.Module:
    return torchvision.models.get_model(name, weights=None, num_classes=10)


def test_hooks_see_what_they_saw():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU())
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.min().item()))
    model[3].register_forward_pre_hook(lambda module, args: seen.append(args[0].min().item()))
    converted = cnnkern.convert(model)
    converted(torch.randn(2, 4, 3, 3))
    model[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].min().item()))
    converted(torch.randn(2, 4, 3, 3))
    seen = seen[:2]
    assert len(seen) == 2
    assert max(seen) < 0


def test_an_optimiser_made_before_trains_the_converted_model():
    model = torchvision.models.resnet18(weights=None, num_classes=4)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    converted = cnnkern.convert(model)
    before = [p.detach().clone() for p in model.parameters()]
    converted(torch.randn(2, 3, 32, 32)).sum().backward()
    optimiser.step()
    assert all(not torch.equal(b, p) for b, p in zip(before, model.parameters(), strict=True) if p.grad.abs().max() > 0)
    assert model.bn1.running_mean is converted.bn1.running_mean
    assert model.bn1.num_batches_tracked.item() == 1


def test_checkpoints_fit_both_ways():
    model, other = build("resnet18"), cnnkern.convert(build("resnet18"))
    other.load_state_dict(model.state_dict())
    model.load_state_dict(other.state_dict())
    old = {k: v for k, v in model.state_dict().items() if "num_batches_tracked" not in k}
    other.load_state_dict(old)  # from before batches were counted


def test_what_cannot_be_converted_says_so():
    with pytest.raises(TypeError, match=r"cnnkern.convert: expected a torch.nn.Module; got int"):
        cnnkern.convert(3)

    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return x

    report = cnnkern.conversion_report(nn.Sequential(Own(3), nn.SyncBatchNorm(3)))
    assert report.counts == {"not converted": 2}
    assert "Own may do more than the class that it inherits from" in str(report)
    assert "nothing to convert" in str(cnnkern.conversion_report(nn.Linear(2, 2)))
    assert "1 BatchNorm" in str(cnnkern.conversion_report(nn.Sequential(nn.BatchNorm1d(2), nn.ReLU())))


def test_copies_share_what_moves_and_keep_classes_hooks_and_pickling():
    model = build("resnet18")
    seen = []

    class Recorder:
        def __call__(self, *_):
            seen.append(self)

    recorder = Recorder()
    model.relu.register_forward_hook(recorder)
    fused = cnnkern.convert(model)
    block = type(model.layer1[0])
    assert type(fused.layer1[0]) is block
    fused(torch.randn(2, 3, 32, 32))
    assert seen == [recorder]
    fused.double()
    model(torch.randn(2, 3, 32, 32, dtype=torch.float64))  # the original moved too
    assert model.bn1.running_mean.dtype == torch.float64


def test_activations_and_additions_are_fused_backward_too():
    model, x = cnnkern.convert(build("resnet18")), torch.randn(2, 3, 32, 32)
    model(x).sum().backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(x).sum().backward()
    called = collections.Counter(event.name for event in profile.events())
    assert called["cnnkern::bn_act_backward"] == 12  # 9 with their ReLU, 3 alone
    assert called["cnnkern::bn_add_act_backward"] == 8
    assert called["aten::threshold_backward"] == 0


def test_converting_takes_no_time():
    """Nothing is run or read."""
    model = torchvision.models.inception_v3(init_weights=False)
    start = time.process_time()
    cnnkern.convert(model)
    assert time.process_time() - start < 0.5
