"""The convolution of a folded model as a layer, with the batch norm after it folded into its weights."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from cnnkern.conversion.deferral import FOLDED_SITE
from cnnkern.conversion.folding import FoldingLayer, folding_classes, site
from cnnkern.nn.conv import GroupedConv2d, GroupedConv3d
from cnnkern.nn.folded_conv import folded_conv


def _weights(conv: nn.modules.conv._ConvNd, norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of ``norm(conv(x))`` as one convolution, computed in float64; copies without a norm."""
    if norm is None:
        return conv.weight.detach().clone(), None if conv.bias is None else conv.bias.detach().clone()
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    mean = norm.running_mean.double()
    bias = (-mean if conv.bias is None else conv.bias.double() - mean) * scale
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    weight = conv.weight.double() * scale.view(-1, *[1] * (conv.weight.dim() - 1))
    return weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)


class FoldingConv(FoldingLayer, nn.modules.conv._ConvNd):
    kind = "Conv"

    def settings(self, norm: nn.Module | None) -> tuple:
        padding = (self.stride, self.padding, self.dilation, self.groups, self.padding_mode)
        return (*padding, None if norm is None else (norm.eps, norm.weight is None, norm.bias is None))

    def make(self, norm: nn.Module | None, sources: list[Tensor]) -> Any:
        return folded_conv(self, *_weights(self, norm), sources, normed=norm is not None)

    def became(self) -> tuple[str, str] | None:
        kind, reason = super().became()  # type: ignore[misc]
        return None if kind == "Conv + BatchNorm" else (kind, reason)

    def takes(self, norm: nn.Module) -> bool:
        """Whether a batch norm in eval mode can be folded into this convolution."""
        tensors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        return (
            norm.running_mean is not None
            and forward_ad._current_level < 0
            and norm.num_features == self.out_channels
            and all(t is None or t.dtype == self.weight.dtype for t in tensors)
            and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))
        )

    def take_norm(self, before: Any, norm: nn.Module, input: Tensor) -> Tensor | None:
        if not self.is_current(before, None) or not self.takes(norm):
            return None  # it has changed since
        folded = self.folded(norm)
        return None if folded is None else folded.take_over(site(norm, FOLDED_SITE), input)


CONVOLUTIONS = folding_classes(FoldingConv, (nn.Conv1d, nn.Conv2d, nn.Conv3d, GroupedConv2d, GroupedConv3d), __name__)
globals().update({made.__name__: made for made in CONVOLUTIONS.values()})
