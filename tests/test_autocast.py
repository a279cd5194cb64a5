"""Autocast: dtypes, values and gradients as in eager, or an error if nothing is promoted."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import cnnkern
from cnnkern import functional, testing
from cnnkern.testing import CASES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("bn_act", "bn_add_act", "add_relu", "layer_norm", "layer_norm2d")

operators = pytest.mark.parametrize("name", NAMES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def drawn(name, dtype, parameter_dtype, generator):
    """(case, inputs, dy)"""
    case, shape = CASES[name], (3, 8, 4, 4)
    variant = {"parameter_dtype": parameter_dtype} if case.float32_parameters else {}
    return (
        case,
        case.inputs(shape, dtype, generator=generator, **variant),
        testing.randn(shape, generator, dtype),
    )


@operators
@dtypes
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients_as_eager_has_them(name, dtype, parameter_dtype, generator):
    case, inputs, dy = drawn(name, dtype, parameter_dtype, generator)
    for autocast in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=autocast):
            try:
                testing.run(case.reference, case, inputs)
            except RuntimeError:
                with pytest.raises(RuntimeError, match=rf"cnnkern::{name}: expected weight in the input's dtype"):
                    testing.run(case.function, case, inputs)
                assert parameter_dtype not in (torch.float32, dtype)
            else:
                testing.check(case, inputs, dy)


@operators
@dtypes
def test_dtypes_on_a_gpu_as_eager_has_them(name, dtype, generator):
    case, inputs, _ = drawn(name, dtype, dtype, generator)
    enabled = torch.is_autocast_enabled("cuda")
    with FakeTensorMode():  # which needs no GPU
        fakes = {
            n: torch.empty(v.shape, dtype=v.dtype, device="cuda") if isinstance(v, Tensor) else v
            for n, v in inputs.items()
        }
        try:
            torch.set_autocast_enabled("cuda", True)
            assert case.function(**fakes).dtype == case.reference(**fakes).dtype
        finally:
            torch.set_autocast_enabled("cuda", enabled)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_float32_residual_beside_a_16_bit_input_is_refused(dtype):
    """Eager promotes the sum to float32, twice the bytes: a convolution under autocast beside a float32 skip."""
    x, skip = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6)
    norm = cnnkern.nn.BatchNormAddReLU2d(4)
    before = {n: v.clone() for n, v in norm.state_dict().items()}
    with torch.autocast("cpu", dtype=dtype):
        x = nn.functional.conv2d(x, torch.randn(4, 4, 1, 1))
        assert x.dtype == dtype
        assert (x + skip).dtype == torch.float32
        for a, b in itertools.permutations((x, skip)):
            message = r"residual must have the input's dtype \w+; got \w+"
            with pytest.raises(RuntimeError, match=f"cnnkern::bn_add_act: {message}"):
                norm(a, b)
            with pytest.raises(RuntimeError, match=f"cnnkern::add_relu: {message}"):
                functional.add_relu(a, b)
    assert all(torch.equal(v, before[n]) for n, v in norm.state_dict().items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modules_as_their_twins(dtype, generator):
    """A module keeps its parameters in float32."""
    for ours, theirs in (
        (cnnkern.nn.BatchNormReLU2d(8), nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())),
        (cnnkern.nn.LayerNorm(4), nn.LayerNorm(4)),
    ):
        x = testing.randn((3, 8, 4, 4), generator, dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, expected = ours(x), theirs(x)
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y, expected)
