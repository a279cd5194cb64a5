"""The row of add_relu."""

from typing import Any

import torch
from torch import Tensor

from cnnkern import functional, reference
from cnnkern.testing.case import Case, Shape, randn
from cnnkern.testing.shapes import ADD_LAYERS, RAGGED_SHAPES
from cnnkern.triton_kernels.layout import memory_order


def add_relu_inputs(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    *,
    generator: torch.Generator,
    smooth: bool = False,
) -> dict[str, Any]:
    """Arguments of add_relu, no sum near the kink of the ReLU."""
    x, other = (randn(shape, generator, torch.float64).to(dtype) for _ in range(2))
    return {"input": x, "other": torch.where((x + other).abs() < 1e-3, other + 1, other)}


def add_relu_backward_call(inputs: dict[str, Any], dy: Tensor) -> tuple:
    y, mask = torch.ops.cnnkern.add_relu(inputs["input"].detach(), inputs["other"].detach())
    return torch.ops.cnnkern.add_relu_backward.default, (dy, mask, memory_order(y))


ADD_RELU = Case(
    name="add_relu",
    function=functional.add_relu,
    reference=reference.add_relu,
    inputs=add_relu_inputs,
    differentiable=("input", "other"),
    mutated=(),
    variants={"plain": {}},
    shapes=RAGGED_SHAPES,
    gradcheck_shapes=((3, 2, 2, 2), (4, 3), (2, 2, 3)),
    forward_call=lambda inputs: (torch.ops.cnnkern.add_relu.default, (inputs["input"], inputs["other"])),
    backward_call=add_relu_backward_call,
    bench_layers=ADD_LAYERS,
    bench_variant="plain",
    bench_forms={"in place": reference.add_relu_in_place},
    forward_traffic=(2, 1),
    backward_traffic=(1, 1),
    float32_parameters=False,
)
