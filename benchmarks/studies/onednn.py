"""What oneDNN makes of the grouped convolutions of six networks, by its own account (ONEDNN_VERBOSE).

`python -m benchmarks.studies.onednn [--batch N] [--threads N] [--only TEXT]` prints, for each kind of layer, layout and
pass of eager PyTorch, the implementations that oneDNN chose and for how many layers, the milliseconds that it says its
convolutions took, all layers together, and what reorders between memory layouts took beside them.
"""

import argparse
import itertools
import os
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

import cnnkern

from ..suite.groups import LAYOUTS
from .passes import kind, layers, steps

PASSES = ("forward", "dx", "dweight")


@dataclass
class Account:
    """Of one pass of several layers."""

    implementations: Counter[str] = field(default_factory=Counter)
    convolution_ms: float = 0.0
    reorder_ms: float = 0.0

    def add(self, text: str) -> None:
        """A call's lines of ONEDNN_VERBOSE; without a convolution among them, oneDNN was not asked."""
        chosen = set()
        for line in text.splitlines():
            if not line.startswith("onednn_verbose,v1,primitive,exec,"):
                continue
            primitive, implementation, *_, milliseconds = line.split(",")[5:]
            if primitive == "convolution":
                chosen.add(implementation)
                self.convolution_ms += float(milliseconds)
            elif primitive == "reorder":
                self.reorder_ms += float(milliseconds)
        self.implementations[" and ".join(sorted(chosen)) or "not oneDNN"] += 1


def said_by_onednn(call: Callable[[], object]) -> str:
    """What oneDNN writes to the standard output during the call."""
    sys.stdout.flush()
    with tempfile.TemporaryFile() as log:
        stdout = os.dup(1)
        os.dup2(log.fileno(), 1)
        try:
            with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
                call()
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
        log.seek(0)
        return log.read().decode()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.onednn", description=__doc__)
    parser.add_argument("--batch", type=int, default=16, help="the batch size (default: 16)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: PyTorch's choice)"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="time only layers with TEXT in their row")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    cnnkern.tune_malloc()
    accounts: dict[tuple[str, str, str], Account] = defaultdict(Account)
    for layer, layout in itertools.product(layers(arguments.batch), LAYOUTS):
        if arguments.only not in f"{layer} {layout} {kind(layer)}":
            continue
        calls = steps(layer, layout)  # which have run once, to be compared
        for name in PASSES:
            accounts[kind(layer), layout, name].add(said_by_onednn(calls["eager", name]))
    print("| kind | layout | pass | implementations (layers) | convolution, ms | reorders, ms |")
    print("|---|---|---|---|---:|---:|")
    for key in sorted(accounts, key=lambda key: (*key[:2], PASSES.index(key[2]))):
        account = accounts[key]
        chosen = ", ".join(f"{name} ({count})" for name, count in account.implementations.most_common())
        print(f"| {' | '.join(key)} | {chosen} | {account.convolution_ms:.1f} | {account.reorder_ms:.1f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
