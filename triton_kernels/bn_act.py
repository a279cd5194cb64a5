# bn_act: y = act(pre), pre = (x - mean) * weight * rstd + bias. Backward: batch_norm_backward.py, with
# g = dy * act'(pre). act'(pre) is recomputed from x by the same subtraction and fma as in the forward pass, so it is
# that of the output bit for bit, and nothing but x and two vectors of C is saved.
# Traffic in tensors read or written: 3 forward, 5 backward (2 and 3 in eval), less what the L2 cache still holds of
# the first pass, for which the second runs backwards.
# A program owns a chunk of one channel (planes) or of up to 64 (rows).
"""bn_act and bn_act_backward of csrc/ops.cpp in Triton."""

import torch
import triton
import triton.language as tl
from cnnkern.triton_kernels import check
from cnnkern.triton_kernels.activations import act_value, constants
from cnnkern.triton_kernels.batch_norm import affine, program, statistics, tile
from cnnkern.triton_kernels.batch_norm_backward import backward
from cnnkern.triton_kernels.layout import Cut, batch_norm_result, dense, in_batch_norm_layout, on_device_of
from cnnkern.triton_kernels.tuning import Tunable
from torch import Tensor


@Tunable
@triton.jit(do_not_specialize=["outer", "C", "units", "steps", "chunk"])
def bn_act_apply_kernel(
    x,
    y,
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
        out = act_value(tl.fma(v - center, scale, offset), PARAM, ACT)
        tl.store(y + at, out.to(y.dtype.element_ty), mask)


def bn_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    act: str,
    act_param: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y and the float64 vectors (C,) mean and rstd, as the schema in csrc/ops.cpp has it."""
    check.batch_norm("cnnkern::bn_act", x, weight, bias, running_mean, running_var, training, eps)
    check.activation("cnnkern::bn_act", act, act_param)
    x = in_batch_norm_layout(x)
    y = batch_norm_result(x, act)
    if x.numel() == 0:
        mean = x.new_zeros(x.shape[1], dtype=torch.float64)
        return y, mean, torch.ones_like(mean)
    cut = Cut.of(x)
    with on_device_of(x):
        mean, rstd = statistics(x, cut, running_mean, running_var, training, momentum, eps)
        bn_act_apply_kernel[cut.grid](
            *(x, y, mean, rstd, dense(weight), dense(bias), *cut.sizes), **constants(act, act_param), **cut.constants
        )
    return y, mean, rstd


def bn_act_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    act: str,
    output_mask: list[bool],
    act_param: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias as the schema in csrc/ops.cpp has it; of no elements where `output_mask` is False."""
    check.batch_norm_backward("cnnkern::bn_act_backward", dy, x, weight, bias, act != "none", mean, rstd, output_mask)
    check.activation("cnnkern::bn_act_backward", act, act_param)
    mask = (output_mask[0], False, *output_mask[1:])
    statistics = (weight, bias, mean, rstd, training, act)
    dx, _, dweight, dbias = backward(dy, in_batch_norm_layout(x), None, *statistics, mask, act_param=act_param)
    return dx, dweight, dbias
