"""What tests/test_sync.py starts in each process for converted models: `torchrun ... sync_converted_worker.py TASK`."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from gloo import run_task
from sync_layers import Converted, converted_add_relu, converted_silu, drawn, of_this_process
from torch import Tensor, nn

import cnnkern
from cnnkern import testing


def its_activation_and_its_addition_are_in_its_kernels() -> None:
    """One collective each way."""
    collectives = {"_c10d_functional::all_gather_into_tensor": 1, "_c10d_functional::all_reduce": 1}
    collectives |= {"_c10d_functional::wait_tensor": 2}
    ours = {"sync_bn_stats": 1, "sync_bn_sums": 1}
    for kind, operators in (
        (converted_silu, {"bn_act": 1, "sync_bn_backward": 1}),
        (converted_add_relu, {"bn_add_act": 1, "sync_bn_backward": 2}),
    ):  # the residual's first
        module, tensors = drawn(kind, torch.float32)
        x, dy, *residual = (of_this_process(t) for t in tensors)
        inputs = [t.requires_grad_() for t in (x, *residual)]
        with torch.profiler.profile() as found:
            module(*inputs).backward(dy)
        events = {e.key: e.count for e in found.key_averages()}
        expected = ours | operators
        assert {n.removeprefix("cnnkern::"): c for n, c in events.items() if n.startswith("cnnkern::")} == expected
        assert {n: c for n, c in events.items() if n.startswith(("_c10d_functional::", "c10d::"))} == collectives
        assert not {"aten::relu", "aten::silu", "aten::silu_backward", "aten::threshold_backward"} & set(events)


class Block(nn.Module):
    """Two branches, of which each process uses the batch norms' results in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.first, self.second, self.third = (nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x: Tensor, rank: int) -> Tensor:
        y, z = self.first(self.conv(x)), self.second(self.other(x))
        if rank == 0:
            y = F.relu(y + z)
        else:
            y, z = y * 1, z.clone()  # as they are
            y = (y + z).clamp(min=0)
        total = self.third(y) + x
        return F.silu(total) if rank == 0 else total * torch.sigmoid(total)


def processes_may_use_its_result_in_different_ways() -> None:
    """Collectives are where they are whatever was fused: their order is the same in all processes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(2)
    x = testing.randn((2 * world, 4, 5, 6), generator, torch.float64)
    mine = slice(2 * rank, 2 * rank + 2)
    torch.manual_seed(1)
    model = Block().double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(testing.randn(p.shape, generator, p.dtype))
    converted = cnnkern.nn.convert_sync_batchnorm(cnnkern.convert(model.__class__().double()))
    converted.load_state_dict(model.state_dict())
    for training in (True, True, False):
        model.train(training), converted.train(training)
        given, whole = x[mine].clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = converted(given, rank), model(whole, 1)
        torch.testing.assert_close(y, expected[mine], rtol=1e-9, atol=1e-9)
        (dx, *found) = torch.autograd.grad(y.square().sum(), [given, *converted.parameters()])
        (dwhole, *grads) = torch.autograd.grad(expected.square().sum(), [whole, *model.parameters()])
        for g in found:
            dist.all_reduce(g)
        torch.testing.assert_close([dx, *found], [dwhole[mine], *grads], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(converted.state_dict(), model.state_dict(), rtol=1e-9, atol=1e-9)
    counts = cnnkern.conversion_report(converted).counts
    assert counts == (
        {"BatchNorm + add + ReLU": 1, "BatchNorm": 1, "BatchNorm + add + SiLU": 1} if rank == 0 else counts
    )


def frozen_parts_ask_for_no_collective() -> None:
    """An input without a gradient: those of weight and bias are sums of this process's own."""
    module, (x, dy) = drawn(converted_silu, torch.float64)
    plain = Converted(5, dtype=torch.float64)
    assert plain.act == "none"
    x, dy = of_this_process(x), of_this_process(dy)
    with torch.profiler.profile() as found:
        module(x).backward(dy)
    assert not any("all_reduce" in e.key for e in found.key_averages())
    y = module(x.requires_grad_())
    expected = torch.autograd.grad(y, [module.weight, module.bias], dy)
    torch.testing.assert_close([module.weight.grad, module.bias.grad], list(expected))


if __name__ == "__main__":
    run_task(globals())
