"""What a converted or folded model returns: values that do not change with its inputs any more. A folded model's have
the original's strides where the layout is ambiguous."""

import copy
import io
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import cnnkern
from tests.test_fold import randomised
from tests.test_fold_blocks import Inverted


class Residual(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolution": (lambda: nn.Conv2d(6, 6, 1), (2, 6, 9, 9)),
    "a sum": (lambda: Residual(nn.Conv2d(6, 6, 3, padding=1)), (2, 6, 9, 9)),
    "a sum of linear": (lambda: Residual(nn.Linear(6, 6)), (4, 6)),
    "batch norm": (lambda: nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)), (2, 6, 9, 9)),
    "activation": (lambda: nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU6()), (2, 6, 9, 9)),
    "block": (Inverted, (2, 6, 9, 9)),
}


HOW = [cnnkern.convert, cnnkern.fold]


@pytest.mark.parametrize("how", HOW, ids=lambda f: f.__name__)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
@pytest.mark.parametrize("kind", MODELS)
def test_another_thread_reuses_the_input(kind, mode, how):
    make, shape = MODELS[kind]
    model = randomised(make())
    ours = how(model)
    for _ in range(3):
        with mode():
            x = torch.randn(shape)
            expected = model(x).clone()
            found: list[Tensor] = []

            def work(x: Tensor = x, found: list[Tensor] = found) -> None:
                with mode():
                    found.append(ours(x))

            worker = threading.Thread(target=work)
            worker.start()
            worker.join()
            x.zero_()
            torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", HOW, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", MODELS)
def test_memory_that_other_processes_write(kind, how):
    """Writes that are no operators of this process: here through a raw pointer."""
    make, shape = MODELS[kind]
    model = randomised(make())
    ours = how(model)
    memory = bytearray(4 * torch.Size(shape).numel())
    for _ in range(3):
        x = torch.frombuffer(memory, dtype=torch.float32).view(shape)
        with torch.no_grad():
            x.copy_(torch.randn(shape))
            expected = model(x).clone()
            y = ours(x)
        memory[:] = bytes(len(memory))
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


class Kept(nn.Module):
    """Returns a result that was fused with what used it, in addition to that."""

    def __init__(self, activated: bool) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.activated = activated

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(x)
        if self.activated:
            y = y.relu()
            return self.conv(y), y
        return y.relu(), y


@pytest.mark.parametrize("activated", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_what_was_fused_and_is_returned_too(training, activated):
    model = randomised(Kept(activated)).to(memory_format=torch.channels_last).train(training)
    ours = cnnkern.convert(copy.deepcopy(model))
    for _ in range(3):
        x = torch.randn(4, 32, 64, 64).to(memory_format=torch.channels_last)
        expected = [t.detach().clone() for t in model(x)]
        with torch.set_grad_enabled(training):
            found = ours(x)
        torch.from_dlpack(x).zero_()  # by no operator that gets x
        torch.testing.assert_close([t.detach() for t in found], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", HOW, ids=lambda f: f.__name__)
def test_the_hook_that_computes_it_is_copied_and_removed(how):
    model = randomised(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    ours = how(model)
    assert len(ours._forward_hooks) == 1
    saved = io.BytesIO()
    torch.save(ours, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(saved, weights_only=False),
        how(ours),
    ):
        assert len(other._forward_hooks) == 1
        x = torch.randn(2, 3, 5, 5)
        with torch.no_grad():
            expected, y = model(x), other(x)
            x.zero_()
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert not cnnkern.revert(ours)._forward_hooks
    assert not model._forward_hooks
    assert not how(nn.Sequential(nn.ReLU()).eval())._forward_hooks


def test_a_single_converted_layer_stays_deferred():
    """Something of the model that it is part of may be fused with it."""
    norm = cnnkern.convert(nn.BatchNorm2d(3).eval())
    assert not norm._forward_hooks
    with torch.no_grad():
        torch.relu(norm(torch.randn(2, 3, 5, 5)))
    assert cnnkern.conversion_report(norm).counts == {"BatchNorm + ReLU": 1}


def test_strides_where_the_layout_is_ambiguous():
    images = [
        torch.randn(2, 1, 28, 28).to(memory_format=torch.channels_last),
        torch.randn(2, 1, 28, 28),
        torch.randn(1, 16, 20, 1).as_strided((1, 16, 20, 1), (320, 1, 16, 1)),
        torch.randn(2, 8, 1, 1),
        torch.randn(2, 8, 1, 1).to(memory_format=torch.channels_last),
    ]
    for x in images:
        for k in (1, 3):
            for layout in (torch.contiguous_format, torch.channels_last):
                model = nn.Sequential(nn.Conv2d(x.shape[1], 8, k, padding=k // 2), nn.BatchNorm2d(8), nn.ReLU())
                randomised(model).to(memory_format=layout)
                folded = cnnkern.fold(model)
                with torch.no_grad():
                    for _ in range(2):
                        assert folded(x).stride() == model(x).stride(), (x.shape, x.stride(), k, layout)
