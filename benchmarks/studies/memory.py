"""What training holds in memory: eager, converted, and converted with recomputation (docs/memory.md).

`python -m benchmarks.studies.memory [MODEL ...] [--side N] [--batch N] [--channels-last] [--time] [--seconds S]` prints
for models of torchvision what the graph of an image keeps for the gradient, in millions of float32 elements, and the
most memory that tensors take in a training step beyond parameters and optimizer state. Both are counted by PyTorch's
CPU allocator, not timed: they do not depend on the machine. `--time` times a training step of each beside them, in
interleaved rounds, as `cnnkern bench` does, and in the memory layout in which the converted model is faster.
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import cnnkern
from cnnkern.measure import clock, machine, profile
from cnnkern.measure.steps import Setting, forward, step

MODELS = ("resnet50", "resnext50_32x4d", "vgg16_bn", "mobilenet_v2", "efficientnet_b0", "densenet121", "convnext_tiny")
FLOAT = 4  # bytes of an element
EAGER, CONVERTED, RECOMPUTE = FORMS = ("eager", "converted", "recompute")
MAKE: dict[str, Callable[[nn.Module], nn.Module]] = {
    EAGER: lambda model: model,
    CONVERTED: lambda model: cnnkern.convert(model, inplace=True),
    RECOMPUTE: lambda model: cnnkern.convert(model, inplace=True, recompute=True),
}


@dataclass(frozen=True)
class Memory:
    """Of one form of a model: float32 elements that the graph keeps for an image, bytes of a step at most."""

    elements: float
    peak: int


def image(side: int, batch: int, channels_last: bool) -> Tensor:
    x = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None)


def forms(model: nn.Module, setting: Setting) -> dict[str, nn.Module]:
    return {form: setting.place(make(copy.deepcopy(model))) for form, make in MAKE.items()}


def measure(model: nn.Module, x: Tensor, setting: Setting) -> Memory:
    """After one step: then there is the optimizer's state, and known what batch norms are fused with."""
    one = step(model, (x,), setting)
    one()
    held = profile.held_bytes(lambda: forward(model, (x,), setting), setting.device)
    return Memory(held / FLOAT / len(x), profile.peak_bytes(one, setting.device))


HEAD = (
    f"{'':16} {'M elements per image':>31}   {'MiB of a step at most':>31}\n"
    f"{'':16} {'   '.join(2 * [f'{EAGER:>8} {CONVERTED:>10} {RECOMPUTE:>11}'])}   saved"
)


def line(model: str, memory: dict[str, Memory]) -> str:
    """The figures of a model in a line; what is saved is shares of eager's."""
    elements = [f"{memory[form].elements / 1e6:.1f}" for form in FORMS]
    peaks = [f"{memory[form].peak / 2**20:.0f}" for form in FORMS]
    cells = [f"{a:>8} {b:>10} {c:>11}" for a, b, c in (elements, peaks)]
    eager, again = memory[EAGER], memory[RECOMPUTE]
    shares = f"{1 - again.elements / eager.elements:.0%}, {1 - again.peak / eager.peak:.0%}"
    return f"{model:16} {'   '.join(cells)}   {shares}"


def faster(model: nn.Module, side: int, batch: int, seconds: float) -> Setting:
    """The memory layout in which a step of the converted model takes less time."""
    settings = [Setting(training=True, device="cpu", channels_last=last) for last in (False, True)]
    steps: dict[str, Any] = {
        str(i): step(
            setting.place(MAKE[CONVERTED](copy.deepcopy(model))), (image(side, batch, setting.channels_last),), setting
        )
        for i, setting in enumerate(settings)
    }
    samples = clock.interleave(steps, clock.timer_for("cpu"), seconds=seconds)
    return settings[int(min(samples, key=lambda name: statistics.median(s.wall for s in samples[name])))]


def times(model: nn.Module, side: int, batch: int, seconds: float) -> str:
    """Ratios to eager, medians over interleaved rounds; eager against itself is the noise."""
    setting = faster(model, side, batch, seconds / 5)
    x = image(side, batch, setting.channels_last)
    steps: dict[str, Any] = {form: step(made, (x,), setting) for form, made in forms(model, setting).items()}
    steps = {EAGER: steps[EAGER], "eager, again": steps[EAGER]} | steps
    for one in steps.values():
        one()
    watch = machine.Watch()
    samples = clock.interleave(steps, clock.timer_for(setting.device), seconds=seconds)
    walls = {name: [s.wall for s in taken] for name, taken in samples.items()}
    ratios = {name: clock.ratio(walls[EAGER], taken) for name, taken in walls.items()}
    again = clock.ratio(walls[CONVERTED], walls[RECOMPUTE])
    noise = clock.noise_floor(ratios["eager, again"])
    layout = "channels_last" if setting.channels_last else "contiguous"
    fast = ", ".join(f"{form} {ratios[form].value:.3f}" for form in (CONVERTED, RECOMPUTE))
    return (
        f"in {layout}, times as fast as eager: {fast}; recompute takes {1 / again.value - 1:+.1%} of converted's time; "
        f"noise {noise:.1%}, {len(walls[EAGER])} rounds\n{'':16} {watch.activity()}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.memory", description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", default=list(MODELS), help="models of torchvision")
    parser.add_argument("--side", type=int, default=224, help="the height and width of an image (default: 224)")
    parser.add_argument("--batch", type=int, default=2, help="images per step (default: 2)")
    parser.add_argument("--channels-last", action="store_true", help="count memory in channels_last")
    parser.add_argument("--time", action="store_true", help="also time a training step of each")
    parser.add_argument("--seconds", type=float, default=60.0, help="the time per model (default: 60)")
    options = parser.parse_args(arguments)
    setting = Setting(training=True, device="cpu", channels_last=options.channels_last)
    x = image(options.side, options.batch, options.channels_last)
    print(
        f"float32, {options.batch} images of {options.side} x {options.side}; saved: of eager's elements, of its peak"
    )
    print(HEAD)
    for name in options.models:
        memory = {form: measure(model, x, setting) for form, model in forms(build(name), setting).items()}
        print(line(name, memory), flush=True)
        if options.time:
            print(f"{'':16} {times(build(name), options.side, options.batch, options.seconds)}", flush=True)


if __name__ == "__main__":
    main()
