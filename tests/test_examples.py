"""The examples run as they are, small."""

import ast
import importlib
import io
import json
import re
import sys
import threading
import urllib.error
import urllib.request
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from tests.child import run_child

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.glob("*.py") if path.stem != "photographs")

pytestmark = pytest.mark.slow


@pytest.fixture
def example(monkeypatch):
    """Imports an example as `python examples/NAME.py` would."""
    monkeypatch.syspath_prepend(EXAMPLES)
    before = set(sys.modules)
    yield importlib.import_module
    for name in {path.stem for path in EXAMPLES.glob("*.py")} & (set(sys.modules) - before):
        del sys.modules[name]


def has_cnnkern_fused(printed: str, what: str) -> bool:
    return re.search(rf"cnnkern.convert: .*\d {re.escape(what)}", printed) is not None


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_is_short_and_says_what_it_does(path):
    assert path.read_text().count("\n") < 80
    said = ast.get_docstring(ast.parse(path.read_text()))
    assert re.search(rf"^ *(python|torchrun --nproc-per-node 2) examples/{path.name}", said, re.M)
    assert path.stem in Path(__file__).read_text(), "no test runs it"


def test_a_converted_resnet_learns(example, capsys):
    reached = example("finetune_resnet").main([])
    printed = capsys.readouterr().out
    assert reached >= 0.9, printed
    assert "BatchNorm + add + ReLU" in printed


@pytest.mark.parametrize("more", [[], ["--recompute", "--model", "convnext_atto", "--steps", "4"]])
def test_a_timm_model_learns_with_an_average(example, more, capsys):
    first, last = example("finetune_timm").main(more)
    assert last < (0.5 * first if not more else first + 0.2)
    assert "the average's accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("more", [[], ["--amp", "float16", "--sync-bn"]])
def test_two_processes_train_the_same_model(more):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = run_child([*command, str(EXAMPLES / "train_ddp.py"), "--steps", "2", *more], cwd="/")
    assert done.returncode == 0, done.stderr
    assert re.search(r"step 2: loss \d+\.\d+", done.stdout)
    assert more or has_cnnkern_fused(done.stdout, "BatchNorm + add + ReLU")


def test_detection_and_segmentation_give_the_original_losses(example, capsys):
    differences = example("detection_segmentation").main([])
    assert max(differences.values()) < 1e-3
    assert has_cnnkern_fused(capsys.readouterr().out, "BatchNorm + Hardswish")


@pytest.mark.filterwarnings("default")  # of Lightning's own
def test_a_lightning_module_trains(example, capsys):
    pytest.importorskip("lightning")
    example("lightning_module").main(["--images", "32", "--epochs", "1"])
    assert has_cnnkern_fused(capsys.readouterr().out, "BatchNorm + ReLU")


def test_an_exported_model_is_the_model(example, tmp_path):
    assert example("export_onnx").main(["--out", str(tmp_path / "model.onnx")]) < 1e-4


def test_a_server_answers_images_and_refuses_what_is_none(example):
    from PIL import Image

    serve_cpu = example("serve_cpu")
    torch.manual_seed(0)
    model = serve_cpu.folded("mobilenet_v2")
    image = Image.effect_noise((300, 260), 64).convert("RGB")
    body = io.BytesIO()
    image.save(body, "PNG")
    with ThreadingHTTPServer(("localhost", 0), serve_cpu.handler(model)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://localhost:{server.server_port}/"
        with urllib.request.urlopen(urllib.request.Request(url, data=body.getvalue()), timeout=60) as answer:
            found = json.load(answer)
        with pytest.raises(urllib.error.HTTPError, match="the body is not an image"):
            urllib.request.urlopen(urllib.request.Request(url, data=b"text"), timeout=60)
        server.shutdown()
    with torch.no_grad():
        expected = model(serve_cpu.PREPARE(image)[None]).softmax(1)[0].topk(5)
    assert found["classes"] == expected.indices.tolist()
    assert found["probabilities"] == pytest.approx(expected.values.tolist())


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
