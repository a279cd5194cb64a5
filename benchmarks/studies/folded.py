"""Inference of torchvision's models as they are, compiled, converted and folded; and folded grouped convolutions.

`python -m benchmarks.studies.folded [MODEL ...] [--batch N[,N]] [--contenders NAME[,NAME]] [--threads N] [--seconds S]
[--bfloat16] [--default-malloc]` prints milliseconds and the speedup over eager in the same layout, on photographs.
Outputs are compared first. `folded-by-layer` is folded without runs of layers (docs/deferred.md). `--layers` times the
models' 1x1 and depthwise convolutions and linear layers instead, each followed by a ReLU, by PyTorch and on oneDNN's
kernel and cnnkern's, and says which of the two `cnnkern.fold` uses. `--grouped` does that for the grouped convolutions
of six networks.
"""

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import cnnkern
from cnnkern.conversion.sequential import FoldingSequential
from cnnkern.nn.folded_conv import folded_conv, own_kernel, prefers_own
from cnnkern.nn.folded_linear import folded_linear
from cnnkern.nn.folded_linear import prefers_own as linear_prefers_own
from cnnkern.testing import with_layout

from ..suite import timing
from ..suite.groups import LAYOUTS
from ..suite.judge import assert_as_good_as
from ..suite.models import CHECKED, SIZE, build, photographs, placed
from . import passes


def by_layers(folded: nn.Module) -> nn.Module:
    """A folded model that calls each layer of an ``nn.Sequential`` from now on."""
    for module in folded.modules():
        if isinstance(module, FoldingSequential):
            module.__dict__["forward"] = nn.Sequential.forward.__get__(module)
    return folded


CONTENDERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "eager": lambda model: model,
    "torch.compile": torch.compile,
    "converted": cnnkern.convert,
    "folded": cnnkern.fold,
    "folded-by-layer": lambda model: by_layers(cnnkern.fold(model)),
}


def run(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def model_rows(name: str, batch: int, arguments: argparse.Namespace) -> None:
    dtype = torch.bfloat16 if arguments.bfloat16 else torch.float32
    base, images = build(name).eval().to(dtype), photographs(batch).to(dtype)
    checked = images[:CHECKED]
    truth = run(copy.deepcopy(base).double(), checked.double())
    steps = {}
    for layout, contender in itertools.product(LAYOUTS, arguments.contenders):
        model = CONTENDERS[contender](placed(copy.deepcopy(base), layout, "cpu"))
        x = placed(images, layout, "cpu")
        mine = run(model, x)[:CHECKED]  # at the size that is timed: one compilation
        assert_as_good_as(
            {"output": mine},
            {"output": run(placed(copy.deepcopy(base), layout, "cpu"), placed(checked, layout, "cpu"))},
            {"output": truth},
        )
        steps[layout, contender] = lambda model=model, x=x: run(model, x)
    deadline = time.perf_counter() + arguments.seconds
    samples = timing.interleave(steps, deadline=deadline, min_rounds=5, max_rounds=100)
    for (layout, contender), values in samples.items():
        ms, ratio = statistics.median(values) * 1e3, timing.ratio(samples[layout, "eager"], values)
        print(f"| {name} | {batch}x3x{SIZE}x{SIZE} | {layout} | {contender} | {ms:.1f} | {ratio:.2f}x |", flush=True)


def kernel_row(
    label: str, layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor, x: Tensor, arguments: argparse.Namespace
) -> None:
    """A layer with these weight and bias: PyTorch's and its ReLU, and both ways to fold them."""
    plain = copy.deepcopy(layer)
    plain.weight, plain.bias = nn.Parameter(weight), nn.Parameter(bias)
    steps = {"PyTorch": lambda: run(lambda t: plain(t).relu_(), x)}
    for name, own in (("oneDNN", False), ("cnnkern", True)):
        if isinstance(layer, nn.Linear):
            folded = folded_linear(weight, bias, [], own)
        else:
            folded = folded_conv(layer, weight, bias, [], own)
        steps[name] = lambda folded=folded: run(lambda t: folded.run(t, "relu"), x)
    close = 1e-4
    for name in ("oneDNN", "cnnkern"):
        torch.testing.assert_close(steps[name](), steps["PyTorch"](), rtol=close, atol=close)
    deadline = time.perf_counter() + arguments.seconds
    samples = timing.interleave(steps, deadline=deadline, min_rounds=5, max_rounds=200)
    plain_ms, theirs, mine = (statistics.median(samples[n]) * 1e3 for n in ("PyTorch", "oneDNN", "cnnkern"))
    taken = "cnnkern" if is_own(layer, x) else "oneDNN"
    verdict = "" if (taken == "cnnkern") == (mine < theirs) else " (the slower)"
    print(
        f"| {label} | {plain_ms:.3f} | {theirs:.3f} | {mine:.3f} | {theirs / mine:.2f}x | {taken}{verdict} |",
        flush=True,
    )


def is_own(layer: nn.Conv2d | nn.Linear, x: Tensor) -> bool:
    if isinstance(layer, nn.Linear):
        return linear_prefers_own(x.dtype, x[..., 0].numel())
    return prefers_own(layer, x.dtype, x.shape)


def grouped_rows(batch: int, arguments: argparse.Namespace) -> None:
    dtype = torch.float32  # cnnkern's kernels are chosen for no other
    generator = torch.Generator().manual_seed(0)
    for layer in passes.layers(batch):
        inputs = passes.CASE.inputs(layer.shape, generator=generator, **layer.arguments)
        x, weight = with_layout(inputs["input"].to(dtype), "channels_last"), inputs["weight"].to(dtype)
        bias = torch.randn(weight.shape[0], generator=generator).to(dtype)
        conv = nn.Conv2d(
            x.shape[1],
            weight.shape[0],
            weight.shape[2:],
            inputs["stride"],
            inputs["padding"],
            inputs["dilation"],
            inputs["groups"],
        )
        kernel_row(f"{passes.kind(layer)}: {layer}", conv, weight, bias, x, arguments)


def layers_of(name: str) -> dict[str, tuple[nn.Conv2d | nn.Linear, tuple[int, ...]]]:
    """The different layers of a model that a kernel of cnnkern computes, and the shapes of an image's inputs."""
    found: dict[str, tuple[nn.Conv2d | nn.Linear, tuple[int, ...]]] = {}

    def note(module: nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
        if isinstance(module, nn.Conv2d) and own_kernel(module) in ("pointwise", "depthwise"):
            shape = tuple(inputs[0].shape[1:])
            stride = f", stride {module.stride[0]}" if module.stride[0] > 1 else ""
            kernel = f"{'depthwise ' * (module.groups > 1)}{module.kernel_size[0]}x{module.kernel_size[1]}"
            label = f"{kernel}{stride}, {'x'.join(map(str, shape))} to {module.out_channels} channels"
            found.setdefault(label, (module, shape))
        elif isinstance(module, nn.Linear):
            shape = tuple(inputs[0].shape[1:])
            found.setdefault(f"linear, {'x'.join(map(str, shape))} to {module.out_features}", (module, shape))

    model = build(name).eval()
    for module in model.modules():
        module.register_forward_hook(note)
    run(model, photographs(1))
    return found


def layer_rows(name: str, batch: int, arguments: argparse.Namespace) -> None:
    for label, (layer, shape) in layers_of(name).items():
        x, weight = torch.randn(batch, *shape), layer.weight.detach()
        if isinstance(layer, nn.Conv2d):
            x = x.to(memory_format=torch.channels_last)
        kernel_row(f"{label}, batch {batch}", layer, weight, torch.randn(len(weight)), x, arguments)


def main(argv: list[str] | None = None) -> int:
    def batches(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    def contenders(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(CONTENDERS):
            raise argparse.ArgumentTypeError(f"no contender is called {', '.join(sorted(unknown))}")
        return text.split(",")

    # No option takes a variable number of values: it would take MODEL, where that comes next.
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.folded", description=__doc__)
    parser.add_argument("models", nargs="*", default=["resnet50"], metavar="MODEL")
    parser.add_argument(
        "--batch", type=batches, default=[1, 16], metavar="N[,N]", help="images in a batch (default: 1,16)"
    )
    parser.add_argument(
        "--contenders",
        type=contenders,
        default=list(CONTENDERS),
        metavar="NAME[,NAME]",
        help=f"what is timed (default: {','.join(CONTENDERS)})",
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: PyTorch's choice)"
    )
    parser.add_argument(
        "--seconds", type=float, default=None, help="the time per model and batch (default: 30) or layer (default: 1)"
    )
    parser.add_argument("--bfloat16", action="store_true", help="run the models in bfloat16")
    parser.add_argument("--grouped", action="store_true", help="time grouped convolutions by themselves")
    parser.add_argument(
        "--layers", action="store_true", help="time the models' 1x1 and depthwise convolutions and linear layers"
    )
    parser.add_argument("--default-malloc", action="store_true", help="do not call cnnkern.tune_malloc()")
    arguments = parser.parse_args(argv)
    if "eager" not in arguments.contenders:
        arguments.contenders = ["eager", *arguments.contenders]
    if arguments.seconds is None:
        arguments.seconds = 1.0 if arguments.grouped or arguments.layers else 30.0
    torch.set_num_threads(arguments.threads)
    malloc = "malloc's defaults" if arguments.default_malloc else cnnkern.tune_malloc()
    print(f"threads: {arguments.threads}; {malloc}; {passes.PEAK}: {passes.peak_gflops():.0f} GFLOP/s\n")
    if arguments.grouped or arguments.layers:
        print("| layer, channels_last | PyTorch (ms) | oneDNN (ms) | cnnkern (ms) | oneDNN to cnnkern | taken |")
        print("|---|---:|---:|---:|---:|---|")
        for batch in arguments.batch:
            if arguments.grouped:
                grouped_rows(batch, arguments)
            for name in arguments.models if arguments.layers else ():
                layer_rows(name, batch, arguments)
        return 0
    print("| model | input | layout | implementation | ms | vs eager |\n|---|---|---|---|---:|---:|")
    for name, batch in itertools.product(arguments.models, arguments.batch):
        model_rows(name, batch, arguments)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
