"""Other packages' kernels on a GPU, in operators' rows, where they are installed: `cnnkern bench --peers`."""

import importlib
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cnnkern.testing import Case

from .groups import Unavailable

Inputs = dict[str, Any]
Function = Callable[..., Tensor]  # takes an operator's arguments by name


@dataclass(frozen=True)
class Peer:
    package: str  # as it is imported
    install: str  # what pip is told
    # By operator: makes the function for such inputs. Raises Unavailable for what the package does not compute.
    make: dict[str, Callable[[Case, Inputs, bool], Function]]  # (case, inputs, whether gradients are wanted)
    around: Callable[[], AbstractContextManager[object]] = nullcontext  # what forward and backward run in
    # (what the package is given, what the operator is given to compute the same)
    inputs: Callable[[Inputs], tuple[Inputs, Inputs]] = lambda inputs: (inputs, inputs)


def _only(condition: bool, what: str) -> None:
    if not condition:
        raise Unavailable(f"computes only {what}")


def _over_last_dimension(inputs: Inputs) -> None:
    affine = inputs["weight"] is not None and inputs["bias"] is not None
    _only(len(inputs["normalized_shape"]) == 1 and affine, "layer norms of the last dimension, with weight and bias")


def _liger_layer_norm(case: Case, inputs: Inputs, training: bool) -> Function:
    norm = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    _over_last_dimension(inputs)
    return lambda input, normalized_shape, weight, bias, eps: norm.apply(input, weight, bias, eps)


def _quack_layer_norm(case: Case, inputs: Inputs, training: bool) -> Function:
    norm = importlib.import_module("quack.rmsnorm").layernorm_fwd
    _over_last_dimension(inputs)
    _only(not training and inputs["input"].dtype != torch.float64, "inference, in float32 and 16 bits")
    weight, bias = inputs["weight"].float(), inputs["bias"].float()  # it takes no others: cast before the time starts

    def call(input: Tensor, eps: float, **others: Any) -> Tensor:
        return norm(input.flatten(0, -2), weight, bias, eps).view_as(input)

    return call


def _apex_layer_norm(case: Case, inputs: Inputs, training: bool) -> Function:
    norm = importlib.import_module("apex.normalization.fused_layer_norm").fused_layer_norm_affine
    _over_last_dimension(inputs)

    def call(input: Tensor, normalized_shape: Any, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return norm(input, weight, bias, normalized_shape, eps)

    return call


def _spio_conv2d(case: Case, inputs: Inputs, training: bool) -> Function:
    conv = importlib.import_module("spio.functional").conv2d_gw8
    weight = inputs["weight"]
    covered = weight.shape[1] == 8 and weight.dtype == torch.float16 and inputs["groups"] > 1
    covered &= all(_pair(inputs.get(name, 1)) == (1, 1) for name in ("stride", "dilation"))
    covered &= inputs["input"].is_contiguous(memory_format=torch.channels_last)
    _only(covered, "groups of 8 channels with stride 1, in float16 and channels_last")
    pad_y, pad_x = _pair(inputs.get("padding", 0))

    def call(input: Tensor, weight: Tensor, bias: Tensor | None, groups: int, **others: Any) -> Tensor:
        return conv(input, weight, None if bias is None else bias.float(), 1, pad_y, pad_x, 1, groups)

    return call


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


ACTIVATIONS = {"leaky_relu": ("leaky_relu", 0.01), "none": ("identity", 0.0), "elu": ("elu", 1.0)}


def _inplace_abn(case: Case, inputs: Inputs, training: bool) -> Function:
    norm = importlib.import_module("inplace_abn").inplace_abn
    act = inputs.get("act", "relu")
    _only(act in ACTIVATIONS and inputs["weight"] is not None, f"{', '.join(ACTIVATIONS)}, with a weight")
    activation, parameter = ACTIVATIONS[act]

    def call(input: Tensor, weight: Tensor, bias: Tensor, eps: float, **others: Any) -> Tensor:
        statistics = (others["running_mean"], others["running_var"], others["training"], others["momentum"])
        return norm(input.clone(), weight, bias, *statistics, eps, activation, parameter)  # it overwrites its input

    return call


def _absolute_weights(inputs: Inputs) -> tuple[Inputs, Inputs]:
    """It multiplies by the absolute weight plus eps."""
    if inputs["weight"] is None:
        return inputs, inputs
    weight = inputs["weight"].abs()
    return inputs | {"weight": weight}, inputs | {"weight": weight + inputs["eps"]}


def _reference(case: Case, inputs: Inputs, training: bool) -> Function:
    return case.reference


def _gems() -> AbstractContextManager[object]:
    return importlib.import_module("flag_gems").use_gems()


PEERS = {
    "Liger-Kernel": Peer("liger_kernel", "liger-kernel", {"layer_norm": _liger_layer_norm}),
    "FlagGems": Peer(
        "flag_gems",
        "flag-gems",
        dict.fromkeys(("bn_act", "bn_add_act", "grouped_conv2d", "layer_norm"), _reference),
        around=_gems,
    ),
    "quack": Peer("quack", "quack-kernels", {"layer_norm": _quack_layer_norm}),
    "spio": Peer("spio", "spio", {"grouped_conv2d": _spio_conv2d}),
    "apex": Peer("apex", "git+https://github.com/NVIDIA/apex", {"layer_norm": _apex_layer_norm}),
    "inplace_abn": Peer("inplace_abn", "inplace-abn", {"bn_act": _inplace_abn}, inputs=_absolute_weights),
}


def of(operator: str) -> tuple[str, ...]:
    """The peers that compute an operator."""
    return tuple(name for name, peer in PEERS.items() if operator in peer.make)


def load(name: str, case: Case, inputs: Inputs, training: bool) -> Function:
    """A peer's function for such inputs. Raises Unavailable where there is none, or the package is not installed."""
    peer = PEERS[name]
    if importlib.util.find_spec(peer.package) is None:
        raise Unavailable(f"needs `pip install {peer.install}`")
    try:
        function = peer.make[case.name](case, inputs, training)
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"{name} cannot be used: {error}") from error
    return function
