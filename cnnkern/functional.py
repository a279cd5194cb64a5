"""The operators as functions, with the signatures of `torch.nn.functional`."""

from cnnkern.ops.bn_act import batch_norm_act, batch_norm_relu

__all__ = ["batch_norm_act", "batch_norm_relu"]
