"""Residual addition with an activation in one operator."""

from torch import Tensor, fx, nn

from cnnkern.nn.traced import leaf
from cnnkern.ops.add_relu import add_relu


class AddReLU(nn.Module):
    """``F.relu(input + other)``, called as ``m(input, other)``; both of the same shape and dtype."""

    def forward(self, input: Tensor, other: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy) or isinstance(other, fx.Proxy):
            return leaf(self, input, other)
        return add_relu(input, other)
