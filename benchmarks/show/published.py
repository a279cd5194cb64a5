"""Published results inside documents, generated: `python -m benchmarks.show.published`.

A document asks for tables between two comments:

    <!-- results: cpu-resnet50 operators models -->
    ... this is replaced ...
    <!-- end of results -->

`cpu-resnet50` is a file of benchmarks/results/published; the words after it are names of PARTS. `gains` is not a
file, but README's table, made from several. Each file also gets a page of its own, docs/runs/NAME.md, with every part,
and a line in the navigation of mkdocs.yml. Their titles are in titles.py.
The command rewrites README.md, docs/ and mkdocs.yml; --check says which of them differ, and fails.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from ..suite import files
from ..suite.files import Run
from ..suite.place import ROOT
from ..suite.rows import Row
from . import breakdown, gains, means, remarks, tables
from .titles import TITLES, title

BLOCK = re.compile(r"(<!-- results: (\S+)((?: [a-z-]+)+) -->\n)(.*?)(<!-- end of results -->)", re.DOTALL)
OPENINGS = re.compile(r"<!-- results:")
PAGES = "docs/runs"
NAVIGATION = re.compile(r"(?<= - Every run:\n)(?: +- .*runs/.*\n)*")  # of mkdocs.yml


def _means(run: Run) -> str:
    parts = []
    for malloc in tables.settings(run.rows):
        header, lines = tables.summary(run.rows, malloc)
        if lines:
            title = f"Speedup over eager, share of memory bandwidth ({malloc} malloc)"
            parts.append(f"**{title}**\n\n{tables.markdown_table(header, lines)}")
    return "\n\n".join(parts)


def _every_model(run: Run) -> str:
    return _table(*tables.model_table(run.rows))


def _overhead(run: Run) -> str:
    return _table(tables.OVERHEAD, tables.overhead_lines(run.rows))


def _lost(run: Run) -> str:
    counted = means.ranked(run.rows)
    if not counted:
        return ""
    parts = [_list(remarks.lost_lines(run.rows), f"{{}} of {len(counted)} rows that count are slower than eager")]
    compared = [r for r in counted if r.ratio_to_compile is not None]
    if compared:
        head = f"{{}} rows are slower than torch.compile, which was timed for {len(compared)} of cnnkern's rows"
        parts.append(_list(remarks.lost_to_compile(run.rows), head))
    noisy = means.left_out(run.rows)
    if noisy:
        parts.append(f"{len(noisy)} rows are left out: they are too noisy, or other processes used their cores.")
    return "\n\n".join(parts)


def _list(lines: list[str], head: str) -> str:
    return "\n".join([head.format(len(lines)) + (":\n" if lines else "."), *(f"- {line}" for line in lines)])


def _origin(run: Run) -> str:
    said = f"Measured on {remarks.origin(run.rows, run.created)}; {remarks.bandwidth_line(run.rows)}."
    if run.out_of_place:
        names = ", ".join(run.out_of_place)
        said += (
            f" Measured before eager was in place: in rows of {names} each of eager's operators returns a new tensor."
        )
    return said


def _table(header: list[str], lines: list[list[str]]) -> str:
    return tables.markdown_table(header, lines) if lines else ""


def _of(make: Callable[[list[Row]], breakdown.Table]) -> Callable[[Run], str]:
    return lambda run: _table(*make(run.rows))


PARTS: dict[str, Callable[[Run], str]] = {
    "operators": lambda run: _table(*breakdown.operators(run.rows, run.out_of_place)),
    "models": _of(breakdown.models),
    "ways": _of(breakdown.ways),
    "slower": lambda run: _table(*breakdown.slower(run.rows)),
    "means": _means,
    "every-model": _every_model,
    "overhead": _overhead,
    "kinds": _of(breakdown.kinds),
    "kernels": _of(breakdown.kernels),
    "sizes": _of(breakdown.sizes),
    "malloc": _of(breakdown.malloc),
    "roofline": _of(breakdown.roofline),
    "lost": _lost,
    "origin": _origin,
}
# The parts of a run's page and their headings; empty parts are left out.
HEADINGS = {
    "operators": "Operators",
    "models": "Models",
    "kernels": "Time of all kernels of a kind in one step",
    "slower": "Slower than eager, by operator",
    "means": "Every network",
    "every-model": "Every model",
    "overhead": "Call overhead, on a tensor of one kilobyte",
    "kinds": "Grouped convolutions by kind",
    "sizes": "Layer norms by size",
    "malloc": "Effect of tuned malloc",
    "roofline": "Roofline: rows with a low share of the bandwidth",
    "lost": "Every row that is slower",
}


def documents() -> Iterator[Path]:
    """Documents that may have blocks. The pages of runs are generated as a whole."""
    assert ROOT is not None, "the documents are in a checkout"
    yield ROOT / "README.md"
    yield from sorted(path for path in (ROOT / "docs").rglob("*.md") if path.parent != ROOT / PAGES)


@cache
def block(name: str, parts: tuple[str, ...]) -> str:
    """The Markdown of these parts of a published result. Raises ValueError for an unknown one."""
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"no part {unknown[0]!r} of a result; there are {', '.join(PARTS)}")
    if name == gains.NAME:
        return _table(*gains.table())
    run = files.load(files.RESULTS / "published" / f"{name}{files.ENDING}")
    return "\n\n".join(PARTS[part](run) for part in parts)


def generated(text: str) -> str:
    """The document with every block generated from the published results."""
    if len(OPENINGS.findall(text)) != len(BLOCK.findall(text)):
        raise ValueError("a block of results has no end, or is not `<!-- results: NAME PART ... -->`")
    return BLOCK.sub(lambda m: f"{m[1]}\n{block(m[2], tuple(m[3].split()))}\n\n{m[5]}", text)


def page(name: str) -> str:
    """The Markdown of the page of a published result."""
    found = {heading: text for part, heading in HEADINGS.items() if (text := block(name, (part,)))}
    said = block(name, ("origin",))
    made = (
        f"Generated by `python -m benchmarks.show.published` from `benchmarks/results/published/{name}{files.ENDING}`; "
        "[how to read it](../results.md#how-to-read-a-figure)."
    )
    parts = [f"# {title(name)}", f"{made} {said}", *(f"## {heading}\n\n{text}" for heading, text in found.items())]
    return "\n\n".join(parts) + "\n"


def navigation(text: str) -> str:
    """mkdocs.yml with a line for the page of each published result."""
    if not NAVIGATION.search(text):
        raise ValueError("no `- Every run:` in the navigation")
    titles = {file.stem: title(file.stem).replace("`", "") for file in files.published()}
    lines = [f'          - "{titles[name]}": runs/{name}.md\n' for name in TITLES if name in titles]
    return NAVIGATION.sub(lambda m: "".join(lines), text)


def wanted() -> Iterator[tuple[Path, str]]:
    """Every document and page, with its expected text."""
    assert ROOT is not None, "the documents are in a checkout"
    for path in documents():
        try:
            yield path, generated(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path.relative_to(ROOT)}: {error}") from error
    site = ROOT / "mkdocs.yml"
    yield site, navigation(site.read_text())
    for file in files.published():
        yield ROOT / PAGES / f"{file.stem}.md", page(file.stem)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.show.published", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, name the documents that differ")
    arguments = parser.parse_args(argv)
    if ROOT is None:
        parser.error("the documents are in a checkout of the repository, and this is an installed package")
    try:
        texts = dict(wanted())
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    stale = [path for path in (ROOT / PAGES).glob("*.md") if path not in texts]
    different = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    for path in [*different, *stale]:
        print(f"{path.relative_to(ROOT)}: {'differs' if arguments.check else 'written'}")
        if not arguments.check:
            path.parent.mkdir(exist_ok=True)
            files.write(path, texts[path]) if path in texts else path.unlink()
    return int(arguments.check and bool(different or stale))


if __name__ == "__main__":
    sys.exit(main())
