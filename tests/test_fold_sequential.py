"""Layers of an ``nn.Sequential`` in a folded model that run together: that they do, and what ends it."""

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import cnnkern
from benchmarks.studies.folded import by_layers
from cnnkern.conversion.sequential import _PLAN
from tests.test_fold import LAYOUTS, build, counts, judged, randomised

NETWORKS = (
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "regnet_y_400mf",
    "resnet18",
    "convnext_tiny",
    "vgg11",
)


def held(model: nn.Module) -> int:
    """How often layers ran together."""
    return sum(vars(m)[_PLAN].held for m in model.modules() if _PLAN in vars(m))


@pytest.mark.parametrize("name", NETWORKS)
def test_results_are_those_of_the_layers(name):
    """To the bit, in whatever layout, size and mode, with the same strides and the same report."""
    folded = cnnkern.fold(build(name))
    layers = by_layers(copy.deepcopy(folded))
    for size, layout, mode in ((64, LAYOUTS[0], torch.no_grad), (65, LAYOUTS[1], torch.inference_mode)):
        x = torch.randn(2, 3, size, size).to(memory_format=layout)
        inner = {"ours": [], "theirs": []}
        for model, seen in ((folded, inner["ours"]), (layers, inner["theirs"])):
            with mode():
                for _ in range(3):
                    y = model(x)
                seen.append(y)
        assert torch.equal(inner["ours"][0], inner["theirs"][0])
    assert held(folded) > 0
    assert held(layers) == 0
    assert counts(folded) == counts(layers)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_are_the_originals(layout):
    model = randomised(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.SiLU()))
    folded = cnnkern.fold(model)
    for x in (torch.randn(2, 3, 9, 7).to(memory_format=layout), torch.randn(2, 3, 9, 7).flip(-1)[..., ::2]):
        with torch.no_grad():
            for _ in range(3):
                y = folded(x)
            assert y.stride() == model(x).stride()
        judged(folded, model, x)
    assert held(folded) > 0


def block() -> nn.Sequential:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Hardswish(inplace=True), nn.Dropout(0.5))
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.LeakyReLU(0.1), inner, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)
    )
    return randomised(model)


def halve(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output / 2


def doubled(self: nn.Module, x: Tensor) -> Tensor:
    return 2 * x


CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "hook": lambda m: m[1].register_forward_hook(halve),
    "hook, within": lambda m: m[2][0].register_forward_hook(halve),
    "hook of a Sequential within": lambda m: m[2].register_forward_hook(halve),
    "pre-hook": lambda m: m[2][1].register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    "backward hook": lambda m: m[2][2].register_full_backward_hook(lambda *args: None),
    "child": lambda m: m.__setitem__(1, nn.Tanh()),
    "child, within": lambda m: m[2].__setitem__(2, nn.Tanh()),
    "another child": lambda m: m.append(nn.Tanh()),
    "another child, within": lambda m: m[2].append(nn.Tanh()),
    "child gone": lambda m: m.__delitem__(5),
    "forward of an object": lambda m: setattr(m[1], "forward", lambda x: -x),
    "forward of a Sequential within": lambda m: setattr(m[2], "forward", lambda x: -x),
    "number of an activation": lambda m: setattr(m[1], "negative_slope", 0.7),
    "weight in place": lambda m: m[2][0].weight.data.mul_(2),
    "weight": lambda m: setattr(m[2][0], "weight", nn.Parameter(m[2][0].weight.detach() * 2)),
    "weight's data": lambda m: setattr(m[2][0].weight, "data", m[2][0].weight.data * 2),
    "weight by NumPy": lambda m: m[0].weight.detach().numpy().__imul__(2),
    "weight of a Linear": lambda m: m[5].weight.data.mul_(2),
    "exchanged weights": lambda m: torch.utils.swap_tensors(m[0].weight, nn.Parameter(m[0].weight.detach() * 2)),
    "statistics": lambda m: m[2][1].running_mean.add_(1),
    "eps": lambda m: setattr(m[2][1], "eps", 1.0),
    "stride": lambda m: setattr(m[2][0], "stride", (2, 2)),
    "a checkpoint": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}),
    "class": lambda m: setattr(m[1], "__class__", nn.LogSigmoid),
    "training": lambda m: m[2][1].train(),
    "double": lambda m: m.double().float(),
    "type": lambda m: (
        m[0].__setattr__("weight", None) or m[0].__setattr__("weight", nn.Parameter(torch.ones(8, 3, 1, 1)))
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_later_is_seen(name):
    model, x = block(), torch.randn(2, 3, 9, 7)
    folded = cnnkern.fold(model)
    with torch.no_grad():
        for _ in range(3):
            before = folded(x)
        assert held(folded) > 0
        CHANGES[name](folded)
        CHANGES[name](model)
        for _ in range(3):
            theirs, mine = model(x), folded(x)
            torch.testing.assert_close(mine, theirs)
            assert name in ("double", "backward hook") or mine.shape != before.shape or not torch.equal(mine, before)


def test_patches_of_classes_and_hooks_of_all_modules_are_seen(monkeypatch):
    folded, x = cnnkern.fold(block()), torch.randn(2, 3, 9, 7)
    with torch.no_grad():
        for _ in range(3):
            before = folded(x)
        seen = []
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(type(module)))
        assert torch.equal(folded(x), before)
        handle.remove()
        assert [kind.__name__ for kind in seen[:2]] == ["FoldingConv2d", "LeakyReLU"]
        assert len(seen) == 1 + len(list(folded.modules())) - 1
        monkeypatch.setattr(nn.LeakyReLU, "forward", doubled)
        model = block()
        torch.testing.assert_close(folded(x), model(x))


class Writes(nn.Module):
    """A layer that changes those behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.others: list[nn.Module] = []

    def forward(self, x: Tensor) -> Tensor:
        for other in self.others:
            other[3] = nn.Conv2d(4, 4, 1).requires_grad_(False).eval()
            nn.init.ones_(other[3].weight)
        return x


def test_a_layer_may_exchange_those_behind_it():
    model = randomised(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), Writes(), nn.Conv2d(4, 4, 1), nn.ReLU()))
    folded, x = cnnkern.fold(model), torch.randn(1, 3, 5, 5)
    with torch.no_grad():
        for _ in range(3):
            before = folded(x)
        assert held(folded) > 1
        folded[2].others.append(folded)
        assert not torch.allclose(folded(x), before)


def test_what_changes_all_the_time_is_not_planned_for_ever():
    folded, x = cnnkern.fold(block()), torch.randn(2, 3, 9, 7)
    with torch.no_grad():
        for i in range(40):
            folded[1].seen = i  # an attribute of whoever counts
            folded(x)
    assert vars(folded)[_PLAN].made <= 10


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning")
def test_gradients_autocast_and_transforms():
    model = block()
    folded, x = cnnkern.fold(model), torch.randn(2, 3, 9, 7)
    with torch.no_grad():
        for _ in range(3):
            folded(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(folded(x), by_layers(copy.deepcopy(folded))(x))
    before = held(folded)
    wanted = x.clone().requires_grad_()
    (mine,) = torch.autograd.grad(folded(wanted).square().sum(), wanted)
    assert held(folded) == before
    theirs = x.double().requires_grad_()
    (exact,) = torch.autograd.grad(copy.deepcopy(model).double()(theirs).square().sum(), theirs)
    torch.testing.assert_close(mine, exact.float())
    batch = torch.randn(3, 2, 3, 9, 7)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(folded)(batch), torch.stack([model(b) for b in batch]))
        traced = torch.jit.trace(folded, x, check_trace=False)
        torch.testing.assert_close(traced(x), model(x))


def test_classes_copies_and_pickles():
    folded, x = cnnkern.fold(build("mobilenet_v2")), torch.randn(1, 3, 32, 32)
    first = folded.features[0]
    assert isinstance(first, torchvision.ops.Conv2dNormActivation)
    with torch.no_grad():
        for _ in range(3):
            y = folded(x)
        for other in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
            assert held(other) == 0
            for _ in range(3):
                assert torch.equal(other(x), y)
            assert held(other) > 0
            assert type(other.features[0]) is type(first)
        replica = folded.features._replicate_for_data_parallel()  # shares attributes with its original
        replica[0] = nn.Sequential(nn.Conv2d(3, 32, 1)).eval()
        folded.features(x)
        assert not torch.equal(nn.Sequential.__call__(replica, x), folded.features(x))
    plain = cnnkern.revert(folded)
    assert [type(m) for m in plain.modules()] == [type(m) for m in build("mobilenet_v2").modules()]


def test_threads():
    folded = cnnkern.fold(build("mobilenet_v2"))
    x, failed = torch.randn(1, 3, 32, 32), []
    with torch.no_grad():
        expected = by_layers(copy.deepcopy(folded))(x)

    def work() -> None:
        with torch.no_grad():
            for _ in range(5):
                if not torch.equal(folded(x), expected):
                    failed.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed
