"""Max pooling beside PyTorch's, bit for bit: ties, NaN, minus infinity, every setting, and what is dispatched to
PyTorch."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import cnnkern
from cnnkern import functional, testing
from cnnkern.ops import max_pool2d
from tests.slow import proved

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "sliced")


@pytest.fixture(params=["cpu", "emulator", "eager"])
def answering(request):
    """Whose kernels answer for CPU tensors."""
    if request.param == "emulator":
        import emulator

        with emulator.Emulator("float32"):
            yield "emulator"
    else:
        yield request.param


def both(x: torch.Tensor, *settings, function, **named) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(y, dx), ours and PyTorch's, of a dy of integers: sums of a window's are exact in every order and type."""
    results = []
    for pool in (function, F.max_pool2d):
        leaf = x.detach().requires_grad_()
        y = pool(leaf, *settings, **named)
        dy = torch.arange(1, y.numel() + 1).view(y.shape)
        dy = (dy * 7 % 11 % 2 if x.dtype.itemsize == 2 else dy).to(x.dtype)
        results.append((y.detach(), torch.autograd.grad(y, leaf, dy)[0]))
    return results


def assert_same(x: torch.Tensor, *settings, function=functional.max_pool2d, **named) -> None:
    (y, dx), (eager_y, eager_dx) = both(x, *settings, function=function, **named)
    for ours, eager in ((y, eager_y), (dx, eager_dx)):
        assert ours.dtype == eager.dtype
        assert ours.stride() == eager.stride()
    torch.testing.assert_close(y, eager_y, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(dx, eager_dx)


def by_operators(operators):
    """max_pool2d and its gradient as these launchers compute them, with the same signature as F.max_pool2d."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, kernel, stride, padding, ceil_mode):
            y, positions = operators["max_pool2d"](x, kernel, stride, padding, ceil_mode)
            ctx.save_for_backward(positions)
            ctx.settings = (x.shape[2:], kernel, stride, padding)
            ctx.channels_last = torch._prims_common.suggest_memory_format(x) == torch.channels_last
            return y

        @staticmethod
        def backward(ctx, dy):
            (positions,) = ctx.saved_tensors
            dx = operators["max_pool2d_backward"](dy, positions, *ctx.settings, ctx.channels_last)
            return dx, None, None, None, None

    def pool(x, kernel, stride=None, padding=0, ceil_mode=False):
        pair = lambda v: (v, v) if isinstance(v, int) else v  # noqa: E731
        return Function.apply(x, pair(kernel), pair(kernel if stride is None else stride), pair(padding), ceil_mode)

    return pool


def function_of(answering: str):
    return by_operators(cnnkern.eager.LAUNCHERS) if answering == "eager" else functional.max_pool2d


KINDS = ("ties", "nan", "minus infinity", "zeros of both signs")


def hard(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    x = torch.randint(-2, 3, shape, generator=generator).float()
    chance = torch.rand(shape, generator=generator)
    if kind == "nan":
        x[chance < 0.2] = float("nan")
    if kind == "minus infinity":
        x[chance < 0.9] = float("-inf")
    if kind == "zeros of both signs":
        x = torch.where(chance < 0.5, 0.0, -0.0)
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_maxima_are_pytorchs_whatever_is_in_a_window_minus_infinity_too(kind, answering, generator):
    for layout, (kernel, stride, padding) in itertools.product(
        LAYOUTS, ((3, 2, 1), (2, 2, 0), (2, 2, 1), (3, 1, 1), (5, 3, 2))
    ):
        for shape in ((2, 8, 9, 11), (1, 3, 40, 41), (2, 5, 12, 80)):
            x = testing.with_layout(hard(kind, shape, generator), layout)
            assert_same(x, kernel, stride, padding, function=function_of(answering))


def test_the_sign_of_a_zero_is_that_of_the_first(answering, generator):
    x = hard("zeros of both signs", (2, 8, 12, 40), generator)
    for layout in LAYOUTS[:2]:
        placed = testing.with_layout(x, layout)
        y, eager = (pool(placed, 3, 2, 1) for pool in (function_of(answering), F.max_pool2d))
        assert torch.equal(y.signbit(), eager.signbit())


SETTINGS = (
    *((kernel, None, padding, ceil) for kernel in (2, 3) for padding in (0, 1) for ceil in (False, True)),
    *((3, 2, padding, ceil) for padding in (0, 1) for ceil in (False, True)),
    *((kernel, 1, kernel // 2, False) for kernel in (5, 9, 13)),
    ((1, 1), (1, 1), (0, 0), False),
    ((3, 1), (2, 3), (1, 0), True),
    ((2, 5), (3, 1), (1, 2), True),
    ((4, 3), (1, 2), (0, 1), False),
    (2, 4, 1, True),
    ((16, 16), (1, 2), (8, 8), False),
)


@pytest.mark.parametrize("dtype", proved(DTYPES, DTYPES[:1]), ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_setting(settings, dtype, generator):
    kernel, stride, padding, ceil_mode = settings
    for layout, shape in itertools.product(LAYOUTS, ((2, 8, 13, 14), (1, 3, 16, 37), (2, 17, 8, 9))):
        x = testing.with_layout(torch.randint(-50, 50, shape, generator=generator).to(dtype), layout)
        if shape[2] + 2 * (padding if isinstance(padding, int) else padding[0]) < 16 and settings[0] == (16, 16):
            continue
        assert_same(x, kernel, stride, padding, ceil_mode=ceil_mode)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_setting_on_the_emulator_and_by_pytorch_s_operators(settings, answering, generator):
    kernel, stride, padding, ceil_mode = settings
    for layout, shape in itertools.product(LAYOUTS[:2], ((2, 8, 13, 14), (1, 3, 16, 9))):
        x = testing.with_layout(torch.randint(-50, 50, shape, generator=generator).float(), layout)
        assert_same(x, kernel, stride, padding, ceil_mode=ceil_mode, function=function_of(answering))


def operators_of(function) -> set[str]:
    with torch.profiler.profile() as profile:
        function()
    return {event.key for event in profile.key_averages() if "max_pool2d" in event.key}


LEFT = {
    "dilation": ({"dilation": 2}, torch.float32),
    "indices": ({"return_indices": True}, torch.float32),
    "a window of more than 256": ({"kernel_size": (16, 17), "padding": 8}, torch.float32),
    "integers": ({}, torch.int64),
    "bytes": ({}, torch.uint8),
    "no batch": ({}, torch.float32),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_to_pytorch(name, generator):
    settings, dtype = LEFT[name]
    settings = {"kernel_size": 3, "stride": 2} | settings
    x = torch.randint(0, 50, (2, 16, 18, 19), generator=generator).to(dtype)
    x = x[0] if name == "no batch" else x
    assert "cnnkern::max_pool2d" not in operators_of(lambda: functional.max_pool2d(x, **settings))
    ours, eager = functional.max_pool2d(x, **settings), F.max_pool2d(x, **settings)
    for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (ours, eager)), strict=True):
        assert torch.equal(a, b)


def test_inference_in_channels_last_on_a_cpu_is_left_to_pytorch(generator):
    rows = torch.randn(2, 16, 18, 19, generator=generator).to(memory_format=torch.channels_last)
    for x, ours in ((rows, False), (rows.contiguous(), True), (rows.clone().requires_grad_(), True)):
        found = operators_of(lambda x=x: functional.max_pool2d(x, 3, 2, 1))
        assert ("cnnkern::max_pool2d" in found) == ours
    with torch.no_grad():
        assert "cnnkern::max_pool2d" not in operators_of(lambda: functional.max_pool2d(x, 3, 2, 1))


def test_windows_without_a_kernel_of_their_own_are_left_to_pytorch_on_a_gpu():
    with FakeTensorMode():
        x = torch.empty(2, 16, 18, 19, device="cuda")
    of = {(3, 2): False, (2, 2): False, (3, 1): True, (2, 1): True, (3, 3): True, (5, 2): True}
    assert {(k, s): max_pool2d._is_left(x, (k, k), (s, s), (1, 1)) for k, s in of} == of
    assert not max_pool2d._is_left(torch.empty(2, 16, 18, 19), (3, 3), (1, 1), (1, 1))


def test_modules_are_torch_s(generator):
    x = torch.randn(2, 8, 9, 9, generator=generator).to(memory_format=torch.channels_last)
    for arguments in ((3, 2, 1), (2,), ((3, 2), (2, 1), (1, 0), 1, False, True), (3, 2, 1, 1, True), (3, 2, 1, 2)):
        ours, theirs = cnnkern.nn.MaxPool2d(*arguments), nn.MaxPool2d(*arguments)
        assert isinstance(ours, nn.MaxPool2d)
        assert repr(ours) == repr(theirs)
        for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (ours(x), theirs(x))), strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()


def test_convert_exchanges_it_and_revert_gives_it_back():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    x = torch.randn(2, 3, 16, 16)
    expected = model.eval()(x)
    converted = cnnkern.convert(model)
    assert type(converted[3]) is cnnkern.nn.MaxPool2d
    torch.testing.assert_close(converted(x), expected)
    assert type(cnnkern.revert(converted)[3]) is nn.MaxPool2d


def test_third_order(generator):
    x = torch.randperm(2 * 3 * 7 * 8, generator=generator).view(2, 3, 7, 8).double().requires_grad_()

    def cubed(x):
        return functional.max_pool2d(x, 3, 2, 1).pow(3)

    first = torch.autograd.grad(cubed(x).sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), x, create_graph=True)[0]
    third = torch.autograd.grad(second.sum(), x)[0]
    eager = torch.autograd.grad(F.max_pool2d(x, 3, 2, 1).pow(3).sum(), x, create_graph=True)[0]
    eager = torch.autograd.grad(eager.sum(), x, create_graph=True)[0]
    assert torch.equal(second, eager)
    assert torch.equal(third, torch.autograd.grad(eager.sum(), x)[0])
