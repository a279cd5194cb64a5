"""bn_act_conv2d: batch norm, activation and grouped convolution, which computes the others as it reads its input. How
converted models use it: test_prologue.py."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cnnkern
from cnnkern import testing

pytestmark = pytest.mark.skipif(not cnnkern.extension.extension, reason="the operator is the extension's")
ops = torch.ops.cnnkern
LAYOUTS = ("contiguous", "channels_last")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Shape, width, kernel, stride, padding: depthwise kernels that read where x lies and in tiles, ragged channels, narrow
# and wide groups, rows without padding, an image that is smaller than the kernel.
SHAPES = {
    "depthwise 3x3": ((2, 40, 11, 13), 1, 3, 1, 1),
    "depthwise 3x3, many channels": ((1, 400, 9, 20), 1, 3, 1, 1),
    "depthwise 3x3, stride 2": ((3, 37, 14, 9), 1, 3, 2, 1),
    "depthwise 3x3, no padding": ((2, 33, 7, 8), 1, 3, 1, 0),
    "depthwise 5x5, stride 2": ((2, 24, 15, 12), 1, 5, 2, 2),
    "depthwise 7x7, small": ((2, 20, 4, 5), 1, 7, 1, 3),
    "width 4": ((2, 32, 9, 10), 4, 3, 1, 1),
    "width 8, stride 2": ((2, 64, 10, 9), 8, 3, 2, 1),
    "width 16": ((1, 64, 30, 30), 16, 3, 1, 1),
}


class Arguments:
    """Of the operators, for a shape; what is `norm`'s comes before what is the convolution's."""

    def __init__(self, shape, dtype: torch.dtype, layout: str, seed: int = 0) -> None:
        size, width, k, stride, padding = shape
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: testing.randn(shape, generator, dtype)  # noqa: E731
        channels = size[1]
        vector = torch.float64 if dtype == torch.float64 else torch.float32
        self.x = testing.with_layout(draw(*size) * 3 + 1, layout)
        self.kernel, self.kernel_bias = draw(channels, width, k, k), draw(channels)
        self.weight, self.bias = draw(channels).to(vector), draw(channels).to(vector)
        self.statistics = (draw(channels).to(vector), draw(channels).to(vector).abs() + 0.5)
        self.settings = ([stride] * 2, [padding] * 2, [1, 1], channels // width)

    def apart(self, training: bool, act: str) -> tuple[Tensor, ...]:
        """y, mean, rstd, what the convolution read."""
        norm = (self.weight, self.bias, *self.statistics, training, 0.1, 1e-5, act)
        a, mean, rstd = ops.bn_act(self.x, *norm)
        return ops.grouped_conv2d(a, self.kernel, self.kernel_bias, *self.settings), mean, rstd, a

    def fused(self, training: bool, act: str) -> tuple[Tensor, ...]:
        norm = (self.weight, self.bias, *self.statistics, training, 0.1, 1e-5, act, None)
        return ops.bn_act_conv2d(self.x, *norm, self.kernel, self.kernel_bias, *self.settings)


def assert_equal(found: Tensor, expected: Tensor, name: str = "") -> None:
    assert torch.equal(found, expected), name
    assert found.stride() == expected.stride(), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_operator_equals_its_parts(shape, dtype, layout):
    for act, training in itertools.product(("none", "relu", "relu6", "silu", "sigmoid"), (True, False)):
        apart, fused = (Arguments(SHAPES[shape], dtype, layout) for _ in range(2))
        y, mean, rstd, a = apart.apart(training, act)
        for name, found, expected in zip(
            ("y", "mean", "rstd"), fused.fused(training, act), (y, mean, rstd), strict=True
        ):
            assert_equal(found, expected, f"{name} {act} {training}")
        for found, expected in zip(fused.statistics, apart.statistics, strict=True):
            assert_equal(found, expected)
        dy = testing.with_layout(testing.randn(y.shape, torch.Generator().manual_seed(1), dtype), layout)
        for mask in ([True, True, True], [True, False, False], [False, True, False], [False, False, True]):
            expected = ops.grouped_conv2d_backward(dy, a, apart.kernel, *apart.settings, mask)
            norm = (fused.x, fused.weight, fused.bias, mean, rstd, training, act, None)
            gradients = ops.bn_act_conv2d_backward(dy, *norm, fused.kernel, *fused.settings, mask)
            for found, gradient in zip(gradients, expected, strict=True):
                assert_equal(found, gradient, f"{act} {training} {mask}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operator_follows_its_reference(layout):
    """In float64, PyTorch's operators: within the rounding of float32."""
    given = Arguments(SHAPES["depthwise 3x3"], torch.float32, layout)
    y = given.fused(True, "relu6")[0]
    wide = Arguments(SHAPES["depthwise 3x3"], torch.float32, layout)
    a = F.relu6(F.batch_norm(wide.x.double(), None, None, wide.weight.double(), wide.bias.double(), True))
    stride, padding, dilation, groups = wide.settings
    expected = F.conv2d(a, wide.kernel.double(), wide.kernel_bias.double(), stride, padding, dilation, groups)
    # Nine products and a bias are summed. The batch norm subtracts, multiplies and adds numbers of up to 8.
    sums = F.conv2d(
        a + 8, wide.kernel.double().abs(), wide.kernel_bias.double().abs(), stride, padding, dilation, groups
    )
    assert wide.x.abs().max() < 64
    assert bool(((y.double() - expected).abs() <= 12 * torch.finfo(torch.float32).eps * sums).all())


@pytest.mark.parametrize("threads", [1, 3])
def test_results_do_not_depend_on_threads(threads):
    before = torch.get_num_threads()
    for shape, layout in itertools.product(SHAPES.values(), LAYOUTS):
        expected = Arguments(shape, torch.float32, layout).fused(True, "relu")[0]
        torch.set_num_threads(threads)
        try:
            assert_equal(Arguments(shape, torch.float32, layout).fused(True, "relu")[0], expected)
        finally:
            torch.set_num_threads(before)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # opcheck reads it of its copies
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(dtype, training):
    given = Arguments(((2, 8, 5, 6), 1, 3, 1, 1), dtype, "channels_last")
    for t in (given.x, given.weight, given.bias, given.kernel, given.kernel_bias):
        t.requires_grad_()
    norm = (given.weight, given.bias, *given.statistics, training, 0.1, 1e-5, "relu", None)
    torch.library.opcheck(ops.bn_act_conv2d.default, (given.x, *norm, given.kernel, given.kernel_bias, *given.settings))
    y, mean, rstd = given.fused(training, "relu")
    norm = (given.x, given.weight, given.bias, mean.detach(), rstd.detach(), training, "relu", None)
    gradient = (torch.randn_like(y), *norm, given.kernel, *given.settings, [True, True, True])
    torch.library.opcheck(ops.bn_act_conv2d_backward.default, gradient)


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(training):
    given = Arguments(((2, 4, 4, 3), 2, 3, 1, 1), torch.float64, "contiguous")
    inputs = (given.x, given.weight, given.bias, given.kernel, given.kernel_bias)

    def function(x, weight, bias, kernel, kernel_bias):
        statistics = tuple(t.clone() for t in given.statistics)
        norm = (weight, bias, *statistics, training, 0.1, 1e-5, "silu", None)
        return ops.bn_act_conv2d(x, *norm, kernel, kernel_bias, *given.settings)[0]

    inputs = tuple(t.requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize(("argument", "value", "message"), [(7, "relu7", "act must be one of"), (6, -1.0, "eps")])
def test_bad_arguments_name_the_operator(argument, value, message):
    given = Arguments(SHAPES["depthwise 3x3"], torch.float32, "contiguous")
    norm = [given.weight, given.bias, *given.statistics, True, 0.1, 1e-5, "relu", None]
    norm[argument] = value
    with pytest.raises((ValueError, RuntimeError), match=f"bn_act_conv2d.*{message}"):
        ops.bn_act_conv2d(given.x, *norm, given.kernel, given.kernel_bias, *given.settings)
