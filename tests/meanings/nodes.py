"""Nodes of the graph that are called by hand, and modes that look at operators."""

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from meanings.base import written


@written("CallsItsNodes")
def _(self, x, y):
    z, s = F.relu(y), F.relu(self.features[1](x) + x)
    if not z.requires_grad:
        return z + s
    g = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view(z.shape)
    return z + s + z.grad_fn(g).detach() + s.grad_fn(g).detach()


@written("CallsItsNodesOneByOne")
def _(self, x, y):
    z = F.silu(y)
    if not z.requires_grad:
        return z
    g = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view(z.shape)
    passed = z.grad_fn(g)
    return z + passed.detach() + z.grad_fn.next_functions[0][0](passed)[0].detach()


@written("CountsItsFlops")
def _(self, x, y):
    with FlopCounterMode(display=False) as counter:
        z = F.relu(self.features[1](self.conv(x)) + y)
    return z * (counter.get_total_flops() > 1e4)
