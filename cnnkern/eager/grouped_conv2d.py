"""Grouped convolution, by PyTorch's operators."""

from collections.abc import Sequence

import torch

from cnnkern.eager.tensors import asked


def grouped_conv2d(x, weight, bias, stride, padding, dilation, groups):
    return torch.ops.aten.convolution(x, weight, bias, stride, padding, dilation, False, (0,), groups)


def grouped_conv2d_backward(dy, x, weight, stride, padding, dilation, groups, output_mask: Sequence[bool]):
    grads = torch.ops.aten.convolution_backward(
        dy, x, weight, [weight.shape[0]], stride, padding, dilation, False, (0,), groups, list(output_mask)
    )
    return asked(grads, output_mask, (x, weight, weight), x)
