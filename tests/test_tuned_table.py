"""The table of `cnnkern tune`: a file per kind of machine, valid for that only."""

import json
import os
import re
import sys
import warnings

import pytest
import torch

import cnnkern
from cnnkern import functional
from cnnkern.ops import tuned
from tests.child import run_child
from tests.tuning import lost, own_tables, randn  # noqa: F401


def is_ours() -> bool:
    """Of a call that `lost` is about, in inference: PyTorch's result may be told by nothing but who made it."""
    made = []
    operator = cnnkern.ops.layer_norm._layer_norm
    try:
        cnnkern.ops.layer_norm._layer_norm = lambda *a: made.append(a) or operator(*a)
        with torch.no_grad():
            functional.layer_norm(randn(4, 6), (6,), randn(6), randn(6))
    finally:
        cnnkern.ops.layer_norm._layer_norm = operator
    return bool(made)


def test_a_table_counts_from_its_file():
    tuned.save(tuned.this_machine("cpu"), [lost()])
    tuned.load()
    assert not is_ours()


def test_a_table_without_losses_is_none():
    tuned.save(tuned.this_machine("cpu"), [lost()._replace(ratio=1.5)])
    tuned.load()
    assert tuned.table is None


def test_a_class_is_lost_where_all_of_it_are():
    tuned.save(tuned.this_machine("cpu"), [lost((4, 6)), lost((5, 6))._replace(ratio=1.5)])
    tuned.load()
    assert tuned.table is None


@pytest.mark.parametrize("field", ["name", "kernels", "torch", "cnnkern"])
def test_a_stale_table_is_ignored_and_said(field):
    here = tuned.this_machine("cpu")
    path = tuned.save(here, [lost()])
    found = json.loads(path.read_text())
    found["machine"][field] = "another"
    path.write_text(json.dumps(found))
    with pytest.warns(UserWarning, match=re.escape(f"was made for {field} another, and this is {here[field]}")) as said:
        tuned.load()
    assert len(said) == 1
    assert is_ours()
    assert tuned.summary("cpu").startswith("ignored: ")


def test_a_file_that_is_no_table_is_ignored_and_said():
    path = tuned.save(tuned.this_machine("cpu"), [lost()])
    path.write_text('{"machine": []}')
    with pytest.warns(UserWarning, match="is no table of `cnnkern tune`"):
        tuned.load()
    assert tuned.table is None


def test_the_environment_ignores_a_table(monkeypatch):
    tuned.save(tuned.this_machine("cpu"), [lost()])
    monkeypatch.setenv("CNNKERN_TUNE", "0")
    tuned.load()
    assert is_ours()
    assert tuned.summary("cpu").startswith("ignored, because CNNKERN_TUNE=0 is set")
    monkeypatch.setenv("CNNKERN_TUNE", "no")
    with pytest.raises(ValueError, match="CNNKERN_TUNE must be 0, 1 or unset; got 'no'"):
        tuned.load()


def test_a_table_of_other_threads_does_not_count():
    measured = lost()
    tuned.save(tuned.this_machine("cpu"), [measured._replace(call=measured.call._replace(threads=1000))])
    tuned.load()
    assert is_ours()


def test_a_home_that_cannot_be_read_is_no_table(tmp_path, monkeypatch):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    for home in (closed, tmp_path / "absent", None):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", str(home)) if home else monkeypatch.delenv("HOME")
        monkeypatch.setattr("pwd.getpwuid", lambda _: (_ for _ in ()).throw(KeyError("no such user")))
        tuned.load()
        assert tuned.table is None


def test_no_folder_is_no_table(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned.load()
    assert tuned.table is None
    assert "no table" in tuned.summary("cpu")


def test_another_devices_table_is_counted_by_the_doctor():
    tuned.save({**tuned.this_machine("cpu"), "name": "another CPU"}, [lost()])
    tuned.load()
    assert tuned.table is None
    assert "(1 of other devices or kernels in " in tuned.summary("cpu")


def test_importing_cnnkern_reads_the_table(tmp_path):
    tuned.save(tuned.this_machine("cpu"), [lost()])
    environment = {k: v for k, v in os.environ.items() if k != "CNNKERN_TUNE"}
    code = "import cnnkern.ops.tuned as t; print(sum(map(len, t.table.lost.values())))"
    done = run_child([sys.executable, "-c", code], cwd="/", env=environment, check=True)
    assert done.stdout.strip() == "1"
    code = "import cnnkern.ops.tuned as t; print(t.table)"
    done = run_child([sys.executable, "-c", code], cwd="/", env=environment | {"CNNKERN_TUNE": "0"}, check=True)
    assert done.stdout.strip() == "None"
