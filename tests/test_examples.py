"""The examples run as they are."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.mark.slow
def test_a_converted_resnet_learns(capsys):
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("finetune_resnet", EXAMPLES / "finetune_resnet.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reached = module.main([])
    printed = capsys.readouterr().out
    assert reached >= 0.9, printed
    assert "BatchNorm + add + ReLU" in printed


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of Jupyter's own
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    notebook = nbformat.read(EXAMPLES / "batch_norm_from_formula_to_kernel.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "committed without outputs"
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert "largest error against float64" in str(outputs)
