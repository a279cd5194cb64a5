"""The convolution of a folded model: batch norm in its weights, residual and activation in its kernel."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from cnnkern import reference
from cnnkern.nn.traced import leaf
from cnnkern.ops import route

_mkldnn = torch.ops.mkldnn
# Our activations as oneDNN has them: name, scalars.
_POST_OPS: dict[str, tuple[str, list[float]]] = {
    "none": ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
    "leaky_relu": ("leaky_relu", [0.01]),
    "sigmoid": ("sigmoid", []),
    "silu": ("swish", []),
    "hardswish": ("hardswish", []),
}
_SHAPES = 8  # of inputs, for which a convolution keeps packed weights


def prefers_own(weight: Tensor, groups: int, dtype: torch.dtype, pixels: int) -> bool:
    """Whether our kernel of grouped convolution, followed by the activation, beats oneDNN's with the activation in it.

    ``weight`` is (out_channels, C / groups, kH, kW), ``pixels`` the number of pixels of an input image. Both run in
    channels_last. ``python -m benchmarks.studies.folded`` times both for the grouped layers of six networks.
    """
    width = weight.shape[1]
    if weight.dim() != 4 or groups == 1 or weight.shape[0] != groups * width or dtype != torch.float32:
        return False
    return width in (2, 4, 8) or (width == 16 and pixels >= 28 * 28)


class FoldedConv(nn.Module):
    """``act(conv(x))``, or ``act(conv(x) + residual)`` where it is called with a residual; for inference.

    Input and output as those of the convolution it was made from, in 1, 2 or 3 dimensions. In float32 and 16-bit types
    on the CPU, PyTorch's oneDNN operators compute it in one pass; the result is then channels_last, whatever the
    input's memory format. oneDNN wants the weights in an order that depends on the input's shape: they are kept in
    the order of each of the last few shapes, beside ``weight`` itself. Everywhere else (float64, CUDA, inputs that
    need a gradient, ``torch.compile``, ``torch.export``) PyTorch's convolution runs, and then the rest.

    State: ``weight`` and ``bias``, which need no gradient.
    """

    bias: Tensor | None
    inplace = False

    def __init__(
        self,
        conv: nn.modules.conv._ConvNd,
        weight: Tensor,
        bias: Tensor | None,
        act: str = "none",
        *,
        adds: bool = False,
        absorbs: tuple[str, bool] | None = None,
        overwrites: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = conv.in_channels, conv.out_channels, conv.kernel_size
        self.stride, self.dilation, self.groups = conv.stride, conv.dilation, conv.groups
        self.padding: tuple[int, ...] = (0,) * len(conv.kernel_size)
        self._pad: tuple[list[int], str] | None = None  # what F.pad does before
        around = list(conv._reversed_padding_repeated_twice)  # of the last dimension first, both sides of each
        if conv.padding_mode == "zeros" and around[::2] == around[1::2]:
            self.padding = tuple(around[::-2])
        else:
            self._pad = around, "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        self.act, self.adds = act, adds
        # What the forward pass of the module around this spells out and this computes: an activation, an addition.
        self.absorbs = absorbs
        self.overwrites = overwrites  # the residual: nobody else sees it
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.train(False)
        self._packed: tuple[Any, dict[Any, Tensor]] = (None, {})  # what it was made from, and by shape and dtype

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(input, fx.Proxy) or isinstance(residual, fx.Proxy):
            return leaf(self, input, *(() if residual is None else (residual,)))
        if (residual is not None) != self.adds:
            raise TypeError(f"FoldedConv: expected {'a residual' if self.adds else 'no residual'} behind the input")
        x = input if self._pad is None else F.pad(input, self._pad[0], self._pad[1])
        if torch.compiler.is_compiling() or not self._takes(x, residual):
            return self.by_parts(x, residual)
        if prefers_own(self.weight, self.groups, _computed_in(x), x.shape[-1] * x.shape[-2]):
            return self.by_parts(x, residual, own=True)
        return self.by_library(x, residual)

    def by_library(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """In one pass, by oneDNN."""
        dtype = _computed_in(x)
        x, bias = x.to(dtype), None if self.bias is None else self.bias.to(dtype)
        conv = (self._packed_weight(x.shape, dtype), bias, self.padding, self.stride, self.dilation, self.groups)
        act, scalars = _POST_OPS[self.act]
        if residual is None:
            return _mkldnn._convolution_pointwise.default(x, *conv, act, scalars, "")
        fits = residual.dtype == dtype and [*residual.shape] == self._output_shape(x)
        if self.act not in ("none", "relu") or not fits:
            y = _mkldnn._convolution_pointwise.default(x, *conv, "none", [], "")
            return reference.ACTIVATIONS[self.act](y + residual)
        relu = "relu" if self.act == "relu" else None
        if self.overwrites and residual.is_contiguous(memory_format=_CHANNELS_LAST[x.dim()]):
            return _mkldnn._convolution_pointwise_.binary(residual, x, *conv, "add", None, relu, [], "")
        return _mkldnn._convolution_pointwise.binary(x, residual, *conv, "add", None, relu, [], "")

    def by_parts(self, x: Tensor, residual: Tensor | None, own: bool = False) -> Tensor:
        """By PyTorch's convolution, or our grouped one in channels_last, and what follows it."""
        settings = (self.stride, self.padding, self.dilation)
        if own:
            x = x.to(_computed_in(x), memory_format=torch.channels_last)
            bias = None if self.bias is None else self.bias.to(x.dtype)
            y = torch.ops.cnnkern.grouped_conv2d(x, self.weight.to(x.dtype), bias, *settings, self.groups)
            if residual is None and self.act == "relu":
                return y.relu_()
        else:
            functions = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
            y = functions[len(self.stride)](x, self.weight, self.bias, *settings, self.groups)
        return reference.ACTIVATIONS[self.act](y if residual is None else y + residual)

    def _takes(self, x: Tensor, residual: Tensor | None) -> bool:
        """Whether oneDNN's operators compute this call."""
        tensors = (x, self.weight) if residual is None else (x, self.weight, residual)
        dtype = _computed_in(x)
        return bool(
            all(type(t) in (Tensor, nn.Parameter) and route.has_kernels(t) and t.is_cpu for t in tensors)
            and not torch.jit.is_tracing()
            and _has_kernels(dtype)
            and torch.backends.mkldnn.enabled
            and dtype == _computed_in(self.weight)
            and x.dim() in _CHANNELS_LAST
            and x.dim() == self.weight.dim()
            and x.shape[1] == self.in_channels
            and x.numel() > 0
            and min(self._output_shape(x)) > 0
            and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
            and torch._C._functorch.peek_interpreter_stack() is None
        )

    def _output_shape(self, x: Tensor) -> list[int]:
        spans = zip(x.shape[2:], self.padding, self.dilation, self.kernel_size, self.stride, strict=True)
        return [x.shape[0], self.out_channels, *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in spans)]

    def _packed_weight(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The weight in oneDNN's order for an input of this shape: in another it would be reordered in every call."""
        weight = self.weight
        version = (weight.data_ptr(), None if weight.is_inference() else weight._version)
        key = (shape, dtype)
        packed_from, known = self._packed
        if packed_from != version:
            known = {}
        if key in known:
            return known[key]
        packed = _mkldnn._reorder_convolution_weight(
            weight.to(dtype), self.padding, self.stride, self.dilation, self.groups, shape
        )
        order = _order(packed)
        packed = next((p for p in known.values() if p.dtype == dtype and _order(p) == order), packed)
        # Replaced, not changed: other threads may be reading it.
        self._packed = version, dict([*known.items(), (key, packed)][-_SHAPES:])
        return packed

    def _apply(self, fn, recurse=True):
        self._packed = None, {}
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": (None, {})}  # packed weights can be neither copied nor saved

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        if any(self.padding):
            text += f", padding={self.padding}"
        if self._pad is not None:
            text += f", padded by {self._pad}"
        if any(d != 1 for d in self.dilation):
            text += f", dilation={self.dilation}"
        if self.groups > 1:
            text += f", groups={self.groups}"
        return text + ", bias=False" * (self.bias is None) + ", add" * self.adds + f", act={self.act}"


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _computed_in(t: Tensor) -> torch.dtype:
    """The dtype in which a convolution of t computes."""
    casts = torch.is_autocast_enabled("cpu") and t.is_floating_point() and t.dtype != torch.float64
    return torch.get_autocast_dtype("cpu") if casts else t.dtype


@functools.cache
def _has_kernels(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available() or _mkldnn._is_mkldnn_acl_supported():
        return False  # Arm's library has no fused operators
    return (
        dtype == torch.float32
        or (dtype == torch.bfloat16 and _mkldnn._is_mkldnn_bf16_supported())
        or (dtype == torch.float16 and _mkldnn._is_mkldnn_fp16_supported())
    )


def _order(packed: Tensor) -> Sequence[int]:
    """What tells two orders of a weight apart: oneDNN's descriptor, without the bytes in it that are padding."""
    descriptor = _mkldnn._get_mkldnn_serialized_md(packed).tolist()
    return [*descriptor[:108], *descriptor[112:316], *descriptor[320:]]
