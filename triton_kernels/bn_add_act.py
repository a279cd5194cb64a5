# bn_add_act: y = act(pre + residual), pre = (x - mean) * weight * rstd + bias.
# Backward: batch_norm_backward.py, with g = dy * act'(pre + residual), and dresidual = g. Of relu act' is [y > 0],
# saved as one bit per element, in the order of memory; of others it is recomputed from x and the residual, which are
# saved. Where lines are whole bytes the kernel that writes y writes the mask; else a program's lines share bytes with
# others', and a second kernel takes it from y, of which the L2 cache then holds the end or all.
# Traffic in tensors read or written: 4 forward (5 with the second kernel), 6 backward (8 where the residual is read),
# less what the L2 cache holds.
"""bn_add_act and bn_add_act_backward of csrc/ops.cpp in Triton."""

import torch
import triton
import triton.language as tl
from cnnkern.triton_kernels import check
from cnnkern.triton_kernels.activations import act_value, constants, rounds_to_zero
from cnnkern.triton_kernels.batch_norm import affine, program, statistics, tile
from cnnkern.triton_kernels.batch_norm_backward import backward
from cnnkern.triton_kernels.bits import above, pack_positive, packed
from cnnkern.triton_kernels.layout import (
    Cut,
    dense,
    in_batch_norm_layout,
    in_layout_of,
    laid_out,
    mask_bytes,
    on_device_of,
    strides_of_sum,
    with_strides,
)
from cnnkern.triton_kernels.tuning import Tunable
from torch import Tensor


@Tunable
@triton.jit(do_not_specialize=["outer", "C", "units", "steps", "chunk"])
def bn_add_act_apply_kernel(
    x,
    residual,
    y,
    bits,
    mean,
    rstd,
    weight,
    bias,
    outer,
    C,
    units,
    steps,
    chunk,
    ACT: tl.constexpr,
    PARAM: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
):
    S: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    k, first, c = program(tl.num_programs(0) - 1 - tl.program_id(0), C, ROWS, B)
    center, scale, offset = affine(mean, rstd, weight, bias, c, c < C, S)
    for step in range(k * chunk, tl.minimum(k * chunk + chunk, steps)):
        _, at, mask, _ = tile(step, first, outer, C, units, UNIT, ROWS, R, B)
        v = tl.load(x + at, mask, other=0.0).to(S)
        v = tl.fma(v - center, scale, offset) + tl.load(residual + at, mask, other=0.0).to(S)
        tl.store(y + at, act_value(v, PARAM, ACT).to(y.dtype.element_ty), mask)
        if bits is not None:
            _, eighth, whole, _ = tile(step, first, outer, C, units, UNIT, ROWS, R, B, EVERY=8)
            positive = tl.reshape(above(v, rounds_to_zero(x.dtype.element_ty)), (R * B // 8, 8))
            tl.store(bits + (eighth >> 3), tl.reshape(packed(positive), (R, B // 8)), whole)


def bn_add_act(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    act: str,
    act_param: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the float64 vectors (C,) mean and rstd, and the mask, as the schema in csrc/ops.cpp has it."""
    op = "cnnkern::bn_add_act"
    check.batch_norm(op, x, weight, bias, running_mean, running_var, training, eps)
    check.same_shape(op, "residual", residual, x)
    check.activation(op, act, act_param)
    x = in_batch_norm_layout(x)
    strides = strides_of_sum(x, residual, act)
    residual = in_layout_of(residual, x)
    y = torch.empty_like(x)
    if x.numel() == 0:
        mean = x.new_zeros(x.shape[1], dtype=torch.float64)
        return (
            with_strides(y, strides),
            mean,
            torch.ones_like(mean),
            x.new_zeros(4 if act == "relu" else 0, dtype=torch.uint8),
        )
    cut = Cut.of(x)
    with on_device_of(x):
        mean, rstd = statistics(x, cut, running_mean, running_var, training, momentum, eps)
        mask = apply(x, residual, y, mean, rstd, weight, bias, act, act_param, cut)
    return with_strides(y, strides), mean, rstd, mask


def apply(
    x: Tensor,
    residual: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    act: str,
    act_param: float | None,
    cut: Cut,
) -> Tensor:
    """Writes y, and returns the mask, on the current device."""
    whole_bytes = cut.unit % 8 == 0 and x.numel() >= 32
    mask = x.new_empty(mask_bytes(x.numel()) if act == "relu" and whole_bytes else 0, dtype=torch.uint8)
    bits = mask if mask.numel() > 0 else None
    vectors = (mean, rstd, dense(weight), dense(bias))
    chosen = constants(act, act_param)
    bn_add_act_apply_kernel[cut.grid](x, residual, y, bits, *vectors, *cut.sizes, **chosen, **cut.constants)
    return pack_positive(y) if act == "relu" and bits is None else mask


def bn_add_act_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    mask: Tensor,
    channels_last: bool,
    training: bool,
    act: str,
    output_mask: list[bool],
    residual: Tensor | None = None,
    act_param: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dresidual, dweight and dbias as the schema in csrc/ops.cpp has it; empty where `output_mask` is False."""
    op = "cnnkern::bn_add_act_backward"
    check.batch_norm_backward(
        *(op, dy, x, weight, bias, check.recomputes_sum(act), mean, rstd),
        [output_mask[0], output_mask[2], output_mask[3]],
    )
    check.activation(op, act, act_param)
    check.saved_residual(op, act, residual, x)
    check.channels_last(op, x, channels_last)
    check.mask(op, mask, mask_bytes(x.numel()) if act == "relu" else 0, x)
    bits = mask if act == "relu" else None
    if not check.recomputes_sum(act):
        act, residual = "none", None
    statistics = (weight, bias, mean, rstd, training, act)
    return backward(dy, laid_out(x, channels_last), bits, *statistics, output_mask, residual, act_param)
