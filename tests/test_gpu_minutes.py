"""The minutes on a GPU, gone through on the CPU: every section leaves its file, and what came back is published."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_minutes import __main__ as minutes
from benchmarks.gpu_minutes import benches, merge, prepare, sections
from benchmarks.show import published, remarks, tables
from benchmarks.show.titles import TITLES
from benchmarks.suite import files, models
from tests.results import assert_one_line

ROOT = Path(__file__).parent.parent


class Tiny(torch.nn.Sequential):
    def __init__(self):
        super().__init__(
            torch.nn.Conv2d(3, 8, 3, padding=1),
            torch.nn.BatchNorm2d(8),
            torch.nn.ReLU(),
            torch.nn.Conv2d(8, 8, 3, groups=8),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
        )


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """The folder of a dry run of every section, on a model that compiles at once."""
    out = tmp_path_factory.mktemp("minutes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "build", lambda name: Tiny())
        patch.setattr(torch, "compile", lambda model, **options: model)
        assert minutes.main(["--dry-run", "--minutes", "1.5", "--out", str(out)]) == 0
    return out


def test_every_section_leaves_a_file_with_rows(dry_run):
    found = {path.stem: json.loads(path.read_text()) for path in dry_run.iterdir()}
    assert set(found) == {section.name for section in sections.SECTIONS}
    assert found["bandwidth"]["bandwidths"]
    assert set(found["check"]["checks"].values()) == {minutes.CORRECT}
    for name, content in found.items():
        assert content["dry_run"]
        failed = [r for r in content["refused"] if r["status"] in ("failed", "wrong")]
        assert not failed, failed
        if name not in ("check", "bandwidth"):
            assert content["records"], name
    contenders = {r["extra_info"]["contender"] for r in found["compile"]["records"]}
    assert {"eager", "eager, again", "cnnkern", "torch.compile", "torch.compile, converted"} == contenders


def test_what_came_back_is_published(dry_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "RESULTS", tmp_path / "results")
    assert minutes.main(["--merge", str(dry_run)]) == 1
    assert_one_line(capsys.readouterr().err, "it is of a dry run")
    folder = tmp_path / "came back"
    folder.mkdir()
    for path in dry_run.iterdir():
        (folder / path.name).write_text(json.dumps(json.loads(path.read_text()) | {"dry_run": False}))
    assert minutes.main(["--merge", str(folder), "--name", "card"]) == 0
    runs = {path.stem: files.load(path) for path in files.published()}
    assert set(runs) == {"card-models", "card-operators", "card-tf32", "card-kernels"}
    measured = [r for r in runs["card-models"].rows if r.suite == "models"]
    assert {r.dtype for r in measured} == {"bfloat16"}
    assert {r.contender for r in measured} == {"eager", "cnnkern", "torch.compile", "torch.compile, converted"}
    assert all(r.peak_bytes for r in measured)
    for name, run in runs.items():
        published.block.cache_clear()
        monkeypatch.setitem(TITLES, name, f"The run {name}")
        assert published.page(name).startswith(f"# The run {name}\n")
        assert tables.detail_lines(run.rows)
    published.block.cache_clear()


def test_a_run_that_was_cut_off_counts(dry_run, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "RESULTS", tmp_path / "results")
    folder = tmp_path / "cut"
    folder.mkdir()
    content = json.loads((dry_run / "depthwise.json").read_text()) | {"dry_run": False}
    (folder / "depthwise.json").write_text(json.dumps(content))
    (path,) = merge.merge([folder], "cut")
    assert path.stem == "cut-operators"


def test_a_section_that_was_repeated_replaces_the_older_one(dry_run, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "RESULTS", tmp_path / "results")
    folders = {"older": ("depthwise", "layer_norm"), "newer": ("depthwise",)}
    for name, sections_of in folders.items():
        (tmp_path / name).mkdir()
        for section in sections_of:
            content = json.loads((dry_run / f"{section}.json").read_text()) | {"dry_run": False}
            content["where"] |= {"commit": name}
            (tmp_path / name / f"{section}.json").write_text(json.dumps(content))
    (path,) = merge.merge([tmp_path / name for name in folders], "both")
    found = files.load(path).rows
    assert {r.commit for r in found if r.operator == "grouped_conv2d"} == {"newer"}
    assert {r.commit for r in found if r.operator == "layer_norm2d"} == {"older"}
    assert "commits newer, older, " in remarks.origin(found, "")


@pytest.mark.parametrize("content", ["", "[]", '{"schema": 9}', None])
def test_what_cannot_be_merged_is_one_line(content, tmp_path, capsys):
    if content is not None:
        (tmp_path / "models.json").write_text(content)
    assert minutes.main(["--merge", str(tmp_path)]) == 1
    assert_one_line(capsys.readouterr().err, str(tmp_path))


def test_a_section_that_fails_leaves_the_others_their_time(tmp_path, monkeypatch, capsys):
    def fails(scale, seconds):
        raise RuntimeError("no memory")

    chosen = [sections.Section("first", 10, fails), sections.Section("check", 10, lambda *_: sections.Found())]
    assert minutes.measure(chosen, benches.DRY, 0.1, tmp_path, True) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["check.json"]
    assert "first: failed: RuntimeError: no memory" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        minutes.main([])
    assert "--dry-run needs none" in capsys.readouterr().err


def test_models_come_from_torchvision_or_timm(monkeypatch):
    def unavailable(name):
        raise models.Unavailable("no torchvision")

    monkeypatch.setattr(models, "build", unavailable)
    timm = pytest.importorskip("timm")
    assert all(name in timm.list_models() for _, name in benches.MODELS.values())
    monkeypatch.setattr(timm, "create_model", lambda name: name)
    assert benches.build("mobilenet_v2") == "mobilenetv2_100"


def test_any_number_of_pictures(monkeypatch):
    monkeypatch.setattr(models, "photographs", lambda count, size: torch.arange(count).view(-1, 1, 1, 1))
    assert benches.pictures(40, 8).flatten().tolist() == [*range(16), *range(16), *range(8)]


def test_what_is_missing_to_prepare_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(prepare.shutil, "which", lambda name: None)
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert minutes.main(["--prepare", str(tmp_path / "out")]) == 1
    assert_one_line(capsys.readouterr().err, "--prepare needs Python 3.12")


def test_sources_are_those_of_the_checkout_without_what_was_built(tmp_path):
    tree = prepare.sources(tmp_path)
    assert (tree / "pyproject.toml").read_text() == (ROOT / "pyproject.toml").read_text()
    assert not list(tree.rglob("*.so"))
    assert (tree / "benchmarks" / "gpu_minutes" / "__main__.py").exists()
    assert Path(tree / "csrc" / "cuda").is_dir()
