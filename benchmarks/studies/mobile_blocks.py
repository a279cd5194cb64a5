"""The blocks of a mobile network folded, layer by layer and in one kernel (csrc/cpu/conv/mobile_block.cpp).

`python -m benchmarks.studies.mobile_blocks [MODEL ...] [--batch N[,N]] [--threads N] [--seconds S]` finds a torchvision
model's 1x1 convolutions before or after a depthwise one with nothing but a batch norm and an activation between, times
each different block in channels_last, and says which way `cnnkern.fold` takes. Results are compared first.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

import cnnkern
from cnnkern import _C
from cnnkern.nn.folded_conv import folded_conv, own_kernel

from ..suite import timing
from ..suite.models import build, photographs

MODELS = ["mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0"]
KINDS = {("pointwise", "depthwise", "pointwise"), ("pointwise", "depthwise"), ("depthwise", "pointwise")}
ACTIVATIONS = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish"}


class Block(NamedTuple):
    layers: tuple[nn.Conv2d, ...]
    act: str  # between them, and after a depthwise one that is the last
    shape: tuple[int, ...]  # of an image

    def __str__(self) -> str:
        sizes = [f"{conv.kernel_size[0]}x{conv.kernel_size[1]}" for conv in self.layers]
        stride = max(conv.stride[0] for conv in self.layers)
        channels = "-".join(str(c) for c in (self.shape[0], *(conv.out_channels for conv in self.layers)))
        image = f"{self.shape[1]}x{self.shape[2]}"
        return f"{', '.join(sizes)}{f' stride {stride}' * (stride > 1)}, {self.act}, {channels}, {image}"


def blocks_of(name: str) -> Iterator[Block]:
    """The different blocks of a model."""
    called: list[tuple[nn.Module, tuple[int, ...]]] = []

    def note(module: nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
        called.append((module, tuple(inputs[0].shape[1:])))

    model = build(name).eval()
    for module in model.modules():
        if not list(module.children()) and not isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(note)
    with torch.no_grad():
        model(photographs(1))
    found: dict[str, Block] = {}
    first = 0
    while first < len(called):
        layers = []
        acts = set()
        at = first
        while at < len(called) and isinstance(called[at][0], nn.Conv2d) and own_kernel(called[at][0]):
            layers.append(called[at][0])
            at += 1
            if at == len(called) or type(called[at][0]) not in ACTIVATIONS:
                break
            acts.add(ACTIVATIONS[type(called[at][0])])
            at += 1
        if tuple(map(own_kernel, layers)) in KINDS and len(acts) == 1:
            block = Block(tuple(layers), acts.pop(), called[first][1])
            found.setdefault(str(block), block)
            first = at
        else:
            first += 1
    yield from found.values()


def row(block: Block, batch: int, seconds: float) -> float:
    """Prints it. Returns how many times as fast as layer by layer the way is that `cnnkern.fold` takes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, *block.shape, generator=generator).to(memory_format=torch.channels_last)
    folded = []
    for conv in block.layers:
        bias = torch.randn(conv.out_channels, generator=generator)
        folded.append(folded_conv(conv, conv.weight.detach(), bias, []))
    kinds = [own_kernel(conv) for conv in block.layers]
    at = kinds.index("depthwise")
    acts = [block.act] * len(folded)
    if kinds[-1] == "pointwise":
        acts[-1] = "none"
    parts = (folded[0] if at else None, folded[at], folded[-1] if kinds[-1] == "pointwise" else None)
    together = _C.MobileBlock(*parts, block.act)

    def by_layer() -> Tensor:
        y = x
        for layer, act in zip(folded, acts, strict=True):
            y = layer.run(y, act)
        return y

    with torch.no_grad():
        steps = {"layers": by_layer, "block": lambda: together.run(x, None, acts[-1])}
        torch.testing.assert_close(steps["block"](), steps["layers"](), rtol=1e-4, atol=1e-4)
        deadline = time.perf_counter() + seconds
        samples = timing.interleave(steps, deadline=deadline, min_rounds=5, max_rounds=400)
        taken = "block" if together.is_faster(x) else "layers"
    layers, one = (statistics.median(samples[name]) * 1e3 for name in ("layers", "block"))
    ratio = timing.ratio(samples["layers"], samples["block"])
    verdict = "" if (taken == "block") == (ratio > 1) or 0.97 < ratio < 1.03 else " (the slower)"
    print(f"| {block} | {batch} | {layers:.3f} | {one:.3f} | {ratio:.2f}x | {taken}{verdict} |", flush=True)
    return ratio if taken == "block" else 1.0


def main(argv: list[str] | None = None) -> int:
    def batches(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.mobile_blocks", description=__doc__)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--batch", type=batches, default=[1, 16], metavar="N[,N]", help="images (default: 1,16)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: PyTorch's choice)"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="the time per block and batch (default: 1)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    print(f"threads: {arguments.threads}; {cnnkern.tune_malloc()}\n")
    print(
        "| block: kernels, activation, channels, image | batch | layers (ms) | block (ms) | block is faster | taken |"
    )
    print("|---|---:|---:|---:|---:|---|")
    ratios: dict[int, list[float]] = {batch: [] for batch in arguments.batch}
    for name in arguments.models:
        for block in blocks_of(name):
            for batch in arguments.batch:
                ratios[batch].append(row(block, batch, arguments.seconds))
    for batch, found in ratios.items():
        mean, least = statistics.geometric_mean(found), min(found)
        print(f"batch {batch}: as taken {mean:.2f}x as fast as layer by layer, geometric mean; {least:.2f}x at least")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
