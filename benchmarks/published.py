"""Tables of published results inside documents, generated: `python -m benchmarks.published`.

A document asks for them between two comments:

    <!-- results: cpu-resnet50 summary lost -->
    ... what stands here is replaced ...
    <!-- end of results -->

`cpu-resnet50` is a file of benchmarks/results/published; the words behind it name PARTS. The command rewrites README.md
and docs/, --check says which documents differ and fails.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from benchmarks import report, rows, tables
from benchmarks.machine import ROOT
from benchmarks.rows import Row

BLOCK = re.compile(r"(<!-- results: (\S+)((?: [a-z]+)+) -->\n)(.*?)(<!-- end of results -->)", re.DOTALL)
OPENINGS = re.compile(r"<!-- results:")


def _summary(found: list[Row], created: str) -> str:
    parts = []
    for malloc in tables.settings(found):
        header, lines = tables.summary(found, malloc)
        if lines:
            title = f"Times as fast as eager, share of memory bandwidth ({malloc} malloc)"
            parts.append(f"**{title}**\n\n{tables.markdown_table(header, lines)}")
    return "\n\n".join(parts)


def _models(found: list[Row], created: str) -> str:
    return tables.markdown_table(*tables.model_table(found))


def _overhead(found: list[Row], created: str) -> str:
    return tables.markdown_table(tables.OVERHEAD, tables.overhead_lines(found))


def _lost(found: list[Row], created: str) -> str:
    lines = tables.lost_lines(found)
    head = f"{len(lines)} of {len(tables.ours(found))} rows are slower than eager"
    return "\n".join([head + (":\n" if lines else "."), *(f"- {line}" for line in lines)])


def _origin(found: list[Row], created: str) -> str:
    return f"Measured on {tables.origin(found, created)}; {tables.bandwidth_line(found)}."


PARTS: dict[str, Callable[[list[Row], str], str]] = {
    "summary": _summary,
    "models": _models,
    "overhead": _overhead,
    "lost": _lost,
    "origin": _origin,
}


def documents() -> Iterator[Path]:
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").rglob("*.md"))


@cache
def block(name: str, parts: tuple[str, ...]) -> str:
    """The Markdown of these parts of a published result. Raises ValueError where one of them is not there."""
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"no part {unknown[0]!r} of a result; there are {', '.join(PARTS)}")
    found, created = report.load(rows.RESULTS / "published" / f"{name}.json")
    return "\n\n".join(PARTS[part](found, created) for part in parts)


def generated(text: str) -> str:
    """The document with every block as the published results have it."""
    if len(OPENINGS.findall(text)) != len(BLOCK.findall(text)):
        raise ValueError("a block of results has no end, or is not `<!-- results: NAME PART ... -->`")
    return BLOCK.sub(lambda m: f"{m[1]}\n{block(m[2], tuple(m[3].split()))}\n\n{m[5]}", text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.published", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, name the documents that differ")
    arguments = parser.parse_args(argv)
    different = 0
    for path in documents():
        old = path.read_text()
        try:
            new = generated(old)
        except ValueError as error:
            print(f"benchmarks: {path.relative_to(ROOT)}: {error}", file=sys.stderr)
            return 1
        if new != old:
            different += 1
            print(f"{path.relative_to(ROOT)}: {'differs' if arguments.check else 'written'}")
            if not arguments.check:
                rows.write(path, new)
    return int(arguments.check and different > 0)


if __name__ == "__main__":
    sys.exit(main())
