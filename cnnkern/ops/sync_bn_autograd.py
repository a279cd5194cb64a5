"""The derivatives of batch norm over processes.

Of first order by its operators, with one collective between the sums and the map of them; of second order by PyTorch's
own operators and a sum over processes that is differentiable.
"""

from typing import TYPE_CHECKING, NamedTuple, Optional

import torch
import torch.distributed as dist
from torch import Tensor

from cnnkern import reference
from cnnkern.triton_kernels.check import recomputes_sum
from cnnkern.triton_kernels.layout import batch_norm_in_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_ops = torch.ops.cnnkern


class Group(NamedTuple):
    """The processes of a group, by the name that functional collectives know it by."""

    size: int
    name: str

    @classmethod
    def of(cls, group: Optional["ProcessGroup"]) -> "Group":
        """This process alone where none is given and there is no default group."""
        if group is None and not (dist.is_available() and dist.is_initialized()):
            return cls(1, "")
        processes = group or dist.group.WORLD
        assert processes is not None  # the default group is there
        return cls(dist.get_world_size(processes), processes.group_name)

    def gathered(self, t: Tensor) -> Tensor:
        """A row of each process's."""
        if self.size == 1:
            return t[None]
        every = torch.ops._c10d_functional.all_gather_into_tensor(t, self.size, self.name)
        return torch.ops._c10d_functional.wait_tensor(every).view(self.size, -1)

    def summed(self, t: Tensor) -> Tensor:
        if self.size == 1:
            return t
        total = torch.ops._c10d_functional.all_reduce(t, "sum", self.name)
        return torch.ops._c10d_functional.wait_tensor(total)


def combined(gathered: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, biased variance, rstd and number of elements over all processes, from each one's row of `sync_bn_stats`.

    Of no elements at all the mean is 0, as batch norm's is.
    """
    channels = (gathered.shape[1] - 1) // 2
    means, variances, counts = gathered[:, :channels], gathered[:, channels:-1], gathered[:, -1:]
    count = counts.sum(0)
    share = counts / count.clamp(min=1)
    mean = (share * means).sum(0)
    var = (share * (variances + (means - mean).square())).sum(0)
    return mean, var, (var + eps).rsqrt(), count


class _Saved(NamedTuple):
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None  # where the activation's derivative depends on it
    mean: Tensor
    rstd: Tensor
    elements: Tensor
    mask: Tensor | None
    residual: Tensor | None  # where the activation's derivative depends on it


class _Settings(NamedTuple):
    channels_last: bool  # the order of the mask, kept by name: x may come back from the graph in another one
    act: tuple[str, float | None]  # by name, and its number
    adds: bool
    types: tuple[torch.dtype | None, torch.dtype | None]  # of weight and bias
    group: Group


def _gradients(dy: Tensor, saved: _Saved, settings: _Settings, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Of x, residual, weight and bias, where they are needed. One collective where x is."""
    act, act_param = settings.act
    statistics = (saved.weight, saved.bias, saved.mean, saved.rstd, saved.mask, settings.channels_last, act)
    wants_dx, wants_dresidual, *wants_parameters = needs
    dresidual = dy if wants_dresidual and act == "none" else None
    maps = [wants_dx, wants_dresidual and dresidual is None]
    sums = None
    if wants_dx or any(wants_parameters):
        sums = _ops.sync_bn_sums(dy, saved.x, *statistics, saved.residual, act_param)
    dx = None
    if any(maps):
        total = torch.zeros(2, saved.x.shape[1], dtype=torch.float64, device=dy.device) if sums is None else sums
        total = settings.group.summed(total) if wants_dx else total
        dx, through_act = _ops.sync_bn_backward(
            dy, saved.x, *statistics, total, saved.elements, maps, saved.residual, act_param
        )
        dx = dx if wants_dx else None
        dresidual = through_act if maps[1] else dresidual
    dbias, dweight = (None, None) if sums is None else sums.unbind()
    found = [
        g.to(dtype) if wanted and g is not None and dtype is not None else None
        for g, wanted, dtype in zip((dweight, dbias), wants_parameters, settings.types, strict=True)
    ]
    return dx, dresidual, *found


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, act, group):
        mean, var, rstd, count = combined(group.gathered(_ops.sync_bn_stats(x)), eps)
        y, mask = _ops.sync_bn(x, residual, weight, bias, mean, rstd, *act)
        adds = residual is not None
        masked = adds and act[0] == "relu"
        ctx.save_for_backward(
            x,
            weight,
            None if masked or act[0] == "none" else bias,
            mean,
            rstd,
            count,
            mask if masked else None,
            residual if recomputes_sum(act[0]) else None,
        )
        types = tuple(None if v is None else v.dtype for v in (weight, bias))
        ctx.settings = _Settings(batch_norm_in_rows(x), act, adds, types, group)
        ctx.mark_non_differentiable(mean, var, count)
        ctx.set_materialize_grads(False)
        return y, mean, var, count

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 7
        saved, needs = _Saved(*ctx.saved_tensors), tuple(ctx.needs_input_grad[:4])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _Gradients.apply(dy, *saved, ctx.settings, needs)
        else:
            grads = _gradients(dy, saved, ctx.settings, needs)
        return *grads, None, None, None


class _Gradients(torch.autograd.Function):
    """The gradients as functions of dy, x, weight and bias, for who differentiates them once more."""

    @staticmethod
    def forward(ctx, dy, x, weight, bias, mean, rstd, count, mask, residual, settings, needs):
        ctx.save_for_backward(dy, x, weight, bias, mean, rstd, count, mask, residual)
        ctx.settings, ctx.needs = settings, needs
        ctx.set_materialize_grads(False)
        return _gradients(dy, _Saved(x, weight, bias, mean, rstd, count, mask, residual), settings, needs)

    @staticmethod
    def backward(ctx, *grads):
        dy, *rest = ctx.saved_tensors
        saved, settings, further = _Saved(*rest), ctx.settings, torch.is_grad_enabled()
        with torch.enable_grad():
            # With a history of their own. What does not change the derivative may have any value.
            channels = {"dtype": saved.mean.dtype, "device": dy.device}
            residual = torch.zeros_like(saved.x) if settings.adds and saved.residual is None else saved.residual
            bias = saved.bias
            if bias is None and settings.types[1] is not None:
                bias = torch.zeros(saved.x.shape[1], **channels | {"dtype": settings.types[1]})
            inputs = [_own(t) for t in (dy, saved.x, residual, saved.weight, bias)]
            y = _written_out(*inputs[1:], saved, settings)
            firsts = [t for t, wanted in zip(inputs[1:], ctx.needs, strict=True) if wanted]
            first = torch.autograd.grad(y, firsts, inputs[0], create_graph=True, allow_unused=True)
            given = [g for g, wanted in zip(grads, ctx.needs, strict=True) if wanted]
            pairs = [
                (f, g) for f, g in zip(first, given, strict=True) if f is not None and g is not None and f.requires_grad
            ]
            places = [
                i
                for i, n in ((0, 0), (1, 1), (2, 8), (3, 2), (4, 3))
                if ctx.needs_input_grad[n] and inputs[i] is not None
            ]
            if not pairs or not places:
                return (None,) * 11
            second = torch.autograd.grad(
                [f for f, _ in pairs],
                [inputs[i] for i in places],
                [g for _, g in pairs],
                create_graph=further,
                allow_unused=True,
            )
        found = dict(zip(places, second, strict=True))
        return found.get(0), found.get(1), found.get(3), found.get(4), *[None] * 4, found.get(2), None, None


def _own(t: Tensor | None) -> Tensor | None:
    if t is None:
        return None
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()


class _Sum(torch.autograd.Function):
    """A sum over processes, differentiable as often as wanted."""

    @staticmethod
    def forward(ctx, t, group):
        ctx.group = group
        return group.summed(t.contiguous())

    @staticmethod
    def backward(ctx, dt):
        return _Sum.apply(dt, ctx.group), None


def _written_out(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, saved: _Saved, settings: _Settings
) -> Tensor:
    """The layer's output in PyTorch's own operators. Mean and rstd are functions of x, their values the saved ones."""
    wide = torch.promote_types(x.dtype, torch.float32)
    others = [d for d in range(x.dim()) if d != 1]
    count = saved.elements.clamp(min=1).to(wide)

    def column(v: Tensor) -> Tensor:
        return v.to(wide).view(1, -1, *[1] * (x.dim() - 2))

    def mean_over_processes(t: Tensor) -> Tensor:
        total = t.sum(others)
        return (total if settings.group.size == 1 else _Sum.apply(total, settings.group)) / count

    centred = x.to(wide) - column(saved.mean)
    centred = centred - column(mean_over_processes(centred))
    var = mean_over_processes(centred.square())
    pre = centred * column((var - var.detach() + saved.rstd.to(wide).pow(-2)).rsqrt())
    if weight is not None:
        pre = pre * column(weight)
    if bias is not None:
        pre = pre + column(bias)
    pre = pre.to(x.dtype)
    if residual is not None:
        pre = pre + residual
    if saved.mask is not None:  # which does not change
        order = [0, *range(2, x.dim()), 1] if settings.channels_last else list(range(x.dim()))
        return pre * _ops.add_relu_backward(torch.ones_like(x), saved.mask, order).detach()
    return reference.activated(pre, *settings.act)


def normalized(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: tuple[str, float | None],
    group: Group,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, and mean, biased variance and number of elements over all processes."""
    return _SyncBatchNorm.apply(x, residual, weight, bias, eps, act, group)
