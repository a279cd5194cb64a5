"""The kernel of mobile blocks: 1x1, depthwise and 1x1 convolutions, or two of them. As good as eager in every shape,
and bit-equal to the layers one by one."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.studies import mobile_blocks
from cnnkern import _C, testing
from cnnkern.nn.folded_conv import folded_conv
from tests.test_fold import LAYOUTS
from tests.test_fold_blocks import threads
from tests.test_fold_own import in_nan, new_memory_is_nan

pytestmark = pytest.mark.skipif(_C.cpu_capability() == "DEFAULT", reason="without AVX2 oneDNN computes the layers")

# Inputs (0: no first 1x1), channels between, outputs (0: no last 1x1), size of the kernel, stride, padding.
SHAPES = [
    (3, 16, 5, 3, 1, 1),
    (16, 96, 24, 3, 2, 1),
    (5, 33, 7, 5, 1, 2),
    (24, 40, 24, 5, 2, 2),
    (1, 1, 1, 3, 1, 0),
    (8, 200, 65, 3, 1, 2),
    (7, 20, 9, 5, 1, 4),
    (0, 32, 16, 3, 1, 1),
    (0, 19, 3, 5, 2, 0),
    (4, 24, 0, 3, 2, 1),
    (16, 210, 0, 5, 1, 2),
    (9, 17, 0, 3, 1, 0),
]
SIZES = [(1, 7, 7), (2, 9, 5), (3, 5, 14), (1, 30, 11), (5, 8, 60)]  # N, H, W
ACTIVATIONS = ["relu6", "none", "silu", "relu", "hardswish"]


def act_of(name: str) -> Callable[[Tensor], Tensor]:
    return (lambda t: t) if name == "none" else getattr(F, name)


class Parts:
    """The convolutions of a block, folded with a bias, and the block of them."""

    def __init__(self, inputs: int, channels: int, outputs: int, k: int, stride: int, padding: int, act: str) -> None:
        self.act = act
        self.convs = {
            "expand": nn.Conv2d(inputs, channels, 1) if inputs else None,
            "depthwise": nn.Conv2d(channels, channels, k, stride, padding, groups=channels),
            "project": nn.Conv2d(channels, outputs, 1, bias=outputs % 2 == 0) if outputs else None,
        }
        self.inputs = inputs or channels
        self.folded = {name: conv and self._fold(conv) for name, conv in self.convs.items()}
        self.block = _C.MobileBlock(*self.folded.values(), act)

    @staticmethod
    def _fold(conv: nn.Conv2d) -> _C.FoldedConv:
        return folded_conv(conv, conv.weight.detach(), None if conv.bias is None else conv.bias.detach(), [], own=True)

    def acts(self, last: str) -> list[str]:
        return [self.act] * (sum(conv is not None for conv in self.convs.values()) - 1) + [last]

    def eager(self, x: Tensor, residual: Tensor | None, last: str) -> Tensor:
        convs = [copy.deepcopy(conv).to(x.dtype) for conv in self.convs.values() if conv is not None]
        for conv, act in zip(convs[:-1], self.acts(last), strict=False):
            x = act_of(act)(conv(x))
        y = convs[-1](x)
        return act_of(last)(y if residual is None else y + residual)

    def by_layer(self, x: Tensor, last: str) -> Tensor:
        for layer, act in zip([f for f in self.folded.values() if f is not None], self.acts(last), strict=True):
            x = layer.run(x, act)
        return x


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_good_as_eager_whatever_the_shape(shape):
    """With and without a residual, every layout, images cut into bands or not; memory that nobody wrote is NaN."""
    torch.manual_seed(0)
    with torch.no_grad(), new_memory_is_nan():
        for i, (n, h, w) in enumerate(SIZES):
            parts = Parts(*shape, act=ACTIVATIONS[i])
            last = ACTIVATIONS[(i + 2) % 5]
            plain = torch.randn(n, parts.inputs, h, w)
            y = parts.eager(plain, None, "none")
            strided = torch.randn(n, parts.inputs, h, 2 * w)[..., ::2].flip(2)
            for x in (*(in_nan(plain.to(memory_format=layout)) for layout in LAYOUTS), strided):
                for residual in (None, in_nan(torch.randn_like(y)), torch.randn(y.shape).mT.contiguous().mT):
                    wide = None if residual is None else residual.double()
                    with threads(1 + i % 3):
                        mine = parts.block.run(x, residual, last)
                    testing.assert_as_good_as(
                        {last: mine},
                        {last: parts.eager(x, residual, last)},
                        {last: parts.eager(x.double(), wide, last)},
                    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bit_equal_to_the_layers_with_any_number_of_threads(shape):
    parts = Parts(*shape, act="relu6")
    for n, h, w in SIZES:
        x = torch.randn(n, parts.inputs, h, w)
        expected = parts.by_layer(x, "relu")
        for count in (1, 2, 3, 7):
            with threads(count):
                assert torch.equal(parts.block.run(x, None, "relu"), expected)


def test_nan_passes_and_infinities_stay():
    parts = Parts(1, 4, 2, 3, 1, 1, act="relu6")
    values = torch.tensor([float("inf"), -float("inf"), 1.0, float("nan"), 9.0]).repeat(5, 1).view(1, 1, 5, 5)
    torch.testing.assert_close(
        parts.block.run(values, None, "none"), parts.eager(values, None, "none"), equal_nan=True, rtol=1e-5, atol=1e-5
    )


def test_the_rule():
    """Bands cost rows that are expanded twice; with as many images as threads there are none."""

    def faster(shape: tuple[int, ...], n: int, side: int, count: int) -> bool:
        parts = Parts(*shape, act="relu")
        with threads(count):
            return parts.block.is_faster(torch.empty(n, parts.inputs, side, side))

    triple, pair, wide = (8, 16, 8, 3, 1, 1), (8, 16, 0, 3, 1, 1), (8, 16, 0, 5, 1, 2)
    for count in (1, 2, 4):
        for side in (7, 14, 56):
            assert faster(triple, count, side, count)
            assert faster(pair, count, side, count)
    assert faster(triple, 1, 56, 2)
    assert faster(triple, 1, 14, 2)
    assert not faster(triple, 1, 7, 2)
    assert not faster(triple, 1, 56, 16)
    assert not faster(pair, 1, 56, 2)
    assert faster(wide, 1, 14, 1)
    assert not faster(wide, 16, 7, 1)
    assert faster((0, 16, 8, 3, 1, 1), 1, 112, 2)


def test_the_study_runs(capsys):
    assert mobile_blocks.main(["mobilenet_v2", "--batch", "1", "--seconds", "0.001"]) == 0
    assert capsys.readouterr().out.count("| block") >= 3
