"""The launchers in Python, of Triton and of eager PyTorch, refuse what the C++ kernels refuse, in the same words."""

import importlib.util

import pytest
import torch
from torch import Tensor

from cnnkern import backends, eager, testing

BACKENDS = ["eager"] + (["triton"] if importlib.util.find_spec("triton") else [])

# operator -> what is wrong -> arguments by name, made from the right ones
MISUSE = {
    "add_relu": {
        "integers": {"x": Tensor.long},
        "residual of another shape": {"residual": lambda t: t[..., :-1]},
        "residual of another dtype": {"residual": Tensor.double},
    },
    "add_relu_backward": {
        "integers": {"dy": Tensor.long},
        "mask of another size": {"mask": lambda t: t[:-1]},
        "mask of another dtype": {"mask": Tensor.int},
        "a dimension twice": {"order": lambda order: [*order[:-1], order[0]]},
        "a dimension too few": {"order": lambda order: order[:-1]},
    },
    "bn_add_act": {
        "another activation": {"act": lambda _: "tanh"},
        "a number that relu does not take": {"act_param": lambda _: 0.5},
        "a slope that is not finite": {"act": lambda _: "leaky_relu", "act_param": lambda _: float("nan")},
        "residual of another shape": {"residual": lambda t: t[:, :, :-1]},
        "weight of another length": {"weight": lambda t: t[:-1]},
        "running_mean alone": {"running_var": lambda _: None},
        "one value per channel": {"x": lambda t: t[:1, :, :1, :1], "residual": lambda t: t[:1, :, :1, :1]},
    },
    "bn_prelu": {
        "slopes of other channels": {"slope": lambda t: t[:-1]},
        "slopes in a matrix": {"slope": lambda t: t[:, None]},
        "slopes of another dtype": {"slope": lambda t: t.double()},
        "residual of another shape": {"residual": lambda _: torch.ones(3, 5, 4, 3)},
    },
    "bn_prelu_backward": {
        "dy of another shape": {"dy": lambda t: t[:, :, :-1]},
        "slopes of other channels": {"slope": lambda t: t[:-1]},
        "residual of another dtype": {"residual": lambda _: torch.ones(3, 5, 4, 4, dtype=torch.float64)},
        "a gradient of no residual": {"output_mask": lambda _: [True] * 5},
        "no bias": {"bias": lambda _: None},
    },
    "bn_add_act_backward": {
        "dy of another shape": {"dy": lambda t: t[:, :, :-1]},
        "mask of another size": {"mask": lambda t: t[:-1]},
        "another activation": {"act": lambda _: "tanh"},
        "no residual": {"act": lambda _: "silu", "mask": lambda t: t[:0]},
        "residual of another dtype": {
            "act": lambda _: "silu",
            "mask": lambda t: t[:0],
            "residual": lambda _: torch.ones(3, 5, 4, 4, dtype=torch.float64),
        },
        "alpha that is not finite": {"act": lambda _: "elu", "act_param": lambda _: float("inf")},
        "float32 mean": {"mean": Tensor.float},
        "dweight without weight": {"weight": lambda _: None},
        "channels_last of two dimensions": {
            **{name: lambda t: t.movedim(1, -1).flatten(0, -2) for name in ("dy", "x")},
            "channels_last": lambda _: True,
        },
    },
    "bn_act_backward": {
        "dy of another shape": {"dy": lambda t: t[:, :, :-1]},
        "another activation": {"act": lambda _: "tanh"},
        "a number that silu does not take": {"act": lambda _: "silu", "act_param": lambda _: 0.5},
        "float32 rstd": {"rstd": Tensor.float},
        "dweight without weight": {"weight": lambda _: None},
        "dbias behind an activation without bias": {"bias": lambda _: None},
    },
    "sync_bn": {
        "integers": {"x": Tensor.long},
        "one dimension": {"x": lambda t: t[:, 0, 0, 0]},
        "another activation": {"act": lambda _: "tanh"},
        "another activation beside a residual": {"act": lambda _: "tanh", "residual": lambda _: torch.ones(3, 5, 4, 4)},
        "a number that relu does not take": {"act_param": lambda _: 0.5},
        "residual of another shape": {"residual": lambda _: torch.ones(3, 5, 4, 3)},
        "weight of another length": {"weight": lambda t: t[:-1]},
        "float32 mean": {"mean": Tensor.float},
        "rstd of another length": {"rstd": lambda t: t[:-1]},
    },
    "sync_bn_backward": {
        "dy of another shape": {"dy": lambda t: t[:, :, :-1]},
        "mask of another size": {"mask": lambda _: torch.zeros(3, dtype=torch.uint8)},
        "another activation": {"act": lambda _: "tanh"},
        "float32 sums": {"sums": Tensor.float},
        "sums of another shape": {"sums": torch.flatten},
        "count of no dimension": {"count": torch.squeeze},
        "dresidual without a mask": {"output_mask": lambda _: [True, True]},
        "residual that relu does not read": {"residual": lambda _: torch.ones(3, 5, 4, 4)},
        "residual of another shape": {"act": lambda _: "silu", "residual": lambda _: torch.ones(3, 5, 4, 3)},
        "channels_last of two dimensions": {
            "x": lambda t: t.reshape(-1, 5),
            "dy": lambda t: t.reshape(-1, 5),
            "channels_last": lambda _: True,
        },
    },
    "layer_norm": {
        "integers": {"x": Tensor.long},
        "no dimensions": {"normalized_shape": lambda _: []},
        "other dimensions": {"normalized_shape": lambda _: [5]},
        "more dimensions than there are": {"normalized_shape": lambda s: [1] * 4 + list(s)},
        "weight of another shape": {"weight": lambda t: t[:-1]},
        "bias of another dtype": {"bias": Tensor.double},
    },
    "layer_norm_backward": {
        "dy of another dtype": {"dy": Tensor.double},
        "mean of another shape": {"mean": lambda t: t[..., 0]},
        "float64 rstd": {"rstd": Tensor.double},
        "dweight without weight": {"weight": lambda _: None},
    },
    "layer_norm2d": {
        "three dimensions": {"x": lambda t: t[0]},
        "weight of another length": {"weight": lambda t: t[:-1]},
        "bias of another dtype": {"bias": Tensor.double},
    },
    "layer_norm2d_backward": {
        "dy of another shape": {"dy": lambda t: t[:1]},
        "rstd of another shape": {"rstd": lambda t: t[:1]},
        "dweight without weight": {"weight": lambda _: None},
    },
    "grouped_conv2d": {
        "weight of other channels": {"weight": lambda t: t[:, :0]},
        "groups that do not divide": {"groups": lambda _: 4},
        "bias of another length": {"bias": lambda t: t[:-1]},
        "a kernel larger than the image": {"x": lambda t: t[..., :1, :1], "padding": lambda _: [0, 0]},
        "another dtype": {"weight": Tensor.double},
    },
    "max_pool2d": {
        "integers": {"x": Tensor.long},
        "three dimensions": {"x": lambda t: t[0]},
        "no channels": {"x": lambda t: t[:, :0]},
        "a kernel of three numbers": {"kernel_size": lambda _: [3, 3, 3]},
        "no kernel": {"kernel_size": lambda _: (0, 3)},
        "a window of too many": {"kernel_size": lambda _: (16, 17)},
        "no stride": {"stride": lambda _: (1, 0)},
        "padding of more than half": {"padding": lambda _: (1, 2)},
        "an image smaller than the kernel": {"kernel_size": lambda _: (7, 3), "padding": lambda _: (1, 1)},
    },
    "max_pool2d_backward": {
        "integers": {"dy": Tensor.long},
        "padding of more than half": {"padding": lambda _: (2, 1)},
        "dy of three dimensions": {"dy": lambda t: t[0]},
        "dy of another shape": {"dy": lambda t: t[:, :, :-1]},
        "three sizes": {"size": lambda _: [4, 4, 4]},
        "no rows": {"size": lambda _: [0, 4]},
        "positions of another shape": {"positions": lambda t: t[:1]},
        "positions of another dtype": {"positions": Tensor.int},
    },
}


def raised(function, arguments) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011  (the caller compares type and message)
        function(*arguments)
    return caught.value


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("operator", "misuse"), [(o, m) for o, row in MISUSE.items() for m in row])
def test_errors_are_those_of_the_cpp_kernel(operator, misuse, backend, generator):
    case = testing.CASES[operator.removesuffix("_backward")]
    inputs = case.inputs((3, 5, 4, 4), torch.float32, generator=generator)
    op, values = case.forward_call(inputs)
    if operator.endswith("_backward"):
        op, values = case.backward_call(inputs, torch.ones_like(case.reference(**inputs)))
    arguments = dict(zip([a.name for a in op._schema.arguments], values, strict=False))  # the last have defaults
    state = {n: arguments[n].clone() for n in case.mutated if n in arguments}
    arguments |= {name: change(arguments[name]) for name, change in MISUSE[operator][misuse].items()}
    launcher = (eager.LAUNCHERS if backend == "eager" else backends._launchers(backend))[operator]
    mine, theirs = raised(launcher, arguments.values()), raised(op, arguments.values())
    assert type(mine) is type(theirs)
    assert str(mine) == str(theirs)
    assert all(torch.equal(inputs[name], value) or name not in arguments for name, value in state.items())
