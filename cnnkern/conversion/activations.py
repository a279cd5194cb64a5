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


def is_apart(module: nn.Module) -> bool:
    """Whether the module does more than its class: somebody listens to its calls, or has given it another forward."""
    return why_apart(module) != ""


def why_apart(module: nn.Module) -> str:
    """What the report says of it; nothing where it `is_apart` in nothing."""
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
    return type(module) is nn.Identity and not is_apart(module)


def act_of_module(module: nn.Module) -> str | None:
    """The activation that the module computes, and nothing else; None where it is none of ours or has hooks."""
    if is_apart(module) or (type(module) is nn.LeakyReLU and module.negative_slope != 0.01):
        return None
    return _MODULES.get(type(module))
