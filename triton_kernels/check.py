"""Input contracts of the launchers: csrc/check.h in Python, with its types of errors and its messages.

A launcher calls these before it changes anything, so that an error leaves running statistics as they were.
"""

import math
from collections.abc import Sequence

import torch
from cnnkern.triton_kernels.layout import mask_bytes
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ACTIVATIONS = ("none", "relu", "relu6", "leaky_relu", "sigmoid", "silu", "hardswish")
ACTIVATIONS += ("elu", "gelu", "gelu_tanh", "mish", "hardsigmoid")
PARAMETERS = {"leaky_relu": 0.01, "elu": 1.0}  # the number that an activation takes, and its default


def type_name(t: Tensor) -> str:  # as C++ prints it: Float, BFloat16
    return t.type().rpartition(".")[2].removesuffix("Tensor")


def floating(op: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise NotImplementedError(f"{op}: input must be float32, float64, bfloat16 or float16; got {type_name(x)}")


def image(op: str, x: Tensor) -> None:
    floating(op, x)
    if not 2 <= x.dim() <= 5:
        raise RuntimeError(f"{op}: expected an input of 2 to 5 dimensions (N, C, ...); got {list(x.shape)}")


def wide_type(x: Tensor) -> torch.dtype:
    """That of sums over x, and of a layer norm's wide result."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def channel_vector(op: str, name: str, v: Tensor | None, x: Tensor, wide: bool = False) -> None:
    """A vector of C elements on the input's device, in the dtypes of `parameter_type`."""
    if v is None:
        return
    if v.dim() != 1 or v.shape[0] != x.shape[1]:
        raise RuntimeError(
            f"{op}: {name} should contain {x.shape[1]} elements (one per channel), not {v.numel()}; "
            f"got shape {list(v.shape)}"
        )
    parameter_type(op, name, v, x, wide)


def parameter_type(op: str, name: str, v: Tensor, x: Tensor, wide: bool = False) -> None:
    """On the input's device, in its dtype or, beside 16 bits, float32; beside a wide result in the result's dtype."""
    if v.device != x.device:
        raise RuntimeError(f"{op}: expected {name} on {x.device} like the input; got {v.device}")
    if wide and v.dtype != wide_type(x):
        wanted = "Double" if wide_type(x) == torch.float64 else "Float"
        raise RuntimeError(f"{op}: expected {name} in {wanted} beside a result in that dtype; got {type_name(v)}")
    if v.dtype != x.dtype and not (v.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)):
        alternative = "" if x.dtype == torch.float64 else " or float32"
        raise RuntimeError(
            f"{op}: expected {name} in the input's dtype ({type_name(x)}){alternative}; got {type_name(v)}"
        )


def slope(op: str, v: Tensor, x: Tensor) -> None:
    """That of a PReLU."""
    if v.dim() > 1 or v.numel() not in (1, x.shape[1]):
        raise RuntimeError(
            f"{op}: slope should contain 1 element or {x.shape[1]} (one per channel); got shape {list(v.shape)}"
        )
    parameter_type(op, "slope", v, x)


def same_shape(op: str, name: str, t: Tensor, x: Tensor, wide: bool = False) -> None:
    if t.shape != x.shape:
        raise RuntimeError(f"{op}: {name} must have the input's shape {list(x.shape)}; got {list(t.shape)}")
    if t.dtype != (wide_type(x) if wide else x.dtype):
        raise RuntimeError(f"{op}: {name} must have the input's dtype {type_name(x)}; got {type_name(t)}")
    if t.device != x.device:
        raise RuntimeError(f"{op}: {name} must be on {x.device}; got {t.device}")


def activation(op: str, act: str, act_param: float | None = None) -> None:
    if act_param is not None and act not in PARAMETERS:
        raise ValueError(f"{op}: act_param is the slope of leaky_relu or alpha of elu; got {act_param:g} for '{act}'")
    if act_param is not None and not math.isfinite(act_param):
        raise ValueError(f"{op}: act_param must be finite; got {act_param:g}")
    if act not in ACTIVATIONS:
        raise ValueError(f"{op}: act must be one of {', '.join(ACTIVATIONS)}; got '{act}'")


def recomputes_sum(act: str) -> bool:
    """Whether the gradient of `act` behind an addition reads x, the bias and the residual: that of relu has a mask."""
    return act not in ("none", "relu")


def saved_residual(op: str, act: str, residual: Tensor | None, x: Tensor) -> None:
    """The residual in the gradient operator."""
    if not recomputes_sum(act):
        return
    if residual is None:
        raise RuntimeError(f"{op}: the gradient of {act} reads the residual, but residual is None")
    same_shape(op, "residual", residual, x)


def mask(op: str, mask: Tensor, size: int, x: Tensor) -> None:
    fits = mask.dtype == torch.uint8 and mask.shape == (size,) and mask.is_contiguous() and mask.device == x.device
    if not fits:
        raise RuntimeError(
            f"{op}: mask must be the one that the forward operator returned: uint8, {size} bytes, on {x.device}; "
            f"got {type_name(mask)} {list(mask.shape)} on {mask.device}"
        )


def channels_last(op: str, x: Tensor, channels_last: bool) -> None:
    if channels_last and not 3 <= x.dim() <= 5:
        raise RuntimeError(f"{op}: channels_last needs an input of 3 to 5 dimensions; got {list(x.shape)}")


def order(op: str, order: Sequence[int], dy: Tensor) -> None:
    if sorted(order) != list(range(dy.dim())):
        raise RuntimeError(f"{op}: order must name each of the {dy.dim()} dimensions of dy once; got {list(order)}")


def batch_norm(
    op: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    alone: bool = True,
) -> None:
    """`alone`: no other process may have further values of a channel."""
    image(op, x)
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, v in vectors.items():
        channel_vector(op, name, v, x)
    if (running_mean is None) != (running_var is None):
        given = "running_mean" if running_var is None else "running_var"
        raise ValueError(f"{op}: running_mean and running_var must both be given or both be None; got only {given}")
    if not training and running_mean is None:
        raise RuntimeError(f"{op}: running_mean and running_var must be defined in evaluation mode; got None")
    if training and alone and x.shape[1] > 0 and x.numel() // x.shape[1] == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(x.shape)} ({op})")
    if not (eps > 0 if training else eps >= 0):
        wanted = "positive during training" if training else "non-negative"
        raise ValueError(f"{op}: batch_norm eps must be {wanted}, but got {eps:g}")


def batch_norm_backward(
    op: str,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    reads_bias: bool,
    mean: Tensor,
    rstd: Tensor,
    output_mask: Sequence[bool],
) -> None:
    image(op, x)
    same_shape(op, "dy", dy, x)
    channel_vector(op, "weight", weight, x)
    channel_vector(op, "bias", bias, x)
    for t in (mean, rstd):
        fits = t.dim() == 1 and t.shape[0] == x.shape[1] and t.dtype == torch.float64
        if not (fits and t.is_contiguous() and t.device == x.device):
            raise RuntimeError(
                f"{op}: mean and rstd must be the vectors that the forward operator returned: float64, {x.shape[1]} "
                f"elements, on {x.device}; got {type_name(t)} {list(t.shape)} on {t.device}"
            )
    wanted_weight(op, output_mask, weight)
    if output_mask[2] and reads_bias and bias is None:
        raise RuntimeError(
            f"{op}: output_mask asks for dbias behind an activation, which reads the bias, but bias is None"
        )


def bn_prelu_backward(
    op: str,
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    slope_: Tensor,
    mean: Tensor,
    rstd: Tensor,
    rows: bool,
    output_mask: Sequence[bool],
) -> None:
    wanted = [output_mask[0], *output_mask[2:4]]
    batch_norm_backward(op, dy, x, weight, bias, True, mean, rstd, wanted)
    slope(op, slope_, x)
    if residual is not None:
        same_shape(op, "residual", residual, x)
    elif output_mask[1]:
        raise RuntimeError(f"{op}: output_mask asks for dresidual, but residual is None")
    channels_last(op, x, rows)


def fp64(op: str, name: str, t: Tensor, shape: Sequence[int], x: Tensor) -> None:
    """What was computed elsewhere, for instance summed over processes."""
    fits = list(t.shape) == list(shape) and t.dtype == torch.float64
    if not (fits and t.is_contiguous() and t.device == x.device):
        raise RuntimeError(
            f"{op}: {name} must be float64, contiguous, of shape {list(shape)}, on {x.device}; "
            f"got {type_name(t)} {list(t.shape)} on {t.device}"
        )


def sync_bn_statistics(
    op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> None:
    """Batch norm over processes, from statistics that are given."""
    image(op, x)
    channel_vector(op, "weight", weight, x)
    channel_vector(op, "bias", bias, x)
    fp64(op, "mean", mean, x.shape[1:2], x)
    fp64(op, "rstd", rstd, x.shape[1:2], x)


def sync_bn_residual(op: str, x: Tensor, residual: Tensor | None, act: str, act_param: float | None = None) -> None:
    if residual is not None:
        same_shape(op, "residual", residual, x)
    activation(op, act, act_param)


def sync_bn(
    op: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    act: str,
    act_param: float | None = None,
) -> None:
    sync_bn_statistics(op, x, weight, bias, mean, rstd)
    sync_bn_residual(op, x, residual, act, act_param)


def sync_bn_sums(
    op: str,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    bits: Tensor | None,
    last: bool,
    act: str,
    residual: Tensor | None,
    act_param: float | None,
    wants_dresidual: bool = False,
) -> None:
    sync_bn_statistics(op, x, weight, bias, mean, rstd)
    same_shape(op, "dy", dy, x)
    if bits is not None:
        mask(op, bits, mask_bytes(x.numel()), x)
    if residual is not None:
        same_shape(op, "residual", residual, x)
        if not recomputes_sum(act):
            raise RuntimeError(f"{op}: the gradient of {act} reads no residual; got one")
    if wants_dresidual and bits is None and residual is None:
        raise RuntimeError(f"{op}: output_mask asks for dresidual, but mask and residual are None")
    channels_last(op, dy, last)
    activation(op, act, act_param)


def sync_bn_backward(
    op: str,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    bits: Tensor | None,
    last: bool,
    act: str,
    sums: Tensor,
    count: Tensor,
    output_mask: Sequence[bool],
    residual: Tensor | None,
    act_param: float | None,
) -> None:
    sync_bn_sums(op, dy, x, weight, bias, mean, rstd, bits, last, act, residual, act_param, output_mask[1])
    fp64(op, "sums", sums, (2, x.shape[1]), x)
    fp64(op, "count", count, (1,), x)


def layer_norm(
    op: str,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    wide: bool,
) -> None:
    floating(op, x)
    shape = list(normalized_shape)
    if not shape:
        raise RuntimeError(
            f"{op}: expected normalized_shape to be at least 1-dimensional; got normalized_shape = {shape}"
        )
    if x.dim() < len(shape) or list(x.shape[x.dim() - len(shape) :]) != shape:
        raise RuntimeError(
            f"{op}: given normalized_shape={shape}, expected an input whose last dimensions are these; "
            f"got input of size {list(x.shape)}"
        )
    for name, v in (("weight", weight), ("bias", bias)):
        if v is None:
            continue
        if list(v.shape) != shape:
            raise RuntimeError(
                f"{op}: expected {name} to be of the same shape as normalized_shape = {shape}; "
                f"got {name} of shape {list(v.shape)}"
            )
        parameter_type(op, name, v, x, wide)


def layer_norm2d(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, wide: bool) -> None:
    floating(op, x)
    if x.dim() != 4:
        raise RuntimeError(f"{op}: expected an input of 4 dimensions (N, C, H, W); got {list(x.shape)}")
    channel_vector(op, "weight", weight, x, wide)
    channel_vector(op, "bias", bias, x, wide)


def is_wide(dy: Tensor, x: Tensor) -> bool:
    """Whether the result of a layer norm was wide where x is not."""
    return dy.dtype != x.dtype and dy.dtype == wide_type(x)


def layer_norm_saved(
    op: str,
    dy: Tensor,
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    output_mask: Sequence[bool],
) -> None:
    """What the gradient of a layer norm needs besides: statistics of the shape `shape`."""
    same_shape(op, "dy", dy, x, is_wide(dy, x))
    dtype = wide_type(x)
    for t in (mean, rstd):
        fits = list(t.shape) == list(shape) and t.dtype == dtype and t.is_contiguous() and t.device == x.device
        if not fits:
            wanted = "Double" if dtype == torch.float64 else "Float"
            raise RuntimeError(
                f"{op}: mean and rstd must be those that the forward operator returned: {wanted}, of shape "
                f"{list(shape)}, on {x.device}; got {type_name(t)} {list(t.shape)} on {t.device}"
            )
    wanted_weight(op, output_mask, weight)


def wanted_weight(op: str, output_mask: Sequence[bool], weight: Tensor | None) -> None:
    if output_mask[1] and weight is None:
        raise RuntimeError(f"{op}: output_mask asks for dweight, but weight is None")


def parameter_gradient(wanted: bool, v: Tensor | None, shape: Sequence[int], x: Tensor) -> Tensor:
    """A new gradient of v, in its dtype; in that of sums where v, which the gradient need not read, is not given."""
    if not wanted:
        return x.new_empty(0)
    return x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32) if v is None else v.dtype)
