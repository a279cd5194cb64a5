"""What a dense block could gain by computing each feature map's statistics once (docs/memory.md).

`python -m benchmarks.studies.dense_statistics [MODEL] [--side N] [--batch N] [--channels-last] [--seconds S]`

The batch norm in front of each dense layer computes mean and variance of all feature maps so far, though those of the
older ones are known. The study times in interleaved rounds a training step of the converted model, forward passes of
those batch norms, and the same with the statistics of older feature maps given: the most that such a block could gain.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import cnnkern
from cnnkern.measure import clock, machine
from cnnkern.measure.steps import Setting, step

from .memory import build, image

ops = torch.ops.cnnkern


def dense_norms(model: nn.Module, x: Tensor) -> list[tuple[Tensor, int]]:
    """An input of each dense layer's first batch norm, and how many of its channels are new."""
    found: list[tuple[Tensor, int]] = []

    def note(layer: nn.Module, args: tuple[Sequence[Tensor]]) -> None:
        parts = args[0]
        whole = torch.randn_like(torch.cat(list(parts), 1))
        found.append((whole, parts[-1].shape[1]))

    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if type(m).__name__ == "_DenseLayer"]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def as_is(x: Tensor) -> Callable[[], object]:
    channels = x.shape[1]
    values = [torch.ones(channels), torch.zeros(channels), torch.zeros(channels), torch.ones(channels)]
    weight, bias, mean, var = values
    return lambda: cnnkern.functional.batch_norm_act(x, mean, var, weight, bias, training=True, act="relu")


def given(x: Tensor, new: int) -> Callable[[], object]:
    """As if the new channels' statistics were computed here, and the others' known."""
    channels = x.shape[1]
    weight, bias = torch.ones(channels), torch.zeros(channels)
    mean, rstd = torch.zeros(channels, dtype=torch.float64), torch.ones(channels, dtype=torch.float64)
    latest = torch.empty_like(x[:, :new]).copy_(x[:, :new])

    def run() -> None:
        ops.sync_bn_stats(latest)
        ops.sync_bn(x, None, weight, bias, mean, rstd, "relu")

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.dense_statistics", description=__doc__)
    parser.add_argument("model", nargs="?", default="densenet121", help="a DenseNet of torchvision")
    parser.add_argument("--side", type=int, default=224, help="the height and width of an image (default: 224)")
    parser.add_argument("--batch", type=int, default=8, help="images per step (default: 8)")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing (default: 30)")
    options = parser.parse_args(arguments)
    setting = Setting(training=True, device="cpu", channels_last=options.channels_last)
    x = image(options.side, options.batch, options.channels_last)
    model = setting.place(build(options.model))
    norms = dense_norms(model, x)
    converted = setting.place(cnnkern.convert(model))
    runs = {"as they are": [as_is(t) for t, _ in norms], "statistics given": [given(t, new) for t, new in norms]}

    def all_of(calls: list[Callable[[], object]]) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                for call in calls:
                    call()

        return run

    timed: dict[str, Callable[[], object]] = {"a training step": step(converted, (x,), setting)}
    timed |= {name: all_of(calls) for name, calls in runs.items()}
    timed["as they are, again"] = timed["as they are"]
    for run in timed.values():
        run()
    watch = machine.Watch()
    samples = clock.interleave(timed, clock.timer_for("cpu"), seconds=options.seconds)
    walls = {name: [s.wall for s in taken] for name, taken in samples.items()}
    for name, taken in walls.items():
        print(f"{name:20} {statistics.median(taken) * 1e3:8.1f} ms")
    gain = statistics.median(
        (old - new) / whole
        for old, new, whole in zip(
            walls["as they are"], walls["statistics given"], walls["a training step"], strict=True
        )
    )
    noise = clock.noise_floor(clock.ratio(walls["as they are"], walls["as they are, again"]))
    print(f"{len(norms)} batch norms; at most {gain:.1%} of a step; noise of their time {noise:.1%}")
    print(watch.activity())


if __name__ == "__main__":
    main()
