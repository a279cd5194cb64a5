"""The Python in the documents runs as printed, links between them lead somewhere, the version stands in one place."""

import re
from importlib import metadata
from pathlib import Path

import pytest

import cnnkern

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```python(?P<options>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
ELSEWHERE = {"docs/triton.md": "tests/test_triton_docs.py runs it, through Triton's interpreter"}
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)(#[^)\s]*)?\)")


def blocks():
    for path in DOCUMENTS:
        for match in FENCE.finditer(path.read_text()):
            line = path.read_text()[: match.start()].count("\n") + 1
            name = path.relative_to(ROOT).as_posix()
            marks = [pytest.mark.skip(reason=ELSEWHERE[name])] if name in ELSEWHERE else []
            yield pytest.param(match["options"], match["code"], id=f"{name}:{line}", marks=marks)


@pytest.mark.parametrize(("options", "code"), list(blocks()))
def test_code_runs_as_printed(options, code):
    assert not options, (
        f"{options!r}: expected nothing behind ```python, which the site's Markdown would not read as code"
    )
    exec(compile(code, "document", "exec"), {"__name__": "document"})


def test_the_front_page_converts_and_reverts(capsys):
    code = next(m["code"] for m in FENCE.finditer((ROOT / "README.md").read_text()) if "convert" in m["code"])
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert "9 BatchNorm + ReLU" in capsys.readouterr().out
    assert not any("cnnkern" in type(m).__module__ for m in names["model"].modules())


def test_there_are_no_blocks_without_a_language_that_hold_python():
    """Python in an indented block would not be run."""
    for path in DOCUMENTS:
        for line in path.read_text().splitlines():
            assert not re.match(r"    (import |from \w+ import |\w+ = cnnkern\.|print\()", line), f"{path.name}: {line}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_between_documents_lead_somewhere(path):
    for target, _ in LINK.findall(path.read_text()):
        assert (path.parent / target).exists(), target


def test_the_version_stands_in_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", cnnkern.__version__)
    assert metadata.version("cnnkern") == cnnkern.__version__
    version = re.escape(cnnkern.__version__)
    assert not re.search(rf'version\s*=\s*"{version}"', (ROOT / "pyproject.toml").read_text())
    assert re.search(rf"^## (Unreleased: )?{version}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
