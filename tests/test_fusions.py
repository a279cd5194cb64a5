"""The study that counts what is fused in other packages' models: how it counts; of a sample nothing is missed."""

from collections import Counter

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from benchmarks.studies import fusions
from benchmarks.studies.census import Census
from benchmarks.studies.packages import Model
from tests.meanings import CASES


class Known(nn.Module):
    """A batch norm for each thing that may follow it."""

    def __init__(self) -> None:
        super().__init__()
        names = "relu relu_ six tanh elu selu leaky add both first second sum shared view scaled number wide pair "
        names += "dropped given"
        self.norms = nn.ModuleDict({name: nn.BatchNorm2d(4) for name in names.split()})

    def forward(self, x):
        norm = {name: module(x) for name, module in self.norms.items()}
        found = [F.relu(norm["relu"]), F.relu_(norm["relu_"]), F.relu6(norm["six"]), torch.tanh(norm["tanh"])]
        found += [F.elu(norm["elu"]), F.selu(norm["selu"]), F.leaky_relu(norm["leaky"], 0.2), norm["add"] + x]
        found += [F.silu(x + norm["both"]), F.relu(norm["first"] + norm["second"])]
        total = norm["sum"] + x
        found += [F.relu(total), total * 2, F.relu(norm["shared"]) * norm["shared"], F.relu(norm["view"].flatten(1))]
        found += [torch.add(norm["scaled"], x, alpha=2), norm["number"] + 1, norm["wide"] + x[:1]]
        norm["pair"] += x
        return [*found, F.gelu(norm["pair"], approximate="tanh"), norm["given"]]


KINDS = {"relu": "relu", "relu_": "relu", "six": "relu6", "elu": "elu", "leaky": "leaky_relu", "add": "add"}
KINDS |= {"both": "add + silu", "first": "add + relu", "second": "add + relu", "sum": "add", "shared": "several"}
KINDS |= {"view": "view", "pair": "add + gelu_tanh", "tanh": "tanh", "selu": "another elu", "dropped": "nothing"}
KINDS |= {"scaled": "another add", "number": "another add", "wide": "another add", "given": "the caller"}


def census_of(model: nn.Module, x: torch.Tensor) -> Census:
    with Census(model) as census:
        outputs = model(x)
    census.returned(outputs)
    return census


def test_it_tells_what_follows_a_batch_norm():
    census = census_of(Known(), torch.randn(2, 4, 5, 5))
    assert {path.removeprefix("norms."): kind for path, kind in census.kinds()} == KINDS
    assert Counter(total.kind for total in census.additions) == {
        "add": 2, "add + silu": 1, "add + relu": 1, "add + gelu_tanh": 1
    }  # fmt: skip


def test_a_number_added_in_place_is_nothing_that_follows_if_it_is_zero():
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.zero, self.one = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x):
            zero, one = self.zero(x), self.one(x)
            zero += 0
            one += 1
            return [F.relu(zero), F.relu(one)]

    census = census_of(Added(), torch.randn(2, 4, 5, 5))
    assert dict(census.kinds()) == {("zero", "relu"): 1, ("one", "another add"): 1}


def test_it_counts_what_was_fused_and_what_was_not():
    def unfused() -> nn.Module:
        model = Known()
        model.norms["relu"] = type("Norm", (nn.BatchNorm2d,), {})(
            4
        )  # more than a batch norm, for all that convert knows
        return model

    for build, missed in ((Known, 0), (unfused, 1)):
        found = fusions.survey(iter([Model("known", build, (2, 4, 5, 5))]), 0, 1, check=True)
        assert not found.failed
        assert not found.differing
        assert found.expected == {"act": 5, "add": 5}
        assert found.fused == {"act": 5 - missed, "add": 5}
        assert found.others["several"] == 1
        assert len(found.missed) == missed
        assert all("Norm is not converted" in reason for reason in found.missed)


def test_it_notices_another_result():
    built = []

    def build() -> nn.Module:
        built.append(nn.Sequential(nn.BatchNorm2d(4), nn.Hardtanh(0, 6 + len(built))))
        return built[-1]

    model = build()
    a, b = (fusions.step(m.double(), torch.randn(2, 4, 5, 5).double() * 9, backward=True) for m in (model, build()))
    assert fusions.difference(a, a) == 0
    assert fusions.difference(a, b[:1]) == float("inf")


TIMM = ["resnet10t", "mobilenetv3_small_050", "efficientnet_lite0", "regnetx_002", "densenet121"]
TIMM += ["hardcorenas_a", "mixnet_s", "fbnetc_100", "spnasnet_100", "semnasnet_050", "tinynet_e", "lcnet_035"]
TIMM += ["repvgg_a0", "fastvit_t8"]  # which add in place onto other tensors
TORCHVISION = ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5", "shufflenet_v2_x0_5", "regnet_y_400mf"]


def sample():
    for name in TORCHVISION:
        yield Model(f"torchvision {name}", lambda name=name: torchvision.models.get_model(name, weights=None))
    for name in TIMM:
        yield Model(f"timm {name}", lambda name=name: timm.create_model(name))
    for name in ("IsOfMMCV", "IsOfDetectron", "IsOfUltralytics", "IsKerasStyle", "IsFrozenInTraining"):
        yield Model(name, CASES[name][0], (3, 4, 6, 6))


@pytest.mark.parametrize("model", list(sample()), ids=lambda model: model.name)
def test_nothing_is_missed(model):
    found = fusions.survey(iter([model]), 64, 20, check=False)
    assert not found.failed
    assert found.models == 1
    assert found.fused == found.expected, found.missed
    assert sum(found.expected.values())
