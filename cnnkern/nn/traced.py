"""Under `torch.fx`."""

from typing import Any

from torch import fx, nn


def leaf(module: nn.Module, *arguments: Any) -> Any:
    """The call of a layer of ours as one node of the graph, as `torch.fx` records those of torch.nn's layers.

    Only of torch's own does a tracer know that it need not look inside, so each forward pass of ours begins with the
    question whether an argument is a proxy. (A wrapper that asks it for all would cost every call another one.)
    """
    tracer = next(a.tracer for a in arguments if isinstance(a, fx.Proxy))
    return tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, {})  # type: ignore[attr-defined]
