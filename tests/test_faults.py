"""The mutations of `make faults` still apply to the sources, and every operator has some."""

import itertools

import pytest
from faults import ROOT, all_faults

from cnnkern.testing import CASES

FAULTS = all_faults()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.backend}-{fault.operator}-{fault.name}")
def test_a_fault_still_applies(fault, tmp_path):
    text = (ROOT / fault.path).read_text()
    assert text.count(fault.right) == 1, f"{fault.path}: this is to stand in it once:\n{fault.right}"
    copy = tmp_path / fault.path
    copy.parent.mkdir(parents=True)
    copy.write_text(text)
    assert fault.plant(tmp_path) == text
    assert copy.read_text() == text.replace(fault.right, fault.wrong) != text
    for test in fault.tests:
        if test.startswith("tests/"):
            assert (ROOT / test.partition("::")[0]).exists()


def test_there_are_faults_of_every_operator_on_every_backend():
    assert len(FAULTS) >= 40
    assert len({(f.backend, f.operator, f.name) for f in FAULTS}) == len(FAULTS)
    for backend, operator in itertools.product(("cpu", "cuda", "triton"), CASES):
        assert any((f.backend, f.operator) == (backend, operator) for f in FAULTS), f"none of {operator} on {backend}"


def test_a_fault_that_no_longer_applies_is_an_error(tmp_path):
    copy = tmp_path / FAULTS[0].path
    copy.parent.mkdir(parents=True)
    copy.write_text("nothing of it")
    with pytest.raises(ValueError, match="has the text to change 0 times"):
        FAULTS[0].plant(tmp_path)
