"""What new memory costs: page faults and processor time of a step, with malloc's defaults, with the pool and without.

    python -m benchmarks.studies.pool resnet50 mobilenet_v2 --batch 8

Each figure is from a process of its own. Processor time counts both threads' and the kernel's; a busy machine changes
it less than it changes the clock on the wall.
"""

import argparse
import json
import os
import resource
import subprocess
import sys

from rich.console import Console
from rich.table import Table

from ..suite.machine import malloc_environment

WAYS = {  # what is measured: the model's form, whether the pool is on, malloc's setting
    "eager": ("eager", "1", "default"),
    "cnnkern, no pool": ("cnnkern", "0", "default"),
    "cnnkern": ("cnnkern", "1", "default"),
    "eager, tuned malloc": ("eager", "1", "tuned"),
    "cnnkern, tuned malloc": ("cnnkern", "1", "tuned"),
}


def measure(name: str, form: str, batch: int, training: bool, steps: int, threads: int) -> dict[str, float]:
    """Page faults and processor seconds of a step, MiB of resident memory at most; in this process."""
    import torch
    import torchvision

    import cnnkern

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)().train(training)
    if form == "cnnkern":
        model = cnnkern.convert(model) if training else cnnkern.fold(model)
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        with torch.set_grad_enabled(training):
            y = model(x)
        if training:
            model.zero_grad()
            y.square().mean().backward()

    for _ in range(3):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(steps):
        step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    faults = after.ru_minflt - before.ru_minflt
    return {"faults": faults / steps, "seconds": seconds / steps, "MiB": after.ru_maxrss / 1024}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["resnet50", "mobilenet_v2"], help="torchvision's names")
    parser.add_argument("--batch", type=int, default=8, help="images in a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="steps that are counted (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.measure:
        print(json.dumps(measure(*json.loads(options.measure))))
        return 0
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("model", "step", "how", "page faults", "processor ms", "resident MiB"):
        table.add_column(title, justify="left" if title in ("model", "step", "how") else "right")
    for name in options.models:
        for training in (True, False):
            for way, (form, pool, malloc) in WAYS.items():
                asked = json.dumps([name, form, options.batch, training, options.steps, options.threads])
                command = [sys.executable, "-m", "benchmarks.studies.pool", "--measure", asked]
                environment = malloc_environment(malloc) | {"CNNKERN_POOL": pool, "PATH": os.environ.get("PATH", "")}
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                figures = (f"{found['faults']:,.0f}", f"{found['seconds'] * 1e3:.0f}", f"{found['MiB']:.0f}")
                table.add_row(name, "training" if training else "inference", way, *figures)
    Console(highlight=False, width=100).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
