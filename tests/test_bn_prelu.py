"""Batch norm and PReLU beyond the conformance suite: slopes of other shapes, misuse, memory, autocast, folding."""

import pytest
import torch
import torch.nn.functional as F
from meanings import IResNetBlock
from torch import Tensor, nn

import cnnkern
from cnnkern import functional, testing

CASE = testing.CASES["bn_prelu"]


def inputs(shape=(3, 5, 4, 6), dtype=torch.float32, **variant) -> dict:
    return CASE.inputs(shape, dtype, generator=torch.Generator().manual_seed(0), **variant)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    "slope", [torch.tensor(0.3), torch.tensor([-0.3]), torch.randn(10)[::2], torch.zeros(1).expand(5)]
)
def test_slopes_of_any_shape_and_strides(slope, residual):
    given = inputs(residual=residual) | {"slope": slope}
    testing.check(CASE, given, testing.randn((3, 5, 4, 6), torch.Generator().manual_seed(1), torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 1), (3, 1, 5, 5), (2, 1, 130)])
def test_one_channel(shape, dtype):
    for slopes in ("one", "one per channel"):
        given = inputs(shape, dtype, slopes=slopes)
        testing.check(CASE, given, testing.randn(shape, torch.Generator().manual_seed(1), dtype))


def test_a_slope_that_wants_no_gradient_and_one_that_alone_does():
    given = inputs(residual=True)
    x = given["input"].requires_grad_()
    (dx,) = torch.autograd.grad(functional.batch_norm_prelu(**given).square().sum(), x)
    x.requires_grad_(False)
    slope = given["slope"].requires_grad_()
    (dslope,) = torch.autograd.grad(functional.batch_norm_prelu(**given).square().sum(), slope)
    x.requires_grad_()
    both = torch.autograd.grad(functional.batch_norm_prelu(**given).square().sum(), (x, slope))
    torch.testing.assert_close((dx, dslope), both, rtol=0, atol=0)


def test_nan_and_infinities_as_pytorch_has_them():
    given = inputs((2, 2, 3, 3), training=False, weight=False, bias=False)
    given["input"].view(-1)[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    results = [
        testing.run(function, CASE, given, torch.ones(2, 2, 3, 3)) for function in (CASE.function, CASE.reference)
    ]
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], equal_nan=True, msg=name)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"slope": torch.ones(4)}, RuntimeError, r"slope should contain 1 element or 5 .*; got shape \[4\]"),
        ({"slope": torch.ones(5, 1)}, RuntimeError, r"slope should contain 1 element or 5 .*; got shape \[5, 1\]"),
        ({"slope": torch.ones(5).double()}, RuntimeError, "expected slope in the input's dtype .*; got Double"),
        ({"slope": torch.ones(5, device="meta")}, RuntimeError, "expected slope on cpu like the input; got meta"),
        ({"residual": torch.ones(1, 5, 4, 6)}, RuntimeError, "residual must have the input's shape"),
        ({"residual": torch.ones(3, 5, 4, 6).half()}, RuntimeError, "residual must have the input's dtype"),
        ({"eps": 0.0}, ValueError, "eps must be positive"),
    ],
)
def test_misuse_changes_nothing(change, error, message):
    given = inputs() | change
    before = given["running_mean"].clone()
    with pytest.raises(error, match=message):
        functional.batch_norm_prelu(**given)
    assert torch.equal(given["running_mean"], before)


def test_a_residual_s_gradient_needs_a_residual():
    operator, arguments = CASE.backward_call(inputs(), torch.ones(3, 5, 4, 6))
    with pytest.raises(RuntimeError, match="output_mask asks for dresidual, but residual is None"):
        operator(*arguments[:-1], [True] * 5)


@pytest.mark.parametrize("residual", [False, True])
def test_saves_x_and_the_residual_alone(residual):
    given = inputs((4, 8, 32, 32), residual=residual)
    for name in CASE.differentiable:
        if given[name] is not None:
            given[name].requires_grad_()
    vectors = 3 * 8 * 4 + 2 * 8 * 8  # weight, bias, slope; mean and rstd in float64
    saved = testing.saved_bytes(lambda: functional.batch_norm_prelu(**given))
    assert saved == (1 + residual) * given["input"].numel() * 4 + vectors


# ---- in converted models ------------------------------------------------------------------------------------------


def trained(model: nn.Module, x: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, list[Tensor]]:
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        y = model(x)
    return y, list(torch.autograd.grad(y.float().square().sum(), list(model.parameters())))


def model_of(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*layers)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.bias)
        if isinstance(m, nn.PReLU):
            nn.init.normal_(m.weight)
    return model


@pytest.mark.parametrize("slopes", [1, 4])
def test_autocast(slopes):
    model = model_of(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.PReLU(slopes))
    converted = cnnkern.convert(model)
    x = torch.randn(3, 4, 9, 9)
    (y, grads), (expected, expected_grads) = (trained(m, x, torch.bfloat16) for m in (converted, model))
    assert cnnkern.conversion_report(converted).counts == {"BatchNorm + PReLU": 1}
    assert y.dtype == expected.dtype == torch.bfloat16
    exact, exact_grads = trained(model, x, None)
    for found, eager, truth in ((y, expected, exact), *zip(grads, expected_grads, exact_grads, strict=True)):
        assert found.dtype == eager.dtype
        error, allowed = ((t.float() - truth).abs().max() for t in (found, eager))
        assert error <= 2 * allowed + 2**-7 * truth.abs().max()


def test_autocast_of_a_batch_norm_in_float32_is_pytorch_s():
    model = model_of(nn.BatchNorm2d(4), nn.PReLU(4))  # whose result autocast makes bfloat16
    converted = cnnkern.convert(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert converted(torch.randn(3, 4, 9, 9)).dtype == torch.bfloat16
    assert cnnkern.conversion_report(converted).counts == {"BatchNorm": 1}


def test_what_pytorch_refuses_is_refused():
    model = cnnkern.convert(model_of(nn.BatchNorm2d(4), nn.PReLU(3)))
    with pytest.raises(RuntimeError, match="Mismatch of parameter numbers and input channel size"):
        model(torch.randn(3, 4, 9, 9))
    model = cnnkern.convert(model_of(nn.BatchNorm2d(4), nn.PReLU(4).double()))
    with pytest.raises(RuntimeError, match="Type promoting not supported"):
        model(torch.randn(3, 4, 9, 9))


@pytest.mark.parametrize("slopes", [1, 4])
def test_folded(slopes):
    model = model_of(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.PReLU(slopes), nn.Conv2d(4, 4, 1)).eval()
    folded = cnnkern.fold(model)
    x = torch.randn(3, 4, 9, 9)
    for _ in range(2):
        with torch.inference_mode():
            torch.testing.assert_close(folded(x), model(x))
    assert cnnkern.conversion_report(folded).counts == {"Conv + BatchNorm + PReLU": 1, "Conv": 1}
    with torch.no_grad():  # a slope that changes is read anew
        for m in (model, folded):
            m[2].weight.copy_(torch.linspace(-1, 2, slopes))
        torch.testing.assert_close(folded(x), model(x))
    folded.requires_grad_()
    y = folded(x)  # with gradients it runs as a converted one
    torch.testing.assert_close(y, model(x))
    assert torch.autograd.grad(y.sum(), folded[2].weight)[0].shape == (slopes,)


def test_a_folded_block_of_insightface():
    torch.manual_seed(0)
    model = IResNetBlock().eval()
    folded = cnnkern.fold(model)
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x))


def test_a_slope_learns_behind_frozen_folded_layers():
    model = model_of(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.PReLU(4)).eval().requires_grad_(False)
    folded = cnnkern.fold(model)
    x = torch.randn(3, 4, 9, 9)
    for m in (model, folded):
        m[2].requires_grad_()
        m(x).square().sum().backward()
    torch.testing.assert_close(folded[2].weight.grad, model[2].weight.grad)


def test_recompute_keeps_what_a_prelu_gives():
    model = model_of(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.PReLU(4), nn.Conv2d(4, 4, 3))
    x = torch.randn(3, 4, 9, 9)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    again = cnnkern.convert(model, recompute=True)
    torch.testing.assert_close(torch.autograd.grad(again(x).square().sum(), list(again.parameters())), expected)


def test_f_prelu_on_no_deferred_result_is_pytorch_s():
    x, slope = torch.randn(2, 3, 4), torch.randn(3)
    torch.testing.assert_close(F.prelu(x, slope), torch.where(x > 0, x, slope[:, None] * x))
