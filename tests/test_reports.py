"""Reports of a run: tables, the page, and what has changed between two runs."""

import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import __main__ as driver
from benchmarks.show import chart, comparison, figures, gains, means, page, published, remarks, report, tables, terminal
from benchmarks.show.titles import TITLES, title
from benchmarks.suite import files, rows
from tests.results import assert_one_line, row, some_rows

ROOT = Path(__file__).resolve().parent.parent


def test_means_are_geometric_per_network_and_layout():
    found = {(m.contender, m.layout): m for m in means.means(some_rows())}
    assert found["cnnkern", "contiguous"].ratio == pytest.approx(1.0)  # 2x and 0.5x
    assert found["cnnkern", "contiguous"].shapes == 2
    assert found["cnnkern", "channels_last"].ratio == pytest.approx(4.0)
    assert found["eager", "contiguous"].ratio == 1.0


def test_rows_that_are_lost_are_marked_and_listed():
    (line,) = remarks.lost_lines(some_rows())
    assert line == "bn_act net 4x4 training contiguous tuned malloc: 4.0 ms, 0.50x"
    assert sum(cells[-1].endswith("lost") for cells in tables.detail_lines(some_rows())) == 1


def test_markdown_is_made_of_the_saved_rows(tmp_path, capsys):
    file = tmp_path / "result.csv"
    file.write_text(files.dumps(files.Run(some_rows(), "2000-01-01 00:00 UTC")))
    assert report.main([str(file), "--markdown"]) == 0
    text = capsys.readouterr().out
    assert "| bn_act | net | 2 | training | contiguous | tuned | cnnkern | " in text
    assert "| bn_act | net | 1 | training | channels_last | tuned | cnnkern | 84% | 4.00x |" in text
    assert "| resnet18 | 2x2 | training | contiguous | tuned | 2.0 ms | 1000.0 | 1.00x | 0% |" in text
    assert "- bn_act net 4x4 training contiguous tuned malloc: 4.0 ms, 0.50x" in text
    assert "- torch.compile not available: no compiler (bn_act net 2x2" in text
    assert "and 1 more" in text
    for words in ("some-machine", "threads: 1", torch.__version__, "abc1234-dirty", "2000-01-01", "read 10.0"):
        assert words in text
    for table in re.findall(r"(?:^\|.*\|\n?)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.strip().splitlines()}) == 1, table


def test_details_name_every_measured_row():
    out = io.StringIO()
    terminal.show(some_rows(), "today", Console(file=out, width=terminal.WIDTH), details=True)
    text = out.getvalue()
    assert text.count("tuned") >= len(tables.detail_lines(some_rows()))
    for words in ("Every measurement", "Slower than eager:", "Not timed:", "some-machine", "0.50x lost"):
        assert words in text


PUBLISHED = files.published()


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda path: path.stem)
def test_published_tables_fit_into_100_columns(file, capsys):
    assert report.main([str(file)]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= terminal.WIDTH
    assert not re.search(r"x~? +\d+$", printed, re.MULTILINE), "a share without its %: the table is cropped"
    many = len(means.ranked(files.load(file).rows)) > 2 * terminal.RANKED
    ranked = ("Best rows", "Worst rows") if many else ()
    for words in (*ranked, "left out for noise", "memory bandwidth"):
        assert words in " ".join(printed.split()), words


def test_summary_has_a_line_for_each_contender_and_a_column_for_each_mode_and_layout():
    header, lines = tables.summary(some_rows(), "tuned")
    assert header == ["operator", "network (shapes)", "implementation", "training contiguous", "training channels last"]
    assert lines == [
        ["bn_act", "net (2)", "cnnkern", "1.00x 21%", figures.MISSING],
        ["bn_act", "net (1)", "cnnkern", figures.MISSING, "4.00x 84%"],
    ]
    assert tables.summary(some_rows(), "default")[1] == []


def test_the_picture_shows_means_of_what_counts_and_is_in_place():
    noisy = [replace(r, noise=0.5) if r.contender == "cnnkern" else r for r in row(seconds=1e-4, shape="4x4")]
    found = (
        row(seconds=1e-3) + row(seconds=1e-3, operator="add_relu") + noisy + row(network="net batch 1", seconds=9e-3)
    )
    run = files.Run(found, "today", out_of_place=("add_relu",))
    assert chart.bars(run, "operators") == {"bn_act": {"cnnkern": {"training": 2.0}}}
    image = chart.draw({title: chart.bars(run, suite) for title, _, suite in chart.PANELS}, "dark")
    assert chart.described(image)["Operators, CPU"] == {"bn_act": {"cnnkern": {"training": 2.0}}}


@pytest.mark.parametrize("theme", chart.THEMES)
def test_the_picture_of_the_front_page_is_current(theme):
    image = (ROOT / chart.FOLDER / f"speed-{theme}.png").read_bytes()
    assert chart.described(image) == chart.everything(), "`python -m benchmarks.show.chart` makes it"
    width, height = (int.from_bytes(image[at : at + 4], "big") for at in (16, 20))
    assert width <= 1200
    assert height <= 700
    assert f"docs/images/speed-{theme}.png" in (ROOT / "README.md").read_text()


def test_published_results_are_small():
    folder = ROOT / "benchmarks" / "results" / "published"
    assert {path.suffix for path in folder.iterdir()} == {".csv"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3e6


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda path: path.stem)
def test_published_files_are_what_their_rows_are_written_as(file):
    assert files.dumps(files.load(file)) == file.read_text()


def test_a_file_keeps_four_digits_and_says_everything_else_again():
    run = files.Run(some_rows(), "today", quick=True, out_of_place=("add_relu",))
    found = files.loads(files.dumps(run))
    assert replace(found, rows=[]) == replace(run, rows=[])
    for kept, whole in zip(found.rows, run.rows, strict=True):
        assert [getattr(kept, n) for n in rows.TOGETHER] == [getattr(whole, n) for n in rows.TOGETHER]
        assert (kept.contender, kept.status, kept.note, kept.threads) == (
            *(whole.contender, whole.status, whole.note),
            whole.threads,
        )
        assert kept.median_ms == (whole.median_ms and pytest.approx(whole.median_ms, rel=1e-3))
        assert kept.ratio == (whole.ratio and pytest.approx(whole.ratio, rel=1e-3))
    with pytest.raises(ValueError, match="no rows"):
        files.dumps(files.Run([], "today"))


NO_RESULTS = [
    "",
    "[]",
    f"{files.MARK}[]",
    f'{files.MARK}{{"schema": 1}}',
    f'{files.MARK}{{"schema": 2}}\na,b\n1,2\n',
    None,
]


@pytest.mark.parametrize("content", NO_RESULTS)
def test_report_says_in_one_line_that_a_file_is_no_result(content, tmp_path, capsys):
    file = tmp_path / "result.csv"
    if content is not None:
        file.write_text(content)
    assert report.main([str(file)]) == 1
    assert_one_line(capsys.readouterr().err, "cannot read")


class Page(HTMLParser):
    """What a page holds, and whether every element that has to be closed is."""

    VOID = frozenset(("meta", "line", "path", "input", "br"))

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.links += [v for n, v in attributes if n in ("href", "src", "srcset", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in self.VOID
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def count(self, tag, **attributes):
        return sum(t == tag and attributes.items() <= a.items() for t, a in self.tags)


def test_the_page_is_whole_and_needs_no_network():
    text = page.render(some_rows(), "today")
    found = Page(text)
    assert all(link.startswith("#") for link in found.links)
    assert {link[1:] for link in found.links} <= {a["id"] for _, a in found.tags if "id" in a}
    for remote in ("http://", "https://", "@import", "url("):
        assert remote not in text
    assert "prefers-color-scheme: dark" in text
    assert found.count("div", **{"class": "bar"}) == 3
    assert found.count("circle", **{"class": "cnnkern"}) == 3
    assert found.count("circle", **{"class": "other"}) == 3
    assert found.count("path", **{"class": "band"}) == 1
    for words in ("some-machine", "torch.compile not available: no compiler", "MALLOC_TOP_PAD_", "streaming copy"):
        assert words in text


def test_bars_of_a_page_end_where_the_ratio_says():
    (tuned,) = page._operator_bars(some_rows())
    (bars,) = tuned.groups.values()
    assert [(b.label, b.ratio) for b in bars] == [
        ("contiguous, cnnkern", pytest.approx(1.0)),
        ("channels_last, cnnkern", pytest.approx(4.0)),
    ]
    assert tuned.width(bars[1]) == pytest.approx(4 * tuned.one)
    assert tuned.width(bars[1]) < 100


def test_the_page_of_part_of_a_run_leaves_out_what_was_not_timed():
    for suite, absent in (("operators", "models"), ("models", "roofline"), ("bandwidth", "ratios")):
        found = Page(page.render([r for r in some_rows() if r.suite == suite], "today"))
        assert found.count("section", id=absent) == 0, suite
        assert found.count("section", id="environment") == 1


def test_the_page_of_many_rows_has_the_best_and_the_worst():
    many = [r for n in range(2 * page.RANKED + 1) for r in row(seconds=1e-3, shape=f"{n}x2")]
    text = page.render(many, "today")
    assert text.count("bn_act net 3x2") > 0
    assert ">Best<" in text
    assert ">Worst<" in text


def test_the_page_escapes_what_it_is_told():
    text = page.render([replace(r, machine="<b>x</b>") for r in some_rows()], "a & b")
    assert "<b>x</b>" not in text
    assert "&lt;b&gt;x&lt;/b&gt;" in text
    assert "a &amp; b" in text


@pytest.fixture
def saved(tmp_path):
    """Writes rows to a file of this name and returns its path."""

    def write(name, found):
        (tmp_path / name).write_text(files.dumps(files.Run(found, "2000-01-01 00:00 UTC")))
        return str(tmp_path / name)

    return write


def test_report_writes_the_page_and_compares(saved, tmp_path, capsys):
    old, new = saved("old.csv", row(seconds=1e-3)), saved("new.csv", row(seconds=4e-3))
    out = tmp_path / "page.html"
    assert report.main([new, "--html", str(out), "--compare", old]) == 1
    assert "Changes since the earlier run" in out.read_text()
    assert "1 slower" in capsys.readouterr().out
    assert report.main([new, "--html", str(tmp_path / "no" / "page.html")]) == 1
    assert_one_line(capsys.readouterr().err, "cannot write")


def test_a_change_counts_beyond_the_spread_of_the_rounds():
    before = row(seconds=1e-3)
    assert not comparison.compare(before, before).is_regression
    for seconds, spread, slower, faster in (
        (1.04e-3, 0.0, 0, 0),
        (1.10e-3, 0.0, 1, 0),
        (0.90e-3, 0.0, 0, 1),
        (1.10e-3, 0.4, 0, 0),
        (2.00e-3, 0.4, 1, 0),
    ):
        found = comparison.compare(before, row(seconds=seconds, spread=spread))
        assert (len(found.slower), len(found.faster)) == (slower, faster), (seconds, spread)
        assert found.is_regression == bool(slower)
        ((operator, mode, count, factor),) = found.moved()
        assert (operator, mode, count) == ("bn_act", "training", 1)
        assert factor == pytest.approx(1e-3 / seconds)


def test_a_change_is_taken_against_eager_of_the_same_run():
    """A machine that is twice as slow in the second run makes both contenders slower."""
    before = row(seconds=1e-3)
    after = [replace(r, median_ms=2 * r.median_ms) for r in before]
    assert not comparison.compare(before, after).slower


def test_rows_of_unknown_noise_are_not_judged():
    before, after = row(seconds=1e-3), [replace(r, noise=None) for r in row(seconds=9e-3)]
    (change,) = comparison.compare(before, after).changes
    assert not change.slower
    assert change.line()[-1] == "unknown"


def test_a_row_that_became_wrong_is_a_regression():
    before = row(seconds=1e-3)
    after = [replace(r, status="wrong", note="output", ratio=None) if r.contender == "cnnkern" else r for r in before]
    found = comparison.compare(before, after)
    assert found.is_regression
    (line,) = found.broken
    assert line == "bn_act net 2x2 training contiguous tuned malloc: wrong, had 2.00x: output"


def test_comparison_names_what_the_runs_do_not_share():
    before = row(seconds=1e-3) + row(shape="4x4")
    after = [replace(r, machine="other", torch="9.9") for r in row(seconds=1e-3)]
    notes = "\n".join(comparison.compare(before, after).notes)
    assert "not the same machine: some-machine before, other now" in notes
    assert "not the same torch" in notes
    assert "rows timed before only: 1" in notes
    with pytest.raises(ValueError, match="no measurement of cnnkern is in both"):
        comparison.compare(before, [replace(r, threads=7) for r in before])


@pytest.mark.parametrize(("seconds", "code", "words"), [(1e-3, 0, "0 slower"), (3e-3, 1, "1 slower")])
def test_bench_compares_with_an_earlier_run(seconds, code, words, saved, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(files, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(driver, "run", lambda options, settings, scratch, limit: (row(seconds=seconds), []))
    assert driver.main(["--quick", "--compare", saved("old.csv", row(seconds=1e-3))]) == code
    printed = capsys.readouterr()
    assert words in printed.out
    assert ("Slower than before" in printed.out) == bool(code)
    assert "Changes since" in (tmp_path / "results" / "report.html").read_text()
    if code:
        assert_one_line(printed.err, "by more than the noise")


def test_bench_reads_the_earlier_run_before_it_measures(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(driver, "run", None)
    with pytest.raises(SystemExit, match="2"):
        driver.main(["--compare", str(tmp_path / "none.csv")])
    assert_one_line(capsys.readouterr().err, "--compare: cannot read")


@pytest.mark.parametrize("path", list(published.documents()), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_tables_in_documents_are_those_of_the_published_files(path):
    text = path.read_text()
    assert published.generated(text) == text, "`python -m benchmarks.show.published` writes them"


def test_every_published_run_has_a_page_that_is_current_and_in_the_site():
    texts = {path: text for path, text in published.wanted() if path.parent == ROOT / published.PAGES}
    assert {path: path.read_text() for path in (ROOT / published.PAGES).iterdir()} == texts
    site = (ROOT / "mkdocs.yml").read_text()
    assert published.navigation(site) == site, "`python -m benchmarks.show.published` writes it"
    listed = dict(re.findall(r'- "(.+)": runs/(\S+)\.md', site))
    assert set(listed.values()) == {file.stem for file in PUBLISHED}
    for name_of_page, name in listed.items():
        page = (ROOT / published.PAGES / f"{name}.md").read_text()
        assert page.partition("\n")[0].replace("`", "") == f"# {name_of_page}"


def test_every_published_run_has_a_title_of_its_own():
    assert set(TITLES) == {file.stem for file in PUBLISHED}
    assert len(set(TITLES.values())) == len(TITLES)
    with pytest.raises(ValueError, match="'unknown' has no title: give it one"):
        title("unknown")


def test_results_are_a_page_that_is_read():
    assert (ROOT / "docs" / "results.md").read_text().count("\n") < 250


def test_the_front_page_shows_published_results():
    text = (ROOT / "README.md").read_text()
    assert [(m[2], m[3].split()) for m in published.BLOCK.finditer(text)] == [(gains.NAME, ["models"])]
    assert text.count("\n") <= 150
    _, lines = gains.table()
    assert len(lines) <= 10
    assert all(any(cell.endswith("x") for cell in line[2:4]) for line in lines), "a row that nobody published"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<!-- results: cpu-resnet50 nonsense -->\n<!-- end of results -->", "no part 'nonsense'"),
        ("<!-- results: none means -->\n<!-- end of results -->", "cannot read"),
        ("<!-- results: cpu-resnet50 means -->\n", "has no end"),
    ],
)
def test_a_block_that_cannot_be_generated_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        published.generated(text)


def test_published_rewrites_documents_and_checks_them(monkeypatch, tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(published, "ROOT", tmp_path)
    monkeypatch.setattr(files, "published", list)
    (tmp_path / "mkdocs.yml").write_text("nav:\n      - Every run:\n          - runs/gone.md\n  - Other: page.md\n")
    document, plain = tmp_path / "docs" / "page.md", tmp_path / "README.md"
    plain.write_text("No results here.\n")
    document.write_text("Before.\n<!-- results: cpu-resnet50 origin -->\nold\n<!-- end of results -->\nAfter.\n")
    assert published.main(["--check"]) == 1
    assert "old" in document.read_text()
    assert published.main([]) == 0
    assert "old" not in document.read_text()
    assert re.search(r"^Measured on .*\.$", document.read_text(), re.MULTILINE)
    assert published.main(["--check"]) == 0
    assert (tmp_path / "mkdocs.yml").read_text() == "nav:\n      - Every run:\n  - Other: page.md\n"
    changed = ("docs/page.md", "mkdocs.yml")
    assert capsys.readouterr().out.splitlines() == [f"{f}: {did}" for did in ("differs", "written") for f in changed]
