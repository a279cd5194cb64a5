"""How long calls take on a GPU by the bytes that their kernels move, beside what was measured last."""

import math
from collections.abc import Iterable, Sequence

from benchmarks.suite import files
from benchmarks.suite.rows import Row
from cnnkern import testing

MEASURED = "cuda-h100-minutes-operators"  # a published run
BATCH_NORMS = ("bn_act", "bn_add_act", "bn_prelu")  # read x for the sums forward, and x and dy for those backward
LAUNCH = 3e-6  # seconds of a launch that has nothing to do: `benchmarks/studies/norm_rows.cu`, the finalise kernel
OWN_WIDTHS = (1, 4, 8, 16, 24)  # of convolutions in channels_last; cuDNN computes the others


def rows() -> list[Row]:
    """cnnkern's rows of that run, as far as cnnkern's kernels computed them, in channels_last and contiguous."""
    (path,) = (path for path in files.published() if path.stem == MEASURED)
    found = [row for row in files.load(path).rows if row.contender == "cnnkern" and row.status == "ok"]
    return [row for row in found if row.bytes or (row.layout == "channels_last" and width(row) in OWN_WIDTHS)]


def width(row: Row) -> int:
    words = row.shape.split()
    return int(words[words.index("width") + 1])


def moved(row: Row) -> tuple[float, int]:
    """(bytes, launches). A pass of a convolution moves two of its three tensors."""
    elements = math.prod(map(int, row.shape.split()[0].split("x")))
    size = 2 if row.dtype in ("bfloat16", "float16") else 4
    operator = row.operator.split()[0]
    if operator == "grouped_conv2d":
        stride = int(row.shape.split()[-1])
        return size * elements * (1 + 1 / stride**2), 1
    case = testing.CASES[operator]
    (read, written), (read_back, written_back) = case.forward_traffic, case.backward_traffic
    tensors = read + written + read_back + written_back
    if operator not in BATCH_NORMS:
        return size * elements * tensors, 3  # forward; backward, and the end of the parameters' sums
    return size * elements * (tensors + 3), 6  # sums, their end and a map in each direction


def seconds(row: Row) -> float:
    """At the rate of a copy in the same run."""
    assert row.copy_gb_s is not None
    volume, launches = moved(row)
    return volume / (row.copy_gb_s * 1e9) + launches * LAUNCH


def table_rows() -> Iterable[Sequence[object]]:
    for row in rows():
        assert row.median_ms is not None
        expected, measured = seconds(row) * 1e6, row.median_ms * 1e3
        name = f"{row.operator} {row.mode}"
        yield (name, row.shape, row.layout, f"{expected:.0f}", f"{measured:.0f}", f"{measured / expected:.2f}")


def origin() -> str:
    """The device, and the commits of the kernels."""
    found = rows()
    return f"{found[0].machine}, bfloat16, commits {', '.join(sorted({row.commit for row in found}))}"
