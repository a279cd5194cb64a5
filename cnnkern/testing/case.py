"""What tests and benchmarks know of an operator, and how they call it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """A call as a network makes it: the input's shape, and what else `Case.inputs` is told."""

    shape: Shape
    arguments: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join(["x".join(map(str, self.shape)), *(f"{n} {v}" for n, v in self.arguments.items())])


@dataclass(frozen=True)
class Case:
    """What tests and benchmarks need to know of one operator."""

    name: str
    function: Callable[..., Tensor]  # the public function ...
    reference: Callable[..., Tensor]  # ... and its specification, with the same signature
    inputs: Callable[..., dict[str, Any]]  # (shape, dtype, generator=, smooth=, **variant) -> arguments of both
    differentiable: tuple[str, ...]  # arguments that get gradients, where they are not None
    mutated: tuple[str, ...]  # arguments that the call changes in place
    variants: dict[str, dict[str, Any]]  # name -> keyword arguments of `inputs`
    shapes: tuple[Shape, ...]  # the conformance suite's: ragged sizes, one element, every rank
    gradcheck_shapes: tuple[Shape, ...]
    bench_layers: dict[str, tuple[Layer, ...]]  # network -> its layers, each once
    bench_variant: str
    bench_others: tuple[str, ...] = field(default=(), kw_only=True)  # variants that a full run adds on two shapes
    # Other forms of the reference in use, by name: baselines of the benchmarks.
    bench_forms: dict[str, Callable[..., Tensor]] = field(default_factory=dict, kw_only=True)
    compiled_forms: tuple[str, ...] = field(default=(), kw_only=True)  # those that Inductor does not make the same of
    forward_call: Callable[[dict[str, Any]], tuple]  # arguments of `inputs` -> (operator, positional arguments)
    backward_call: Callable[[dict[str, Any], Tensor], tuple]  # ... and dy -> (gradient operator, arguments)
    # Tensors that the least possible memory traffic (read, written) consists of; of x's size but for y and dy.
    forward_traffic: tuple[int, int]
    backward_traffic: tuple[int, int]
    ranks: tuple[int, ...] = (2, 3, 4, 5)  # numbers of dimensions that the input may have
    empty_shapes: tuple[Shape, ...] = ((0, 3, 4, 5), (0, 3), (2, 3, 0, 4))
    keeps_layout: bool = True  # whether results have the input's memory format; else they are contiguous
    float32_parameters: bool = True  # beside a 16-bit input: whether `inputs` knows parameter_dtype

    output_shape: Callable[[Layer], Shape] | None = None  # where it is not the input's
    parts: tuple[str, ...] = ()  # the operators in the order of their calls, where they are more than two

    @property
    def operators(self) -> tuple[str, ...]:
        """In the order in which a forward and a backward pass call them."""
        return self.parts or (self.name, f"{self.name}_backward")

    def elements(self, layer: Layer, training: bool) -> tuple[int, int]:
        """How many elements have to be (read, written)."""
        x = math.prod(layer.shape)
        y = math.prod(self.output_shape(layer)) if self.output_shape else x
        read, written = self.forward_traffic[0] * x, self.forward_traffic[1] * y
        if training:
            read += (self.backward_traffic[0] - 1) * x + y
            written += self.backward_traffic[1] * x
        return read, written

    def of_its_rank(self, *shapes: Shape) -> tuple[Shape, ...]:
        return tuple(shape for shape in shapes if len(shape) in self.ranks)


def randn(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Normal numbers on the generator's device, drawn in float64 and rounded: every dtype sees the same ones."""
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device).to(dtype)


def with_layout(x: Tensor, layout: str) -> Tensor:
    """x with the same values in another memory layout: contiguous, channels_last, sliced or permuted.

    Raises ValueError for another layout.
    """
    if layout == "contiguous" or (layout == "channels_last" and x.dim() <= 2):
        return x.contiguous()
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":  # every dimension cut out of a larger one
        larger = x.new_full([n + 2 for n in x.shape], float("nan"))
        view = larger[tuple(slice(1, n + 1) for n in x.shape)]
        return view.copy_(x)
    if layout == "permuted":  # the first dimension innermost, which is no memory format
        return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    raise ValueError(f"layout must be one of contiguous, channels_last, sliced, permuted; got {layout!r}")


def run(
    function: Callable[..., Tensor], case: Case, inputs: dict[str, Any], dy: Tensor | None = None
) -> dict[str, Tensor]:
    """Calls `function` on copies of `inputs`; returns output, gradients and what the call changed in place.

    Leaves keep their memory layout. Without `dy` only the forward pass runs.
    """

    def leaf(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if name in case.mutated:
            return value.clone()
        return value.detach().requires_grad_(dy is not None and name in case.differentiable)

    arguments = {name: leaf(name, value) for name, value in inputs.items()}
    y = function(**arguments)
    results = {"output": y.detach()}
    if dy is not None:
        wanted = [n for n in case.differentiable if isinstance(arguments.get(n), Tensor)]
        grads = torch.autograd.grad(y, [arguments[n] for n in wanted], dy)
        results |= {f"grad of {n}": g for n, g in zip(wanted, grads, strict=True)}
    results |= {n: arguments[n] for n in case.mutated if isinstance(arguments.get(n), Tensor)}
    return results


def saved_bytes(function: Callable[[], Tensor]) -> int:
    """What autograd holds between the forward pass of `function` and its backward pass, each storage once."""
    storages: dict[int, tuple[Tensor, int]] = {}

    def pack(t: Tensor) -> Tensor:  # kept alive, or another storage might take its place
        return storages.setdefault(t.untyped_storage().data_ptr(), (t, t.untyped_storage().nbytes()))[0]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function()
    del y
    return sum(n for _, n in storages.values())
