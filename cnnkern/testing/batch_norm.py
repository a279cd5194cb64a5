"""The rows of bn_act and bn_add_act."""

from typing import Any

import torch
from torch import Tensor

from cnnkern import functional, reference
from cnnkern.testing.case import Case, Shape, randn
from cnnkern.testing.judge import to_float64
from cnnkern.testing.shapes import ADD_LAYERS, BATCH_NORM_LAYERS, RAGGED_SHAPES
from cnnkern.triton_kernels.check import recomputes_sum
from cnnkern.triton_kernels.layout import batch_norm_in_rows

# Where an activation's derivative jumps.
KINKS = {"relu": (0.0,), "relu6": (0.0, 6.0), "leaky_relu": (0.0,), "hardswish": (-3.0, 3.0)}
KINKS |= {"elu": (0.0,), "hardsigmoid": (-3.0, 3.0)}


def _near_kink(inputs: dict[str, Any], distance: float) -> Tensor:
    """Elements whose pre-activation is as good as at a kink, but not zero throughout as behind a weight of zero."""
    add = "residual" in inputs
    function = reference.batch_norm_add_act if add else reference.batch_norm_act
    pre = function(**{**to_float64(copied(inputs)), "act": "none", "act_param": None})
    if add and inputs["input"].dtype in (torch.bfloat16, torch.float16):
        # Eager rounds the batch norm before it adds: by up to half a unit of a term of 8 or so.
        distance = max(distance, 4 * torch.finfo(inputs["input"].dtype).eps)
    near = [(pre - kink).abs() < distance for kink in KINKS.get(inputs["act"], ())]
    return torch.stack(near).any(0) & (pre != 0) if near else torch.zeros_like(pre, dtype=torch.bool)


def batch_norm_inputs(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    *,
    generator: torch.Generator,
    training: bool = True,
    weight: bool = True,
    bias: bool = True,
    running: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
    act_param: float | None = None,
    parameter_dtype: torch.dtype | None = None,
    smooth: bool = False,
    residual: bool = False,
) -> dict[str, Any]:
    """Arguments of batch_norm_act, or with `residual` of batch_norm_add_act: offsets and scales that differ from
    channel to channel, one weight of zero.

    With `smooth`, for finite differences, no weight is zero and no element near the activation's kink.
    """
    channels, parameters = shape[1], parameter_dtype or dtype
    scale = randn((1, channels) + (1,) * (len(shape) - 2), generator, torch.float64)
    x = (randn(shape, generator, torch.float64) * (0.5 + scale.abs()) + 2 * scale).to(dtype)
    w = randn((channels,), generator, parameters)
    if channels > 2 and not smooth:
        w[channels // 2] = 0
    inputs = {
        "input": x,
        **({"residual": randn(shape, generator, torch.float64).to(dtype)} if residual else {}),
        "running_mean": randn((channels,), generator, parameters) if running else None,
        "running_var": randn((channels,), generator, parameters).abs() + 0.5 if running else None,
        "weight": w if weight else None,
        "bias": randn((channels,), generator, parameters) if bias else None,
        "training": training,
        "momentum": momentum,
        "eps": eps,
        "act": act,
        "act_param": act_param,
    }
    if smooth and _near_kink(inputs, 1e-3).any():
        variant = {"training": training, "weight": weight, "bias": bias, "running": running, "residual": residual}
        variant |= {"momentum": momentum, "eps": eps, "act": act, "act_param": act_param, "smooth": True}
        return batch_norm_inputs(shape, dtype, generator=generator, **variant)
    # Rounding must not decide on which side of the kink an element falls: its whole gradient hangs on it. Such an
    # element takes its neighbour's value, which moves the statistics a little, so twice.
    for _ in range(2 if act in KINKS else 0):
        if inputs["input"].numel() == 0:
            break
        near = _near_kink(inputs, 1e-5)
        if residual:
            inputs["residual"] = torch.where(near, inputs["residual"] + 1, inputs["residual"])
        else:
            inputs["input"] = torch.where(near, inputs["input"].roll(1), inputs["input"])
    return inputs


def copied(inputs: dict[str, Any]) -> dict[str, Any]:
    return {n: v.detach().clone() if isinstance(v, Tensor) else v for n, v in inputs.items()}


def bn_act_forward_call(inputs: dict[str, Any]) -> tuple:
    a = inputs
    vectors = (a["weight"], a["bias"], a["running_mean"], a["running_var"])
    settings = (a["training"], a["momentum"], a["eps"], a["act"], a["act_param"])
    return torch.ops.cnnkern.bn_act.default, (a["input"], *vectors, *settings)


def bn_act_backward_call(inputs: dict[str, Any], dy: Tensor) -> tuple:
    a = inputs
    operator, arguments = bn_act_forward_call(copied(a))
    _, mean, rstd = operator(*arguments)
    mask = [True, a["weight"] is not None, a["bias"] is not None]
    return torch.ops.cnnkern.bn_act_backward.default, (
        *(dy, a["input"], a["weight"], a["bias"], mean, rstd, a["training"], a["act"], mask, a["act_param"]),
    )


def batch_norm_add_inputs(shape: Shape, dtype: torch.dtype = torch.float32, **variant: Any) -> dict[str, Any]:
    return batch_norm_inputs(shape, dtype, residual=True, **variant)


def bn_add_act_forward_call(inputs: dict[str, Any]) -> tuple:
    x, *rest = bn_act_forward_call(inputs)[1]
    return torch.ops.cnnkern.bn_add_act.default, (x, inputs["residual"], *rest)


def bn_add_act_backward_call(inputs: dict[str, Any], dy: Tensor) -> tuple:
    a = inputs
    operator, arguments = bn_add_act_forward_call(copied(a))
    _, mean, rstd, mask = operator(*arguments)
    wanted = [True, True, a["weight"] is not None, a["bias"] is not None]
    return torch.ops.cnnkern.bn_add_act_backward.default, (
        *(dy, a["input"], a["weight"], a["bias"], mean, rstd, mask, batch_norm_in_rows(a["input"])),
        *(a["training"], a["act"], wanted, a["residual"] if recomputes_sum(a["act"]) else None, a["act_param"]),
    )


BATCH_NORM_VARIANTS = {
    "train relu": {},
    "train none": {"act": "none"},
    "eval relu": {"training": False},
    "eval none": {"training": False, "act": "none"},
    "no affine": {"weight": False, "bias": False},
    "weight alone": {"bias": False},
    "bias alone, eval": {"weight": False, "training": False},
    "no running statistics": {"running": False},
    "bias alone, momentum 0": {"weight": False, "momentum": 0.0},
    "momentum 1, large eps": {"momentum": 1.0, "eps": 0.1},
}

_OTHERS = {
    "train relu6": {"act": "relu6"},
    "train leaky_relu": {"act": "leaky_relu"},
    "train sigmoid": {"act": "sigmoid"},
    "eval silu": {"act": "silu", "training": False},
    "train silu": {"act": "silu"},
    "train hardswish": {"act": "hardswish"},
    "train leaky_relu of slope 0.2": {"act": "leaky_relu", "act_param": 0.2},
    "train elu": {"act": "elu"},
    "train elu of alpha 0.7": {"act": "elu", "act_param": 0.7},
    "train gelu": {"act": "gelu"},
    "eval gelu": {"act": "gelu", "training": False},
    "train gelu_tanh": {"act": "gelu_tanh"},
    "train mish": {"act": "mish"},
    "train hardsigmoid": {"act": "hardsigmoid"},
}

BN_ACT = Case(
    name="bn_act",
    function=functional.batch_norm_act,
    reference=reference.batch_norm_act,
    inputs=batch_norm_inputs,
    differentiable=("input", "weight", "bias"),
    mutated=("running_mean", "running_var"),
    variants=BATCH_NORM_VARIANTS | _OTHERS,
    shapes=RAGGED_SHAPES,
    gradcheck_shapes=((3, 2, 2, 2), (4, 3), (2, 2, 3)),
    forward_call=bn_act_forward_call,
    backward_call=bn_act_backward_call,
    bench_layers=BATCH_NORM_LAYERS,
    bench_variant="train relu",
    bench_forms={"in place": reference.batch_norm_act_in_place},
    bench_others=(
        *("train none", "train relu6", "train leaky_relu", "train sigmoid", "train silu", "train hardswish"),
    ),
    forward_traffic=(1, 1),
    backward_traffic=(2, 1),
)

BN_ADD_ACT = Case(
    name="bn_add_act",
    function=functional.batch_norm_add_act,
    reference=reference.batch_norm_add_act,
    inputs=batch_norm_add_inputs,
    differentiable=("input", "residual", "weight", "bias"),
    mutated=("running_mean", "running_var"),
    variants=BATCH_NORM_VARIANTS
    | _OTHERS
    | {
        "silu, no affine": {"act": "silu", "weight": False, "bias": False},
        "silu, weight alone": {"act": "silu", "bias": False},
        "silu, bias alone, eval": {"act": "silu", "weight": False, "training": False},
    },
    shapes=RAGGED_SHAPES,
    gradcheck_shapes=((3, 2, 2, 2), (4, 3), (2, 2, 3)),
    forward_call=bn_add_act_forward_call,
    backward_call=bn_add_act_backward_call,
    bench_layers=ADD_LAYERS,
    bench_variant="train relu",
    bench_forms={"in place": reference.batch_norm_add_act_in_place},
    bench_others=("train none",),
    forward_traffic=(2, 1),
    backward_traffic=(2, 2),
)
