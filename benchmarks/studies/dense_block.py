"""What a dense block gains by one buffer instead of concatenations (docs/memory.md).

`python -m benchmarks.studies.dense_block [MODEL] [--side N] [--batch N] [--channels-last] [--recompute] [--seconds S]`

For a DenseNet of the zoo, it compares PyTorch's operators, cnnkern's layers with concatenations, and
`cnnkern.nn.DenseBlock`'s buffer. It prints the elements that autograd saves per image, and the peak memory of a
training step. Then the share of a step that concatenations and the additions of their gradients take, and the share
that known statistics of older feature maps would save: together the bound of the gain. Then it times steps of the
three in interleaved rounds. `--recompute` runs the second and third within `cnnkern.recompute`.
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import cnnkern
from cnnkern.measure import clock, machine
from cnnkern.measure.steps import Setting, step
from cnnkern.models.densenet import DenseLayer

from .memory import image, measure

ops = torch.ops.cnnkern
EAGER, CONCATENATED, BUFFER = FORMS = ("eager", "concatenated", "buffer")
# Beside cat itself: the additions of gradients, which are PyTorch's other additions too, of a bias or an optimiser.
OF_CONCATENATIONS = ("aten::cat", "aten::add_", "aten::add")


class _Concatenated(cnnkern.nn.DenseBlock):
    def _buffer(self, input: Tensor) -> None:
        return None


def forms(name: str, setting: Setting, recompute: bool) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    buffer = cnnkern.models.create_model(name)
    eager = cnnkern.models.create_model(name, fused=False)
    eager.load_state_dict(buffer.state_dict())
    concatenated = copy.deepcopy(buffer)
    for m in concatenated.modules():
        if type(m) is cnnkern.nn.DenseBlock:
            m.__class__ = _Concatenated
    made = {EAGER: eager, CONCATENATED: concatenated, BUFFER: buffer}
    if recompute:
        made |= {form: cnnkern.convert(made[form], inplace=True, recompute=True) for form in FORMS[1:]}
    return {form: setting.place(model) for form, model in made.items()}


def share_of_concatenations(one: Callable[[], object]) -> float:
    """Of the time of a step's operators, by the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            one()
    took = {e.key: e.self_cpu_time_total for e in profiler.key_averages()}
    return sum(took.get(name, 0) for name in OF_CONCATENATIONS) / sum(took.values())


def dense_norms(model: nn.Module, x: Tensor) -> list[tuple[Tensor, int]]:
    """An input of each dense layer's first batch norm, and how many of its channels are new."""
    found: list[tuple[Tensor, int]] = []

    def note(layer: nn.Module, args: tuple[Tensor]) -> None:
        channels, last = args[0].shape[1], found[-1][0].shape if found else None
        same_block = last is not None and last[2:] == args[0].shape[2:]
        found.append((torch.randn_like(args[0]), channels - last[1] if last is not None and same_block else channels))

    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, DenseLayer)]
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


def all_of(calls: list[Callable[[], object]]) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            for call in calls:
                call()

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.dense_block", description=__doc__)
    parser.add_argument("model", nargs="?", default="densenet121", help="a DenseNet of the zoo with bottlenecks")
    parser.add_argument("--side", type=int, default=224, help="the height and width of an image (default: 224)")
    parser.add_argument("--batch", type=int, default=8, help="images per step (default: 8)")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--recompute", action="store_true", help="cnnkern's two within cnnkern.recompute")
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing (default: 60)")
    options = parser.parse_args(arguments)
    setting = Setting(training=True, device="cpu", channels_last=options.channels_last)
    x = image(options.side, options.batch, options.channels_last)
    models = forms(options.model, setting, options.recompute)
    for form, model in models.items():
        memory = measure(model, x, setting)
        print(
            f"{form:14} saves {memory.elements / 1e6:5.1f} M elements an image, {memory.peak / 2**20:6.0f} MiB at most"
        )
    steps: dict[str, Callable[[], object]] = {form: step(model, (x,), setting) for form, model in models.items()}
    share = share_of_concatenations(steps[CONCATENATED])
    norms = dense_norms(models[CONCATENATED], x)
    timed = steps | {
        f"{BUFFER}, again": steps[BUFFER],
        "norms as they are": all_of([as_is(t) for t, _ in norms]),
        "statistics given": all_of([given(t, new) for t, new in norms]),
    }
    for one in timed.values():
        one()
    watch = machine.Watch()
    samples = clock.interleave(timed, clock.timer_for("cpu"), seconds=options.seconds)
    walls = {name: [s.wall for s in taken] for name, taken in samples.items()}
    for name, taken in walls.items():
        print(f"{name:18} {statistics.median(taken) * 1e3:8.1f} ms")
    known = statistics.median(
        (old - new) / whole
        for old, new, whole in zip(
            walls["norms as they are"], walls["statistics given"], walls[CONCATENATED], strict=True
        )
    )
    print(f"at most to gain: cat and additions {share:.1%} of a step, statistics of {len(norms)} norms {known:.1%}")
    noise = clock.noise_floor(clock.ratio(walls[BUFFER], walls[f"{BUFFER}, again"]))
    for form in FORMS[:-1]:
        gain = clock.ratio(walls[form], walls[BUFFER])
        print(f"with the buffer {gain.value:.3f} times as fast as {form}; noise {noise:.1%}, {len(walls[form])} rounds")
    print(watch.activity())


if __name__ == "__main__":
    main()
