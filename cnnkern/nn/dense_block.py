"""The dense block of DenseNets: layers that each see the outputs of all before."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cnnkern.extension import extension


class DenseBlock(nn.ModuleDict):
    """Layers that each see the input and the outputs of all layers before, concatenated.

    (N, C, H, W) -> (N, C + len(layers) * growth, H, W). Each layer maps all channels so far, (N, ..., H, W), to
    (N, growth, H, W). Equivalent to

        features = [x]
        for layer in layers.values():
            features.append(layer(torch.cat(features, 1)))
        y = torch.cat(features, 1)

    State-dict keys are those of torchvision's dense blocks where the layers have their names.

    In training on a CPU all features are in one buffer, of which each layer's output becomes a slice, so that nothing
    is concatenated. A :class:`~cnnkern.nn.BatchNormReLU2d` at the beginning of a layer then takes the statistics of
    each feature map once, and its backward pass adds its gradient to that of the buffer. A layer may be any module: it
    gets an ordinary tensor, which is the first channels of the buffer. If it writes to that tensor in place, the block
    raises RuntimeError. So does the backward pass if the block's result was written to in place.

    PyTorch concatenates

    - in eval mode, without gradients, and if the input needs no gradient;
    - on devices other than CPUs, for dtypes other than float32, float64, bfloat16 and float16, subclasses of tensors,
      and inputs that are not of four dimensions or are empty;
    - under :func:`torch.compile`, `torch.export`, `torch.jit.trace` and `torch.fx`, under modes (`TorchDispatchMode`,
      `TorchFunctionMode`), transforms of :mod:`torch.func`, forward-mode differentiation, saved-tensor hooks other than
      those of :func:`cnnkern.recompute`, and profilers that record shapes;
    - from a layer on whose output differs from the input in more than its channels, or has no room in the buffer;
    - without the compiled extension.

    Source: Huang et al., Densely Connected Convolutional Networks, 2016 (arXiv:1608.06993).
    """

    def __init__(self, layers: Mapping[str, nn.Module], growth: int) -> None:
        super().__init__(layers)
        self.growth = growth

    def forward(self, input: Tensor) -> Tensor:
        buffer = self._buffer(input)
        features = [input if buffer is None else buffer.features()]
        for layer in self.values():
            new = layer(_concatenated(features))
            if buffer is not None and buffer.append(new):
                features = [buffer.features()]
            else:
                buffer = None
                features.append(new)
        whole = buffer is None or features[0].shape[1] == input.shape[1] + len(self) * self.growth
        return _concatenated(features) if whole else torch.cat(features, 1)

    def _buffer(self, input: Tensor) -> Any:
        """The extension's buffer with the input's channels; None where PyTorch concatenates."""
        if torch.compiler.is_compiling() or not self.training or type(input) is not Tensor or extension is None:
            return None
        if torch._C._len_torch_function_stack() > 0:  # a mode that would see concatenations
            return None
        return extension.feature_buffer(input, len(self) * self.growth)

    def extra_repr(self) -> str:
        return f"growth={self.growth}"


def _concatenated(features: list[Tensor]) -> Tensor:
    return torch.cat(features, 1) if len(features) > 1 else features[0]
