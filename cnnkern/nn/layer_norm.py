"""Layer norms on the fused kernels; each is a `torch.nn.LayerNorm` and takes its checkpoints."""

from torch import Tensor, fx, nn

from cnnkern.nn.traced import NotScriptable, leaf
from cnnkern.ops.layer_norm import layer_norm
from cnnkern.ops.layer_norm2d import layer_norm2d


class LayerNorm(NotScriptable, nn.LayerNorm):
    """:class:`torch.nn.LayerNorm` on the fused kernel. Input (\\*, \\*normalized_shape)."""

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return leaf(self, input)
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class LayerNorm2d(NotScriptable, nn.LayerNorm):
    """Layer norm over the channels of (N, C, H, W), without a permute; the result has the input's memory format.

    Equivalent to ``torchvision.models.convnext.LayerNorm2d(num_channels, eps=1e-6)``, whose checkpoints it takes, and
    timm's: ``weight`` and ``bias`` of C. ``elementwise_affine`` and ``bias`` are those of :class:`torch.nn.LayerNorm`.
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-6,
        elementwise_affine: bool = True,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(num_channels, eps, elementwise_affine, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return leaf(self, input)
        return layer_norm2d(input, self.weight, self.bias, self.eps)
