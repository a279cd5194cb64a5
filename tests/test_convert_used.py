"""Converted models together with other tools: several processes, mixed precision, averages, quantization, files."""

import copy
import io
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from converted_worker import Net, fused, pair
from torch import nn
from torch.optim import swa_utils

import cnnkern
from tests.child import run_child

WORKER = Path(__file__).with_name("converted_worker.py")
TASKS = ["data_parallel", "data_parallel_that_checkpoints", "data_parallel_that_accumulates", "fully_sharded"]


@pytest.mark.parametrize("task", [*TASKS, "fully_sharded_norm_by_norm", "fully_sharded_by_the_older_way"])
def test_in_two_processes(task):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER), task]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parent.parent)}
    done = run_child(command, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]


def image(step: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(step), dtype=dtype)


def train(model: nn.Module, after: Callable[[], None] = lambda: None, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        model(image(step)).square().mean().backward()
        optimizer.step()
        after()


def assert_same_state(found: nn.Module, expected: nn.Module) -> None:
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-9, atol=1e-9)


def test_a_scaler_and_autocast():
    """Gradients of a step in bfloat16 are about as far from float64's as the original's are."""
    torch.manual_seed(0)
    exact = Net().double()
    plain, converted = copy.deepcopy(exact).float(), cnnkern.convert(copy.deepcopy(exact).float(), inplace=True)
    exact(image(0)).square().mean().backward()
    for model in (plain, converted):
        optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.0), torch.amp.GradScaler("cpu")
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(image(0, torch.float32)).float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() > 0
    assert fused(converted) == {"relu", "silu", "add + relu"}
    off = [float((flat(model) - flat(exact)).norm()) for model in (converted, plain)]
    assert off[0] <= 2 * off[1] + 1e-6 * float(flat(exact).norm())


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])


def averaged(model: nn.Module) -> tuple[nn.Module, Callable[[], None]]:
    average = swa_utils.AveragedModel(model, use_buffers=False)
    return average, lambda: average.update_parameters(model)


def averaged_exponentially(model: nn.Module) -> tuple[nn.Module, Callable[[], None]]:
    average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True)
    return average, lambda: average.update_parameters(model)


def averaged_by_timm(model: nn.Module) -> tuple[nn.Module, Callable[[], None]]:
    average = timm.utils.ModelEmaV3(model, decay=0.9)
    return average, lambda: average.update(model)


@pytest.mark.parametrize("average", [averaged, averaged_exponentially, averaged_by_timm])
def test_averages(average):
    results = []
    for model in pair():
        of, update = average(model)
        train(model, update)
        module = of.module
        if average is averaged:
            swa_utils.update_bn([image(step) for step in range(3)], of)
        results.append(module.eval())
    assert_same_state(results[1], results[0])
    torch.testing.assert_close(results[1](image(9)), results[0](image(9)))
    assert fused(results[1])  # of the copy itself


def test_the_model_is_saved_and_loaded_as_a_whole():
    plain, converted = pair()
    train(converted)
    train(plain)
    file = io.BytesIO()
    torch.save(converted, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for model in (plain, converted, loaded):
        train(model)
    assert_same_state(converted, plain)
    assert_same_state(loaded, plain)
    assert fused(converted) == {"relu", "silu", "add + relu"}


def torch_saves(model: nn.Module, file: str, mmap: bool) -> nn.Module:
    torch.save(model, file)
    return torch.load(file, weights_only=False, mmap=mmap)


def torch_assigned(model: nn.Module, file: str, mmap: bool) -> nn.Module:
    torch.save(model.state_dict(), file)
    loaded = Net().double()
    loaded.load_state_dict(torch.load(file, mmap=mmap), assign=True)  # a state dict that is kept shares the memory
    return loaded


def safetensors_assigned(model: nn.Module, file: str, mmap: bool) -> nn.Module:
    """Each tensor's memory is a part of the file's, always mapped."""
    safetensors.torch.save_file(model.state_dict(), file)
    loaded = Net().double()
    loaded.load_state_dict(safetensors.torch.load_file(file), assign=True)
    return loaded


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("through", [torch_saves, torch_assigned, safetensors_assigned])
def test_weights_from_a_file_fuse(tmp_path, through, mmap):
    """PyTorch did not allocate their memory for the model, or mapped the file to it."""
    torch.manual_seed(0)
    model = Net().double()
    loaded = through(model, str(tmp_path / "weights"), mmap)
    converted = cnnkern.convert(loaded)
    for step in range(2):
        torch.testing.assert_close(converted(image(step)), model(image(step)))
    assert fused(converted) == {"relu", "silu", "add + relu"}
    assert_same_state(converted, model)


class Quantized(nn.Module):
    """What its users write: stubs, and modules where functions would do."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.add = nn.quantized.FloatFunctional()

    def forward(self, x):
        y = self.relu(self.bn(self.conv(self.quant(x))))
        return self.dequant(self.add.add(self.block(y), y))


def prepared(model: nn.Module, fuse: bool) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", UserWarning)
        model.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
        if fuse:
            model = torch.ao.quantization.fuse_modules_qat(
                model, [["conv", "bn", "relu"], ["block.0", "block.1", "block.2"]]
            )
        return torch.ao.quantization.prepare_qat(model)


@pytest.mark.parametrize("fuse", [False, True])
def test_quantization_aware_training(fuse):
    """Prepared, then converted; reverted, then quantized: quantization goes by torch's own classes."""
    torch.manual_seed(0)
    original = prepared(Quantized().train(), fuse)
    results = []
    for model in (copy.deepcopy(original), cnnkern.convert(copy.deepcopy(original), inplace=True)):
        for step in range(2):
            model(image(step, torch.float32)).square().mean().backward()
        results.append([p.grad for p in model.parameters()] + [b.double() for b in model.buffers()])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantized = torch.ao.quantization.convert(cnnkern.revert(model).eval())
            results[-1].append(quantized(image(5, torch.float32)))
    for found, expected in zip(results[1], results[0], strict=True):  # a rounding may move a value to the next of 255
        assert float((found - expected).norm()) <= 1e-2 * max(float(expected.norm()), 1e-3)
