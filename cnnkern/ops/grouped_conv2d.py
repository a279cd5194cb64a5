"""Grouped and depthwise convolution of images; the fakes are those of volumes too, and of bn_act_conv2d. Kernels:
csrc/cpu, triton_kernels; autograd: csrc/autograd."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from cnnkern.extension import extension
from cnnkern.ops import route, tuned
from cnnkern.ops.pair import pair

_grouped_conv2d = torch.ops.cnnkern.grouped_conv2d.default
_NAME = "cnnkern::grouped_conv2d"


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """2-D convolution, fast for many groups: depthwise, and groups of a few channels.

    Equivalent to ``F.conv2d(input, weight, bias, stride, padding, dilation, groups)``; all its arguments are accepted.
    PyTorch's kernel is used where it is faster (``docs/grouped_conv.md`` has the rule). On a GPU float32 may be
    multiplied in TF32, where PyTorch's settings allow that for convolutions.

    Shapes: ``input`` (N, C, H, W) or (C, H, W); ``weight`` (out_channels, C / groups, kH, kW); ``bias``
    (out_channels,) or None; the result (N, out_channels, H', W'). ``padding`` is a number of pixels, one for each of
    the two dimensions, ``"valid"`` or ``"same"``. All tensors have one dtype. The result is channels_last where the
    input or the weight is. Saved for backward: ``input`` and ``weight``.

    Raises RuntimeError, as PyTorch does, for shapes, dtypes or devices that do not match, for groups that do not divide
    the channels and for a kernel larger than the padded input.
    """
    if route.is_pytorchs((input,), (weight, bias), shards=True):
        return route.by_pytorch(conv2d, input, weight, bias, stride, padding, dilation, groups)
    # Complex numbers are convolved by F.conv2d alone, in real parts; and it has the errors for tensors of other ranks.
    if input.is_complex() or input.dim() not in (3, 4) or weight.dim() != 4:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    strides, dilations = pair(_NAME, "stride", stride), pair(_NAME, "dilation", dilation)
    if isinstance(padding, str):
        input, paddings = _pad(input, weight, strides, padding, dilations)
    else:
        paddings = pair(_NAME, "padding", padding)
    if tuned.table is not None and input.dim() == 4:
        settings = (*weight.shape, *strides, *paddings, *dilations, groups, bias is not None)
        if tuned.loses("conv2d", input, weight, bias, *settings):
            return route.by_pytorch(conv2d, input, weight, bias, strides, paddings, dilations, groups)
    if input.dim() == 3:
        return _grouped_conv2d(input[None], weight, bias, strides, paddings, dilations, groups)[0]
    return _grouped_conv2d(input, weight, bias, strides, paddings, dilations, groups)


def _pad(
    input: Tensor, weight: Tensor, stride: tuple[int, int], padding: str, dilation: tuple[int, int]
) -> tuple[Tensor, tuple[int, int]]:
    """The input, and how far it is still to be padded on every side."""
    if padding == "valid":
        return input, (0, 0)
    if padding != "same":
        raise RuntimeError(f"cnnkern::grouped_conv2d: padding must be numbers, 'valid' or 'same'; got {padding!r}")
    if stride != (1, 1):
        raise RuntimeError(f"cnnkern::grouped_conv2d: padding='same' needs stride 1; got stride {stride}")
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[-2:], strict=True)]
    odd = [n % 2 for n in total]  # one more pixel on the far side, as PyTorch has it
    if any(odd):
        input = F.pad(input, (0, odd[1], 0, odd[0]))
    return input, (total[0] // 2, total[1] // 2)


@torch.library.register_fake("cnnkern::grouped_conv2d")
def _(x, weight, bias, stride, padding, dilation, groups):
    y = torch.ops.aten.convolution(x, weight, bias, stride, padding, dilation, False, (0,), groups)
    # PyTorch's own fake has other strides than its kernels where strides suggest a format that x is not dense in.
    rows = torch.channels_last_3d if x.dim() == 5 else torch.channels_last
    channels_last = rows in (suggest_memory_format(x), suggest_memory_format(weight))
    return torch.empty_like(y, memory_format=rows if channels_last else torch.contiguous_format)


@torch.library.register_fake("cnnkern::grouped_conv2d_backward")
def _(dy, x, weight, stride, padding, dilation, groups, output_mask):
    sizes = [weight.shape[0]]
    grads = torch.ops.aten.convolution_backward(
        dy, x, weight, sizes, stride, padding, dilation, False, (0,), groups, output_mask
    )
    return tuple(x.new_empty(0) if g is None else g for g in grads)


if extension:  # whose operator this is: deferred results call it (csrc/deferred/prologue.h)

    @torch.library.register_fake("cnnkern::bn_act_conv2d")
    def _(
        x, weight, bias, running_mean, running_var, training, momentum, eps, act, act_param, kernel, kernel_bias, *to
    ):
        norm = (weight, bias, running_mean, running_var, training, momentum, eps, act, act_param)
        a, mean, rstd = torch.ops.cnnkern.bn_act(x, *norm)
        return _grouped_conv2d(a, kernel, kernel_bias, *to), mean, rstd

    @torch.library.register_fake("cnnkern::bn_act_conv2d_backward")
    def _(dy, x, weight, bias, mean, rstd, training, act, act_param, kernel, *of):
        a = torch.ops.cnnkern.sync_bn(x, None, weight, bias, mean, rstd, act, act_param)[0]
        return torch.ops.cnnkern.grouped_conv2d_backward(dy, a, kernel, *of)
