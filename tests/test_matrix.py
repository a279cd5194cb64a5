"""What tools/matrix.py writes of a release of torch, with environments and builds that are not made."""

import sys

import pytest

from tests.child import run_child
from tests.programs import ROOT, from_tools

tool = from_tools("matrix")
DOCUMENT = f"before\n\n{tool.BEGIN}\n\n{tool.END}\n\nafter\n"
ROW = ["2.11.0", "3.12.1", "3.6.0", "works", "100 s", "9 pass", "works"]


@pytest.fixture
def document(tmp_path, monkeypatch):
    path = tmp_path / "install.md"
    path.write_text(DOCUMENT)
    monkeypatch.setattr(tool, "DOCUMENT", path)
    return path


def test_the_document_of_the_repository_has_a_place_for_the_table():
    text = (ROOT / "docs" / "install.md").read_text()
    assert tool.with_rows(text, tool.rows_of(text)) == text
    assert set(tool.rows_of(text)) <= set(tool.RELEASES)


def test_rows_are_exchanged_and_stand_in_the_order_of_releases(document, monkeypatch, capsys):
    monkeypatch.setattr(tool, "found", lambda release, *others: iter([[f"{release}.0", *ROW[1:]]]))
    assert tool.main(["2.11", "2.9:3.10", "2.10"]) == 0
    assert list(tool.rows_of(document.read_text())) == ["2.9", "2.10", "2.11"]
    worse = [*ROW[1:5], "1 of 9 fail", "works"]
    monkeypatch.setattr(tool, "found", lambda release, *others: iter([[f"{release}.1", *worse]]))
    assert tool.main(["2.10"]) == 1
    rows = tool.rows_of(document.read_text())
    assert [row[0] for row in rows.values()] == ["2.9.0", "2.10.1", "2.11.0"]
    assert document.read_text().startswith("before\n")
    assert document.read_text().endswith("\nafter\n")


def test_a_build_that_is_broken_off_leaves_what_is_known(document, monkeypatch):
    def break_off(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "with_torch", lambda folder, *others: folder / "bin" / "python")
    monkeypatch.setattr(tool, "run", lambda *command, **options: type("Done", (), {"stdout": "2.9.1 3.10.13 3.5.1"}))
    for name in ("copy_sources", "build_wheel", "install_wheel"):
        monkeypatch.setattr(tool, name, lambda *arguments, **settings: None)
    monkeypatch.setattr(tool, "built", break_off)
    with pytest.raises(KeyboardInterrupt):
        tool.main(["2.9"])
    assert tool.rows_of(document.read_text())["2.9"] == ["2.9.1", "3.10.13", "3.5.1", "works", *["not tried"] * 3]


def test_a_release_that_cannot_be_had_is_a_sentence_and_no_row(document, monkeypatch, capsys):
    def refuse(*arguments):
        raise tool.Failed("there is no python3.15 on the path")

    monkeypatch.setattr(tool, "with_torch", refuse)
    assert tool.main(["2.15:3.15"]) == 1
    assert capsys.readouterr().err == "cnnkern: torch 2.15: there is no python3.15 on the path\n"
    assert document.read_text() == DOCUMENT


def test_cuda_kernels_are_built_where_the_package_index_has_their_compiler(document, capsys):
    assert tool.main(["--cuda", "2.10"]) == 1
    assert capsys.readouterr().err == "cnnkern: torch 2.10: PyPI has no CUDA compiler for it\n"
    assert tool.nvcc_for("2.11") == tool.nvcc_for("2.15") != ()
    assert document.read_text() == DOCUMENT


@pytest.mark.parametrize(
    ("said", "verdict"), [("9 passed, 2 skipped in 1.0s", "9 pass"), ("3 failed, 9 passed in 1.0s", "3 of 12 fail")]
)
def test_the_verdict_of_the_tests_is_what_pytest_counted(monkeypatch, tmp_path, said, verdict):
    def run(*command, **options):
        if "failed" in said:
            raise tool.Failed(said)
        return type("Done", (), {"stdout": said})

    monkeypatch.setattr(tool, "run", run)
    assert tool.operators_tests(tmp_path / "bin" / "python") == verdict


def test_no_test_at_all_is_no_verdict(monkeypatch, tmp_path):
    monkeypatch.setattr(tool, "run", lambda *command, **options: type("Done", (), {"stdout": "5 deselected in 1.0s"}))
    with pytest.raises(tool.Failed, match="no test has passed"):
        tool.operators_tests(tmp_path / "bin" / "python")


def test_a_build_takes_the_time_of_its_compilers():
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    started_by_another = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}], check=True)"
    before = tool.processor_time()
    run_child([sys.executable, "-c", started_by_another], check=True)
    assert tool.processor_time() - before >= 0.3
