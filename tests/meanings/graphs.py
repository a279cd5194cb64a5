"""What is done with the autograd graph: nodes that are called, second derivatives, checkpoints, functions."""

import contextlib
import warnings

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.autograd.graph import (
    allow_mutation_on_saved_tensors,
    get_gradient_edge,
    register_multi_grad_hook,
    save_on_cpu,
)
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from meanings.base import Layers, case, written


@written("WalksTheGraph")
def _(self, x, y):
    z = F.relu(self.features[1](F.silu(y)) + y)
    if not z.requires_grad:
        return z
    seen, open_, leaves = set(), [z.grad_fn], 0
    while open_:
        node = open_.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaves += hasattr(node, "variable")
        open_ += [n for n, _ in node.next_functions]
    return z * leaves


@written("TakesTheGradientOfAnEdge")
def _(self, x, y):
    if not y.requires_grad:
        return F.relu(y)
    edge = get_gradient_edge(y)
    z = F.relu(y)
    (g,) = torch.autograd.grad(z.square().sum(), edge, retain_graph=True)
    return z + g


@written("HooksManyGradients")
def _(self, x, y):
    z = F.relu(y)
    s = self.features[1](x) + z
    w = F.silu(s)
    if w.requires_grad:
        seen: list = []
        handle = register_multi_grad_hook((y, z, s), lambda grads: seen.extend(g.detach() for g in grads))
        w.square().sum().backward(retain_graph=True)
        handle.remove()
        return w + seen[0] + seen[1] + seen[2]
    return w


@written("HooksItsNodeBefore")
def _(self, x, y):
    if y.requires_grad:
        y.grad_fn.register_prehook(lambda grads: tuple(g * 3 for g in grads))
    z = F.relu(y)
    if z.requires_grad:
        z.grad_fn.register_prehook(lambda grads: tuple(g * 2 for g in grads))
    return z


@written("AccumulatesInAHook")
def _(self, x, y):
    """An optimiser that steps within the backward pass; here it gives the gradient to the weight of another."""
    z = F.silu(y) + F.relu(self.features[1](x) + y)
    if z.requires_grad:
        other = self.features[1].weight

        def step(p):
            other.data.add_(p.grad * 1e-3)

        handle = self.bn.weight.register_post_accumulate_grad_hook(step)
        z.square().mean().backward(retain_graph=True)
        handle.remove()
        other.data.sub_(self.bn.weight.grad * 1e-3)
    return z.detach() + x


@written("GoesBackwardTwice")
def _(self, x, y):
    z = F.relu(self.features[1](F.silu(y)) + x)
    if z.requires_grad:
        z.square().sum().backward(retain_graph=True)
        z.sum().backward()
        with contextlib.suppress(RuntimeError):
            z.sum().backward()
            return z * 100
    return z.detach() + x


@written("DifferentiatesTwice")
def _(self, x, y):
    if not y.requires_grad:
        return F.relu(y)
    z = F.silu(self.features[1](F.silu(y) + x) + y)
    parameters = [self.bn.weight, self.bn.bias, self.conv.weight]
    first = torch.autograd.grad(z.square().sum(), parameters, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), parameters, create_graph=True)
    return z + sum(g.sum().detach() for g in second) * 1e-3


@written("AsksForSomeGradientsOnly")
def _(self, x, y):
    z = F.relu(self.features[1](x) + F.silu(y))
    if not z.requires_grad:
        return z
    torch.autograd.backward(z.sum(), inputs=[self.bn.bias, self.features[1].weight], retain_graph=True)
    (g,) = torch.autograd.grad(z.sum(), self.features[1].bias, retain_graph=True)
    return z + g.view(1, -1, 1, 1)


@written("LearnsWithin")
def _(self, x, y):
    """Meta-learning: a step on the inner loss, and the outer one by what it gave."""
    if not torch.is_grad_enabled():
        return F.relu(y)
    before = dict(self.features.named_parameters())
    loss = F.silu(self.features[1](self.features[0](x)) + x).square().mean()
    gradients = torch.autograd.grad(loss, list(before.values()), create_graph=True, allow_unused=True)
    fast = {n: p - 0.1 * g for (n, p), g in zip(before.items(), gradients, strict=True) if g is not None}
    return torch.func.functional_call(self.features, fast, (x,)) + F.relu(y)


@written("CallsItWithOtherState")
def _(self, x, y):
    state = {n: t * 2 for n, t in (*self.bn.named_parameters(), *self.bn.named_buffers()) if t.is_floating_point()}
    z = torch.func.functional_call(self.bn, state, (x,))
    first = F.relu(z)
    return first + state["running_mean"].mean() + F.relu(torch.func.functional_call(self.bn, state, (x,)) + y)


@written("DetectsAnomalies")
def _(self, x, y):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.set_detect_anomaly(True):
            z = F.relu(self.features[1](F.silu(self.bn(x))) + y)
            if z.requires_grad:
                z.square().sum().backward(retain_graph=True)
    return z


@written("SavesElsewhere")
def _(self, x, y):
    with save_on_cpu():
        z = F.silu(self.features[1](x) + y)
    if not torch.is_grad_enabled():
        return z
    with allow_mutation_on_saved_tensors():
        t = x * 1
        w = F.silu(self.bn(t))
        t.mul_(2)
        (g,) = torch.autograd.grad(w.square().sum(), self.bn.weight)
    return z + g.view(1, -1, 1, 1)


@written("HasATangent")
def _(self, x, y):
    with forward_ad.dual_level(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dual = forward_ad.make_dual(y.detach(), x)
        z = F.silu(dual)
        w = F.silu(self.features[1](forward_ad.make_dual(x, x)) + x)
        tangents = forward_ad.unpack_dual(z).tangent, forward_ad.unpack_dual(w).tangent
        return tangents[0].detach() + tangents[1].detach() + F.relu(y)


@written("ComputesAJacobian")
def _(self, x, y):
    if self.training:
        return F.relu(y)

    def inner(t):
        return F.relu(self.bn(t) + t).sum((0, 2, 3))

    jacobian = torch.autograd.functional.jacobian(inner, x)
    return F.relu(y) + jacobian.sum(0) + torch.func.vjp(inner, x)[1](torch.ones(4, dtype=x.dtype))[0]


class Clipped(torch.autograd.Function):
    """With its context set up apart, gradients that are None, and no second derivative."""

    @staticmethod
    def forward(x, y):
        return x.clamp(-1, 1) + y, x * 0

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        x, y = ctx.saved_tensors
        return (None, None) if dy is None else (dy * (x.abs() < 1), dy + 0 * y)


@written("AppliesAFunctionOfTwo")
def _(self, x, y):
    z, zero = Clipped.apply(y, self.features[1](x))
    w, _ = Clipped.apply(F.relu(y), y)
    return F.relu(z + w) + zero


class WritesOntoIt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x.mul_(2).relu_()

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy * (ctx.saved_tensors[0] > 0)


@written("AppliesAFunctionThatWrites")
def _(self, x, y):
    s = self.features[1](x) + y * 2
    return WritesOntoIt.apply(y) + F.relu(WritesOntoIt.apply(s))


@case()
class CheckpointsWithin(Layers):
    """Nested, in sequence, to the end, without the generator's state, and with some results kept."""

    def block(self, x):
        return F.relu(self.features[1](x) + checkpoint(self.hidden, x, use_reentrant=False))

    def forward(self, x):
        def policy(ctx, op, *args, **kwargs):
            return (
                CheckpointPolicy.MUST_SAVE if op == torch.ops.aten.relu.default else CheckpointPolicy.PREFER_RECOMPUTE
            )

        y = checkpoint(self.block, x, use_reentrant=False)
        y = y + checkpoint_sequential(self.features, 2, x, use_reentrant=False)
        with set_checkpoint_early_stop(False):
            y = y + checkpoint(self.block, x, use_reentrant=False, preserve_rng_state=False)
        return y + checkpoint(
            self.hidden, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
        )


@case()
class CheckpointsInTurns(Layers):
    """The reentrant kind, around and within the other; what is checkpointed has a batch norm's output for its input."""

    def forward(self, x):
        y = self.bn(self.conv(x))
        if not torch.is_grad_enabled():
            return self.hidden(y) + F.relu(y)
        inner = checkpoint(lambda t: checkpoint(self.hidden, t, use_reentrant=False), y, use_reentrant=True)
        return inner + F.relu(y)


@written("StraightThrough")
def _(self, x, y):
    hard = (y > 0).to(y.dtype)
    return F.relu(hard - y.detach() + y) + torch.where(y > 0, y, 0 * y)
