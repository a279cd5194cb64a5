"""The row of sync_bn, in a process alone. Several are what tests/test_sync.py starts."""

from typing import Any

import torch
from torch import Tensor

from cnnkern import functional, reference
from cnnkern.testing.batch_norm import BATCH_NORM_VARIANTS, batch_norm_inputs
from cnnkern.testing.case import Case, Shape
from cnnkern.testing.shapes import RAGGED_SHAPES
from cnnkern.triton_kernels.check import recomputes_sum
from cnnkern.triton_kernels.layout import batch_norm_in_rows

_ops = torch.ops.cnnkern


def sync_bn_inputs(shape: Shape, dtype: torch.dtype = torch.float32, **variant: Any) -> dict[str, Any]:
    """Arguments of sync_batch_norm_act, with `residual=True` with one."""
    return {"residual": None} | batch_norm_inputs(shape, dtype, **variant)


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """mean, rstd and number of elements"""
    moments, channels = _ops.sync_bn_stats(x), x.shape[1]
    return moments[:channels].clone(), (moments[channels:-1] + eps).rsqrt(), moments[-1:].clone()


def sync_bn_forward_call(inputs: dict[str, Any]) -> tuple:
    # Detached: the derivative is that of the whole.
    a = {n: v.detach() if isinstance(v, Tensor) else v for n, v in inputs.items()}
    mean, rstd, _ = _statistics(a["input"], a["eps"])
    return _ops.sync_bn.default, (
        a["input"],
        a["residual"],
        a["weight"],
        a["bias"],
        mean,
        rstd,
        a["act"],
        a["act_param"],
    )


def sync_bn_backward_call(inputs: dict[str, Any], dy: Tensor) -> tuple:
    operator, arguments = sync_bn_forward_call(inputs)
    _, mask = operator(*arguments)
    x, residual, weight, bias, mean, rstd, act, act_param = arguments
    masked = residual is not None and act == "relu"
    read = residual if recomputes_sum(act) else None
    common = (dy, x, weight, bias, mean, rstd, mask if masked else None, batch_norm_in_rows(x), act)
    sums, count = _ops.sync_bn_sums(*common, read, act_param), _statistics(x, inputs["eps"])[2]
    wanted = [True, masked or read is not None]
    return _ops.sync_bn_backward.default, (*common, sums, count, wanted, read, act_param)


_TRAINING = {name: variant for name, variant in BATCH_NORM_VARIANTS.items() if variant.get("training", True)}

SYNC_BN = Case(
    name="sync_bn",
    function=functional.sync_batch_norm_act,
    reference=reference.sync_batch_norm_act,
    inputs=sync_bn_inputs,
    differentiable=("input", "residual", "weight", "bias"),
    mutated=("running_mean", "running_var"),
    variants=_TRAINING
    | {
        "bias alone": {"weight": False},
        "train relu6": {"act": "relu6"},
        "train silu": {"act": "silu"},
        "add relu": {"residual": True},
        "add none": {"residual": True, "act": "none"},
        "add relu, no affine": {"residual": True, "weight": False, "bias": False},
        "train gelu": {"act": "gelu"},
        "train leaky_relu of slope 0.2": {"act": "leaky_relu", "act_param": 0.2},
        "add silu": {"residual": True, "act": "silu"},
        "add elu of alpha 0.7": {"residual": True, "act": "elu", "act_param": 0.7},
        "add mish, no affine": {"residual": True, "act": "mish", "weight": False, "bias": False},
    },
    shapes=RAGGED_SHAPES,
    gradcheck_shapes=((3, 2, 2, 2), (4, 3), (2, 2, 3)),
    forward_call=sync_bn_forward_call,
    backward_call=sync_bn_backward_call,
    bench_layers={},  # alone it is bn_act; over processes benchmarks/studies/sync.py times it
    bench_variant="train relu",
    forward_traffic=(1, 1),
    backward_traffic=(2, 1),
    parts=("sync_bn_stats", "sync_bn", "sync_bn_sums", "sync_bn_backward"),
)
