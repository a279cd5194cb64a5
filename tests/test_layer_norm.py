"""Layer norms: modules beside torch's, hard numbers, sizes that the battery has not, errors."""

import copy
import itertools
import pickle

import emulator
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import cnnkern
from cnnkern import functional, testing
from cnnkern.testing import CASES

ROWS, IMAGES = CASES["layer_norm"], CASES["layer_norm2d"]
LAYOUTS = ("contiguous", "channels_last")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

either = pytest.mark.parametrize("case", [ROWS, IMAGES], ids=lambda c: c.name)


@pytest.fixture(params=["device", pytest.param("emulator", marks=pytest.mark.slow)])
def on(request, device):
    """Where a test puts its tensors: on --device, or on the CPU while the emulated CUDA kernels answer there."""
    if request.param == "device":
        yield device.tensors
    elif request.config.getoption("--device") == "emulator":
        pytest.skip("--device is the emulator already")
    else:
        with emulator.Emulator():
            yield "cpu"


def arguments(case, x, generator, **more):
    """Arguments of either operator around a given x: the last dimension is normalised, or the channels."""
    size = (x.shape[-1] if case is ROWS else x.shape[1],)
    weight, bias = (testing.randn(size, generator, x.dtype).to(x.device) for _ in range(2))
    shape = {"normalized_shape": size} if case is ROWS else {}
    return {"input": x, "weight": weight, "bias": bias, "eps": 1e-5} | shape | more


def placed_on(tensors, case, shape, dtype, generator):
    """(inputs, dy)"""
    inputs = case.inputs(shape, dtype, generator=generator)
    inputs = {n: v.to(tensors) if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
    return inputs, testing.randn(shape, generator, dtype).to(tensors)


def layouts(case, x):
    return [x] if case is ROWS else [testing.with_layout(x, layout) for layout in LAYOUTS]


@either
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6])
def test_mean_far_above_the_deviation(case, ratio, dtype, generator, on):
    for shape in ((64, 33), (20, 300), (3, 4100), (2, 9000)) if case is ROWS else ((2, 40, 9, 11), (1, 300, 8, 8)):
        x = (testing.randn(shape, generator, torch.float64) + ratio).to(dtype).to(on)
        dy = testing.randn(shape, generator, dtype).to(on)
        for placed in layouts(case, x):
            testing.check(case, arguments(case, placed, generator), dy, slack=False)


@either
@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e-3, 1e4, 16777217.0, 1e-20, 1e30])
def test_constant_rows(case, value, generator, on):
    for dtype in (torch.float32, torch.float64):
        for n in (1, 5, 257, *((8200,) if case is ROWS else ())):
            x = torch.full((6, n) if case is ROWS else (2, n, 3, 7), value, dtype=dtype, device=on)
            for placed in layouts(case, x):
                a = arguments(case, placed, generator)
                y = case.function(**a)
                bias = a["bias"] if case is ROWS else a["bias"].view(1, -1, 1, 1)
                torch.testing.assert_close(y, bias.expand_as(y), rtol=0, atol=1e-6)


@either
@pytest.mark.parametrize("scale", [1e30, 1e18, 1e-18, 1e-30, 1e-42])
def test_extreme_scales(case, scale, generator, on):
    for shape in ((7, 40), (9, 700), (2, 8200)) if case is ROWS else ((2, 40, 5, 7), (2, 70, 8, 8)):
        x = (testing.randn(shape, generator, torch.float64) * scale).float().to(on)
        dy = testing.randn(shape, generator, torch.float32).to(on)
        for placed, eps in itertools.product(layouts(case, x), (1e-5, 1e-30)):
            a = arguments(case, placed, generator, eps=eps)
            ours, eager = (testing.run(f, case, a, dy) for f in (case.function, case.reference))
            ref = testing.run(case.reference, case, testing.to_float64(a), dy.double())
            testing.assert_as_good_as(ours, eager, ref)
            assert all(v.isfinite().all() for v in ours.values()), "where eager overflows we need not"
            # Eager's squares overflow to results that nothing is as bad as: normalised values are of the order of one.
            error = (ours["output"].double() - ref["output"]).abs().max()
            assert error <= 1e-5 * ref["output"].abs().max(), f"{error:.1e}"


@either
@pytest.mark.parametrize("outlier", [1e3, 1e6, 1e12, 1e19, 1e30])
def test_one_outlier_a_row(case, outlier, generator, on):
    shape, first = ((9, 260), (slice(None), 0)) if case is ROWS else ((2, 60, 9, 9), (slice(None), 0))
    x = testing.randn(shape, generator, torch.float32).to(on)
    x[first] = outlier
    for placed in layouts(case, x):
        dy = testing.randn(shape, generator, torch.float32).to(on)
        testing.check(case, arguments(case, placed, generator), dy, slack=False)


@either
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_stay_in_their_row(case, bad, generator, on):
    rows, images = ((9, 37), (4, 5), (4,)), ((2, 9, 5, 13), (1, 2, 3, 4), (1, slice(None), 3, 4))
    shape, at, where = rows if case is ROWS else images
    for dtype in DTYPES:
        x = testing.randn(shape, generator, dtype).to(on)
        spoilt = x.clone()
        spoilt[at] = bad
        for clean, placed in zip(layouts(case, x), layouts(case, spoilt), strict=True):
            a = arguments(case, placed, generator)
            y, dx, *_ = testing.run(case.function, case, a, torch.ones_like(x)).values()
            eager = testing.run(case.reference, case, a, torch.ones_like(x))
            whole = testing.run(case.function, case, a | {"input": clean}, torch.ones_like(x))
            for mine, theirs, alone in zip((y, dx), eager.values(), whole.values(), strict=False):
                assert torch.equal(mine.isnan(), theirs.isnan())
                assert mine[where].isnan().all()
                mine[where] = alone[where]
                assert torch.equal(mine, alone)


@either
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_one_and_two_values_a_row(case, dtype, generator, on):
    """One value has no deviation and no gradient, whatever the rounding; two leave what rounding makes."""
    for n in (1, 2):
        shape = (37, n) if case is ROWS else (3, n, 5, 9)
        x, dy = (testing.randn(shape, generator, dtype).to(on) for _ in range(2))
        for placed in layouts(case, x):
            a = arguments(case, placed, generator)
            y, dx, dweight, dbias = testing.run(case.function, case, a, dy).values()
            if n == 1:
                assert torch.equal(y, a["bias"].expand_as(y))
                assert not dx.any()
                assert not dweight.any()
                torch.testing.assert_close(dbias, dy.double().sum().view(1).to(dtype))
            elif dtype != torch.float64:
                testing.check(case, a, dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_rows_few_rows_and_many(dtype, generator, device):
    """Columns shared out between threads, pieces of rows, sums flushed to double, stores past the caches."""
    for shape in (
        (1, 65536),
        (3, 65535),
        (63, 1100),
        (64, 1056),
        (200, 4096),
        (1_000_000, 1),
        (70_001, 3),
        (5003, 130),
    ):
        inputs, dy = placed_on(device.tensors, ROWS, shape, dtype, generator)
        testing.check(ROWS, inputs, dy)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_images_and_single_pixels(layout, generator, device):
    for shape in ((2, 96, 64, 64), (4, 130, 56, 56), (300, 129, 1, 1), (70, 40, 2, 3), (1, 2000, 9, 9)):
        inputs, dy = placed_on(device.tensors, IMAGES, shape, torch.float32, generator)
        inputs["input"] = testing.with_layout(inputs["input"], layout)
        testing.check(IMAGES, inputs, dy)


@either
def test_results_do_not_depend_on_the_number_of_threads(case, generator):
    shapes = ((40, 2000), (70, 3000), (3000, 96)) if case is ROWS else ((4, 96, 56, 56), (16, 768, 7, 7))
    threads = torch.get_num_threads()
    try:
        for shape in shapes:
            inputs = case.inputs(shape, torch.float32, generator=generator)
            dy, runs = testing.randn(shape, generator, torch.float32), []
            for n in (threads, 1, 3, 5):
                torch.set_num_threads(n)
                runs.append(testing.run(case.function, case, inputs, dy))
            for other, (name, value) in itertools.product(runs[1:], runs[0].items()):
                assert torch.equal(value, other[name]), f"{shape}: {name} differs"
    finally:
        torch.set_num_threads(threads)


def test_rows_in_any_strides(generator):
    base = testing.randn((6, 5, 8, 7), generator, torch.float32)
    views = (base.permute(0, 2, 3, 1), base.transpose(0, 3), base[::2, :, 1:, ::3], base[:1].expand(4, 5, 8, 7))
    for x, dims in itertools.product(views, (1, 2, 3)):
        size = tuple(x.shape[-dims:])
        inputs = {"input": x, "normalized_shape": size, "weight": torch.rand(size), "bias": torch.rand(size)}
        dy = testing.randn(x.shape, generator, torch.float32)
        for incoming in (dy, dy.transpose(0, 1).contiguous().transpose(0, 1), torch.ones(()).expand(x.shape)):
            testing.check(ROWS, inputs, incoming)


@either
def test_parameters_in_any_strides_and_frozen_ones(case, generator):
    shape = (9, 6) if case is ROWS else (2, 6, 3, 5)
    dy = testing.randn(shape, generator, torch.float32)
    whole = case.inputs(shape, torch.float32, generator=generator)
    strided = torch.stack([whole["weight"], whole["bias"]], dim=1)
    testing.check(case, whole | {"weight": strided[:, 0], "bias": strided[:, 1]}, dy)
    expected = testing.run(case.function, case, whole, dy)
    for wanted in itertools.product((True, False), repeat=3):
        names = [n for n, w in zip(case.differentiable, wanted, strict=True) if w]
        if not names:
            continue
        leaves = dict(whole)
        leaves |= {n: whole[n].detach().requires_grad_(n in names) for n in case.differentiable}
        grads = torch.autograd.grad(case.function(**leaves), [leaves[n] for n in names], dy)
        for name, g in zip(names, grads, strict=True):
            assert torch.equal(g, expected[f"grad of {name}"]), f"{name} where {names} are wanted"


def test_errors_name_the_operator_and_what_came():
    x, v = torch.randn(2, 5, 3, 4), torch.ones(5)
    for call, message in (
        (lambda: functional.layer_norm(x, ()), r"cnnkern::layer_norm: expected normalized_shape to be at least 1-dim"),
        (lambda: functional.layer_norm(x, (5,)), r"given normalized_shape=\[5\], .* got input of size \[2, 5, 3, 4\]"),
        (lambda: functional.layer_norm(v, (1, 5)), r"given normalized_shape=\[1, 5\], .* got input of size \[5\]"),
        (lambda: functional.layer_norm(x, (4,), v), r"expected weight to be of the same shape .*\[4\]; got .*\[5\]"),
        (lambda: functional.layer_norm(x, (4,), None, v), r"expected bias to be of the same shape"),
        (lambda: functional.layer_norm(x, (4,), torch.ones(4).double()), r"expected weight in the input's dtype"),
        (lambda: functional.layer_norm(x.int(), (4,)), r"cnnkern::layer_norm: input must be float32.*got Int"),
        (lambda: functional.layer_norm2d(x[0]), r"layer_norm2d: expected an input of 4 dimensions .* got \[5, 3, 4\]"),
        (lambda: functional.layer_norm2d(x, v[:4]), r"layer_norm2d: weight should contain 5 .* got shape \[4\]"),
        (lambda: functional.layer_norm2d(x, v, v.double()), r"layer_norm2d: expected bias in the input's dtype"),
        (lambda: functional.layer_norm2d(x.long()), r"cnnkern::layer_norm2d: input must be float32.*got Long"),
    ):
        with pytest.raises((RuntimeError, NotImplementedError), match=message):
            call()
    _, mean, rstd = torch.ops.cnnkern.layer_norm2d(x, v, v, 1e-6)
    gradient, wanted = torch.ops.cnnkern.layer_norm2d_backward, [True, True, True]
    for broken, message in (
        ((x[:1], x, v, v, mean, rstd, wanted), "dy must have the input's shape"),
        ((x, x, v, v, mean[0], rstd, wanted), r"mean and rstd must be those .* \[2, 1, 3, 4\].* got Float \[1, 3, 4\]"),
        ((x, x, None, v, mean, rstd, wanted), "output_mask asks for dweight, but weight is None"),
    ):
        with pytest.raises(RuntimeError, match=message):
            gradient(*broken)


def test_empty_rows_as_eager_has_them():
    for shape, size in (((0, 3), (3,)), ((3, 0), (0,)), ((2, 0, 4), (0, 4)), ((0, 2, 4), (2, 4))):
        inputs = {"input": torch.ones(shape), "normalized_shape": size, "weight": torch.ones(size), "bias": None}
        ours, eager = (testing.run(f, ROWS, inputs, torch.ones(shape)) for f in (ROWS.function, ROWS.reference))
        for name, value in ours.items():
            assert torch.equal(value, eager[name]), name


@pytest.mark.parametrize("affine", [{}, {"bias": False}, {"elementwise_affine": False}], ids=str)
def test_modules_are_their_twins(affine):
    x = torch.randn(2, 6, 5, 6)
    pairs = (
        (cnnkern.nn.LayerNorm((5, 6), eps=1e-3, **affine), nn.LayerNorm((5, 6), eps=1e-3, **affine)),
        (cnnkern.nn.LayerNorm(6, **affine), nn.LayerNorm(6, **affine)),
        (cnnkern.nn.LayerNorm2d(6, **affine), torchvision.models.convnext.LayerNorm2d(6, eps=1e-6, **affine)),
    )
    for ours, theirs in pairs:
        for p in theirs.parameters():
            nn.init.normal_(p)
        assert isinstance(ours, nn.LayerNorm)
        assert repr(ours) == repr(theirs)
        ours.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
        for other in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            torch.testing.assert_close(other(x), theirs(x))


def test_convert_and_revert_layer_norms():
    model = torchvision.models.convnext_tiny(num_classes=3).eval()
    for block in model.modules():
        if hasattr(block, "layer_scale"):
            nn.init.ones_(block.layer_scale)  # else nothing of the blocks is seen
    classes, x = [type(m) for m in model.modules()], torch.randn(1, 3, 64, 64)
    fused = cnnkern.convert(model)
    assert cnnkern.conversion_report(fused).counts == {"GroupedConv2d": 18, "LayerNorm": 18, "LayerNorm2d": 5}
    assert not [m for m in fused.modules() if type(m) in (nn.LayerNorm, torchvision.models.convnext.LayerNorm2d)]
    assert list(fused.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(fused(x), model(x), rtol=1e-3, atol=1e-4)
    assert [type(m) for m in cnnkern.revert(fused).modules()] == classes
    assert cnnkern.convert(fused, inplace=True) is fused
    pickle.loads(pickle.dumps(fused))
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    cnnkern.convert(encoder, verify=torch.randn(2, 5, 16))

    class Own(nn.LayerNorm):
        def forward(self, x):
            return F.layer_norm(x, self.normalized_shape) + 1

    assert cnnkern.conversion_report(nn.Sequential(Own(3))).counts == {"not converted": 1}
