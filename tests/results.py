"""Invented rows, and rows of plans timed in this process, for the tests of benchmarks and reports."""

from benchmarks.suite import bandwidth, machine, rows
from benchmarks.suite.bandwidth import Bandwidth
from benchmarks.suite.groups import Refused, Session
from benchmarks.suite.options import Options

WHERE = machine.describe(Options(threads=1)) | {"machine": "some-machine", "commit": "abc1234-dirty"}
BANDWIDTHS = [Bandwidth(mix, 2**20, 10.0) for mix in bandwidth.MIXES]


def row(seconds=2e-3, spread=0.0, **values):
    """Eager's row and cnnkern's, which takes `seconds`; rounds spread by this share of the median."""
    what = {
        "suite": "operators",
        "operator": "bn_act",
        "network": "net",
        "shape": "2x2",
        "mode": "training",
        "api": "functional",
        "dtype": "float32",
        "bytes_read": 3 * 2**20,
        "bytes_written": 2**20,
        "contender": "cnnkern",
        "layout": "contiguous",
    } | values
    rounds = [seconds * (1 + spread * i / 2) for i in (-1, -0.5, 0, 0.5, 1)]
    records = [
        {"extra_info": what | {"contender": "eager"}, "stats": {"data": [2e-3] * 5}},
        {"extra_info": what, "stats": {"data": rounds}},
    ]
    return rows.from_records(records, [], BANDWIDTHS, "tuned", WHERE)


def some_rows():
    found = row(seconds=1e-3) + row(shape="4x4", seconds=4e-3) + row(layout="channels_last", seconds=5e-4)
    found += row(suite="models", operator="resnet18", network="resnet18", api="module", bytes_read=0, bytes_written=0)
    refused = {"status": "not available", "note": "no compiler"}
    extra = {
        n: getattr(found[0], n) for n in ("suite", "operator", "network", "shape", "mode", "api", "dtype", "layout")
    }
    extra |= {"bytes_read": 0, "bytes_written": 0, "contender": "torch.compile"} | refused
    return (
        found
        + rows.from_records([], [extra, extra], BANDWIDTHS, "tuned", WHERE)
        + rows.bandwidth_rows(BANDWIDTHS, WHERE)
    )


def assert_one_line(text, words):
    assert text.count("\n") == 1, text
    assert text.startswith("benchmarks: ")
    assert words in text


def measure(plan, options=None, malloc="tuned"):
    """(rows, events) of a plan, timed in this process."""
    events = []
    session = Session(plan, options or Options(seconds=60.0), events.append)
    records = [
        {"extra_info": group.identity(contender) | session.conditions[contender], "stats": {"data": result}}
        for group in plan
        for contender, result in session.results_of(group).items()
        if not isinstance(result, Refused)
    ]
    refused = [event["refused"] for event in events if "refused" in event]
    return rows.from_records(records, refused, BANDWIDTHS, malloc, WHERE), events
