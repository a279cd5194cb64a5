"""Where the time of a step goes, by kind of layer, and the most memory that it holds: by torch.profiler."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

DENSE, GROUPED, NORM = "dense convolution", "grouped and depthwise convolution", "norm, activation, addition"
LAYER_NORM, POOLING, LINEAR, OPTIMIZER = "layer norm", "max pooling", "matrix product", "optimiser"
COPIES, REST, IDLE = "copies and casts", "rest", "host idle"
KINDS = (DENSE, GROUPED, NORM, LAYER_NORM, POOLING, LINEAR, OPTIMIZER, COPIES, REST, IDLE)
OURS = (GROUPED, NORM, LAYER_NORM, POOLING)  # for which cnnkern has kernels
ROUNDS = 20  # that are profiled at most
# Where the number of groups stands among a convolution's arguments.
GROUPS = {
    "aten::convolution": 8,
    "aten::convolution_backward": 9,
    "cnnkern::grouped_conv2d": 6,
    "cnnkern::grouped_conv2d_backward": 6,
}
_IN_PLACE_TOO = ("relu", "hardtanh", "silu", "sigmoid", "hardsigmoid", "hardswish", "leaky_relu", "elu", "mish", "add")
_ACTIVATIONS = (*_IN_PLACE_TOO, *(f"{name}_" for name in _IN_PLACE_TOO), "relu6", "gelu", "prelu", "_prelu_kernel")
_DERIVATIVES = (
    "threshold",
    "hardtanh",
    "silu",
    "sigmoid",
    "hardsigmoid",
    "hardswish",
    "gelu",
    "leaky_relu",
    "elu",
    "mish",
    "_prelu_kernel",
)
_FUSED = ("bn_act", "bn_add_act", "bn_add_into", "bn_prelu", "add_relu", "sync_bn", "sync_bn_stats", "sync_bn_sums")
KIND_OF = {
    **{f"aten::{name}": NORM for name in (*_ACTIVATIONS, "batch_norm", "native_batch_norm_backward")},
    **{f"aten::{name}_batch_norm_backward": NORM for name in ("cudnn", "miopen")},
    **{f"aten::{name}_backward": NORM for name in _DERIVATIVES},
    **{f"cnnkern::{name}{half}": NORM for name in _FUSED for half in ("", "_backward")},
    # With the batch norm that the convolution computes as it reads its input.
    **{f"cnnkern::bn_act_conv2d{half}": GROUPED for half in ("", "_backward")},
    "DenseBlockBnRelu": NORM,  # the gradient of a batch norm in a dense block, which is no operator
    **{f"aten::{name}": LAYER_NORM for name in ("layer_norm", "native_layer_norm_backward")},
    **{f"cnnkern::{name}{half}": LAYER_NORM for name in ("layer_norm", "layer_norm2d") for half in ("", "_backward")},
    **{f"aten::max_pool2d{name}": POOLING for name in ("", "_with_indices", "_with_indices_backward")},
    **{f"cnnkern::max_pool2d{half}": POOLING for half in ("", "_backward")},
    **{f"aten::{name}": LINEAR for name in ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm")},
    "aten::scaled_dot_product_attention": LINEAR,
}
NONE: Mapping[int, str] = MappingProxyType({})
_COPIES = frozenset(f"aten::{name}" for name in ("copy_", "_to_copy", "to", "contiguous", "clone"))


def kind_of(event: FunctionEvent, convolutions: Mapping[int, str] = NONE) -> str:
    """The kind of the outermost enclosing operator that has one: a cast within a convolution counts as convolution.
    `convolutions`: the kinds of convolutions by the ids of their events, which do not show the kind."""
    around = [event]
    while around[-1].cpu_parent is not None:
        around.append(around[-1].cpu_parent)
    for e in reversed(around):
        if e.name.startswith("Optimizer."):
            return OPTIMIZER
        if e.name in GROUPS:
            groups = (e.concrete_inputs or [])[GROUPS[e.name] :][:1]
            return GROUPED if groups and groups[0] != 1 else convolutions.get(e.id, DENSE)
        if e.name in KIND_OF:
            return KIND_OF[e.name]
    return COPIES if any(e.name in _COPIES for e in around) else REST


@dataclass(frozen=True)
class Profiled:
    """One step: seconds by kind, of operators on a CPU or of kernels on a GPU, and its wall time in the profiler."""

    by_kind: dict[str, float]
    wall: float

    @property
    def busy(self) -> float:
        return sum(self.by_kind.values())


def profiled(steps: Mapping[str, Callable[[], object]], device: str, seconds: float) -> dict[str, Profiled]:
    """The medians over rounds for each step. A round calls every step once. There are as many rounds as `seconds` and
    ROUNDS allow, and at least three."""
    found: dict[str, list[Profiled]] = {name: [] for name in steps}
    kinds = {name: convolution_kinds(step, device) for name, step in steps.items()}
    deadline = time.perf_counter() + seconds
    for done in range(ROUNDS):
        if done >= 3 and time.perf_counter() > deadline:
            break
        for name, step in steps.items():
            found[name].append(profile_once(step, device, kinds[name]))
    return {name: _median(rounds) for name, rounds in found.items()}


def _median(rounds: list[Profiled]) -> Profiled:
    by_kind = {kind: statistics.median(r.by_kind[kind] for r in rounds) for kind in KINDS[:-1]}
    return Profiled(by_kind, statistics.median(r.wall for r in rounds))


Kinds = Mapping[str, Sequence[str]]


def convolution_kinds(step: Callable[[], object], device: str) -> Kinds:
    """The kinds of a step's convolutions in their order, by the operator's name.

    Only a profile with shapes distinguishes them. It accesses each tensor before the operator is called, so batch norms
    of a converted model are not deferred, nor fused. Times are therefore measured without shapes.
    """
    return {
        name: [kind_of(e) for e in events] for name, events in _convolutions(_events(step, device, True)[0]).items()
    }


def profile_once(step: Callable[[], object], device: str, kinds: Kinds) -> Profiled:
    """One step; `kinds` are its :func:`convolution_kinds`."""
    events, wall = _events(step, device, False)
    convolutions = {
        e.id: kind for name, found in _convolutions(events).items() for e, kind in zip(found, kinds[name], strict=False)
    }
    on_gpu = torch.device(device).type == "cuda"
    by_kind = dict.fromkeys(KINDS[:-1], 0.0)
    for event in events:
        micros = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        by_kind[kind_of(event, convolutions)] += micros / 1e6
    return Profiled(by_kind, wall)


def _events(step: Callable[[], object], device: str, shapes: bool) -> tuple[list[FunctionEvent], float]:
    """The operators of one step, and its wall time. On a GPU the time of a kernel belongs to its operator."""
    on_gpu = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, record_shapes=shapes) as found:
        start = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        wall = time.perf_counter() - start
    return [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CPU], wall


def _convolutions(events: Iterable[FunctionEvent]) -> dict[str, list[FunctionEvent]]:
    found: dict[str, list[FunctionEvent]] = {name: [] for name in GROUPS}
    for event in sorted(events, key=lambda e: e.time_range.start):
        if event.name in GROUPS:
            found[event.name].append(event)
    return found


def breakdown(found: Profiled, step_seconds: float, on_gpu: bool) -> dict[str, float]:
    """Seconds by kind that add up to a step's time, as it was measured without the profiler.

    On a CPU the shares are the profiler's, and idle is the time outside operators, mostly Python. On a GPU the times of
    kernels are taken as they are, and idle is the rest of the step, in which the GPU waits for the host.
    """
    if on_gpu:
        scale = min(1.0, step_seconds / found.busy) if found.busy else 1.0
        idle = step_seconds - found.busy * scale
    else:
        scale = step_seconds / max(found.wall, found.busy)
        idle = step_seconds - found.busy * scale
    return {kind: seconds * scale for kind, seconds in found.by_kind.items()} | {IDLE: max(0.0, idle)}


def bound(by_kind: dict[str, float]) -> float:
    """An upper bound of the speedup of a step: if the kinds in OURS took no time (Amdahl)."""
    whole = sum(by_kind.values())
    left = whole - sum(by_kind[kind] for kind in OURS)
    return whole / left if left > 0 else float("inf")


CPU_PEAK = "what PyTorch's CPU allocator had handed out at most (torch.profiler), beyond what was there before the step"
GPU_PEAK = "what PyTorch's CUDA allocator had handed out at most, beyond what was there before the step"


def peak_bytes(step: Callable[[], object], device: str) -> int:
    """The peak memory of tensors during the step, in addition to what they held before: activations, gradients,
    temporary tensors. Without what libraries allocate themselves, and what an allocator keeps."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return max(0, *_held_on_cpu(step))


def held_bytes(step: Callable[[], object], device: str) -> int:
    """The memory of tensors after the step, in addition to what they held before, while its result is alive. For a
    forward pass that is what autograd saves."""
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        _ = step()
        return torch.cuda.memory_allocated(device) - before
    return _held_on_cpu(step)[-1]


def _held_on_cpu(step: Callable[[], object]) -> list[int]:
    """The bytes that tensors hold beyond what they held before, after each allocation and release."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        _ = step()
    # The public summary adds up an operator's allocations, without their order.
    events = found.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return [0, *itertools.accumulate(change for _, change in changes)]
