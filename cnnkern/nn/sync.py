"""Batch norm over all processes of a group, with the activation and the residual in the kernels.

Each way one collective: forward's all_gather brings every process's count, mean and variance of each channel, combined
in the order of ranks; backward's all_reduce sums two vectors of C. Unlike torch's own, it runs on the CPU (gloo)
as well.
"""

import functools
import operator
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cnnkern.nn.batchnorm import _FusedBatchNorm, _FusedBatchNormAdd
from cnnkern.ops.bn_act import batch_norm_act
from cnnkern.ops.bn_add_act import batch_norm_add_act
from cnnkern.triton_kernels.layout import batch_norm_in_rows

_ops = torch.ops.cnnkern
_TINY = 1e-300  # an eps that the variance can be recovered from


def _local_moments(x: Tensor) -> tuple[int, Tensor, Tensor]:
    """(elements a channel, mean, biased variance), the vectors in float64."""
    count = x.numel() // max(x.shape[1], 1)
    if count <= 1:  # for one element the kernel would be right to refuse; the other processes may have more
        mean = x.detach().movedim(1, -1).reshape(count, x.shape[1]).double().sum(0)
        return count, mean, torch.zeros_like(mean)
    _, mean, rstd = _ops.bn_act(x.detach(), None, None, None, None, True, 0.0, _TINY, "none")
    return count, mean, rstd.pow(-2) - _TINY


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return functools.reduce(operator.add, terms)


def _global_moments(x: Tensor, group: dist.ProcessGroup) -> tuple[int, Tensor, Tensor]:
    count, mean, var = _local_moments(x)
    mine = torch.cat([mean.new_tensor([count]), mean, var])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    channels = x.shape[1]
    counts = [int(e[0].item()) for e in everyone]
    total = sum(counts)
    if total <= 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got {total} over all processes")
    mean = _sum(n * e[1 : 1 + channels] for n, e in zip(counts, everyone, strict=True)) / total
    squares = [
        n * (e[1 + channels :] + (e[1 : 1 + channels] - mean).square()) for n, e in zip(counts, everyone, strict=True)
    ]
    return total, mean, _sum(squares) / total


class _Synchronised(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, running_mean, running_var, momentum, eps, act, group):
        count, batch_mean, var = _global_moments(x, group)
        # With the statistics given, the kernels of eval mode do the rest.
        dtype = torch.promote_types(x.dtype, torch.float32)
        vectors = (weight, bias, batch_mean.to(dtype), var.to(dtype))
        mask = None
        if residual is None:
            y, mean, rstd = _ops.bn_act(x, *vectors, False, 0.0, eps, act)
        else:
            y, mean, rstd, mask = _ops.bn_add_act(x, residual, *vectors, False, 0.0, eps, act)
        if running_mean is not None:  # after the kernels, which raise before anything has changed
            running_mean.mul_(1 - momentum).add_(batch_mean.to(running_mean.dtype), alpha=momentum)
            unbiased = var * (count / (count - 1))
            running_var.mul_(1 - momentum).add_(unbiased.to(running_var.dtype), alpha=momentum)
        ctx.save_for_backward(x, weight, bias, mean, rstd, mask)
        ctx.channels_last = batch_norm_in_rows(x)
        ctx.count, ctx.act, ctx.group = count, act, group
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, mean, rstd, mask = ctx.saved_tensors
        dtype = torch.promote_types(x.dtype, torch.float32)
        channels = x.shape[1]
        # In float32 at least, whatever the parameters are, for their gradients are sums that others are added to.
        w = x.new_ones(channels, dtype=dtype) if weight is None else weight.to(dtype)
        b = x.new_zeros(channels, dtype=dtype) if bias is None else bias.to(dtype)
        dresidual = None
        if mask is None:
            dx, dweight, dbias = _ops.bn_act_backward(dy, x, w, b, mean, rstd, False, ctx.act, [True] * 3)
        else:
            dx, dresidual, dweight, dbias = _ops.bn_add_act_backward(
                dy, x, w, b, mean, rstd, mask, ctx.channels_last, False, ctx.act, [True] * 4
            )
        sums = torch.cat([dbias.double(), dweight.double()])
        dist.all_reduce(sums, group=ctx.group)
        scale = w.double() * rstd / ctx.count
        shape = (1, channels) + (1,) * (x.dim() - 2)

        def column(v: Tensor) -> Tensor:
            return v.to(dtype).view(shape)

        centred = x.to(dtype) - column(mean)
        through_statistics = centred * column(scale * rstd * sums[channels:]) + column(scale * sums[:channels])
        dx = (dx.to(dtype) - through_statistics).to(x.dtype)
        dweight = None if weight is None else dweight.to(weight.dtype)
        dbias = None if bias is None else dbias.to(bias.dtype)
        return dx, dresidual, dweight, dbias, None, None, None, None, None, None


class SyncBatchNorm(_FusedBatchNorm):
    """:class:`torch.nn.SyncBatchNorm` on the fused kernels, on the CPU too. Input (N, C, ...).

    Constructor and state are torch's, but it is no subclass: DistributedDataParallel refuses those on a CPU.
    """

    act = "none"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: "dist.ProcessGroup | None" = None,
        device=None,
        dtype=None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.process_group = process_group

    def forward(self, input: Tensor) -> Tensor:
        return self._normalize(input, self._over_processes(batch_norm_act))

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def _over_processes(self, alone: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The operator `alone` with the statistics of all processes; itself where there is one process."""
        if not (dist.is_available() and dist.is_initialized()):
            return alone
        group = self.process_group or dist.group.WORLD
        if dist.get_world_size(group) == 1:
            return alone

        def together(input: Tensor, *arguments) -> Tensor:
            *residual, mean, var, weight, bias, training, momentum, eps, act = arguments
            if not training:
                return alone(input, *arguments)
            return _Synchronised.apply(
                input, *(residual or (None,)), weight, bias, mean, var, momentum, eps, act, group
            )

        return together


class SyncBatchNormReLU(SyncBatchNorm):
    """:class:`torch.nn.SyncBatchNorm`, then ReLU. Input (N, C, ...)."""

    act = "relu"


class SyncBatchNormAddReLU(SyncBatchNorm):
    """``F.relu(sync_batch_norm(x) + residual)``, called as ``m(x, residual)``. Both are (N, C, ...)."""

    act = "relu"

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        return self._normalize(input, self._over_processes(batch_norm_add_act), residual)


def convert_sync_batchnorm(module: nn.Module, process_group: "dist.ProcessGroup | None" = None) -> nn.Module:
    """The module with every batch norm, torch's or ours, synchronised over the processes of a group, in place.

    Like :meth:`torch.nn.SyncBatchNorm.convert_sync_batchnorm`, and with the activations and additions of our own
    kept. Parameters, buffers and state-dict keys stay. ``process_group`` is the default group where it is None.
    """
    for child in module.modules():
        if isinstance(child, _FusedBatchNorm) and not isinstance(child, SyncBatchNorm):
            act = child.act
            kind: type[SyncBatchNorm] = SyncBatchNormReLU if act == "relu" else SyncBatchNorm
            if isinstance(child, _FusedBatchNormAdd):
                kind = SyncBatchNormAddReLU
            child.__class__ = getattr(child, "synchronised", kind)
            if isinstance(act, str):
                child.act = act  # of the module, whatever its new class has
        elif type(child) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
            child.__class__ = SyncBatchNorm
        if isinstance(child, SyncBatchNorm):
            child.process_group = process_group
    return module
