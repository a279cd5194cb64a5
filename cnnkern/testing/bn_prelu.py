"""The row of bn_prelu."""

from typing import Any

import torch
from torch import Tensor

from cnnkern import functional, reference
from cnnkern.testing.batch_norm import batch_norm_inputs, copied
from cnnkern.testing.case import Case, Layer, Shape, randn
from cnnkern.testing.shapes import RAGGED_SHAPES
from cnnkern.triton_kernels.layout import batch_norm_in_rows


def bn_prelu_inputs(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    *,
    generator: torch.Generator,
    slopes: str = "one per channel",
    parameter_dtype: torch.dtype | None = None,
    **variant: Any,
) -> dict[str, Any]:
    """Arguments of batch_norm_prelu, those of batch_norm_act and slopes of either sign; `slopes` may be "one"."""
    variant |= {"act": "leaky_relu", "parameter_dtype": parameter_dtype}  # whose derivative jumps where PReLU's does
    inputs = batch_norm_inputs(shape, dtype, generator=generator, **variant)
    slope = randn((shape[1] if slopes == "one per channel" else 1,), generator, parameter_dtype or dtype)
    settings = {n: inputs[n] for n in ("training", "momentum", "eps")}
    vectors = {n: inputs[n] for n in ("running_mean", "running_var", "weight", "bias")}
    return {"input": inputs["input"], "residual": inputs.get("residual"), "slope": slope, **vectors, **settings}


def bn_prelu_forward_call(inputs: dict[str, Any]) -> tuple:
    names = (
        "input",
        "residual",
        "weight",
        "bias",
        "slope",
        "running_mean",
        "running_var",
        "training",
        "momentum",
        "eps",
    )
    return torch.ops.cnnkern.bn_prelu.default, tuple(inputs[name] for name in names)


def bn_prelu_backward_call(inputs: dict[str, Any], dy: Tensor) -> tuple:
    operator, arguments = bn_prelu_forward_call(copied(inputs))
    _, mean, rstd = operator(*arguments)
    read = [inputs[name] for name in ("input", "residual", "weight", "bias", "slope")]
    settings = (batch_norm_in_rows(inputs["input"]), inputs["training"], [t is not None for t in read])
    return torch.ops.cnnkern.bn_prelu_backward.default, (dy, *read, mean, rstd, *settings)


# Those of insightface's iresnet50 at 112x112, each once.
LAYERS = tuple(
    Layer((32, c, side, side))
    for c, side in ((64, 112), (64, 56), (128, 56), (128, 28), (256, 28), (256, 14), (512, 14))
)

BN_PRELU = Case(
    name="bn_prelu",
    function=functional.batch_norm_prelu,
    reference=reference.batch_norm_prelu,
    inputs=bn_prelu_inputs,
    differentiable=("input", "residual", "weight", "bias", "slope"),
    mutated=("running_mean", "running_var"),
    variants={
        "train": {},
        "one slope": {"slopes": "one"},
        "eval": {"training": False},
        "no affine": {"weight": False, "bias": False},
        "weight alone, one slope, eval": {"bias": False, "training": False, "slopes": "one"},
        "bias alone, no running statistics": {"weight": False, "running": False},
        "add": {"residual": True},
        "add, one slope": {"residual": True, "slopes": "one"},
        "add, eval": {"residual": True, "training": False},
        "add, no affine": {"residual": True, "weight": False, "bias": False},
    },
    shapes=RAGGED_SHAPES,
    gradcheck_shapes=((3, 2, 2, 2), (4, 3), (2, 2, 3)),
    forward_call=bn_prelu_forward_call,
    backward_call=bn_prelu_backward_call,
    bench_layers={"iresnet50": LAYERS},
    bench_variant="train",
    bench_others=("one slope",),
    forward_traffic=(1, 1),
    backward_traffic=(2, 1),
)
