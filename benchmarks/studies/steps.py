"""Where the time of a model's training step goes, layer by kind of layer, and what that leaves to be gained.

`python -m benchmarks.studies.steps [MODEL ...] [--batch N] [--threads N] [--steps N] [--default-malloc]` prints, for
eager and for the converted model in both layouts, milliseconds by kind of layer, and the bound: the speedup
of a step in which grouped convolutions and norms took no time at all. Times are torch.profiler's, which adds a little
to each operator.
"""

import argparse
import itertools
import statistics
from collections.abc import Sequence

import torch

import cnnkern
from cnnkern.measure import profile

from ..suite.groups import LAYOUTS, Contender
from ..suite.models import LARGE, LARGE_BATCH_SIZE, ModelBench

KINDS = profile.KINDS[:-1]


def rounds(bench: ModelBench, contender: Contender, steps: int, device: str = "cpu") -> list[dict[str, float]]:
    """Milliseconds by kind, of each of so many steps; on a GPU those of the kernels that operators launch."""
    step = bench.step(contender, verify=False)
    step()
    kinds = profile.convolution_kinds(step, device)
    found = [profile.profile_once(step, device, kinds) for _ in range(steps)]
    return [{kind: 1e3 * seconds for kind, seconds in one.by_kind.items()} for one in found]


def milliseconds(bench: ModelBench, contender: Contender, steps: int) -> dict[str, float]:
    """By kind, the medians over so many steps."""
    found = rounds(bench, contender, steps)
    return {kind: statistics.median(r[kind] for r in found) for kind in KINDS}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.steps", description=__doc__)
    parser.add_argument("models", nargs="*", default=list(LARGE), metavar="MODEL")
    parser.add_argument(
        "--batch", type=int, default=LARGE_BATCH_SIZE, help=f"the batch size (default: {LARGE_BATCH_SIZE})"
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: PyTorch's choice)"
    )
    parser.add_argument("--steps", type=int, default=3, help="the number of steps (default: 3)")
    parser.add_argument("--default-malloc", action="store_true", help="do not call cnnkern.tune_malloc()")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    if not arguments.default_malloc:
        cnnkern.tune_malloc()
    print(f"| model | layout | | {' | '.join(f'{kind}, ms' for kind in KINDS)} | step, ms | bound |")
    print(f"|---|---|---|{'---:|' * (len(KINDS) + 2)}")
    for name, layout in itertools.product(arguments.models, LAYOUTS):
        bench = ModelBench(name, arguments.batch, training=True, device="cpu")
        for who in ("eager", "cnnkern"):
            found = milliseconds(bench, Contender(who, layout), arguments.steps)
            whole = sum(found.values())
            bound = f"{profile.bound(found):.2f}x" if who == "eager" else ""
            cells = " | ".join(f"{found[kind]:.0f}" for kind in KINDS)
            print(f"| {name} | {layout} | {who} | {cells} | {whole:.0f} | {bound} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
