"""Under torch.compile: what is left to Inductor."""

import torch
from torch import Tensor


def left_to_inductor(input: Tensor, *others: Tensor, training: bool = False) -> bool:
    """Whether a layer that is one pass over memory is to be PyTorch's own operators, for Inductor to fuse.

    Without gradients it is, unless it takes statistics: a norm with running statistics, an addition and an activation
    join whatever stands before and behind them, which an operator of ours, a call inside of the graph, would prevent.

    With gradients, in training, it is where a CPU's images are contiguous: Inductor chooses another layout for what it
    may, our operators bind it to this one, and whole models were a few hundredths slower with them than with grouped
    convolutions alone exchanged. In channels_last they were faster, and ours stay (docs/results.md, whole models).

    An exported program names our operators. Tensors that PyTorch would broadcast or promote are ours to refuse.
    """
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    if any(other.shape != input.shape or other.dtype != input.dtype for other in others):
        return False
    if not torch.is_grad_enabled():
        return not training
    return input.device.type == "cpu" and input.dim() >= 4 and input.is_contiguous()
