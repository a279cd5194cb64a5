"""The sections, each a plan of groups or a measurement of its own, in order of value."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from cnnkern import doctor
from cnnkern.testing import CASES, Layer

from ..studies import gpu_kernels, steps
from ..suite import bandwidth, operators
from ..suite.groups import AGAIN, CONVERTED_AND_COMPILED, LAYOUTS, Contender, Group, Refused, Session
from ..suite.options import Options
from .benches import TUNED, AutocastBench, PassBench, Passes, Scale

DTYPE = torch.bfloat16
NETWORK = "several networks"  # whose layers these are
LONGEST = 25  # kernels of a step that are kept by name


@dataclass
class Found:
    """What a section has measured: `records` and `refused` as `rows.from_records` takes them."""

    records: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)
    bandwidths: list[dict[str, Any]] = field(default_factory=list)
    checks: dict[str, str] = field(default_factory=dict)
    kernels: dict[str, dict[str, float]] = field(default_factory=dict)  # contender -> longest, microseconds per step


@dataclass(frozen=True)
class Section:
    name: str
    seconds: float  # of 600, about; what a section leaves goes to those behind it
    run: Callable[[Scale, float], Found]


def timed(plan: list[Group], scale: Scale, seconds: float) -> Found:
    """Every group within its share of the time, as the suite does it."""
    found, plan = Found(), plan[: scale.most]

    def keep(event: dict[str, Any]) -> None:
        if "refused" in event:
            found.refused.append(event["refused"])

    options = Options(seconds=seconds, compile_seconds=seconds, device=scale.device, dtype="bfloat16")
    session = Session(plan, options, keep)
    for group in plan:
        for contender, samples in session.results_of(group).items():
            if not isinstance(samples, Refused):
                what = group.identity(contender) | session.conditions[contender]
                found.records.append({"extra_info": what, "stats": {"data": samples}})
    return found


def check(scale: Scale, seconds: float) -> Found:
    """Every operator once, forward and backward, against the reference."""
    return Found(checks=doctor.check_kernels(scale.device))


def measure_bandwidth(scale: Scale, seconds: float) -> Found:
    sizes = (2**26, 2**28, 3 * 2**30) if scale.device == "cuda" else (2**16,)
    measured = bandwidth.measure(scale.device, 1, seconds, sizes)
    return Found(bandwidths=[{"mix": b.mix, "size": b.size, "gb_s": b.gb_s} for b in measured])


def model_group(
    name: str, batch: int, layout: str, names: tuple[str, ...], scale: Scale, weight: float, graphed: bool = False
) -> Group:
    return Group(
        suite="models",
        operator=name,
        network=name,
        shape=f"{batch}x3x{scale.size}x{scale.size}",
        mode="training, CUDA graph" if graphed else "training",
        api="module",
        contenders=tuple(Contender(each, layout) for each in names),
        open=lambda: AutocastBench(name, batch, scale, graphed),
        weight=weight,
        dtype="bfloat16",
        min_rounds=7,
        max_rounds=15,
        peaks=True,
        compiled=frozenset({"torch.compile", CONVERTED_AND_COMPILED}),
    )


def models_in_eager(scale: Scale, seconds: float) -> Found:
    names = ("eager", AGAIN, "cnnkern")
    plan = [model_group(m, batch, "channels_last", names, scale, 6.0) for batch in scale.batches for m in scale.models]
    return timed(plan, scale, seconds)


def models_graphed(scale: Scale, seconds: float) -> Found:
    """Whole steps as CUDA graphs: the kernels without the host, for which models of many small layers wait."""
    names = ("eager", AGAIN, "cnnkern")
    batch = scale.batches[-1]
    plan = [model_group(m, batch, "channels_last", names, scale, 8.0, graphed=True) for m in scale.models]
    return timed(plan, scale, seconds)


def models_compiled(scale: Scale, seconds: float) -> Found:
    names = ("eager", AGAIN, "cnnkern", "torch.compile", CONVERTED_AND_COMPILED)
    first = [m for m in ("resnet50", "regnety_032") if m in scale.models]
    order = [(m, layout) for m in first for layout in reversed(LAYOUTS)]
    order += [(m, "channels_last") for m in scale.models if m not in first]
    plan = [model_group(m, scale.batches[0], layout, names, scale, 40.0) for m, layout in order]
    return timed(plan, scale, seconds)


def kernels_by_kind(scale: Scale, seconds: float) -> Found:
    """A step's milliseconds by kind of layer, of eager and of the converted model, and on a GPU its longest kernels."""
    end, found = time.perf_counter() + seconds, Found()
    for name in scale.models:
        if time.perf_counter() > end:
            break
        bench = AutocastBench(name, scale.batches[-1], scale)
        for who in ("eager", "cnnkern"):
            contender = Contender(who, "channels_last")
            rounds = steps.rounds(bench, contender, scale.repeats, scale.device)
            group = model_group(name, scale.batches[-1], "channels_last", (who,), scale, 0.0)
            if scale.device == "cuda":
                taken = gpu_kernels.microseconds(bench.step(contender, verify=False))
                found.kernels[f"{name} {who}"] = dict(sorted(taken.items(), key=lambda item: -item[1])[:LONGEST])
            for kind in steps.KINDS:
                samples = [r[kind] / 1e3 for r in rounds]
                if min(samples) > 0:
                    what = group.identity(contender) | {"suite": "kernels", "operator": kind}
                    found.records.append({"extra_info": what, "stats": {"data": samples}})
    return found


def convolution_groups(
    layers: list[tuple[Layer, tuple[str, ...]]], scale: Scale, dtype: torch.dtype = DTYPE
) -> list[Group]:
    return [
        Group(
            suite="operators",
            operator="grouped_conv2d",
            network=NETWORK,
            shape=str(layer),
            mode=name,
            api="functional",
            contenders=tuple(
                Contender(who, layout) for layout in layouts for who in ("eager", AGAIN, TUNED, "cnnkern")
            ),
            open=lambda of=of, name=name: PassBench(of, name),
            weight=0.7,
            dtype=str(dtype).removeprefix("torch."),
        )
        for layer, layouts in layers
        for of in [Passes(layer, scale.device, dtype)]
        for name in ("forward", "dx", "dweight")
    ]


def convolution(scale: Scale, channels: int, plane: int, width: int, kernel: int, stride: int) -> Layer:
    batch, channels, plane, _ = scale.shape(128, channels, plane)
    width = min(width, channels)
    channels -= channels % width
    return Layer(
        (batch, channels, plane, plane),
        {"width": width, "kernel": kernel, "padding": kernel // 2, "bias": False, "stride": stride},
    )


def grouped(scale: Scale, seconds: float) -> Found:
    """cuDNN's grouped 3x3, pass by pass, over the widths that networks have."""
    widths = (8, 4, 16, 24, 32, 48, 64, 40, 56, 72, 112)
    layers = [
        (convolution(scale, -(-256 // width) * width, plane, width, 3, stride), ("channels_last", "contiguous")[:both])
        for plane, stride, both in ((28, 1, 2), (56, 2, 1))
        for width in widths
    ]
    return timed(convolution_groups(layers, scale), scale, seconds)


def tf32(scale: Scale, seconds: float) -> Found:
    """Grouped 3x3 of float32 with PyTorch's default, which allows TF32 in convolutions."""
    layers = [
        (convolution(scale, -(-256 // width) * width, plane, width, 3, stride), ("channels_last",))
        for plane, stride in ((28, 1), (56, 2))
        for width in (8, 4, 16, 24)
    ]
    return timed(convolution_groups(layers, scale, torch.float32), scale, seconds)


def depthwise(scale: Scale, seconds: float) -> Found:
    """Layers of mobilenet_v2, efficientnet_b0 and convnext_tiny."""
    shapes = [(144, 56, 3, 1), (96, 112, 3, 2), (384, 14, 3, 1), (240, 28, 5, 1), (672, 14, 5, 2), (96, 56, 7, 1)]
    layers = [(convolution(scale, c, plane, 1, k, stride), ("channels_last",)) for c, plane, k, stride in shapes]
    return timed(convolution_groups(layers, scale), scale, seconds)


def operator_groups(
    name: str, shapes: list[tuple[int, ...]], scale: Scale, variants: tuple[str, ...] = (), compiled: int = 0
) -> list[Group]:
    """Training of a case over its shapes, by default of its usual variant; the first `compiled` of the first variant
    with torch.compile as well."""
    variants = variants or (CASES[name].bench_variant,)
    case = CASES[name]
    return [
        operators.group(
            NETWORK,
            "training",
            operators.Drawn(case, Layer(scale.shape(*shape)), DTYPE, variant, scale.device),
            i < compiled and variant == variants[0] and scale.device == "cuda",
            False,
        )
        for variant in variants
        for i, shape in enumerate(shapes)
    ]


def batch_norm(scale: Scale, seconds: float) -> Found:
    shapes = [(batch, *of) for of in ((256, 56), (128, 28), (64, 112), (1024, 14), (2048, 7)) for batch in (256, 64)]
    plan = operator_groups("bn_act", shapes, scale, compiled=2)
    plan += operator_groups("bn_add_act", [(256, 256, 56), (256, 1024, 14)], scale, compiled=1)
    plan += operator_groups("bn_act", shapes[2:3], scale, ("train silu", "train relu6"))
    return timed(plan, scale, seconds)


def layer_norm(scale: Scale, seconds: float) -> Found:
    shapes = [(128, 768, 7), (128, 384, 14), (128, 96, 56)]
    plan = operator_groups("layer_norm2d", shapes, scale)
    return timed(plan, scale, seconds)


SECTIONS = (
    Section("check", 10, check),
    Section("bandwidth", 10, measure_bandwidth),
    Section("models", 130, models_in_eager),
    Section("graphed", 60, models_graphed),
    Section("grouped", 90, grouped),
    Section("kernels", 70, kernels_by_kind),
    Section("batch_norm", 60, batch_norm),
    Section("depthwise", 40, depthwise),
    Section("tf32", 25, tf32),
    Section("compile", 170, models_compiled),
    Section("layer_norm", 20, layer_norm),
)
