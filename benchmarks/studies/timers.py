"""Wall time, or the CPU time of one thread, for a machine with other work: the options of studies that offer both."""

import argparse
import time
from collections.abc import Callable

import torch

from cnnkern.measure import clock


class CpuTimer:
    """Of what this process computes."""

    def sample(self, step: Callable[[], object], calls: int) -> clock.Sample:
        start = time.process_time()
        for _ in range(calls):
            step()
        return clock.Sample((time.process_time() - start) / calls)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: PyTorch's choice)"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--seconds", type=float, default=2.0, help="the time per row (default: 2)")
    parser.add_argument("--only", default="", metavar="TEXT", help="time only layers with TEXT in their row")
    parser.add_argument("--cpu-time", action="store_true", help="report CPU time of one thread instead of wall time")


def chosen(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> clock.Timer:
    """The timer that was asked for. Sets the number of threads."""
    if arguments.cpu_time and arguments.threads != 1:
        parser.error("--cpu-time is of --threads 1: several threads compute while they wait for one another")
    torch.set_num_threads(arguments.threads)
    return CpuTimer() if arguments.cpu_time else clock.HostTimer()
