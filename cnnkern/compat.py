"""All Python code that differs between the supported releases of PyTorch.

Each entry names its releases, and so when it can be removed. csrc/compat.h is the same for the extension.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., object])


def constant_while_traced(function: F) -> F:
    """Makes torch.compile call this function while tracing, and treat its result as a constant.

    2.11 cannot trace a ContextVar, 2.14 can. `torch.compiler.assume_constant_result` does no more than this, and takes
    a second to import.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def weight_beside(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """The weight of PyTorch's batch norm: ones on a GPU where there is a bias alone, to which its CUDA kernels give a
    wrong gradient in eval, or crash. Seen in 2.11; whether a later release has it is not known."""
    return torch.ones_like(bias) if input.is_cuda and weight is None and bias is not None else weight


@constant_while_traced
def has_lists_of_passes() -> bool:
    """Whether Inductor takes several passes over a graph before autograd, each with a uuid: 2.14 does, 2.11 does not.
    Without, batch norms of converted models are Inductor's under torch.compile."""
    from torch._inductor import custom_graph_pass

    return hasattr(custom_graph_pass, "get_custom_graph_passes")
