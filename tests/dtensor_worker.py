"""The program that tests/test_dtensor.py runs in each of two processes: `torchrun ... dtensor_worker.py TASK`."""

import copy
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from gloo import run_task
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

import cnnkern
from cnnkern.nn import (
    AddReLU,
    BatchNorm2d,
    BatchNormAddReLU2d,
    BatchNormReLU2d,
    GroupedConv1d,
    GroupedConv2d,
    GroupedConv3d,
    LayerNorm,
    LayerNorm2d,
)

ROWS, IMAGES = (4, 6, 8), (4, 8, 6, 6)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LayerNorm": (lambda: LayerNorm(8), ROWS),
    "LayerNorm over two dimensions": (lambda: LayerNorm((6, 8)), ROWS),
    "LayerNorm without a bias": (lambda: LayerNorm(8, bias=False), ROWS),
    "LayerNorm without parameters": (lambda: LayerNorm(8, elementwise_affine=False), ROWS),
    "LayerNorm over two dimensions without parameters": (lambda: LayerNorm((6, 8), elementwise_affine=False), ROWS),
    "LayerNorm of shards of two sizes": (lambda: LayerNorm(8), (5, 3, 8)),
    "LayerNorm2d": (lambda: LayerNorm2d(8), IMAGES),
    "GroupedConv1d": (lambda: GroupedConv1d(8, 8, 3, padding=1, groups=4), (4, 8, 6)),
    "GroupedConv1d with a stride": (lambda: GroupedConv1d(8, 16, 2, 2, groups=4, bias=False), (4, 8, 6)),
    "GroupedConv2d": (lambda: GroupedConv2d(8, 8, 3, padding=1, groups=4), IMAGES),
    "GroupedConv2d with a stride": (lambda: GroupedConv2d(8, 16, 2, 2, groups=4, bias=False), IMAGES),
    "GroupedConv2d with another stride": (lambda: GroupedConv2d(8, 16, 2, 3, groups=4, bias=False), IMAGES),
    "GroupedConv3d": (lambda: GroupedConv3d(8, 8, 3, padding=1, groups=4), (4, 8, 3, 5, 6)),
    "BatchNorm2d": (lambda: BatchNorm2d(8), IMAGES),
    "BatchNormReLU2d": (lambda: BatchNormReLU2d(8), IMAGES),
    "BatchNormAddReLU2d": (lambda: BatchNormAddReLU2d(8), IMAGES),
    "AddReLU": (AddReLU, IMAGES),
    "MaxPool2d": (lambda: cnnkern.nn.MaxPool2d(3, 2, 1), IMAGES),
}


class Called(TorchDispatchMode):
    """The operators that the processes' own tensors meet."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    module = LAYERS[name][0]()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    return module.double()


def every_layer_is_the_layer_of_one_process() -> None:
    """Forward, gradients and buffers, with inputs replicated and sharded in every dimension."""
    for name, (_, shape) in LAYERS.items():
        g = torch.Generator().manual_seed(1)
        inputs = [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(1 + ("Add" in name))]
        for training in (True, False) if "BatchNorm" in name else (True,):
            for placement in (Replicate(), *(Shard(d) for d in range(len(shape)))):
                compare(name, training, placement, inputs)


def compare(name: str, training: bool, placement: Placement, whole: list[Tensor]) -> None:
    label = f"{name}, {placement}, {'training' if training else 'eval'}"
    alone, sharded = made(name).train(training), made(name).train(training)
    inputs = [t.clone().requires_grad_() for t in whole]
    expected = alone(*inputs)
    dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected.backward(dy)

    # With the channels, their vectors: PyTorch loses the update of running statistics that it had to take apart.
    along = [Shard(0)] if "BatchNorm" in name and placement == Shard(1) else [Replicate()]

    def distribute(_, module: nn.Module, mesh: DeviceMesh) -> None:
        for held in (module._parameters, module._buffers):
            for n, t in held.items():
                if t is not None:
                    d = distribute_tensor(t, mesh, along if t.dim() else [Replicate()])
                    held[n] = nn.Parameter(d) if held is module._parameters else d

    distribute_module(sharded, mesh(), distribute)
    parts = [distribute_tensor(t, mesh(), [placement]).requires_grad_() for t in whole]
    with Called() as called:
        y = sharded(*parts)
        y.backward(distribute_tensor(dy, mesh(), y.placements))

    of_rows = name.startswith("Layer")
    ours = {n.removeprefix("cnnkern::") for n in called.names if n.startswith("cnnkern::")}
    if of_rows or "Conv" in name:
        operator = "layer_norm2d" if "2d" in name and of_rows else "layer_norm" if of_rows else "grouped_conv2d"
        assert ours == {operator, f"{operator}_backward"}, (label, ours)
    elif "Pool" in name:
        assert ours == {"max_pool2d", "max_pool2d_backward"}, (label, ours)
    else:
        assert not ours, (label, ours)
    independent = (0,) if "Conv" in name or "two dimensions" in name else (0, 2, 3) if "2d" in name else (0, 1)
    if "Pool" in name:
        independent = (0, 1)
    if ours and isinstance(placement, Shard) and placement.dim in independent:
        assert y.placements == (placement,), (label, y.placements)
        assert not any("all_gather" in n or "all_reduce" in n for n in called.names), (label, called.names)
    found = [y, *(p.grad for p in parts), *(p.grad for p in sharded.parameters()), *sharded.buffers()]
    truth = [expected, *(t.grad for t in inputs), *(p.grad for p in alone.parameters()), *alone.buffers()]
    for mine, theirs in zip(found, truth, strict=True):
        # Sums over shards are sums in another order.
        torch.testing.assert_close(mine.full_tensor(), theirs, rtol=1e-10, atol=1e-10, msg=lambda m: f"{label}: {m}")


class Block(nn.Module):
    """The parts of a transformer's block that tensor parallelism takes apart."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x))))


def sequence_parallel_layer_norms() -> None:
    """A converted model under `parallelize_module`, its layer norms on shards of the sequence."""
    torch.manual_seed(0)
    original = nn.Sequential(Block(), Block()).double()
    sharded = cnnkern.convert(copy.deepcopy(original))
    assert sum(type(m) is LayerNorm for m in sharded.modules()) == 2
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    expected = original(x)
    expected.square().sum().backward()
    plan = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    }
    for block in sharded:
        parallelize_module(block, mesh(), plan)
    with Called() as called:
        y = sharded(distribute_tensor(x, mesh(), [Shard(1)]))
        y.full_tensor().square().sum().backward()
    assert {"cnnkern::layer_norm", "cnnkern::layer_norm_backward"} <= called.names, called.names
    assert y.placements == (Shard(1),)
    torch.testing.assert_close(y.full_tensor(), expected)
    for mine, theirs in zip(sharded.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad)


def fully_sharded_parameters() -> None:
    """FSDP's parameters are DTensors outside of the layers' forward passes, and plain tensors within."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.BatchNorm2d(8)
    original = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.LayerNorm(8 * 16)).double()
    sharded = cnnkern.convert(copy.deepcopy(original))
    fully_shard(sharded, mesh=mesh())
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    for _ in range(2):
        with Called() as called:
            sharded(x).square().mean().backward()
        original(x).square().mean().backward()
    assert {"cnnkern::bn_act", "cnnkern::grouped_conv2d", "cnnkern::layer_norm"} <= called.names
    for mine, theirs in zip(sharded.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad)
    torch.testing.assert_close(dict(sharded.named_buffers()), dict(original.named_buffers()))


if __name__ == "__main__":
    run_task(globals())
