"""`cnnkern.testing.assert_as_good_as` at the cost of a few passes, for tensors of a benchmark's size.

That function compares the largest errors. Here it only gets the elements with the largest error or value of each part
of the tensors, which gives the same verdict without its masks: these take seconds on a hundred megabytes.
"""

import torch
from torch import Tensor

from cnnkern import testing


def assert_as_good_as(out: dict[str, Tensor], eager: dict[str, Tensor], ref: dict[str, Tensor]) -> None:
    """The verdict of the function of the same name in :mod:`cnnkern.testing`."""
    testing.assert_as_good_as(*decisive(out, eager, ref))


def decisive(*results: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """(out, eager, ref) reduced to the elements that decide the verdict."""
    cut: list[dict[str, Tensor]] = [{}, {}, {}]
    names = [list(result) for result in results]
    assert names[0] == names[1] == names[2], f"results {names} of cnnkern, eager and the reference"
    for name in results[0]:
        whole = [result[name] for result in results]
        shapes = [tuple(t.shape) for t in whole]
        assert len(set(shapes)) == 1, f"{name}: shapes {shapes} of cnnkern, eager and the reference"
        for part, kept in zip(cut, _largest(*whole) or whole, strict=True):
            part[name] = kept
    return cut


def _largest(mine: Tensor, theirs: Tensor, truth: Tensor) -> list[Tensor] | None:
    """The elements with the largest errors and values; None if not all are finite."""
    if mine.dim() == 0 or mine.numel() == 0:
        return None
    kept: list[list[Tensor]] = [[], [], []]
    rows = max(1, 2**18 * mine.shape[0] // mine.numel())  # parts that stay in cache
    for parts in zip(mine.split(rows), theirs.split(rows), truth.split(rows), strict=True):
        m, t, r = (part.double().reshape(-1) for part in parts)
        values = torch.stack([(m - r).abs(), (t - r).abs(), r.abs()])
        largest, where = values.max(dim=1)
        if not largest.isfinite().all():
            return None
        for chosen, part in zip(kept, (m, t, r), strict=True):
            chosen.append(part[where])
    return [torch.cat(c).to(t.dtype) for c, t in zip(kept, (mine, theirs, truth), strict=True)]
