"""Layer norms under autocast on a GPU: 16 bits in, float32 out, without the casts that PyTorch makes beside them."""

import emulator
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import cnnkern
from cnnkern import eager, functional, reference, testing
from tests.wide_layer_norms import DTYPES as OF_16_BITS
from tests.wide_layer_norms import NAMES, check, drawn, results

operators = pytest.mark.parametrize("name", NAMES)
dtypes = pytest.mark.parametrize("dtype", OF_16_BITS, ids=str)


@operators
@dtypes
def test_a_wide_result_is_that_of_the_input_in_float32(name, dtype, generator):
    for layout in ("contiguous", "channels_last"):
        inputs, dy = drawn(name, (3, 8, 5, 7), dtype, generator, layout)
        check(name, inputs, dy)
        check(name, inputs, dy, eager)
        check(name, inputs | {"weight": None}, dy)
        check(name, inputs | {"bias": None}, dy, eager)


@pytest.mark.slow
@operators
@dtypes
def test_tensors_that_begin_where_no_vector_does(name, dtype, generator):
    """On a GPU, where in float32 they are cut in another way. tests/test_emulator.py has those that are aligned."""
    with emulator.Emulator():
        for shape in ((3, 8, 6, 6), (2, 17, 3, 5)):
            check(name, *drawn(name, shape, dtype, generator, "off a vector"), exactly=False)


@operators
def test_no_elements(name):
    inputs, dy = drawn(name, (0, 8, 2, 2), torch.bfloat16, torch.Generator())
    for functions in (torch.ops.cnnkern, eager):
        check(name, inputs, dy, functions)


@operators
def test_what_a_wide_result_allows(name, generator):
    inputs, dy = drawn(name, (3, 8, 4, 4), torch.bfloat16, generator)
    narrow = inputs | {"weight": inputs["weight"].bfloat16()}
    for functions in (torch.ops.cnnkern, eager):
        with pytest.raises(RuntimeError, match="expected weight in Float beside a result in that dtype; got BFloat16"):
            results(name, narrow, dy, True, functions)
        with pytest.raises(RuntimeError, match="dy must have the input's dtype BFloat16; got Half"):
            results(name, inputs, dy.half(), True, functions)
        for dtype in (torch.float32, torch.float64):
            same = {n: v.to(dtype) if isinstance(v, Tensor) else v for n, v in inputs.items()}
            both = (results(name, same, dy.to(dtype), wide, functions) for wide in (True, False))
            assert all(map(torch.equal, *both))


# ---- derivatives ------------------------------------------------------------------------------------------------


def of_float32(name: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Eager's, which casts first."""
    function = {"layer_norm": lambda *a: F.layer_norm(a[0], (4,), *a[1:], 1e-5), "layer_norm2d": reference.layer_norm2d}
    return function[name](x.float(), weight, bias)


def of_16_bits(name: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    shape, eps = (((4,),), 1e-5) if name == "layer_norm" else ((), 1e-6)
    return getattr(torch.ops.cnnkern, name)(x, *shape, weight, bias, eps, True)[0]


@operators
def test_derivatives_of_every_kind(name, generator):
    x = testing.randn((3, 4, 5, 4), generator, torch.bfloat16)
    weight, bias, dy = (testing.randn(s, generator, torch.float32) for s in ((4,), (4,), x.shape))
    found = []
    for function in (of_16_bits, of_float32):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = function(name, *leaves)
        first = torch.autograd.grad(y, leaves, dy, create_graph=True)
        assert [g.dtype for g in first] == [t.dtype for t in leaves]
        second = torch.autograd.grad(sum(g.float().square().sum() for g in first), leaves[:2])
        tangents = torch.ones_like(x), torch.ones_like(weight)
        _, forward = torch.func.jvp(lambda x, w, f=function: f(name, x, w, bias), (x, weight), tangents)
        found.append([y, *first, *second, forward])
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_the_input_is_saved_as_it_came():
    x = torch.randn(6, 8, dtype=torch.bfloat16, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        torch.ops.cnnkern.layer_norm(x, (8,), torch.ones(8), torch.zeros(8), 1e-5, True)
    assert [t.dtype for t in saved if t.shape == x.shape] == [torch.bfloat16]


# ---- who casts, on a GPU that there need not be -----------------------------------------------------------------


class Recorded(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket._qualified_op_name
        if not name.startswith("prim::"):  # which ask a fake for its device
            self.calls.append((name, args))
        return function(*args, **(kwargs or {}))


def recorded(function, *arguments, enabled: bool = True) -> tuple[Tensor, list[tuple[str, tuple]]]:
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", enabled)
    try:
        with Recorded() as mode:
            return function(*arguments), mode.calls
    finally:
        torch.set_autocast_enabled("cuda", before)


def modules(dtype: torch.dtype = torch.float32) -> list[tuple[nn.Module, tuple[int, ...]]]:
    where = {"device": "cuda", "dtype": dtype}
    converted = cnnkern.convert(nn.Sequential(nn.LayerNorm(8, **where)))
    rows, images = cnnkern.nn.LayerNorm(8, **where), cnnkern.nn.LayerNorm2d(8, **where)
    return [(rows, (3, 8)), (images, (3, 8, 4, 4)), (converted, (3, 8))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *OF_16_BITS], ids=str)
@pytest.mark.parametrize("enabled", [True, False])
def test_who_casts(dtype, enabled):
    with FakeTensorMode():
        for module, shape in modules(torch.float64 if dtype == torch.float64 else torch.float32):
            x = torch.empty(shape, dtype=dtype, device="cuda")
            y, ((operator, arguments),) = recorded(module, x, enabled=enabled)  # and nothing beside it
            assert operator.startswith("cnnkern::layer_norm")
            assert arguments[0].dtype == dtype
            assert (arguments[-1] is True) == (enabled and dtype in OF_16_BITS)
            assert y.dtype == (torch.float32 if enabled and dtype in OF_16_BITS else dtype)


@dtypes
def test_parameters_of_16_bits_are_cast_as_eager_casts_them(dtype):
    with FakeTensorMode():
        for module, shape in modules(dtype):
            y, calls = recorded(module, torch.empty(shape, dtype=dtype, device="cuda"))
            assert y.dtype == torch.float32
            *casts, (operator, arguments) = calls
            assert [name for name, _ in casts] == ["aten::_to_copy"] * 2
            assert operator.startswith("cnnkern::layer_norm")
            assert arguments[0].dtype == dtype


@operators
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_reference_is_pytorchs_own(name, parameter_dtype):
    with FakeTensorMode():
        x = torch.empty(3, 8, 4, 8, dtype=torch.bfloat16, device="cuda")
        weight = torch.empty(8, dtype=parameter_dtype, device="cuda")
        shape = ((8,),) if name == "layer_norm" else ()
        for function in (getattr(functional, name), getattr(reference, name)):
            y, _ = recorded(function, x, *shape, weight, None)
            assert y.dtype == torch.float32
