"""Batch norm over all processes of a group, with the activation and the residual in the kernels.

Each way one collective (cnnkern/ops/sync_bn.py). Unlike torch's own, it runs on the CPU (gloo) as well.
"""

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor, nn

from cnnkern.nn.batchnorm import _FusedBatchNorm, _FusedBatchNormAdd
from cnnkern.ops.bn_act import batch_norm_act
from cnnkern.ops.bn_add_act import batch_norm_add_act
from cnnkern.ops.sync_bn import sync_batch_norm_act


class SyncBatchNorm(_FusedBatchNorm):
    """:class:`torch.nn.SyncBatchNorm` on the fused kernels, on the CPU too. Input (N, C, ...).

    It has torch's constructor and state, but is not a subclass, because DistributedDataParallel refuses those on a CPU.
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

    def _several(self) -> bool:
        """Whether the statistics are those of several processes."""
        if not (dist.is_available() and dist.is_initialized()):
            return False
        return dist.get_world_size(self.process_group or dist.group.WORLD) > 1

    def _average_factor(self, counter: Tensor | None) -> float | Tensor:
        if self.momentum is None and counter is not None and self._several():
            return 1 / (counter.double() + 1)  # a tensor, for nothing is to wait for the device
        return super()._average_factor(counter)

    def _over_processes(self, alone: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The operator `alone` with the statistics of all processes; itself where there is one process."""
        if not self._several():
            return alone

        def together(input: Tensor, *arguments) -> Tensor:
            *residual, mean, var, weight, bias, training, momentum, eps, act, act_param = arguments
            if not training:
                return alone(input, *arguments)
            added = residual[0] if residual else None
            return sync_batch_norm_act(
                *(input, mean, var, weight, bias, training, momentum, eps, act, added, self.process_group, act_param)
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
    """Synchronises every batch norm of the module, torch's or cnnkern's, over the processes of a group, in place.

    Like :meth:`torch.nn.SyncBatchNorm.convert_sync_batchnorm`, but cnnkern's layers keep their activations and
    additions. Parameters, buffers and state-dict keys stay the same. ``process_group`` None is the default group.
    Raises TypeError if ``module`` is not an ``nn.Module``.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"cnnkern.nn.convert_sync_batchnorm: expected a torch.nn.Module; got {type(module).__name__}")
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
