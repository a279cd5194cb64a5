"""A result against torch.compile and by what rows have in common; and how nearly two runs agree."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import __main__ as driver
from benchmarks.show import breakdown, page, published, remarks, report, tables
from benchmarks.suite import files, machine, rows
from benchmarks.suite.groups import AGAIN, CONVERTED_AND_COMPILED
from tests.results import BANDWIDTHS, WHERE, assert_one_line, row

SETTING = {
    "suite": "operators",
    "operator": "bn_act",
    "network": "net",
    "shape": "2x2",
    "mode": "training",
    "api": "functional",
    "dtype": "float32",
    "bytes_read": 0,
    "bytes_written": 0,
    "layout": "contiguous",
}


def timed(seconds, **setting):
    """Rows of contenders, by name, that took so many seconds in each round."""
    records = [
        {"extra_info": SETTING | setting | {"contender": name}, "stats": {"data": [value] * 3}}
        for name, value in seconds.items()
    ]
    return rows.from_records(records, [], BANDWIDTHS, "tuned", WHERE)


def test_kernels_of_a_step_by_kind():
    setting = {"suite": "kernels", "operator": "optimiser", "network": "resnet18", "shape": "2x3x8x8"}
    header, (line,) = breakdown.kernels([*timed({"eager": 3e-3, "cnnkern": 1e-3}, **setting), *row()])
    assert header == ["model", "kind of kernel", "eager, ms", "cnnkern, ms", "speedup", "input", "layout"]
    assert line == ["resnet18", "optimiser", "3", "1", "3.00x", "2x3x8x8", "contiguous"]


def test_what_tuned_malloc_is_worth_to_eager_and_to_cnnkern():
    found = [
        replace(r, malloc=malloc)
        for malloc, eager, ours in (("tuned", 2.0, 1.0), ("default", 3.0, 4.0))
        for shape, factor in (("2x2", 1), ("4x4", 10))
        for r in timed({"eager": factor * eager, "cnnkern": factor * ours}, shape=shape)
    ]
    found += timed({"eager": 1.0, "cnnkern": 1.0}, shape="8x8")  # under one setting alone
    header, (line,) = breakdown.malloc(found)
    assert dict(zip(header, line, strict=True)) == {
        "operator": "bn_act",
        "shapes and layouts": "2",
        "eager, training": "1.50x",
        "cnnkern, training": "4.00x",
        "eager, inference": "-",
        "cnnkern, inference": "-",
    }


def test_ways_to_run_inference_are_milliseconds_of_the_faster_layout():
    model = {"suite": "models", "operator": "net", "shape": "16x3x8x8", "mode": "inference"}
    found = timed({"eager": 2.0, AGAIN: 2.0, "cnnkern.fold": 1.0}, **model)
    found += timed({"eager": 1.5, AGAIN: 1.5, "cnnkern.fold": 1.25}, layout="channels_last", **model)
    found += timed({"eager": 0.25, "OpenVINO": 0.125}, **model | {"shape": "1x3x8x8"})
    found += timed({"eager": 9.0}, **model | {"mode": "training"})
    found = [replace(r, iqr_ms=r.median_ms / 2) if r.contender == "OpenVINO" else r for r in found]
    header, lines = breakdown.ways(found)
    assert header == ["model", "batch", "eager, ms", "cnnkern.fold, ms", "OpenVINO, ms"]
    assert lines == [["net", "16", "1500", "**1000**", "-"], ["net", "1", "250", "-", "**125**~"]]


def of_compile(found):
    return {r.contender: r.ratio_to_compile for r in found}


def test_the_fastest_compiled_form_of_the_reference_is_what_is_compared_with():
    found = timed({"eager": 4.0, "torch.compile": 3.0, "torch.compile, written out": 2.0, "cnnkern": 1.0})
    assert of_compile(found) == {
        "eager": 0.5,
        "torch.compile": None,
        "torch.compile, written out": None,
        "cnnkern": 2.0,
    }
    assert of_compile(timed({"eager": 4.0, "cnnkern": 1.0})) == {"eager": None, "cnnkern": None}


def test_a_compiled_model_of_ours_is_compared_with_the_reference_compiled():
    seconds = {"eager": 4.0, "torch.compile": 3.0, CONVERTED_AND_COMPILED: 1.5, "cnnkern": 6.0}
    found = timed(seconds, suite="models", operator="resnet18", network="resnet18", shape="8x3x224x224")
    assert of_compile(found) == {"eager": 0.75, "torch.compile": None, CONVERTED_AND_COMPILED: 2.0, "cnnkern": 0.5}
    assert [r.images_s for r in found] == [2.0, 8 / 3, 8 / 1.5, 8 / 6.0]
    header, (line,) = tables.model_table(found)
    cells = dict(zip(header, line, strict=True))
    assert cells["vs torch.compile"] == "0.50x"
    assert (cells["images/s"], cells["noise"]) == ("1.3", "0%")
    assert not any("4000" in cell for cell in line), "no median of eager beside a ratio that is none of medians"
    assert cells["others vs eager"] == ("torch.compile 1.33x; torch.compile, converted 2.67x, 2.00x vs torch.compile")
    (lost,) = remarks.lost_to_compile(found)
    assert lost == "resnet18 8x3x224x224 training contiguous tuned malloc: 6000.0 ms, 0.50x vs torch.compile"
    assert "<td>torch.compile, converted</td>" in page.render(found, "today").replace(' class=""', "")


def test_the_summary_has_our_means_against_torch_compile_and_over_all_networks():
    found = timed({"eager": 4.0, "torch.compile": 2.0, "cnnkern": 1.0})
    found += timed({"eager": 4.0, "cnnkern": 4.0}, network="other")
    found += timed({"eager": 1.0, "torch.compile": 1.0, "cnnkern": 2.0}, network="net batch 1")
    found += timed({"eager": 1.0, "cnnkern": 4.0}, network="widths")
    _, lines = tables.summary(found, "tuned")
    assert lines == [
        ["bn_act", "net (1)", "cnnkern", "4.00x"],
        ["bn_act", "net (1)", "torch.compile", "2.00x"],
        ["bn_act", "net (1)", "cnnkern, vs torch.compile", "2.00x"],
        ["bn_act", "other (1)", "cnnkern", "1.00x"],
        ["bn_act", "net batch 1 (1)", "cnnkern", "0.50x"],
        ["bn_act", "net batch 1 (1)", "torch.compile", "1.00x"],
        ["bn_act", "net batch 1 (1)", "cnnkern, vs torch.compile", "0.50x"],
        ["bn_act", "widths (1)", "cnnkern", "0.25x"],
        ["bn_act", "all networks (2)", "cnnkern", "2.00x"],
        ["bn_act", "all networks (1)", "cnnkern, vs torch.compile", "2.00x"],
    ]
    assert remarks.lost_to_compile(found) == [
        "bn_act net batch 1 2x2 training contiguous tuned malloc: 2000.0 ms, 0.50x vs torch.compile"
    ]
    text = published.PARTS["lost"](files.Run(found, "today"))
    assert "2 of 4 rows that count are slower than eager:" in text
    assert "1 rows are slower than torch.compile, which was timed for 2 of cnnkern's rows:" in text
    assert "vs torch.compile: operators 1.00x" in remarks.verdict(found)


def test_layer_norms_by_size():
    found = []
    for shape, seconds in (("312x32", 1.0), ("78x128", 4.0), ("2x4096", 1.0), ("31250x32", 4.0), ("312500x32", 1.0)):
        found += timed({"eager": 4.0, "cnnkern": seconds}, operator="layer_norm", network="widths", shape=shape)
    header, lines = breakdown.sizes(found + timed({"eager": 4.0, "cnnkern": 9.0}))
    assert header == ["operator", "size", "malloc", "shapes", "training contiguous"]
    assert [line[1:] for line in lines] == [
        ["elements 10^4", "tuned", "3", "2.52x"],  # 4, 1 and 4
        ["elements 10^6", "tuned", "1", "1.00x"],
        ["elements 10^7", "tuned", "1", "4.00x"],
        ["widths up to 512, elements up to 10^6", "tuned", "3", "1.59x"],  # 4, 1 and 1
        ["all", "tuned", "5", "2.30x"],
    ]


def test_grouped_convolutions_by_kind():
    def conv(width, kernel, network, **seconds):
        shape = f"16x32x9x9 width {width} kernel {kernel} padding 1 bias False stride 1"
        return timed({"eager": 4.0} | seconds, operator="grouped_conv2d", network=network, shape=shape)

    found = conv(16, 3, "one", cnnkern=2.0) + conv(1, 7, "one", cnnkern=1.0) + conv(1, 7, "two", cnnkern=4.0)
    found += conv(1, 7, "one batch 1", cnnkern=8.0)
    assert breakdown.kinds(found)[1] == [
        ["depthwise 7x7", "larger", "tuned", "2", "2.00x"],
        ["width 16", "larger", "tuned", "1", "2.00x"],
        ["depthwise 7x7", "1", "tuned", "1", "0.50x"],
    ]


def test_rows_that_leave_bandwidth_unused_are_counted_and_the_worst_is_named():
    ours = replace(row()[1], cache_bytes=1000)

    def with_share(share, moved, **values):
        return replace(ours, bandwidth_share=share, bytes=moved, **values)

    found = [
        with_share(0.84, 1001, shape="a"),
        with_share(0.86, 1001, shape="b"),
        with_share(0.71, 999, shape="c"),
        with_share(0.60, 999, shape="d"),
        with_share(0.10, 1001, shape="e", malloc="default"),
        with_share(0.10, 1001, operator="grouped_conv2d", shape="1x8x4x4 width 4 kernel 3 stride 1"),
        with_share(0.80, 1001, operator="grouped_conv2d", shape="1x8x4x4 width 1 kernel 3 stride 1"),
        with_share(0.99, 1001, operator="add_relu"),
        with_share(0.01, 1001, contender="torch.compile"),
    ]
    assert breakdown.roofline(found) == (
        breakdown.ROOFLINE,
        [
            ["bn_act", "net", "1 of 2", "1 of 2", "d training contiguous: 60%"],
            ["grouped_conv2d", "net", "1 of 1", "-", "1x8x4x4 width 1 kernel 3 stride 1 training contiguous: 80%"],
            ["add_relu", "net", "0 of 1", "-", "-"],
        ],
    )


def test_the_cache_is_the_last_level_that_the_system_names(monkeypatch, tmp_path):
    for index, size in enumerate(("32K", "1024K", "32768K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    monkeypatch.setattr(machine, "CACHES", tmp_path)
    assert machine.cache_bytes("cpu") == 32 * 2**20
    monkeypatch.setattr(machine, "CACHES", tmp_path / "none")
    assert machine.cache_bytes("cpu") is None


@pytest.fixture
def two_runs(tmp_path):
    """Files of two runs in which one row of two agrees within a tenth."""
    first = row(seconds=1e-3) + row(seconds=1e-3, shape="4x4")
    second = row(seconds=1.05e-3) + row(seconds=2e-3, shape="4x4") + row(shape="8x8")
    paths = [tmp_path / "run.csv", tmp_path / "run-again.csv"]
    for path, found in zip(paths, (first, second), strict=True):
        path.write_text(files.dumps(files.Run(found, "2000-01-01 00:00 UTC")))
    return paths


@pytest.mark.parametrize(
    "command", [lambda paths: report.agree(*map(Path, paths)), lambda paths: driver.main(["--agree", *paths])]
)
def test_two_runs_are_said_to_agree_on_a_share_of_their_rows(command, two_runs, capsys):
    assert command([str(path) for path in two_runs]) == 0
    printed = capsys.readouterr().out
    assert "Speedups over eager in two runs agree within 10% in 1 of 2 rows (50%)" in printed
    line = next(line for line in printed.splitlines() if line.startswith("bn_act"))
    assert line.split() == ["bn_act", "training", "2", "50%", "2.00x", "1.38x", "-31.0%"]
    first = printed.index("Furthest apart:")
    assert "4x4 training contiguous tuned malloc: 2.00x and 1.00x" in printed[first:].splitlines()[1]


def test_runs_without_a_row_in_common_are_one_line(two_runs, tmp_path, capsys):
    other = tmp_path / "other.csv"
    other.write_text(files.dumps(files.Run(row(operator="add_relu"), "today")))
    assert report.agree(two_runs[0], other) == 1
    assert_one_line(capsys.readouterr().err, "no measurement of cnnkern is in both")
    assert report.agree(two_runs[0], tmp_path / "none.csv") == 1
    assert_one_line(capsys.readouterr().err, "cannot read")
