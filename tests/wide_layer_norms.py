"""Layer norms with 16-bit input and float32 result, compared with those of the input cast to float32."""

import torch
from torch import Tensor

from cnnkern import testing
from cnnkern.testing import CASES

NAMES = ("layer_norm", "layer_norm2d")
DTYPES = (torch.bfloat16, torch.float16)


def drawn(name: str, shape, dtype: torch.dtype, generator: torch.Generator, layout: str = "contiguous"):
    """(inputs, dy): 16 bits in, float32 parameters and gradient."""
    inputs = CASES[name].inputs(shape, dtype, generator=generator, parameter_dtype=torch.float32)
    dy = testing.randn(shape, generator, torch.float32)
    if layout == "off a vector":  # begins where no vector does
        inputs["input"], dy = (t.new_empty(t.numel() + 1)[1:].view(shape).copy_(t) for t in (inputs["input"], dy))
    elif name == "layer_norm2d":
        inputs["input"], dy = (testing.with_layout(t, layout) for t in (inputs["input"], dy))
    return inputs, dy


def results(name: str, inputs: dict, dy: Tensor, wide: bool, functions=torch.ops.cnnkern) -> list[Tensor]:
    """y, mean, rstd, dx, and the gradients of the parameters that there are, of the operators of `functions`."""
    shape = (inputs["normalized_shape"],) if name == "layer_norm" else ()
    x, parameters = inputs["input"], (inputs["weight"], inputs["bias"])
    y, mean, rstd = getattr(functions, name)(x, *shape, *parameters, inputs["eps"], wide)
    mask = [True, *(p is not None for p in parameters)]
    found = getattr(functions, f"{name}_backward")(dy, x, *shape, *parameters, mean, rstd, mask)
    return [y, mean, rstd, *(g for g, wanted in zip(found, mask, strict=True) if wanted)]


def check(name: str, inputs: dict, dy: Tensor, functions=torch.ops.cnnkern, exactly: bool = True) -> None:
    """The results with a cast to float32 before the operator, and one of dx after it."""
    found = results(name, inputs, dy, True, functions)
    expected = results(name, inputs | {"input": inputs["input"].float()}, dy, False, functions)
    expected[3] = expected[3].to(inputs["input"].dtype)
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.stride()) == (other.dtype, other.stride())
        if exactly:
            assert torch.equal(one, other)
        else:
            torch.testing.assert_close(one, other)
