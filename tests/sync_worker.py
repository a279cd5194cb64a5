"""What tests/test_sync.py starts in each process: `torchrun ... sync_worker.py TASK`."""

import copy
import itertools
import os
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from gloo import run_task
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import cnnkern
from cnnkern import reference, testing
from cnnkern.nn import SyncBatchNorm, SyncBatchNormAddReLU, SyncBatchNormReLU, convert_sync_batchnorm

SPLITS = {2: ((3, 3), (5, 1), (6, 0)), 3: ((2, 2, 2), (4, 0, 2), (1, 4, 1))}
CHANNELS = 5


def silu(*arguments, **keywords) -> SyncBatchNorm:
    module = SyncBatchNorm(*arguments, **keywords)
    module.act = "silu"
    return module


def add_silu(*arguments, **keywords) -> SyncBatchNorm:
    module = SyncBatchNormAddReLU(*arguments, **keywords)
    module.act = "silu"
    return module


KINDS = (SyncBatchNorm, SyncBatchNormReLU, SyncBatchNormAddReLU, silu, add_silu)
ADDING = (SyncBatchNormAddReLU, add_silu)


def equal_to_one_process_on_the_whole_batch() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    for split in SPLITS[world]:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for layout in ("contiguous", "channels_last"):
                for kind in KINDS:
                    compare(kind, split, dtype, layout, rank)


def drawn(kind: Callable, dtype: torch.dtype, layout: str = "contiguous", **keywords) -> tuple[nn.Module, list[Tensor]]:
    """A layer, and x, dy and where it adds the residual of the whole batch. Parameters are float32 at least."""
    g = torch.Generator().manual_seed(1)
    module = kind(CHANNELS, dtype=torch.promote_types(dtype, torch.float32), **keywords)
    x, dy, r = (testing.with_layout(testing.randn((6, CHANNELS, 4, 7), g, dtype), layout) for _ in range(3))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(testing.randn((CHANNELS,), g, parameter.dtype))
    return module, [x, dy, r] if isinstance(module, SyncBatchNormAddReLU) else [x, dy]


def of_this_process(t: Tensor, layout: str = "contiguous", split: tuple[int, ...] | None = None) -> Tensor:
    rank, world = dist.get_rank(), dist.get_world_size()
    split = split or SPLITS[world][1]
    return testing.with_layout(t[sum(split[:rank]) : sum(split[: rank + 1])], layout)


def written_out(module: nn.Module, x: Tensor, residual: Tensor | None, *statistics, training: bool = True) -> Tensor:
    """The layer in a process alone, in PyTorch's operators."""
    y = F.batch_norm(x, *statistics, training=training)
    return reference.ACTIVATIONS[module.act](y if residual is None else y + residual)


def compare(kind, split, dtype, layout, rank) -> None:
    module, (x, dy, *residual) = drawn(kind, dtype, layout)
    x = x * 3 + (100 if dtype != torch.bfloat16 else 3)
    mine = slice(sum(split[:rank]), sum(split[: rank + 1]))
    inputs = [of_this_process(t, layout, split).requires_grad_() for t in (x, *residual)]
    y = module(*inputs)
    grads = torch.autograd.grad(y, [*inputs, module.weight, module.bias], dy[mine])
    dist.all_reduce(grads[-1]), dist.all_reduce(grads[-2])  # what DistributedDataParallel does

    def whole(wide):
        leaves = [t.detach().to(wide).requires_grad_() for t in (x, *residual)]
        vectors = torch.promote_types(wide, torch.float32)
        parameters = [p.detach().to(vectors).requires_grad_() for p in (module.weight, module.bias)]
        rm, rv = torch.zeros(CHANNELS, dtype=vectors), torch.ones(CHANNELS, dtype=vectors)
        out = written_out(module, leaves[0], leaves[1] if residual else None, rm, rv, *parameters)
        gs = torch.autograd.grad(out, [*leaves, *parameters], dy.to(wide))
        found = {"y": out[mine], **{f"grad {i}": t[mine] for i, t in enumerate(gs[:-2])}}
        return found | {"dweight": gs[-2], "dbias": gs[-1], "mean": rm, "var": rv}

    found = {"y": y, **{f"grad {i}": t for i, t in enumerate(grads[:-2])}, "dweight": grads[-2], "dbias": grads[-1]}
    found |= {"mean": module.running_mean, "var": module.running_var}
    truth, eps = whole(torch.float64), torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    # The input's mean is 30 deviations: what rounding the input itself would change.
    allowance = {n: 64 * eps * max(1.0, t.abs().max().item() if t.numel() else 0.0) for n, t in truth.items()}
    if dtype == torch.float64:
        # The truth's own mean, a sum, is wrong by about sqrt(n) roundings, of which dweight has dbias times as many.
        roundings = 34 * (x.numel() / CHANNELS) ** 0.5 * eps  # in deviations
        allowance = {n: max(a, a / 64 / eps * roundings) for n, a in allowance.items()}
        allowance["dweight"] += roundings * truth["dbias"].abs().max().item()
    testing.assert_as_good_as(found, whole(dtype), truth, allowance)
    assert module.num_batches_tracked.item() == 1
    statistics = module.running_mean, module.running_var, module.weight, module.bias
    expected = written_out(module, inputs[0], inputs[1] if residual else None, *statistics, training=False)
    rounding = {"rtol": 0.02, "atol": 0.05} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-3}
    torch.testing.assert_close(module.eval()(*inputs), expected, **rounding)


def second_derivatives_are_those_of_one_process_on_the_whole_batch() -> None:
    for kind, layout, affine in itertools.product(KINDS, ("contiguous", "channels_last"), (True, False)):
        module, (x, dy, *residual) = drawn(kind, torch.float64, layout, affine=affine)
        g = torch.Generator().manual_seed(3)
        parameters = list(module.parameters())
        vs = [testing.randn(t.shape, g, torch.float64) for t in (x, *residual, *parameters)]

        def second(layer, tensors, dy, vs, parameters=parameters, residual=residual):
            leaves = [t.detach().requires_grad_() for t in tensors]
            dy = dy.detach().requires_grad_()
            firsts = torch.autograd.grad(layer(*leaves), [*leaves, *parameters], dy, create_graph=True)
            total = sum((f * v).sum() for f, v in zip(firsts, vs, strict=True))
            wanted = [
                dy,
                leaves[0],
                *parameters[:1],
            ]  # nothing depends on a residual, or on a bias behind none or a mask
            found = torch.autograd.grad(total, wanted, allow_unused=True, create_graph=True)
            third = torch.autograd.grad(found[1].square().sum(), leaves[0])
            return [*firsts, *found, *third]

        mine = [of_this_process(t, layout) for t in (x, *residual)]
        my_vs = [of_this_process(v) if v.dim() == 4 else v for v in vs]
        found = second(module, mine, of_this_process(dy), my_vs)
        whole = [t.contiguous() for t in (x, *residual)]

        def alone(x, residual=None, module=module, parameters=parameters):
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)  # F.batch_norm has no third derivative
            y = (x - mean) * (var + module.eps).rsqrt()
            if parameters:
                weight, bias = (p.view(-1, 1, 1) for p in parameters)
                y = y * weight + bias
            return reference.ACTIVATIONS[module.act](y if residual is None else y + residual)

        expected = second(alone, whole, dy, vs)  # of a sum to which every process adds its own parameters' gradients
        for ours, theirs in zip(found, expected, strict=True):
            if ours.dim() == 4:
                torch.testing.assert_close(ours, of_this_process(theirs), rtol=1e-9, atol=1e-9)
            else:
                dist.all_reduce(ours := ours.detach().clone())
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


class Called(TorchDispatchMode):
    """The names of the operators that run, and those that touch a tensor of as many elements as `numel`."""

    def __init__(self, numel: int = -1) -> None:
        super().__init__()
        self.numel, self.names, self.large = numel, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name
        self.names.append(name)
        result = func(*args, **(kwargs or {}))
        touched = torch.utils._pytree.tree_leaves((args, result))
        views = ("aten::detach", "aten::alias", "aten::view")
        if name not in views and any(isinstance(t, Tensor) and t.numel() == self.numel for t in touched):
            self.large.append(name)
        return result


def nothing_is_read_by_the_host_and_memory_is_passed_over_once_a_part() -> None:
    reads = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero"}
    for kind, momentum in itertools.product(KINDS, (0.1, None)):
        module, tensors = drawn(kind, torch.float32, momentum=momentum)
        x, dy, *residual = (of_this_process(t) for t in tensors)
        inputs = [t.requires_grad_() for t in (x, *residual)]
        with Called(x.numel()) as called:
            y = module(*inputs)
            assert called.large == ["cnnkern::sync_bn_stats", "cnnkern::sync_bn"], called.large
            called.large.clear()
            torch.autograd.backward([y], [dy])
        assert called.large == ["cnnkern::sync_bn_sums", "cnnkern::sync_bn_backward"], called.large
        assert not reads & set(called.names), reads & set(called.names)
        assert x.grad.shape == x.shape
        assert module.weight.grad is not None


def running_statistics_are_a_cumulative_average() -> None:
    module, (x, _) = drawn(SyncBatchNorm, torch.float64, momentum=None)
    alone = nn.BatchNorm2d(CHANNELS, momentum=None, dtype=torch.float64)
    for step in range(3):
        module(of_this_process(x * step + step))
        alone(x * step + step)
    torch.testing.assert_close(module.running_mean, alone.running_mean)
    torch.testing.assert_close(module.running_var, alone.running_var)


def compiles_to_one_graph_equal_to_eager() -> None:
    exact = itertools.product(("aot_eager",), KINDS, ("contiguous", "channels_last"))
    fused = (("inductor", SyncBatchNormAddReLU, "channels_last"), ("inductor", silu, "contiguous"))
    for backend, kind, layout in (*exact, *fused):
        torch._dynamo.reset()
        module, tensors = drawn(kind, torch.float32, layout)
        results = []
        for layer in (module, torch.compile(copy.deepcopy(module), fullgraph=True, backend=backend)):
            x, dy, *residual = (of_this_process(t, layout) for t in tensors)
            inputs = [t.clone().requires_grad_() for t in (x, *residual)]
            y = layer(*inputs)
            y.backward(dy)
            results.append([y, *(t.grad for t in (*inputs, *layer.parameters())), *layer.state_dict().values()])
        # Inductor computes the vectors of C in another order, and in float64.
        rounding = 0 if backend == "aot_eager" else 8 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(*results, rtol=rounding, atol=rounding)


def saved_tensors_may_come_back_in_another_memory_format() -> None:
    def other(layout: str) -> Callable[[Tensor], Tensor]:
        return lambda t: testing.with_layout(t, layout) if t.dim() == 4 else t

    for kind, layout, given in itertools.product(
        KINDS, ("contiguous", "channels_last"), ("contiguous", "channels_last")
    ):
        module, tensors = drawn(kind, torch.float64, layout)
        x, dy, *residual = (of_this_process(t, layout) for t in tensors)
        inputs = [t.requires_grad_() for t in (x, *residual)]
        leaves = [*inputs, *module.parameters()]
        firsts = torch.autograd.grad(module(*inputs), leaves, dy, create_graph=True)
        seconds = torch.autograd.grad(firsts[0].square().sum(), inputs[0])
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), other(given)):
            found = torch.autograd.grad(module(*inputs), leaves, dy, create_graph=True)
            again = torch.autograd.grad(found[0].square().sum(), inputs[0])
        for a, b in zip((*firsts, *seconds), (*found, *again), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
            assert a.stride() == b.stride() or a is seconds[0]


def the_benchmark_s_formula_is_the_layer() -> None:
    from benchmarks.studies import sync

    generator = torch.Generator().manual_seed(dist.get_rank())
    x, dy = (testing.randn((3, CHANNELS, 4, 7), generator, torch.float64) for _ in range(2))
    results = []
    for layer in (SyncBatchNormReLU(CHANNELS, dtype=x.dtype), sync.SyncWrittenOut(CHANNELS, dtype=x.dtype)):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        grads = torch.autograd.grad(y, [leaf, layer.weight, layer.bias], dy)
        results.append([y, *grads, layer.running_mean, layer.running_var])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def every_process_empty() -> None:
    for kind in KINDS:
        module, _ = drawn(kind, torch.float32)
        plain = nn.BatchNorm2d(CHANNELS)
        module.running_mean.fill_(0.25), plain.running_mean.fill_(0.25)
        inputs = [torch.empty(0, CHANNELS, 3, 4, requires_grad=True) for _ in range(1 + (kind in ADDING))]
        y = module(*inputs)
        expected = plain(inputs[0].detach())
        assert y.shape == expected.shape
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(getattr(module, name), getattr(plain, name)), name
        y.sum().backward()
        for t in (*inputs, module.weight, module.bias):
            assert torch.equal(t.grad, torch.zeros_like(t))


def synchronised_resnet_under_ddp_is_single_process_training() -> None:
    def make(distributed: bool) -> nn.Module:
        model = resnet18()
        if not distributed:
            return model
        model = convert_sync_batchnorm(cnnkern.convert(model))
        assert not any(type(m) is nn.BatchNorm2d for m in model.modules())
        return nn.parallel.DistributedDataParallel(model)

    compare_training(make, (True, False))


def converted_resnet_under_ddp_is_the_original_under_ddp() -> None:
    """Batch statistics are each process's own."""

    def make(converted: bool) -> nn.Module:
        return nn.parallel.DistributedDataParallel(cnnkern.convert(resnet18()) if converted else resnet18())

    compare_training(make, (True, True))


def resnet18() -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=10).double()


def compare_training(make, split: tuple[bool, bool]) -> None:
    """Three steps of two models, each on this process's images or on all: losses, and the state they end in."""
    rank, world = dist.get_rank(), dist.get_world_size()
    g = torch.Generator().manual_seed(2)
    x, target = testing.randn((2 * world, 3, 64, 64), g, torch.float64), torch.arange(2 * world)
    curves, states = [], []
    for first, divided in zip((True, False), split, strict=True):
        model = make(first)
        mine = slice(2 * rank, 2 * rank + 2) if divided else slice(None)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
        curve = []
        for _ in range(3):
            optimiser.zero_grad()
            loss = F.cross_entropy(model(x[mine]), target[mine])
            loss.backward()
            optimiser.step()
            value = loss.detach() / (world if divided else 1)
            if divided:
                dist.all_reduce(value)
            curve.append(value)
        curves.append(torch.stack(curve))
        states.append({n.removeprefix("module."): t for n, t in model.state_dict().items()})
    torch.testing.assert_close(*curves, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(*states, rtol=1e-8, atol=1e-9)


def one_collective_each_way() -> None:
    def sent(called: Called) -> list[str]:
        return [name for name in called.names if name.startswith(("_c10d_functional::", "c10d::"))]

    module = SyncBatchNormAddReLU(CHANNELS)
    x, r = (torch.randn(2, CHANNELS, 3, 3, requires_grad=True) for _ in range(2))
    for _ in range(2):
        with Called() as forward:
            y = module(x, r)
        with Called() as backward:
            y.sum().backward()
        assert sent(forward) == [f"_c10d_functional::{name}" for name in ("all_gather_into_tensor", "wait_tensor")]
        assert sent(backward) == [f"_c10d_functional::{name}" for name in ("all_reduce", "wait_tensor")]
    with Called() as evaluated:
        module.eval()(x, r).sum().backward()
    assert sent(evaluated) == []


def one_value_over_all_processes_is_its_own_mean() -> None:
    """No process knows that there is no second one before all have said what they have, and then the device does."""
    for kind in KINDS:
        module, _ = drawn(kind, torch.float32)
        shape = (1 if dist.get_rank() == 0 else 0, CHANNELS, 1, 1)
        inputs = [torch.full(shape, 7.0, requires_grad=True) for _ in range(1 + (kind in ADDING))]
        y = module(*inputs)
        expected = reference.ACTIVATIONS[module.act](module.bias.detach() + (7.0 if len(inputs) > 1 else 0.0))
        assert torch.equal(y.detach().flatten(), expected.expand(shape[0], CHANNELS).flatten())
        y.sum().backward()
        assert torch.equal(inputs[0].grad, torch.zeros(shape))
        assert torch.equal(module.running_mean, torch.zeros(CHANNELS))
        assert torch.equal(module.running_var, torch.ones(CHANNELS))


def refused() -> Iterator[tuple[str, Callable[[SyncBatchNormAddReLU], object]]]:
    """What a call is refused for, on every process, and the call."""
    x = torch.randn(2, CHANNELS, 3, 3)

    def pack(t):
        raise RuntimeError("a hook that raises")

    def with_hook(module):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            module(x, x)

    with torch.inference_mode():
        inference = torch.randn(2, CHANNELS, 3, 3)
    yield "residual must have the input's shape", lambda module: module(x, x[:1])
    yield "should contain", lambda module: module(x[:, 1:], x[:, 1:])
    yield "a hook that raises", with_hook
    yield "Inference tensors cannot be saved for backward", lambda module: module(inference, inference)


def an_error_leaves_the_statistics() -> None:
    for message, call in refused():
        module = SyncBatchNormAddReLU(CHANNELS)
        try:
            call(module)
        except RuntimeError as error:
            assert message in str(error), error  # noqa: PT017
        else:
            raise AssertionError(f"accepted: {message}")
        assert torch.equal(module.running_mean, torch.zeros(CHANNELS))
        assert torch.equal(module.running_var, torch.ones(CHANNELS))
        assert module.num_batches_tracked.item() == 0


def a_process_that_dies() -> None:
    module = SyncBatchNormReLU(CHANNELS)
    module(torch.randn(2, CHANNELS, 3, 3))
    if dist.get_rank() == 1:
        os._exit(3)
    module(torch.randn(2, CHANNELS, 3, 3))  # an error, not a hang


if __name__ == "__main__":
    run_task(globals())
