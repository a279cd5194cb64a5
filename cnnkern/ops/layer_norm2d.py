"""Layer norm over the channels of images. Kernels: csrc, triton_kernels; autograd: csrc/autograd."""

import torch
from torch import Tensor

from cnnkern.ops import fake, route, tuned
from cnnkern.triton_kernels import check

_layer_norm2d = torch.ops.cnnkern.layer_norm2d.default


def layer_norm2d(input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Layer normalisation of each pixel over its channels.

    Equivalent to ``F.layer_norm(input.permute(0, 2, 3, 1), input.shape[1:2], weight, bias, eps).permute(0, 3, 1, 2)``,
    in the memory format of the input.

    Shapes: ``input`` and the result (N, C, H, W); ``weight`` and ``bias`` (C,) or None, independently.
    Dtypes: float32, float64, bfloat16 or float16; parameters in the input's dtype, or float32 for 16-bit input.
    The result has the input's dtype. Under autocast on a GPU it is float32, as PyTorch's, and the kernel casts.
    Saved for backward: the input, and two values per pixel in float32, or in float64 for float64 input.

    Raises RuntimeError for shapes, dtypes or devices that do not match.

    Source: Liu et al., A ConvNet for the 2020s, 2022 (arXiv:2201.03545).
    """
    if route.is_pytorchs((input,), (weight, bias), shards=True):
        return route.by_pytorch(layer_norm2d, input, weight, bias, eps)
    if tuned.table is not None and tuned.loses("layer_norm2d", input, weight, bias):
        return tuned.layer_norm2d_by_pytorch(input, weight, bias, eps)
    return _layer_norm2d(input, weight, bias, eps)[0]


@torch.library.register_fake("cnnkern::layer_norm2d")
def _(x, weight, bias, eps, wide=False):
    if fake.is_meta(x):
        check.layer_norm2d("cnnkern::layer_norm2d", x, weight, bias, wide)
    torch._check(x.dim() == 4, lambda: "cnnkern::layer_norm2d: expected an input of 4 dimensions (N, C, H, W)")
    fake.check_channel_vectors("cnnkern::layer_norm2d", x, weight=weight, bias=bias)
    y = fake.empty_like_layout(x)
    return y.to(fake.wide_type(x)) if wide else y, *fake.layer_norm_statistics(x, (1,))


@torch.library.register_fake("cnnkern::layer_norm2d_backward")
def _(dy, x, weight, bias, mean, rstd, output_mask):
    dx = fake.empty_like_layout(x) if output_mask[0] else x.new_empty(0)
    parameters = zip(output_mask[1:], (weight, bias), strict=True)
    return dx, *(fake.parameter_gradient(wanted, v, x.shape[1:2], x) for wanted, v in parameters)
