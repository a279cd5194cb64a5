"""The rows of layer_norm and layer_norm2d."""

from typing import Any

import torch
from torch import Tensor

from cnnkern import functional, reference
from cnnkern.testing.case import Case, Shape, randn
from cnnkern.testing.shapes import CONVNEXT_TINY, RAGGED_SHAPES, batch, layers


def _parameter(wanted: bool, shape: Shape, generator: torch.Generator, dtype: torch.dtype) -> Tensor | None:
    """Random values, one of them zero where there are several."""
    values = randn(shape, generator, dtype)
    if values.numel() > 2:
        values.view(-1)[values.numel() // 2] = 0
    return values if wanted else None


def _parameter_dtype(dtype: torch.dtype, asked: torch.dtype | None, weight: bool) -> torch.dtype:
    """A float32 bias beside a 16-bit input and no weight: eager PyTorch, the judge, has no gradient for it."""
    return asked if asked is not None and weight else dtype


def _input(shape: Shape, over: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Offsets and scales that differ from row to row."""
    per_row = [1 if d in over else n for d, n in enumerate(shape)]
    scale = randn(per_row, generator, torch.float64)
    return (randn(shape, generator, torch.float64) * (0.5 + scale.abs()) + 2 * scale).to(dtype)


def layer_norm_inputs(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    *,
    generator: torch.Generator,
    dims: int = 1,
    weight: bool = True,
    bias: bool = True,
    eps: float = 1e-5,
    parameter_dtype: torch.dtype | None = None,
    smooth: bool = False,
) -> dict[str, Any]:
    """Arguments of layer_norm over the last `dims` dimensions, or all if there are fewer."""
    first = max(len(shape) - dims, 0)
    normalized, parameters = tuple(shape[first:]), _parameter_dtype(dtype, parameter_dtype, weight)
    return {
        "input": _input(shape, tuple(range(first, len(shape))), dtype, generator),
        "normalized_shape": normalized,
        "weight": _parameter(weight, normalized, generator, parameters),
        "bias": _parameter(bias, normalized, generator, parameters),
        "eps": eps,
    }


def layer_norm2d_inputs(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    *,
    generator: torch.Generator,
    weight: bool = True,
    bias: bool = True,
    eps: float = 1e-6,
    parameter_dtype: torch.dtype | None = None,
    smooth: bool = False,
) -> dict[str, Any]:
    """Arguments of layer_norm2d."""
    parameters = _parameter_dtype(dtype, parameter_dtype, weight)
    return {
        "input": _input(shape, (1,), dtype, generator),
        "weight": _parameter(weight, shape[1:2], generator, parameters),
        "bias": _parameter(bias, shape[1:2], generator, parameters),
        "eps": eps,
    }


def layer_norm_forward_call(inputs: dict[str, Any]) -> tuple:
    a = inputs
    arguments = (a["input"], a["normalized_shape"], a["weight"], a["bias"], a["eps"])
    return torch.ops.cnnkern.layer_norm.default, arguments


def layer_norm_backward_call(inputs: dict[str, Any], dy: Tensor) -> tuple:
    a = inputs
    with torch.no_grad():
        operator, arguments = layer_norm_forward_call(a)
        _, mean, rstd = operator(*arguments)
    mask = [True, a["weight"] is not None, a["bias"] is not None]
    return torch.ops.cnnkern.layer_norm_backward.default, (
        *(dy, a["input"], a["normalized_shape"], a["weight"], a["bias"], mean, rstd, mask),
    )


def layer_norm2d_forward_call(inputs: dict[str, Any]) -> tuple:
    a = inputs
    return torch.ops.cnnkern.layer_norm2d.default, (a["input"], a["weight"], a["bias"], a["eps"])


def layer_norm2d_backward_call(inputs: dict[str, Any], dy: Tensor) -> tuple:
    a = inputs
    with torch.no_grad():
        operator, arguments = layer_norm2d_forward_call(a)
        _, mean, rstd = operator(*arguments)
    mask = [True, a["weight"] is not None, a["bias"] is not None]
    return torch.ops.cnnkern.layer_norm2d_backward.default, (dy, a["input"], a["weight"], a["bias"], mean, rstd, mask)


VARIANTS = {
    "affine": {},
    "no affine": {"weight": False, "bias": False},
    "weight alone": {"bias": False},
    "bias alone, large eps": {"weight": False, "eps": 0.1},
}

# One or two values normalised leave gradients of nothing but rounding, float64's own included, which judges the others:
# tests/test_layer_norm.py has them.
LAST_DIMENSION = tuple(shape for shape in RAGGED_SHAPES if shape[-1] > 2)
CHANNELS = tuple(shape for shape in RAGGED_SHAPES if len(shape) == 4 and shape[1] > 2)
# Rows of every width that a vector, four vectors and a flushed sum are one short of, or one beyond.
ROWS = ((1, 16), (9, 63), (3, 64), (2, 1025), (70, 260), (3, 4099))
# The widths of transformers and convolutional networks, from what stays in the first cache to what leaves the last.
WIDTHS = tuple(
    (max(1, numel // cols), cols) for numel in (10**4, 10**5, 10**6, 10**7) for cols in (32, 128, 512, 1024, 4096)
)

LAYER_NORM = Case(
    name="layer_norm",
    function=functional.layer_norm,
    reference=reference.layer_norm,
    inputs=layer_norm_inputs,
    differentiable=("input", "weight", "bias"),
    mutated=(),
    variants=VARIANTS | {"two dimensions": {"dims": 2}},
    shapes=((7,), *ROWS, *LAST_DIMENSION),
    gradcheck_shapes=((2, 2, 2, 3), (4, 3), (2, 2, 4)),
    forward_call=layer_norm_forward_call,
    backward_call=layer_norm_backward_call,
    bench_layers={
        "widths": layers(WIDTHS),
        "convnext_tiny": layers([(n * h * w, c) for n, c, h, w in CONVNEXT_TINY]),
    },
    bench_variant="affine",
    forward_traffic=(1, 1),
    backward_traffic=(2, 1),
    ranks=(1, 2, 3, 4, 5),
    keeps_layout=False,
)

LAYER_NORM2D = Case(
    name="layer_norm2d",
    function=functional.layer_norm2d,
    reference=reference.layer_norm2d,
    inputs=layer_norm2d_inputs,
    differentiable=("input", "weight", "bias"),
    mutated=(),
    variants=VARIANTS,
    shapes=(
        *((n, c, 1, 1) for n, c in ROWS),
        *CHANNELS,
        *((2, 5, 8, 8), (1, 3, 1, 65), (2, 66, 9, 15), (5, 130, 7, 9), (2, 70, 2, 6), (3, 24, 3, 5), (2, 344, 7, 7)),
    ),
    gradcheck_shapes=((2, 4, 2, 2), (2, 3, 1, 3)),
    forward_call=layer_norm2d_forward_call,
    backward_call=layer_norm2d_backward_call,
    bench_layers={"convnext_tiny": layers(CONVNEXT_TINY), "convnext_tiny batch 1": layers(batch(1, CONVNEXT_TINY))},
    bench_variant="affine",
    bench_forms={"written out": reference.layer_norm2d_written_out},
    compiled_forms=("written out",),
    forward_traffic=(1, 1),
    backward_traffic=(2, 1),
    ranks=(4,),
    empty_shapes=((0, 3, 4, 5), (2, 3, 0, 4)),
)
