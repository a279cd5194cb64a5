"""`cnnkern.convert`: what it replaces, that results stay, and that everything of a model survives."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import cnnkern

# network -> the batch norms that have a ReLU right behind, and the others
TORCHVISION = {
    "resnet18": (9, 11),
    "resnet50": (33, 20),
    "vgg11_bn": (8, 0),
    "vgg16_bn": (13, 0),
    "densenet121": (120, 1),
    "resnext50_32x4d": (33, 20),
    "mobilenet_v2": (0, 52),
    "googlenet": (57, 0),
}


def build(name: str) -> nn.Module:
    extra = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    return torchvision.models.get_model(name, weights=None, num_classes=10, **extra)


@pytest.mark.parametrize("name", TORCHVISION)
def test_replaces_every_pair_of_a_torchvision_model(name):
    model = build(name)
    converted = cnnkern.convert(model)
    with_relu, alone = TORCHVISION[name]
    expected = {"BatchNorm + ReLU": with_relu, "BatchNorm": alone}
    assert cnnkern.conversion_report(converted).counts == {k: n for k, n in expected.items() if n}
    assert cnnkern.conversion_report(model).counts == cnnkern.conversion_report(converted).counts
    assert list(converted.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(model.parameters(), converted.parameters(), strict=True))
    assert type(converted) in (type(model), *type(converted).__mro__[:3])
    assert not any(isinstance(m, cnnkern.nn.BatchNorm2d | cnnkern.nn.BatchNormReLU2d) for m in model.modules())


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg11_bn", "densenet121", "googlenet"])
def test_two_training_steps_and_eval_are_as_in_the_original(name):
    torch.manual_seed(0)
    original = build(name).double()
    converted = cnnkern.convert(copy.deepcopy(original))
    for m in (original, converted):
        for dropout in (d for d in m.modules() if isinstance(d, nn.Dropout)):
            dropout.p = 0.0
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    target = torch.tensor([3, 7])
    for _ in range(2):
        losses = []
        for m in (original, converted):
            m.zero_grad()
            loss = F.cross_entropy(m(x), target)
            loss.backward()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)
        scale = max(p.grad.abs().max() for p in original.parameters())
        for (n, p), q in zip(original.named_parameters(), converted.parameters(), strict=True):
            assert (p.grad - q.grad).abs().max() <= 1e-8 * scale, n
        with torch.no_grad():
            for m in (original, converted):
                for p in m.parameters():
                    p -= 0.01 * p.grad
    for (n, b), c in zip(original.named_buffers(), converted.buffers(), strict=True):
        torch.testing.assert_close(b, c, msg=n)
    torch.testing.assert_close(original.eval()(x), converted.eval()(x), rtol=1e-7, atol=1e-9)


class Block(nn.Module):
    """One ReLU module for two calls, an in-place add between."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        out = self.conv2(self.relu(self.bn(self.conv1(x))))
        out += x
        return self.relu(out)


class Functional(nn.Module):
    def __init__(self, relu):
        super().__init__()
        self.bn, self.relu_call = nn.BatchNorm2d(4), relu

    def forward(self, x):
        return self.relu_call(self.bn(x)) * 2


class UsedTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        y = self.bn(x)
        return self.relu(y) + y


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(F.relu(self.bn(x)))


class DependsOnMode(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.bn(x)
        return F.relu(y) if self.training else y


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        y = self.bn(x)
        return self.relu(y) if y.sum() > 1e9 else y


class ReachedFromAbove(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        return self.inner(x) + self.inner[0](x)


def shared_norm() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    return nn.Sequential(norm, nn.ReLU(), nn.Sequential(norm))


WRITTEN = {
    "one relu, many calls": (Block, {"BatchNorm + ReLU": 1}),
    "F.relu": (lambda: Functional(F.relu), {"BatchNorm + ReLU": 1}),
    "torch.relu": (lambda: Functional(torch.relu), {"BatchNorm + ReLU": 1}),
    "method": (lambda: Functional(lambda x: x.relu()), {"BatchNorm + ReLU": 1}),
    "in-place method": (lambda: Functional(lambda x: x.relu_()), {"BatchNorm + ReLU": 1}),
    "F.relu in place": (lambda: Functional(lambda x: F.relu(x, inplace=True)), {"BatchNorm + ReLU": 1}),
    "sequential, shared relu": (
        lambda: (lambda r: nn.Sequential(nn.BatchNorm2d(4), r, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), r))(nn.ReLU()),
        {"BatchNorm + ReLU": 2},
    ),
    "output used twice": (UsedTwice, {"BatchNorm": 1}),
    "called twice": (CalledTwice, {"BatchNorm": 1}),
    "depends on the mode": (DependsOnMode, {"BatchNorm": 1}),
    "untraceable": (Untraceable, {"BatchNorm": 1}),
    "reached from above": (ReachedFromAbove, {"BatchNorm": 1}),
    "one batch norm in two places": (shared_norm, {"BatchNorm": 1}),
    "relu6": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU6()), {"BatchNorm": 1}),
    "nothing": (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), {}),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_however_it_is_written(name):
    make, counts = WRITTEN[name]
    torch.manual_seed(1)
    model = make().double()
    for p in model.parameters():
        nn.init.normal_(p)
    converted = cnnkern.convert(copy.deepcopy(model))
    assert cnnkern.conversion_report(converted).counts == counts
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    forms = {
        "converted": converted,
        "copied": copy.deepcopy(converted),
        "converted again": cnnkern.convert(converted),
        "reverted": cnnkern.revert(converted),
    }
    if "lambda" not in repr(model.__dict__):
        forms["pickled"] = pickle.loads(pickle.dumps(converted))
    expected = {}
    for training in (True, False):
        fresh = copy.deepcopy(model).train(training)
        expected[training] = (fresh(x), torch.autograd.grad(fresh(x).square().sum(), list(fresh.parameters())))
    for form, m in forms.items():
        for training in (True, False):
            fresh = copy.deepcopy(m).train(training)
            torch.testing.assert_close(fresh(x), expected[training][0], msg=f"{form}, training={training}")
            grads = torch.autograd.grad(fresh(x).square().sum(), list(fresh.parameters()))
            torch.testing.assert_close(grads, expected[training][1], msg=f"{form}, training={training}")
    assert [type(m) for m in forms["reverted"].modules()] == [type(m) for m in model.modules()]
    assert list(converted.state_dict()) == list(model.state_dict())


def test_hooks_see_what_they_saw():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU())
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.min().item()))
    model[3].register_forward_pre_hook(lambda module, args: seen.append(args[0].min().item()))
    converted = cnnkern.convert(model)
    assert cnnkern.conversion_report(converted).counts == {"BatchNorm": 2}
    converted(torch.randn(2, 4, 3, 3))
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
    assert report.counts == {"left alone": 2}
    assert "Own has a forward pass of its own" in str(report)
    assert "nothing to convert" in str(cnnkern.conversion_report(nn.Linear(2, 2)))
    assert "1 BatchNorm + ReLU" in str(cnnkern.conversion_report(nn.Sequential(nn.BatchNorm1d(2), nn.ReLU())))
