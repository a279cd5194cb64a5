"""Folded 1x1 and depthwise convolutions on cnnkern's kernels: which ones, and that they are as good as eager's."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnnkern
from cnnkern import _C, testing
from cnnkern.nn.folded_conv import folded_conv, prefers_own
from tests.test_fold import LAYOUTS, judged, randomised

pytestmark = pytest.mark.skipif(_C.cpu_capability() == "DEFAULT", reason="without AVX2 oneDNN computes them all")

POINTWISE = [  # inputs, outputs, stride: whole vectors and not, one panel of weights and several
    (1, 1, 1),
    (3, 5, 1),
    (16, 24, 2),
    (24, 16, 1),
    (33, 47, 3),
    (40, 64, 1),
    (96, 130, 2),
    (17, 300, 1),
]
DEPTHWISE = [  # channels, size of the kernel, stride, padding
    (1, 3, 1, 1),
    (5, 3, 2, 1),
    (16, 3, 1, 0),
    (24, 5, 1, 2),
    (33, 5, 2, 2),
    (200, 3, 1, 1),
    (8, 3, 2, 2),
    (8, 5, 1, 4),
    (400, 5, 2, 0),
]
CONVOLUTIONS = [
    *(nn.Conv2d(i, o, 1, s, bias=o % 2 == 0) for i, o, s in POINTWISE),
    *(nn.Conv2d(c, c, k, s, p, groups=c, bias=c % 2 == 0) for c, k, s, p in DEPTHWISE),
]
SIZES = [(1, 7, 7), (2, 9, 5), (3, 5, 14), (1, 28, 28)]  # N, H, W
ACTIVATIONS = ["none", "relu", "relu6", "silu", "hardswish", "sigmoid", "hardsigmoid", "gelu", "mish"]


def eager(conv: nn.Conv2d, x: Tensor, act: str) -> Tensor:
    y = conv(x)
    return y if act == "none" else getattr(F, act)(y)


@contextmanager
def new_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def in_nan(x: Tensor) -> Tensor:
    """x in the middle of memory that is NaN."""
    around = 64
    memory = torch.full((x.numel() + 2 * around,), float("nan"))
    view = memory[around : around + x.numel()].as_strided(x.shape, x.stride())
    return view.copy_(x)


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_they_are_as_good_as_eager_whatever_the_shape(conv):
    """Each size, layout and activation is met, none of them by each of the others; memory that nobody wrote is NaN."""
    torch.manual_seed(0)
    ours = folded_conv(conv, conv.weight.detach(), None if conv.bias is None else conv.bias.detach(), [], own=True)
    exact = copy.deepcopy(conv).double()
    with torch.no_grad(), new_memory_is_nan():
        for i, (n, h, w) in enumerate(SIZES):
            plain = torch.randn(n, conv.in_channels, h, w)
            assert prefers_own(conv, torch.float32, plain.shape)
            strided = torch.randn(n, conv.in_channels, h, 2 * w)[..., ::2].flip(2)
            for x in (*(in_nan(plain.to(memory_format=layout)) for layout in LAYOUTS), strided):
                for act in ACTIVATIONS[i::3]:
                    testing.assert_as_good_as(
                        {act: ours.run(x, act)}, {act: eager(conv, x, act)}, {act: eager(exact, x.double(), act)}
                    )


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_do_not_depend_on_threads(threads):
    before = torch.get_num_threads()
    for conv in (nn.Conv2d(96, 320, 1), nn.Conv2d(160, 160, 3, padding=1, groups=160)):
        ours = folded_conv(conv, conv.weight.detach(), conv.bias.detach(), [], own=True)
        x = torch.randn(2, conv.in_channels, 20, 20)
        expected = ours.run(x, "relu")
        try:
            torch.set_num_threads(threads)
            assert torch.equal(ours.run(x, "relu"), expected)
        finally:
            torch.set_num_threads(before)


class Residual(nn.Module):
    """A convolution and its batch norm, the input added, and what is behind the sum."""

    def __init__(self, conv: nn.Conv2d, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.act = conv, nn.BatchNorm2d(conv.out_channels), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)) + x)


@pytest.mark.parametrize(
    "act", [nn.Identity(), nn.ReLU(), nn.ReLU6(), nn.Hardswish(), nn.PReLU(), nn.PReLU(21)], ids=str
)
@pytest.mark.parametrize("groups", [1, 21])
def test_additions(groups, act):
    torch.manual_seed(0)
    k = 1 if groups == 1 else 3
    model = randomised(Residual(nn.Conv2d(21, 21, k, padding=k // 2, groups=groups, bias=False), copy.deepcopy(act)))
    for shape in ((1, 21, 7, 7), (3, 21, 5, 9)):
        judged(cnnkern.fold(model), model, torch.randn(shape), layouts=LAYOUTS)


def test_nan_passes_and_infinities_stay():
    """In oneDNN's kernels a fused ReLU makes 0 of NaN (tests/test_fold.py): so these are ours."""
    values = torch.tensor([float("inf"), -float("inf"), 1.0, float("nan"), 9.0]).view(1, 1, 1, 5)
    for conv in (nn.Conv2d(1, 2, 1), nn.Conv2d(1, 1, 3, padding=(1, 1))):
        for act in (nn.ReLU(), nn.ReLU6(), nn.Identity()):
            model = randomised(nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), act))
            with torch.no_grad():
                torch.testing.assert_close(cnnkern.fold(model)(values), model(values), equal_nan=True)


def test_weights_of_other_shapes_than_the_layer_says():
    """PyTorch's convolutions compute with the weight that there is."""
    for conv, shape in (
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), (16, 1, 3, 3)),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), (8, 1, 5, 5)),
        (nn.Conv2d(8, 16, 1), (16, 8, 3, 3)),
        (nn.Conv2d(8, 16, 3), (24, 8, 1, 1)),
    ):
        conv.weight, conv.bias = nn.Parameter(torch.randn(shape)), None
        model = nn.Sequential(conv, nn.ReLU()).eval()
        judged(cnnkern.fold(model), model, torch.randn(2, 8, 9, 7))


def test_the_rule():
    def own(conv: nn.Module, *shape: int, dtype: torch.dtype = torch.float32) -> bool:
        return prefers_own(conv, dtype, (shape[0], conv.in_channels, *shape[1:]))

    pointwise, depthwise = nn.Conv2d(8, 16, 1), nn.Conv2d(64, 64, 3, padding=1, groups=64)
    assert own(pointwise, 1, 64, 64)
    assert own(pointwise, 4, 32, 32)
    assert not own(pointwise, 1, 64, 65)
    assert own(nn.Conv2d(8, 16, 1, stride=2), 1, 128, 128)
    assert own(depthwise, 1, 64, 64)
    assert not own(depthwise, 2, 64, 64)
    for shape in ((1, 7, 7), (1, 64, 64)):
        assert not own(pointwise, *shape, dtype=torch.bfloat16)
    for conv in (
        nn.Conv2d(8, 16, 1, padding=1),
        nn.Conv2d(8, 16, 1, stride=(1, 2)),
        nn.Conv2d(8, 16, 3),
        nn.Conv2d(32, 32, 1, groups=2),
        nn.Conv2d(8, 16, 3, groups=8),
        nn.Conv2d(8, 8, 7, groups=8),
        nn.Conv2d(8, 8, 3, groups=8, dilation=2),
        nn.Conv2d(8, 8, 3, groups=8, stride=3),
        nn.Conv2d(8, 8, 3, groups=8, padding=3),
        nn.Conv2d(8, 8, 3, groups=8, padding=(1, 0)),
        nn.Conv2d(8, 8, 3, groups=8, padding=1, padding_mode="reflect"),
    ):
        assert not own(conv, 1, 14, 14), conv
