"""Which modules are activations of our operators, whatever arguments they were given."""

from torch import nn

_MODULES = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to the module's calls, or has put a forward pass of his own into the instance."""
    return why_apart(module) != ""


def why_apart(module: nn.Module) -> str:
    if "forward" in module.__dict__:
        return "has another forward pass than its class"
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return "has hooks" if any(hooks) else ""


def is_identity(module: nn.Module) -> bool:
    """Whether this is an `nn.Identity`, no subclass, that nobody listens to."""
    return type(module) is nn.Identity and not has_hooks(module)


def act_of_module(module: nn.Module) -> str | None:
    """The activation that the module computes, and nothing else; None where it is none of ours or has hooks."""
    if has_hooks(module) or (type(module) is nn.LeakyReLU and module.negative_slope != 0.01):
        return None
    return _MODULES.get(type(module))
