"""Which kernels answer for CUDA tensors: the extension's, Triton's or PyTorch's own.

Every operator has one name in PyTorch's dispatcher, and a backend is whoever is registered under that name on the
CUDA dispatch key. Nothing else in the package asks which one it is, and a GPU is not needed to switch.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cnnkern import _C, reference
from cnnkern.triton_kernels import check

BACKENDS = ("cuda", "triton", "eager")
_LABELS = {"triton": "Triton", "eager": "eager PyTorch"}
# Modules of cnnkern.triton_kernels and the operators whose launchers they hold.
_TRITON_KERNELS = {"bn_act": ("bn_act", "bn_act_backward")}
_WITHOUT_CUDA = (
    "the extension was built without CUDA; `CNNKERN_CUDA=1 pip install --no-build-isolation .` builds it with, given "
    "nvcc and a CUDA build of torch (requirements.txt has both)"
)

Launchers = dict[str, Callable[..., tuple[Tensor, ...]]]


def _eager_bn_act(x, weight, bias, running_mean, running_var, training, momentum, eps, act):
    check.batch_norm("cnnkern::bn_act", x, weight, bias, running_mean, running_var, training, eps)
    check.activation("cnnkern::bn_act", act)
    if x.numel() == 0:
        mean = x.new_zeros(x.shape[1], dtype=torch.float64)
        return torch.empty_like(x), mean, torch.ones_like(mean)
    y, mean, rstd = torch.native_batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps)
    if not training:
        mean, rstd = running_mean, (running_var.double() + eps).rsqrt()
    return reference.ACTIVATIONS[act](y), mean.double(), rstd.double()


_aten = torch.ops.aten
_ACTIVATION_GRADIENTS = {
    "relu": lambda dy, pre: _aten.threshold_backward(dy, pre, 0),
    "relu6": lambda dy, pre: _aten.hardtanh_backward(dy, pre, 0, 6),
    "leaky_relu": lambda dy, pre: _aten.leaky_relu_backward(dy, pre, 0.01, False),
    "sigmoid": lambda dy, pre: _aten.sigmoid_backward(dy, torch.sigmoid(pre)),
    "silu": _aten.silu_backward,
    "hardswish": _aten.hardswish_backward,
}


def _eager_bn_act_backward(dy, x, weight, bias, mean, rstd, training, act, output_mask: Sequence[bool]):
    check.batch_norm_backward("cnnkern::bn_act_backward", dy, x, weight, bias, mean, rstd, output_mask)
    check.activation("cnnkern::bn_act_backward", act)
    parameters = (x, weight, bias)
    if x.numel() == 0:
        return tuple(
            t.new_zeros(t.shape) if m else x.new_empty(0) for t, m in zip(parameters, output_mask, strict=True)
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    w, b = (None if v is None else v.to(wide) for v in (weight, bias))
    mean, rstd, var = mean.to(wide), rstd.to(wide), rstd.pow(-2).to(wide)
    if act != "none":  # the operator saves no mask, so what the activation saw is computed again
        dy = _ACTIVATION_GRADIENTS[act](dy, torch.native_batch_norm(x, w, b, mean, var, False, 0.0, 0.0)[0])
    # In eval the statistics are the running ones, and eps is part of this variance.
    grads = torch.ops.aten.native_batch_norm_backward(dy, x, w, mean, var, mean, rstd, training, 0.0, list(output_mask))
    return tuple(g.to(t.dtype) if m else x.new_empty(0) for g, t, m in zip(grads, parameters, output_mask, strict=True))


def _launchers(name: str) -> Launchers:
    if name == "eager":
        return {"bn_act": _eager_bn_act, "bn_act_backward": _eager_bn_act_backward}
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("cnnkern: backend 'triton' needs the package triton, which is not installed")
    launchers = {}
    for module_name, operators in _TRITON_KERNELS.items():
        module = importlib.import_module(f"cnnkern.triton_kernels.{module_name}")
        launchers |= {operator: getattr(module, operator) for operator in operators}
    return launchers


def _operators() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("cnnkern::") for name in names if name.startswith("cnnkern::"))


def _has_kernel(operator: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"cnnkern::{operator}", key)


_BUILT_WITH_CUDA = bool(_C.build_info()["cuda"])
# As importing the extension left the CUDA key, before a backend of this module covers anything.
# A build without CUDA has only what hands CUDA tensors to PyTorch's operators.
_CUDA_OPERATORS = frozenset(name for name in _operators() if _C.build_info()["cuda"] and _has_kernel(name, "CUDA"))


@dataclass
class _Registration:
    """What a Python backend has put on the CUDA key, for as long as the library lives."""

    name: str
    operators: frozenset[str]
    library: torch.library.Library


_active: _Registration | None = None  # None: the extension's own kernels, where it has any


def _switch(name: str | None) -> None:
    global _active
    launchers = _launchers(name) if name in _LABELS else None  # may raise, while nothing has changed
    if _active is not None:
        _active.library._destroy()
        _active = None
    if launchers is not None:
        library = torch.library.Library("cnnkern", "IMPL")
        for operator, launcher in launchers.items():
            library.impl(operator, launcher, "CUDA", allow_override=True)
        _active = _Registration(name, frozenset(launchers), library)


class backend:
    """Lets `name` answer for CUDA tensors, in the whole process: ``"cuda"``, ``"triton"`` or ``"eager"``.

    ``backend("triton")`` switches; ``with backend("triton"):`` switches back at the end of the block. ``"cuda"``, the
    default, are the extension's kernels; ``"eager"`` is PyTorch's own operators behind ours, which is what kernels
    are compared with (its gradient computes the output again, for the mask of the ReLU). An operator that a backend
    does not have stays with the extension: :func:`status` says who answers.

    Raises ValueError for an unknown name, RuntimeError for a backend that is not there; nothing has changed then.
    """

    def __init__(self, name: str) -> None:
        if name not in BACKENDS:
            raise ValueError(f"cnnkern: backend must be one of {', '.join(BACKENDS)}; got {name!r}")
        if name == "cuda" and not _BUILT_WITH_CUDA:
            raise RuntimeError(f"cnnkern: backend 'cuda' is not available: {_WITHOUT_CUDA}")
        self.name = name
        self._previous = None if _active is None else _active.name
        _switch(name)

    def __enter__(self) -> "backend":
        return self

    def __exit__(self, *exception: object) -> None:
        _switch(self._previous)

    def __repr__(self) -> str:
        return f"backend({self.name!r})"


# What csrc/autograd hands to PyTorch's operators on a GPU: these always, because they have CPU kernels only ...
_LEFT_TO_PYTORCH = {"grouped_conv2d", "grouped_conv2d_backward"}
# ... and where the extension was built without CUDA all but these.
_NEVER_LEFT_TO_PYTORCH = {"bn_act", "bn_act_backward"}


def _cuda_kernel(operator: str) -> str:
    if operator in _LEFT_TO_PYTORCH:
        return "PyTorch's own operators: no CUDA kernel of ours yet"
    if not _BUILT_WITH_CUDA and operator not in _NEVER_LEFT_TO_PYTORCH:
        return f"PyTorch's own operators: {_WITHOUT_CUDA}"
    if _active is not None and operator in _active.operators:
        return _LABELS[_active.name]
    if operator in _CUDA_OPERATORS:
        return "CUDA C++"
    if _BUILT_WITH_CUDA:
        return "none: the extension has no CUDA kernel for this operator"
    return f"none: {_WITHOUT_CUDA}; cnnkern.backends.backend('triton') needs neither"


def status() -> dict[str, dict[str, str]]:
    """Which kernel answers for which device, as ``{operator: {"cpu": kernel, "cuda": kernel}}``.

    A kernel is ``"C++ AVX512"`` (or AVX2, DEFAULT), ``"CUDA C++"``, ``"Triton"``, ``"eager PyTorch"``,
    ``"PyTorch's own operators: "`` with the reason, or
    ``"none: "`` with the reason and how to get one.
    """
    on_cpu = f"C++ {_C.cpu_capability()}"
    missing = "none: the extension has no CPU kernel for this operator"
    return {
        operator: {"cpu": on_cpu if _has_kernel(operator, "CPU") else missing, "cuda": _cuda_kernel(operator)}
        for operator in _operators()
    }
