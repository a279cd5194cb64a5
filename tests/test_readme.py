"""The Python code in the documents runs, the tools accept the commands, and links have targets."""

import argparse
import importlib
import importlib.util
import re
import shlex
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

import pytest

import cnnkern
from cnnkern import cli

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```python(?P<options>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
ELSEWHERE = {"docs/triton.md": "tests/test_triton_docs.py runs it, through Triton's interpreter"}
COMMAND = re.compile(
    r'make (?P<target>bench|test) ARGS="(?P<args>[^"]*)"'
    r"|(?P<tool>(?:cnnkern|python -m benchmarks(?:\.\w+)+)(?: [^`\n#]*)?)(?=`|$)"
)
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


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_tests_that_documents_name_exist(path):
    for file, test in re.findall(r"\b(tests/\w[\w/]*\.py)(?:::(\w+))?", path.read_text()):
        assert (ROOT / file).is_file(), file
        assert not test or f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"


# Pages with rules of dispatch, and how many tests they name at least.
RULES = {"kernels.md": 3, "layer_norm.md": 4, "grouped_conv.md": 7, "fold.md": 3, "convert.md": 2}


@pytest.mark.parametrize("page", RULES)
def test_rules_of_dispatch_name_their_tests(page):
    assert len(re.findall(r"tests/\w+\.py::test_\w+", (ROOT / "docs" / page).read_text())) >= RULES[page]


def commands():
    """`make bench` and `make test` with arguments; what stands in backquotes for a shell, or in a block of its own."""
    found = set()
    for path in DOCUMENTS:
        for match in COMMAND.finditer(path.read_text()):
            before = path.read_text()[: match.start()].rpartition("\n")[2]
            if match["tool"] is None or before.endswith("`") or not before.strip():
                found.add(f"cnnkern bench {match['args']}" if match["target"] == "bench" else match[0])
    return sorted(found)


class _Parsed(Exception):
    pass


@pytest.mark.parametrize("command", commands())
def test_commands_are_taken_as_printed(command, monkeypatch, tmp_path, capsys):
    """Up to the point where they would do something."""

    def parse_and_stop(self, arguments=None, namespace=None):
        _, others = self.parse_known_args(arguments, namespace)
        assert not others, f"{self.prog} does not know {others}"
        raise _Parsed

    for file in ("before.csv", "OLD.csv", "A.csv", "B.csv", "FILE", "OUT", "DIR"):
        command = re.sub(rf"(?<=\s){re.escape(file)}(?=\s|$)", str(tmp_path / file), command)
    words = shlex.split(command)
    if words[0] == "make":
        for word in shlex.split(words[2].removeprefix("ARGS=")):
            assert not word.startswith("tests/") or (ROOT / word.partition("::")[0]).exists(), word
        return
    main, arguments = cli.main, words[1:]
    if arguments[:1] == ["bench"] and cli.names_model(arguments[1:]):
        main, arguments = importlib.import_module("cnnkern.measure.command").parse, arguments[1:]
    elif arguments[:1] == ["bench"]:  # what the command hands the rest to
        main, arguments = importlib.import_module("benchmarks.__main__").main, words[2:]
    elif words[0] == "python":
        package = importlib.util.find_spec(words[2]).submodule_search_locations
        main, arguments = importlib.import_module(words[2] + ".__main__" * bool(package)).main, words[3:]
    if not arguments or arguments[-1] == "--help" or arguments in (["doctor"], ["zoo"], ["train"]):
        return  # nothing to take
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(_Parsed):
        main(arguments)


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


FIGURES = sorted((ROOT / "docs" / "images").glob("*.svg"))


@pytest.mark.parametrize("figure", FIGURES, ids=lambda path: path.stem)
def test_a_figure_is_shown_named_and_has_colours_for_light_and_dark(figure):
    root = ElementTree.parse(figure).getroot()
    assert root.findtext("{*}title")
    assert "prefers-color-scheme: dark" in root.findtext("{*}style", "")
    assert any(f"(images/{figure.name})" in path.read_text() for path in DOCUMENTS)


def test_the_version_stands_in_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", cnnkern.__version__)
    assert metadata.version("cnnkern").partition("+")[0] == cnnkern.__version__  # behind it, the torch that it is for
    version = re.escape(cnnkern.__version__)
    assert not re.search(rf'version\s*=\s*"{version}"', (ROOT / "pyproject.toml").read_text())
    assert re.search(rf"^## (Unreleased: )?{version}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
