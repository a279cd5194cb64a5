"""Shows a saved result, or what has changed since another one.

`python -m benchmarks.show.report FILE` prints tables, --all every measurement, --markdown tables for a document; --html
OUT writes the page that a run leaves. --compare OLD says what has become faster or slower, and fails on a regression.
"""

import argparse
import sys
from pathlib import Path

from ..suite import files
from . import comparison, tables, terminal


def agree(first: Path, second: Path) -> int:
    """Prints the run-to-run variation of two runs of the same code. Returns the exit status."""
    try:
        found = comparison.agreement(*(files.load(path).rows for path in (first, second)))
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    terminal.show_agreement(found, terminal.console())
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.show.report", description=__doc__)
    parser.add_argument("file", type=Path, help="the file of a run")
    parser.add_argument("--all", action="store_true", help="also print every measurement, in wide lines")
    parser.add_argument("--markdown", action="store_true", help="print tables in Markdown, without single measurements")
    parser.add_argument("--html", type=Path, metavar="OUT", help="write the page to OUT")
    parser.add_argument("--compare", type=Path, metavar="OLD", help="the file of the run to compare with")
    arguments = parser.parse_args(argv)
    try:
        run = files.load(arguments.file)
        found, created = run.rows, run.created
        changes = comparison.compare(files.load(arguments.compare).rows, found) if arguments.compare else None
        if arguments.html:
            from . import page

            files.write(arguments.html, page.render(found, created, changes))
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"benchmarks: cannot write {arguments.html}: {error.strerror or error}", file=sys.stderr)
        return 1
    if arguments.markdown:
        print(tables.markdown(found, created), end="")
    elif not arguments.html and not changes:
        terminal.show(found, created, terminal.console(), arguments.all)
    if changes:
        terminal.show_changes(changes, terminal.console())
    return int(changes is not None and changes.is_regression)


if __name__ == "__main__":
    sys.exit(main())
