"""The CUDA kernels as the dispatcher sees them, and on a GPU where there is one.

What nvcc makes of them is judged by tests/test_gpu_gate.py, what they compute without a GPU by tests/test_emulator.py.
"""

import itertools

import pytest
import torch

import cnnkern
from cnnkern import testing

CASE = testing.CASES["bn_act"]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_kernels_are_registered():
    if not cnnkern._C.build_info()["cuda"]:
        pytest.skip("the extension was built without CUDA")
    for name in itertools.chain.from_iterable(case.operators for case in testing.CASES.values()):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cnnkern::{name}", "CUDA")


def on_gpu(shape, dtype, generator, layout="contiguous", **variant) -> tuple[dict, torch.Tensor]:
    inputs = CASE.inputs(shape, dtype, generator=generator, **variant)
    inputs = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    inputs["input"] = testing.with_layout(inputs["input"], layout)
    return inputs, testing.randn(shape, generator, dtype).cuda()


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("variant", CASE.variants)
def test_battery_on_a_gpu(variant, dtype, generator):
    larger = ((4, 3, 100, 100), (2, 100, 20, 20), (4, 128, 28, 28))  # slices, strips and blocks that own a channel
    for shape, layout in itertools.product(CASE.shapes + larger, ("contiguous", "channels_last", "sliced")):
        inputs, dy = on_gpu(shape, dtype, generator, layout, **CASE.variants[variant])
        testing.check(CASE, inputs, dy)
        testing.check(CASE, inputs, testing.with_layout(dy, "channels_last"))
        once, again = (testing.run(CASE.function, CASE, inputs, dy) for _ in range(2))
        for name, value in once.items():
            assert torch.equal(value, again[name]), f"{name} differs in a second run"


@needs_gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
# Not in float64, where eager counts as the truth and loses more digits to a large mean than these kernels do.
@pytest.mark.parametrize(
    "dtype", [d for d in DTYPES if d != torch.float64], ids=lambda d: str(d).removeprefix("torch.")
)
def test_numbers_that_are_hard_on_a_gpu(dtype, layout, generator):
    for shape, change in itertools.product(
        ((4, 6, 9, 9), (4, 8, 64, 64)),
        (
            lambda x: 1e4 + 1e-2 * x,
            lambda x: 1e6 + x if dtype != torch.float16 else x,
            lambda x: x * (1e30 if dtype != torch.float16 else 1e4),
            lambda x: x * 1e-20,
            lambda x: torch.where(torch.arange(x.shape[1]).view(-1, 1, 1) == 1, 3.0, x),
            lambda x: x.index_fill(0, torch.tensor([0]), float("nan")),
            lambda x: x.index_fill(0, torch.tensor([0]), float("inf")),
        ),
    ):
        inputs, dy = on_gpu(shape, dtype, generator)
        x = change(inputs["input"].cpu().double())
        # The special values stay in one channel.
        x = torch.where((torch.arange(shape[1]).view(-1, 1, 1) == 0) | x.isfinite(), x, 1.0)
        inputs["input"] = testing.with_layout(x.to(dtype).cuda(), layout)
        testing.check(CASE, inputs, dy)


@needs_gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_mask_of_backward_is_that_of_the_output_on_a_gpu(dtype, layout, generator):
    for scale in (1.0, 1e-5, 1e-7, 3e-8, 1e-38, 1e-40):  # down to where positive values round to zero
        x = testing.with_layout(testing.randn((2, 5, 32, 33), generator, dtype).cuda(), layout)
        weight = torch.full(
            (5,), scale, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device="cuda"
        )
        y, mean, rstd = torch.ops.cnnkern.bn_act(x, weight, None, None, None, True, 0.1, 1e-5, "relu")
        count = torch.ops.cnnkern.bn_act_backward(
            torch.ones_like(x), x, weight, torch.zeros_like(weight), mean, rstd, True, "relu", [True] * 3
        )[2]
        assert torch.equal(count.double(), (y > 0).sum((0, 2, 3)).double())


@needs_gpu
@pytest.mark.parametrize("width", [4, 8, 16, 24, 32, 40, 48, 56, 64, 72, 112, 120])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d).removeprefix("torch."))
def test_grouped_convolutions_of_every_width_on_a_gpu(dtype, width, generator):
    case = testing.CASES["grouped_conv2d"]
    channels = 3 * width if width >= 8 else 24
    for stride, (n, h, w) in itertools.product((1, 2), ((3, 7, 7), (2, 29, 45), (5, 14, 14))):
        inputs = case.inputs((n, channels, h, w), dtype, generator=generator, width=width, stride=stride, padding=1)
        dy = testing.randn(case.reference(**inputs).shape, generator, dtype).cuda()
        inputs = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        inputs["input"] = testing.with_layout(inputs["input"], "channels_last")
        testing.check(case, inputs, testing.with_layout(dy, "channels_last"))
