"""What `make wheel` refuses, on archives made here. Building and installing is `make wheel` itself, which CI runs."""

import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.child import run_child
from tests.programs import from_tools

ROOT = Path(__file__).resolve().parent.parent


tool = from_tools("wheel")

PACKAGE = (
    *("cnnkern/_C.cpython-311-x86_64-linux-gnu.so", "cnnkern/py.typed", "cnnkern/triton_kernels/bn_act.py"),
    *("cnnkern-0.1.0.dist-info/METADATA", "cnnkern-0.1.0.dist-info/licenses/LICENSE"),
    *("cnnkern/benchmarks/suite/worker.py", "cnnkern/benchmarks/show/report.html.jinja", "cnnkern/_built_for.py"),
)


def wheel(folder, names):
    path = folder / "cnnkern-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    return path


def test_a_whole_wheel_passes(tmp_path):
    tool.check_wheel(wheel(tmp_path, PACKAGE))


@pytest.mark.parametrize("missing", [0, 1, 2, 4, 5, 6, 7])
def test_a_wheel_without_a_part_is_refused(missing, tmp_path):
    with pytest.raises(tool.Failed, match="has no"):
        tool.check_wheel(wheel(tmp_path, PACKAGE[:missing] + PACKAGE[missing + 1 :]))


@pytest.mark.parametrize("stray", ["tests/test_add.py", "benchmarks/__main__.py", "cnnkern.py"])
def test_a_wheel_with_more_than_the_package_is_refused(stray, tmp_path):
    with pytest.raises(tool.Failed, match="outside the package"):
        tool.check_wheel(wheel(tmp_path, (*PACKAGE, stray)))


def test_a_wheel_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "LARGEST", 500)
    with pytest.raises(tool.Failed, match="and PyPI takes 0 MB: build several, each with"):
        tool.check_wheel(wheel(tmp_path, PACKAGE))


def test_a_sample_is_compiled_for_what_a_wheel_is(capsys):
    assert tool.code_for("8.0;12.0+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    assert tool.main(["--sample", "csrc/cpu/add_relu.cpp"]) == 1
    said = "cnnkern: --sample takes one of the sources csrc/cuda/**/*.cu, got csrc/cpu/add_relu.cpp\n"
    assert capsys.readouterr().err == said


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    root = tmp_path / "checkout"
    (root / "csrc").mkdir(parents=True)
    for name in ("setup.py", "csrc/ops.cpp", ".gitignore"):
        (root / name).write_text(name)
    run_child(["git", "init", "-q", root], check=True)
    monkeypatch.setattr(tool, "ROOT", root)
    return root


def sdist(root, names):
    path = root.parent / "cnnkern-0.1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            archive.add(root / name, f"cnnkern-0.1.0/{name}")
    return path


def test_a_source_distribution_has_every_file_as_it_is(checkout, tmp_path):
    tree = tool.check_sdist(sdist(checkout, ["setup.py", "csrc/ops.cpp"]), tmp_path / "a")
    assert (tree / "setup.py").read_text() == "setup.py"
    with pytest.raises(tool.Failed, match=r"lacks or changes 1 files: csrc/ops\.cpp"):
        tool.check_sdist(sdist(checkout, ["setup.py"]), tmp_path / "b")
    made = sdist(checkout, ["setup.py", "csrc/ops.cpp"])
    (checkout / "setup.py").write_text("changed since")
    with pytest.raises(tool.Failed, match=r"lacks or changes 1 files: setup\.py"):
        tool.check_sdist(made, tmp_path / "c")


def test_a_command_that_fails_says_what_it_said(tmp_path):
    with pytest.raises(tool.Failed, match=r"ended with status 3, not 0:\nit broke"):
        tool.run("sh", "-c", "echo it broke; exit 3", cwd=tmp_path)
    assert tool.run("sh", "-c", "exit 3", cwd=tmp_path, code=3).returncode == 3


def test_a_full_disk_is_one_line(checkout, monkeypatch, capsys):
    (checkout / "cnnkern").mkdir()
    (checkout / "cnnkern" / "__init__.py").write_text('__version__ = "0.1.0"\n')
    monkeypatch.setattr(tool, "DIST", checkout / "dist")

    def full(*arguments):
        with open("/dev/full", "w") as file:
            file.write("a wheel")

    monkeypatch.setattr(tool, "build", full)
    assert tool.main([]) == 1
    assert capsys.readouterr().err == "cnnkern: [Errno 28] No space left on device\n"
