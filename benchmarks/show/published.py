"""Tables of published results inside documents, generated: `python -m benchmarks.show.published`.

A document asks for them between two comments:

    <!-- results: cpu-resnet50 summary lost -->
    ... what stands here is replaced ...
    <!-- end of results -->

`cpu-resnet50` is a file of benchmarks/results/published; the words behind it name PARTS, or are `agreement`, which
compares the file with `cpu-resnet50-again`, a second run of the same. The command rewrites README.md and docs/,
--check says which documents differ and fails.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from ..suite import rows
from ..suite.place import ROOT
from ..suite.rows import Row
from . import breakdown, comparison, tables

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
    ours = tables.ours(found)
    compared = [r for r in ours if r.ratio_to_compile is not None]
    parts = [_list(tables.lost_lines(found), f"{{}} of {len(ours)} rows are slower than eager")]
    if compared:
        head = f"{{}} rows are slower than torch.compile, which was timed beside {len(compared)} of ours"
        parts.append(_list(tables.lost_to_compile(found), head))
    return "\n\n".join(parts)


def _list(lines: list[str], head: str) -> str:
    return "\n".join([head.format(len(lines)) + (":\n" if lines else "."), *(f"- {line}" for line in lines)])


def _agreement(found: list[Row], again: list[Row]) -> str:
    agreement = comparison.agreement(found, again)
    table = tables.markdown_table(comparison.AGREEMENT, list(agreement.lines()))
    worst = "\n".join(f"- {line}" for line in agreement.worst_lines())
    return f"{agreement.verdict()}.\n\n{table}\n\nFurthest apart:\n\n{worst}"


def _origin(found: list[Row], created: str) -> str:
    return f"Measured on {tables.origin(found, created)}; {tables.bandwidth_line(found)}."


def _table(make: Callable[[list[Row]], breakdown.Table]) -> Callable[[list[Row], str], str]:
    return lambda found, created: tables.markdown_table(*make(found))


PARTS: dict[str, Callable[[list[Row], str], str]] = {
    "summary": _summary,
    "models": _models,
    "overhead": _overhead,
    "lost": _lost,
    "origin": _origin,
    "roofline": _table(breakdown.roofline),
    "sizes": _table(breakdown.sizes),
    "kinds": _table(breakdown.kinds),
    "malloc": _table(breakdown.malloc),
}
AGREEMENT, AGAIN = "agreement", "-again"  # a part that needs a second run, and what its name ends with


def documents() -> Iterator[Path]:
    assert ROOT is not None, "the documents are in a checkout"
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").rglob("*.md"))


@cache
def block(name: str, parts: tuple[str, ...]) -> str:
    """The Markdown of these parts of a published result. Raises ValueError where one of them is not there."""
    if unknown := [part for part in parts if part not in (*PARTS, AGREEMENT)]:
        raise ValueError(f"no part {unknown[0]!r} of a result; there are {', '.join((*PARTS, AGREEMENT))}")

    def load(name: str) -> tuple[list[Row], str]:
        return rows.load(rows.RESULTS / "published" / f"{name}.json")

    found, created = load(name)
    made = [
        _agreement(found, load(name + AGAIN)[0]) if part == AGREEMENT else PARTS[part](found, created) for part in parts
    ]
    return "\n\n".join(made)


def generated(text: str) -> str:
    """The document with every block as the published results have it."""
    if len(OPENINGS.findall(text)) != len(BLOCK.findall(text)):
        raise ValueError("a block of results has no end, or is not `<!-- results: NAME PART ... -->`")
    return BLOCK.sub(lambda m: f"{m[1]}\n{block(m[2], tuple(m[3].split()))}\n\n{m[5]}", text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.show.published", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, name the documents that differ")
    arguments = parser.parse_args(argv)
    if ROOT is None:
        parser.error("the documents are in a checkout of the repository, and this is an installed package")
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
