"""Batch norm over processes, residual and activation. Kernels: csrc, triton_kernels; autograd: sync_bn_autograd.py."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cnnkern.ops import fake, route
from cnnkern.ops.bn_act import batch_norm_act
from cnnkern.ops.bn_add_act import batch_norm_add_act
from cnnkern.ops.sync_bn_autograd import Group, normalized
from cnnkern.triton_kernels import check

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def sync_batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
    residual: Tensor | None = None,
    group: "ProcessGroup | None" = None,
    act_param: float | None = None,
) -> Tensor:
    """:func:`batch_norm_act`, or with a residual :func:`batch_norm_add_act`, with the statistics of all processes of a
    group. ``group`` None is the default group. Without a group the statistics are those of this process.

    There is one collective forward and one backward. Forward gathers the mean, variance and number of elements of every
    process, and combines them in the order of ranks. Backward sums two vectors of C. Every process of the group has to
    make the call, forward and backward. Nothing synchronises with the device: the number of elements stays a tensor,
    and ``momentum`` may be a tensor. The collectives are PyTorch's functional ones, which torch.compile traces.
    Derivatives, also second ones, are those of the sum of the processes' losses.

    Shapes and dtypes are those of the two functions. Processes may have batches of any size, also empty ones. One value
    per channel is an error in a single process. With several processes the total is only known on the device: a single
    value is then its own mean, and the running statistics stay unchanged, as without any value.

    Raises ValueError and RuntimeError as the two functions do, before anything is sent or changed, and
    NotImplementedError for more than one process in a torch.func transform, in an export and for tensors without
    kernels.

    Source: Zhang et al., Context Encoding for Semantic Segmentation, 2018 (arXiv:1803.08904), section 3.2.
    """
    over = Group.of(group)
    transformed = not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None
    if transformed and over.size > 1 and training:
        raise NotImplementedError("sync_batch_norm_act: torch.func transforms end at a process's own tensors")
    inputs = (input,) if residual is None else (input, residual)
    # An exported program is of one process, and differentiable: the other two functions decide what it names.
    alone = torch.compiler.is_exporting() or torch.jit.is_tracing()
    alone = alone or route.is_pytorchs(inputs, (running_mean, running_var, weight, bias))
    if alone and over.size > 1 and training:
        raise NotImplementedError(
            "sync_batch_norm_act: with several processes it accepts plain tensors only, and cannot be exported"
        )
    if not training or transformed or alone:
        vectors = (running_mean, running_var, weight, bias)
        average = float(momentum)
        if residual is None:
            return batch_norm_act(input, *vectors, training, average, eps, act, act_param)
        return batch_norm_add_act(input, residual, *vectors, training, average, eps, act, act_param)
    op = "cnnkern::sync_bn"
    check.batch_norm(op, input, weight, bias, running_mean, running_var, True, eps, alone=over.size == 1)
    check.sync_bn_residual(op, input, residual, act, act_param)
    y, mean, var, count = normalized(input, residual, weight, bias, eps, (act, act_param), over)
    if running_mean is not None and running_var is not None:  # at last: nothing behind it refuses
        _update(running_mean, running_var, mean, var, count, momentum)
    return y


@torch.no_grad()
def _update(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: Tensor, momentum) -> None:
    known = count > 1
    unbiased = var * (count / (count - 1))
    for running, batch in ((running_mean, mean), (running_var, unbiased)):
        old = running.double()
        running.copy_(torch.where(known, old * (1 - momentum) + batch * momentum, old))


@torch.library.register_fake("cnnkern::sync_bn_stats")
def _(x):
    if fake.is_meta(x):
        check.image("cnnkern::sync_bn_stats", x)
    return x.new_empty(2 * x.shape[1] + 1, dtype=torch.float64)


@torch.library.register_fake("cnnkern::sync_bn")
def _(x, residual, weight, bias, mean, rstd, act, act_param=None):
    op = "cnnkern::sync_bn"
    if fake.is_meta(x):
        check.sync_bn(op, x, residual, weight, bias, mean, rstd, act, act_param)
    fake.check_channel_vectors(op, x, weight=weight, bias=bias, mean=mean, rstd=rstd)
    if residual is not None:
        fake.check_residual(op, x, residual)
    masked = residual is not None and act == "relu"
    y = fake.batch_norm_of(x, act) if residual is None else fake.sum_of(fake.batch_norm_of(x), residual, act)
    return y, fake.mask_of(x) if masked else x.new_empty(0, dtype=torch.uint8)


@torch.library.register_fake("cnnkern::sync_bn_sums")
def _(dy, x, weight, bias, mean, rstd, mask, channels_last, act, residual=None, act_param=None):
    return x.new_empty((2, x.shape[1]), dtype=torch.float64)


@torch.library.register_fake("cnnkern::sync_bn_backward")
def _(
    dy, x, weight, bias, mean, rstd, mask, channels_last, act, sums, count, output_mask, residual=None, act_param=None
):
    dx, dresidual = (fake.in_order_of(x, channels_last) if wanted else x.new_empty(0) for wanted in output_mask)
    return dx, dresidual
