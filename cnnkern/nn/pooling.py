"""Max pooling as a module."""

from torch import Tensor, fx, nn

from cnnkern.nn.traced import NotScriptable, leaf
from cnnkern.ops.max_pool2d import max_pool2d


class MaxPool2d(NotScriptable, nn.MaxPool2d):
    """``nn.MaxPool2d`` that saves one byte per output for backward, instead of the input.

    The constructor is that of :class:`torch.nn.MaxPool2d`; with ``return_indices=True`` PyTorch's kernel is used.
    Input (N, C, H, W) or (C, H, W), output (N, C, H', W') or (C, H', W').
    """

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if isinstance(input, fx.Proxy):
            return leaf(self, input)
        return max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )
