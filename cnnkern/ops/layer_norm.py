"""Layer norm over the last dimensions. Kernels: csrc, triton_kernels; autograd: csrc/autograd."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cnnkern.ops import fake, route, tuned
from cnnkern.triton_kernels import check

_layer_norm = torch.ops.cnnkern.layer_norm.default


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer normalisation over the last ``len(normalized_shape)`` dimensions.

    Equivalent to ``F.layer_norm(input, normalized_shape, weight, bias, eps)``.

    Shapes: ``input`` and the result (\\*, \\*normalized_shape), any number of rows; ``weight`` and ``bias``
    ``normalized_shape`` or None, independently.
    Dtypes: float32, float64, bfloat16 or float16; parameters in the input's dtype, or float32 for 16-bit input.
    The result is contiguous and has the input's dtype. Under autocast on a GPU it is float32, as PyTorch's, and the
    kernel casts. Saved for backward: the input, and two values per row in float32, or in float64 for float64 input.

    Raises RuntimeError for shapes, dtypes or devices that do not match.

    Source: Ba, Kiros and Hinton, Layer Normalization, 2016 (arXiv:1607.06450).
    """
    if route.is_pytorchs((input,), (weight, bias), shards=True):
        return route.by_pytorch(layer_norm, input, normalized_shape, weight, bias, eps)
    if tuned.table is not None and tuned.loses("layer_norm", input, weight, bias, math.prod(normalized_shape)):
        return route.by_pytorch(layer_norm, input, normalized_shape, weight, bias, eps)
    return _layer_norm(input, normalized_shape, weight, bias, eps)[0]


@torch.library.register_fake("cnnkern::layer_norm")
def _(x, normalized_shape, weight, bias, eps, wide=False):
    op, n = "cnnkern::layer_norm", len(normalized_shape)
    if fake.is_meta(x):
        check.layer_norm(op, x, normalized_shape, weight, bias, wide)
    torch._check(n >= 1, lambda: f"{op}: expected normalized_shape to be at least 1-dimensional")
    torch._check(
        x.dim() >= n and all(a == b for a, b in zip(x.shape[x.dim() - n :], normalized_shape, strict=True)),
        lambda: f"{op}: given normalized_shape={normalized_shape}, expected an input whose last dimensions are these",
    )
    for name, vector in (("weight", weight), ("bias", bias)):
        torch._check(
            vector is None or (vector.device == x.device and tuple(vector.shape) == tuple(normalized_shape)),
            lambda name=name: f"{op}: expected {name} of shape normalized_shape, on the input's device",
        )
    dtype = fake.wide_type(x) if wide else x.dtype
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    return y, *fake.layer_norm_statistics(x, range(x.dim() - n, x.dim()))


@torch.library.register_fake("cnnkern::layer_norm_backward")
def _(dy, x, normalized_shape, weight, bias, mean, rstd, output_mask):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if output_mask[0] else x.new_empty(0)
    parameters = zip(output_mask[1:], (weight, bias), strict=True)
    return dx, *(fake.parameter_gradient(wanted, v, normalized_shape, x) for wanted, v in parameters)
