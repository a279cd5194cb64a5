"""Every operator of `cnnkern.testing.CASES` on its networks' shapes, against eager PyTorch and torch.compile."""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from cnnkern import testing
from cnnkern.testing import Case, Layer

from . import operator_peers, reasons, timing
from .groups import (
    AGAIN,
    LAYOUTS,
    MAX_AUTOTUNE,
    OUT_OF_PLACE,
    Contender,
    Group,
    Unavailable,
    first_line,
    is_baseline,
)
from .judge import assert_as_good_as
from .options import Options

# Seconds per element. Forward and backward are the halves of training, with a graph that is built and kept.
WEIGHTS = {"training": 1.5e-7, "inference": 6e-8, "forward": 7e-8, "backward": 1e-7}
# On a GPU the time goes into drawing the inputs, on the host, and into the capture of each contender.
GPU_WEIGHT, GPU_CONTENDER_SECONDS = 3e-8, 0.05
IN_PLACE = "in place"  # the name of that form in `Case.bench_forms`
USUAL_MODES = ("training", "inference")


def groups(options: Options, compiled: bool) -> list[Group]:
    """Training and inference of every case on every shape; with --modes all also forward and backward separately.

    If torch.compile is timed, it is on one shape per network (on all with --compile-shapes all), for the reference and
    for its other forms for which Inductor generates other code. Cases take turns, so that a run without enough time
    has rows of each.
    """
    modes = tuple(WEIGHTS) if options.modes == "all" else USUAL_MODES
    columns = []
    for case in testing.CASES.values():
        for network, layers, variant in _columns(case, options.networks == "all"):
            by_size = sorted(layers, key=lambda layer: math.prod(layer.shape))
            middle = by_size[len(by_size) // 2]
            if options.quick:
                layers = (by_size[0], middle)[: len(layers)]
            column = []
            for layer in layers:
                drawn = Drawn(case, layer, getattr(torch, options.dtype), variant, options.device)
                for mode in modes:
                    with_compile = compiled and not options.quick and variant == case.bench_variant
                    with_compile &= layer == middle or options.compile_shapes == "all"
                    column.append(group(network, mode, drawn, with_compile, options.max_autotune, options.peers))
            columns.append(column)
    longest = max(map(len, columns), default=0)
    shapes = range(0, longest, len(modes))  # the modes of a shape share their inputs, and stay together
    return [each for i in shapes for column in columns for each in column[i : i + len(modes)]]


def _columns(case: Case, everything: bool) -> Iterator[tuple[str, tuple[Layer, ...], str]]:
    """(network, layers, variant): the first network's, or all networks' and after them the other variants'."""
    for network, layers in itertools.islice(case.bench_layers.items(), None if everything else 1):
        yield network, layers, case.bench_variant
    for variant in case.bench_others if everything else ():
        yield "resnet50", (Layer((32, 256, 28, 28)), Layer((1, 256, 28, 28))), variant


def group(
    network: str, mode: str, drawn: "Drawn", with_compile: bool, max_autotune: bool, peers: bool = False
) -> Group:
    case, layer = drawn.case, drawn.layer
    itemsize = drawn.dtype.itemsize
    layouts = LAYOUTS if len(layer.shape) in (4, 5) else LAYOUTS[:1]
    compiled = ("torch.compile", *(f"torch.compile, {form}" for form in case.compiled_forms)) * with_compile
    compiled += (MAX_AUTOTUNE,) * (with_compile and max_autotune)
    # "eager" is the reference in place where it has that form, and the reference otherwise.
    forms = tuple(OUT_OF_PLACE if form == IN_PLACE else form for form in case.bench_forms)
    names = ("eager", AGAIN, "cnnkern", *forms, *compiled, *(operator_peers.of(case.name) if peers else ()))
    numel = math.prod(layer.shape)
    read, written = case.elements(layer, training=mode in ("training", "backward"))
    if mode == "backward":
        forward = case.elements(layer, training=False)
        read, written = read - forward[0], written - forward[1]
    seconds = numel * WEIGHTS[mode] * (1.5 + len(case.bench_forms))
    if drawn.device == "cuda":
        seconds = numel * GPU_WEIGHT + GPU_CONTENDER_SECONDS * len(layouts) * len(names)
    return Group(
        suite="operators",
        operator=case.name + ("" if drawn.variant == case.bench_variant else f" ({drawn.variant})"),
        network=network,
        shape=str(layer),
        mode=mode,
        api="functional",
        contenders=tuple(Contender(name, layout) for layout in layouts for name in names),
        open=lambda: OperatorBench(drawn, mode),
        weight=0.2 + seconds + (6 if mode == "inference" else 12) * len(layouts) * len(compiled),
        compiled=frozenset(compiled),
        dtype=str(drawn.dtype).removeprefix("torch."),
        bytes_read=read * itemsize,
        bytes_written=written * itemsize,
    )


@dataclass(frozen=True, eq=False)
class Drawn:
    """The inputs of a case on one layer, drawn when first needed. Both modes get the same numbers."""

    case: Case
    layer: Layer
    dtype: torch.dtype
    variant: str
    device: str


@lru_cache(maxsize=1)
def _draw(drawn: Drawn) -> tuple[dict[str, Any], Tensor]:
    """(inputs, dy), contiguous. Only the last shape's are kept: they may be gigabytes."""
    case, generator = drawn.case, torch.Generator(drawn.device).manual_seed(0)
    variant = case.variants[drawn.variant] | drawn.layer.arguments
    inputs = case.inputs(drawn.layer.shape, drawn.dtype, generator=generator, **variant)
    shape = testing.run(case.reference, case, inputs)["output"].shape
    return inputs, testing.randn(shape, generator, drawn.dtype)


class OperatorBench:
    def __init__(self, drawn: Drawn, mode: str) -> None:
        self.case, self.device, self.mode = drawn.case, drawn.device, mode
        training = mode != "inference"
        self.inputs, dy = _draw(drawn)
        if "training" in self.inputs:
            self.inputs = self.inputs | {"training": training}
        self.dy = dy if training else None
        self.eager: dict[str, dict[str, Tensor]] = {}
        self.code: dict[Contender, str] = {}

    @cached_property
    def reference64(self) -> dict[str, Tensor]:
        dy64 = None if self.dy is None else self.dy.double()
        return testing.run(self.case.reference, self.case, testing.to_float64(self.inputs), dy64)

    def placed(self, layout: str) -> tuple[dict[str, Any], Tensor | None]:
        """(inputs, dy) in this layout: what a model in that memory format passes to the operator."""

        def place(value: Any) -> Any:
            return testing.with_layout(value, layout) if isinstance(value, Tensor) and value.dim() in (4, 5) else value

        return {n: place(v) for n, v in self.inputs.items()}, place(self.dy)

    def step(self, contender: Contender, verify: bool) -> Callable[[], object]:
        case, (inputs, dy) = self.case, self.placed(contender.layout)
        name, _, form = contender.name.partition(", ")
        function = case.bench_forms.get(form or name, case.function if name == "cnnkern" else case.reference)
        if is_baseline(contender.name):
            function = case.bench_forms.get(IN_PLACE, case.reference)
        if name == "torch.compile":
            # Without graphs: on a GPU the suite captures them itself.
            tuned = "max-autotune-no-cudagraphs" if contender.name == MAX_AUTOTUNE else None
            function = torch.compile(function, dynamic=False, fullgraph=True, mode=tuned)
            # A graph that gives its buffers away cannot be run backward again and again.
            kept = torch._functorch.config.patch(donated_buffer=False) if self.mode == "backward" else nullcontext()
            try:
                with kept:
                    _, self.code[contender] = reasons.compiling(_run, function, case, inputs, dy)
            except torch._dynamo.exc.BackendCompilerFailed as error:  # no C++ compiler, for one
                raise Unavailable(first_line(error)) from error
        if peer := operator_peers.PEERS.get(contender.name):
            return self._of_peer(contender.name, peer, inputs, dy, verify)
        if verify:
            if contender.layout not in self.eager:
                self.eager[contender.layout] = _run(case.reference, case, inputs, dy)
            out = _run(function, case, inputs, dy)
            assert_as_good_as(out, self.eager[contender.layout], self.reference64)
        return self._timed(function, inputs, dy)

    def _timed(
        self, function: Callable[..., Tensor], inputs: dict[str, Any], dy: Tensor | None
    ) -> Callable[[], object]:
        step = timed(function, self.case, inputs, dy, self.mode)
        return timing.captured(step) if self.device == "cuda" else step

    def _of_peer(
        self, name: str, peer: operator_peers.Peer, inputs: dict[str, Any], dy: Tensor | None, verify: bool
    ) -> Callable[[], object]:
        given, same = peer.inputs(inputs)
        function = operator_peers.load(name, self.case, given, training=dy is not None)
        if verify:
            eager = _run(self.case.reference, self.case, same, dy)
            double = testing.run(
                self.case.reference, self.case, testing.to_float64(same), None if dy is None else dy.double()
            )
            with peer.around():
                out = _run(function, self.case, given, dy)
            assert_as_good_as(out, eager, double)
        with peer.around():  # which a graph that is captured in it needs no more
            return self._timed(function, given, dy)


def _run(function: Callable[..., Tensor], case: Case, inputs: dict[str, Any], dy: Tensor | None) -> dict[str, Tensor]:
    with torch.set_grad_enabled(dy is not None):  # as it is timed: torch.compile compiles anew where this changes
        return testing.run(function, case, inputs, dy)


def timed(
    function: Callable[..., Tensor], case: Case, inputs: dict[str, Any], dy: Tensor | None, mode: str
) -> Callable[[], object]:
    """The step of `mode` for `function`. Freeing the results is part of the time."""
    leaves = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            value = value.clone() if name in case.mutated else value.detach()
            value.requires_grad_(dy is not None and name in case.differentiable)
        leaves[name] = value
    wanted = [leaves[n] for n in case.differentiable if isinstance(leaves.get(n), Tensor)]

    def training() -> None:
        torch.autograd.grad(function(**leaves), wanted, dy)

    def inference() -> None:
        with torch.no_grad():
            function(**leaves)

    def forward() -> None:
        function(**leaves)

    if mode == "backward":
        y = function(**leaves)
        return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)
    return {"training": training, "inference": inference, "forward": forward}[mode]
