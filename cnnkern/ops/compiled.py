"""Under torch.compile: what is left to Inductor."""

import torch
from torch import Tensor


def left_to_inductor(input: Tensor, *others: Tensor) -> bool:
    """Whether a layer that is one pass over memory is to be PyTorch's own operators, for Inductor to fuse.

    It is in inference: while torch.compile traces without gradients. There a norm with running statistics, an addition
    and an activation join whatever stands before and behind them, which an operator of ours, a call inside of the
    graph, would prevent (docs/convert.md has what was measured). In training Inductor reads a batch norm's input
    several times and stores masks, and ours stays. An exported program names our operators. Tensors that PyTorch would
    broadcast or promote are ours to refuse.
    """
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.is_grad_enabled():
        return False
    return all(other.shape == input.shape and other.dtype == input.dtype for other in others)
