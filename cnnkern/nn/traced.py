"""Layers under `torch.fx`: each call is one node of the graph."""

from typing import Any

from torch import fx, nn


def leaf(module: nn.Module, *arguments: Any) -> Any:
    """The call of one of cnnkern's layers as one node of the graph, as `torch.fx` records layers of torch.nn.

    A tracer only treats torch's own layers as leaves. So each forward of cnnkern.nn first checks whether an argument is
    a proxy. (A common wrapper for this check would add another call to every forward.)
    """
    tracer = next(a.tracer for a in arguments if isinstance(a, fx.Proxy))
    return tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, {})  # type: ignore[attr-defined]
