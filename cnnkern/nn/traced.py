"""Layers under `torch.fx`, where each call is one node of the graph, and under `torch.jit.script`, which is refused."""

from typing import Any, NoReturn

from torch import fx, nn


def leaf(module: nn.Module, *arguments: Any) -> Any:
    """The call of one of cnnkern's layers as one node of the graph, as `torch.fx` records layers of torch.nn.

    A tracer only treats torch's own layers as leaves. So each forward of cnnkern.nn first checks whether an argument is
    a proxy. (A common wrapper for this check would add another call to every forward.)
    """
    tracer = next(a.tracer for a in arguments if isinstance(a, fx.Proxy))
    return tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, {})  # type: ignore[attr-defined]


class NotScriptable(nn.Module):
    """A layer that `torch.jit.script` cannot compile."""

    def __prepare_scriptable__(self) -> NoReturn:
        raise TypeError(
            f"cnnkern: torch.jit.script cannot compile {type(self).__name__}; script cnnkern.revert(model), or use "
            "torch.jit.trace or torch.export, which take converted models"
        )
