"""Batch norm with an activation in one operator; each class is a `torch.nn` batch norm and takes its checkpoints."""

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cnnkern import reference
from cnnkern.extension import extension
from cnnkern.nn.traced import NotScriptable, leaf
from cnnkern.ops.bn_act import batch_norm_act
from cnnkern.ops.bn_add_act import batch_norm_add_act
from cnnkern.ops.route import alike
from cnnkern.triton_kernels import check

folded_of = extension and extension.folded_of  # without the extension nothing is folded
_is_compiling = torch.compiler.is_compiling


class _FusedBatchNorm(NotScriptable, _BatchNorm):
    """`torch.nn`'s batch norm, its constructor and its state, with a forward pass that applies `act` as well."""

    act: str
    act_param: float | None = None
    _counts_refused_calls = False  # PyTorch's layers do; cnnkern's state is unchanged after an error

    def forward(self, input: Tensor) -> Tensor:
        return self._normalize(input, batch_norm_act)

    def _normalize(self, input: Tensor, operator: Callable[..., Tensor], *residual: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy) or (residual and isinstance(residual[0], fx.Proxy)):
            return leaf(self, input, *residual)
        self._check_input_dim(input)
        training = self.training
        if not training:
            y = self._within_convolution(input, *residual)
            if y is not None:
                return y
        tracks = self.track_running_stats
        counter = self.num_batches_tracked if training and tracks else None
        mean, var = (self.running_mean, self.running_var) if tracks or not training else (None, None)
        arguments = (
            input,
            *residual,
            mean,
            var,
            self.weight,
            self.bias,
            training or (mean is None and var is None),
            self._average_factor(counter),
            self.eps,
            self.act,
            self.act_param,
        )
        if counter is None:
            return operator(*arguments)
        counter.add_(1)  # before the operator: recomputation of a checkpointed segment may end within it
        if self._counts_refused_calls or _is_compiling():  # a failing graph changes no state
            return operator(*arguments)
        try:
            return operator(*arguments)
        except (RuntimeError, TypeError, ValueError):  # the operator raised an error, and has changed nothing
            counter.sub_(1)
            raise

    def _within_convolution(self, input: Tensor, *residual: Tensor) -> Tensor | None:
        """The result, if the input is the deferred result of a folded convolution; else None."""
        if folded_of is None or type(input) is not Tensor or _is_compiling():
            return None
        before = folded_of(input)
        layer = None if before is None else before.of()
        if layer is None or not alike(input, *residual):
            return None
        y = layer.take_norm(before, self, input)
        return None if y is None else self._behind(y, *residual)

    def _behind(self, y: Tensor, *residual: Tensor) -> Tensor:
        """The addition and the activation after the batch norm, by PyTorch's operators, so that a folded convolution
        is fused with them."""
        return reference.activated(y + residual[0] if residual else y, self.act, self.act_param)

    def _average_factor(self, counter: Tensor | None) -> float | Tensor:
        """The weight of this batch's statistics in the running statistics."""
        if self.momentum is not None:
            return self.momentum
        # A cumulative average over the batches, this one included.
        return 1.0 / (float(counter) + 1.0) if counter is not None else 0.0


class _FusedBatchNormAdd(_FusedBatchNorm):
    """The forward pass takes a residual of the input's shape as well: ``m(x, residual)``."""

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        return self._normalize(input, batch_norm_add_act, residual)


class _ChosenAct(_FusedBatchNorm):
    """The activation and its parameter are arguments of the constructor."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
        *,
        bias: bool = True,
        act: str = "relu",
        act_param: float | None = None,
    ) -> None:
        check.activation(type(self).__name__, act, act_param)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.act, self.act_param = act, act_param

    def extra_repr(self) -> str:
        number = "" if self.act_param is None else f", act_param={self.act_param:g}"
        return f"{super().extra_repr()}, act={self.act}{number}"


class BatchNormAct1d(_ChosenAct, nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d`, then the activation ``act``: one of :func:`~cnnkern.functional.batch_norm_act`.

    Input (N, C) or (N, C, L). With the default, ``act="relu"``, equivalent to
    ``nn.Sequential(nn.BatchNorm1d(...), nn.ReLU())``.
    """


class BatchNormAct2d(_ChosenAct, nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d`, then the activation ``act``: one of :func:`~cnnkern.functional.batch_norm_act`.

    Input (N, C, H, W). With the default, ``act="relu"``, equivalent to
    ``nn.Sequential(nn.BatchNorm2d(...), nn.ReLU())``.
    """


class BatchNormAct3d(_ChosenAct, nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d`, then the activation ``act``: one of :func:`~cnnkern.functional.batch_norm_act`.

    Input (N, C, D, H, W). With the default, ``act="relu"``, equivalent to
    ``nn.Sequential(nn.BatchNorm3d(...), nn.ReLU())``.
    """


class BatchNorm1d(_FusedBatchNorm, nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` on the fused kernel. Input (N, C) or (N, C, L)."""

    act = "none"


class BatchNorm2d(_FusedBatchNorm, nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` on the fused kernel. Input (N, C, H, W)."""

    act = "none"


class BatchNorm3d(_FusedBatchNorm, nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d` on the fused kernel. Input (N, C, D, H, W)."""

    act = "none"


class BatchNormReLU1d(_FusedBatchNorm, nn.BatchNorm1d):
    """Equivalent to ``nn.Sequential(nn.BatchNorm1d(...), nn.ReLU())``. Input (N, C) or (N, C, L)."""

    act = "relu"


class BatchNormReLU2d(_FusedBatchNorm, nn.BatchNorm2d):
    """Equivalent to ``nn.Sequential(nn.BatchNorm2d(...), nn.ReLU())``. Input (N, C, H, W)."""

    act = "relu"


class BatchNormReLU3d(_FusedBatchNorm, nn.BatchNorm3d):
    """Equivalent to ``nn.Sequential(nn.BatchNorm3d(...), nn.ReLU())``. Input (N, C, D, H, W)."""

    act = "relu"


class BatchNormAddAct1d(_FusedBatchNormAdd, _ChosenAct, nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d`, plus a residual, then the activation ``act``: ``m(x, residual)``.

    Input and residual (N, C) or (N, C, L). With the default, ``act="relu"``, equivalent to
    ``F.relu(bn(x) + residual)``.
    """


class BatchNormAddAct2d(_FusedBatchNormAdd, _ChosenAct, nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d`, plus a residual, then the activation ``act``: ``m(x, residual)``.

    Input and residual (N, C, H, W). With the default, ``act="relu"``, equivalent to ``F.relu(bn(x) + residual)``.
    """


class BatchNormAddAct3d(_FusedBatchNormAdd, _ChosenAct, nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d`, plus a residual, then the activation ``act``: ``m(x, residual)``.

    Input and residual (N, C, D, H, W). With the default, ``act="relu"``, equivalent to ``F.relu(bn(x) + residual)``.
    """


class BatchNormAddReLU1d(_FusedBatchNormAdd, nn.BatchNorm1d):
    """``F.relu(bn(x) + residual)``, called as ``m(x, residual)``. Both are (N, C) or (N, C, L)."""

    act = "relu"


class BatchNormAddReLU2d(_FusedBatchNormAdd, nn.BatchNorm2d):
    """``F.relu(bn(x) + residual)``, called as ``m(x, residual)``. Both are (N, C, H, W)."""

    act = "relu"


class BatchNormAddReLU3d(_FusedBatchNormAdd, nn.BatchNorm3d):
    """``F.relu(bn(x) + residual)``, called as ``m(x, residual)``. Both are (N, C, D, H, W)."""

    act = "relu"
