"""`cnnkern.convert` of models whose forward passes are written in many ways: what is fused, and that results stay."""

import copy
import pickle

import pytest
import torch
from torch import nn

import cnnkern
from tests.written import WRITTEN, NormOfWhatIsOverwritten


@pytest.mark.parametrize("name", WRITTEN)
def test_however_it_is_written(name):
    make, counts = WRITTEN[name]
    torch.manual_seed(1)
    model = make().double()
    for p in model.parameters():
        nn.init.normal_(p)
    converted = cnnkern.convert(copy.deepcopy(model))
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    ran = cnnkern.convert(copy.deepcopy(model))
    ran(x).square().sum().backward()
    assert cnnkern.conversion_report(ran).counts == counts
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


REASONS = {
    "output used twice": "its output is used again",
    "F.selu": "selu follows",
    "F.celu": "celu follows",
    "softplus": "softplus follows",
    "scaled add": "add follows",
    "sum of two batch norms": "the sum with another follows",
}


@pytest.mark.parametrize("name", REASONS)
def test_the_report_says_why_a_batch_norm_was_not_fused(name):
    make, _ = WRITTEN[name]
    converted = cnnkern.convert(make())
    before = cnnkern.conversion_report(converted)
    assert {e.reason for e in before.entries} == {"has not run: what it is fused with is known then"}
    converted(torch.randn(3, 4, 5, 6)).sum().backward()
    report = cnnkern.conversion_report(converted)
    [reason] = [e.reason for e in report.entries if e.kind == "BatchNorm"]
    assert reason == REASONS[name]
    assert f"BatchNorm ({reason})" in str(report)


def test_what_is_changed_in_place_stays_changed_in_place():
    """Eager cannot differentiate these; their outputs, and what they do to their input, stay."""

    class OntoTheInput(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()

        def forward(self, x):
            y = self.relu(self.bn(x))
            x += y
            return self.relu(x) + y

    for make in (NormOfWhatIsOverwritten, OntoTheInput):
        model = make()
        converted = cnnkern.convert(model)
        x = torch.randn(2, 4, 3, 5)
        mine, theirs = x.clone(), x.clone()
        with torch.no_grad():
            torch.testing.assert_close(converted(mine), model(theirs))
        torch.testing.assert_close(mine, theirs)
