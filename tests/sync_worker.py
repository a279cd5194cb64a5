"""What tests/test_sync.py starts in each process: `torchrun ... sync_worker.py TASK`."""

import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import cnnkern
from cnnkern import testing
from cnnkern.nn import SyncBatchNorm, SyncBatchNormAddReLU, SyncBatchNormReLU, convert_sync_batchnorm

SPLITS = {2: ((3, 3), (5, 1), (6, 0)), 3: ((2, 2, 2), (4, 0, 2), (1, 4, 1))}
CHANNELS = 5


def equal_to_one_process_on_the_whole_batch() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    for split in SPLITS[world]:
        for dtype in (torch.float32, torch.float64):
            for layout in ("contiguous", "channels_last"):
                for kind in (SyncBatchNorm, SyncBatchNormReLU, SyncBatchNormAddReLU):
                    compare(kind, split, dtype, layout, rank)


def compare(kind, split, dtype, layout, rank) -> None:
    g = torch.Generator().manual_seed(1)
    x, r, dy = (testing.with_layout(testing.randn((6, CHANNELS, 4, 7), g, dtype), layout) for _ in range(3))
    x = x * 3 + 100
    module = kind(CHANNELS, dtype=dtype)
    with torch.no_grad():
        module.weight.copy_(testing.randn((CHANNELS,), g, dtype))
        module.bias.copy_(testing.randn((CHANNELS,), g, dtype))
    mine = slice(sum(split[:rank]), sum(split[: rank + 1]))
    adds = kind is SyncBatchNormAddReLU
    a, b = (testing.with_layout(t[mine], layout).requires_grad_() for t in (x, r))
    inputs = (a, b) if adds else (a,)
    y = module(*inputs)
    grads = torch.autograd.grad(y, [*inputs, module.weight, module.bias], dy[mine])
    dist.all_reduce(grads[-1]), dist.all_reduce(grads[-2])  # what DistributedDataParallel does

    def whole(wide):
        leaves = [t.detach().to(wide).requires_grad_() for t in ((x, r) if adds else (x,))]
        parameters = [p.detach().to(wide).requires_grad_() for p in (module.weight, module.bias)]
        rm, rv = torch.zeros(CHANNELS, dtype=wide), torch.ones(CHANNELS, dtype=wide)
        out = F.batch_norm(leaves[0], rm, rv, *parameters, training=True)
        out = out + leaves[1] if adds else out
        out = out if kind is SyncBatchNorm else F.relu(out)
        gs = torch.autograd.grad(out, [*leaves, *parameters], dy.to(wide))
        found = {"y": out[mine], **{f"grad {i}": t[mine] for i, t in enumerate(gs[:-2])}}
        return found | {"dweight": gs[-2], "dbias": gs[-1], "mean": rm, "var": rv}

    found = {"y": y, **{f"grad {i}": t for i, t in enumerate(grads[:-2])}, "dweight": grads[-2], "dbias": grads[-1]}
    found |= {"mean": module.running_mean, "var": module.running_var}
    truth, eps = whole(torch.float64), torch.finfo(dtype).eps
    # The input's mean is 30 deviations: what rounding the input itself would change.
    allowance = {n: 64 * eps * max(1.0, t.abs().max().item() if t.numel() else 0.0) for n, t in truth.items()}
    testing.assert_as_good_as(found, whole(dtype), truth, allowance)
    assert module.num_batches_tracked.item() == 1
    statistics = module.running_mean, module.running_var, module.weight, module.bias
    expected = F.batch_norm(a, *statistics) + (b if adds else 0)
    expected = expected if kind is SyncBatchNorm else F.relu(expected)
    torch.testing.assert_close(module.eval()(*inputs), expected, rtol=1e-4, atol=1e-3)


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
    calls = []
    for name, function in list(vars(dist).items()):
        if name.startswith(
            ("all_", "broadcast", "reduce", "gather", "scatter", "barrier", "send", "recv", "batch_isend")
        ):

            def counted(*arguments, name=name, function=function, **keywords):
                calls.append(name)
                return function(*arguments, **keywords)

            setattr(dist, name, counted)
    module = SyncBatchNormAddReLU(CHANNELS)
    x, r = (torch.randn(2, CHANNELS, 3, 3, requires_grad=True) for _ in range(2))
    for _ in range(2):
        y = module(x, r)
        assert calls == ["all_gather"], calls
        calls.clear()
        y.sum().backward()
        assert calls == ["all_reduce"], calls
        calls.clear()
    module.eval()(x, r).sum().backward()
    assert calls == []


def one_value_over_all_processes_is_refused() -> None:
    module = SyncBatchNormReLU(CHANNELS)
    x = torch.randn(1 if dist.get_rank() == 0 else 0, CHANNELS, 1, 1)
    try:
        module(x)
    except ValueError as error:
        assert "got 1 over all processes" in str(error)  # noqa: PT017
    else:
        raise AssertionError("accepted")
    assert torch.equal(module.running_mean, torch.zeros(CHANNELS))
    assert module.num_batches_tracked.item() == 0


def an_error_leaves_the_statistics() -> None:
    module = SyncBatchNormAddReLU(CHANNELS)
    x = torch.randn(2, CHANNELS, 3, 3)
    try:
        module(x, x[:1])
    except RuntimeError as error:
        assert "residual must have the input's shape" in str(error)  # noqa: PT017
    else:
        raise AssertionError("accepted")
    assert torch.equal(module.running_mean, torch.zeros(CHANNELS))
    assert module.num_batches_tracked.item() == 0


def a_process_that_dies() -> None:
    module = SyncBatchNormReLU(CHANNELS)
    module(torch.randn(2, CHANNELS, 3, 3))
    if dist.get_rank() == 1:
        os._exit(3)
    module(torch.randn(2, CHANNELS, 3, 3))  # an error, not a hang


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    globals()[sys.argv[1]]()
    dist.destroy_process_group()
