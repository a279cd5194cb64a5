"""Which kernels answer for CUDA tensors: the extension's, Triton's or PyTorch's own.

Every operator has one name in PyTorch's dispatcher, and a backend is whoever is registered under that name on the
CUDA dispatch key. Nothing else in the package asks which one it is, and a GPU is not needed to switch.
"""

import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from cnnkern import eager

BACKENDS = ("cuda", "triton", "eager")
_LABELS = {"triton": "Triton", "eager": "eager PyTorch"}
# Modules of cnnkern.triton_kernels, and the operators that each has the launchers of.
_TRITON_KERNELS = {
    name: (name, f"{name}_backward")
    for name in ("bn_act", "bn_add_act", "add_relu", "grouped_conv2d", "layer_norm", "layer_norm2d")
} | {"sync_bn": ("sync_bn_stats", "sync_bn", "sync_bn_sums", "sync_bn_backward")}
_WITHOUT_CUDA = (
    "the extension was built without CUDA; `CNNKERN_CUDA=1 pip install --no-build-isolation .` builds it with, given "
    "nvcc and a CUDA build of torch (requirements.txt has both)"
)
_NOT_BUILT = "the extension was not built; `make`, or `pip install --no-build-isolation .`, builds it"

Launcher = Callable[..., Tensor | tuple[Tensor, ...]]

_extension = sys.modules.get("cnnkern._C")  # None where the package works without


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _launchers(name: str) -> dict[str, Launcher]:
    if name == "eager":
        return eager.LAUNCHERS
    if not _has_triton():
        raise RuntimeError("cnnkern: backend 'triton' needs the package triton, which is not installed")
    launchers = {}
    for kernel, operators in _TRITON_KERNELS.items():
        module = importlib.import_module(f"cnnkern.triton_kernels.{kernel}")
        launchers |= {operator: getattr(module, operator) for operator in operators}
    return launchers


def _imported_when_called(module_name: str, operator: str) -> Launcher:
    """A launcher of Triton's, which takes a second to import."""

    def launch(*arguments):
        return getattr(importlib.import_module(f"cnnkern.triton_kernels.{module_name}"), operator)(*arguments)

    return launch


def _operators() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("cnnkern::") for name in names if name.startswith("cnnkern::"))


def _has_kernel(operator: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"cnnkern::{operator}", key)


# As importing the extension left the CUDA key, before this module covers anything.
_CUDA_OPERATORS = frozenset(name for name in _operators() if _has_kernel(name, "CUDA"))
_BUILT_WITH_CUDA = _extension is not None and bool(_extension.build_info()["cuda"])


def _register(launchers: dict[str, Launcher]) -> torch.library.Library:
    library = torch.library.Library("cnnkern", "IMPL")
    for operator, launcher in launchers.items():
        library.impl(operator, launcher, "CUDA", allow_override=True)
    return library


def _default_launchers() -> tuple[str, dict[str, Launcher]]:
    """What answers for the operators that the extension has no CUDA kernel of."""
    missing = [name for name in _operators() if name not in _CUDA_OPERATORS]
    if not _has_triton():
        return "eager", {name: eager.LAUNCHERS[name] for name in missing}
    module_of = {operator: module for module, operators in _TRITON_KERNELS.items() for operator in operators}
    return "triton", {name: _imported_when_called(module_of[name], name) for name in missing}


# For as long as they live, libraries keep what they registered. The default ones are below any other.
_default_name, _defaults = _default_launchers()
_default_library = _register(_defaults)
_lock = threading.RLock()
_active: tuple[str, torch.library.Library] | None = None  # None: the extension's own kernels, and the defaults


def _switch(name: str | None) -> None:
    """Registers over what is there, and only then takes that away: a call from another thread always finds a kernel."""
    global _active
    launchers = _launchers(name) if name in _LABELS else None  # may raise, while nothing has changed
    with _lock:
        previous, _active = _active, None if launchers is None else (name, _register(launchers))
        if previous is not None:
            previous[1]._destroy()


class backend:
    """Lets `name` answer for CUDA tensors, in the whole process: ``"cuda"``, ``"triton"`` or ``"eager"``.

    ``backend("triton")`` switches; ``with backend("triton"):`` switches back at the end of the block, to what answered
    before. ``"cuda"`` are the extension's kernels; ``"eager"`` is PyTorch's own operators behind ours, which is what
    kernels are compared with (its gradient computes the output again, for the mask of the ReLU).

    By default the extension's kernels answer for the operators that it has any of, Triton for the others, and, where
    Triton is not installed either, eager PyTorch: :func:`status` says who answers. All threads see a switch, and a call
    during one is computed by either backend.

    Raises ValueError for an unknown name, RuntimeError for a backend that is not there; nothing has changed then.
    """

    def __init__(self, name: str) -> None:
        if name not in BACKENDS:
            raise ValueError(f"cnnkern: backend must be one of {', '.join(BACKENDS)}; got {name!r}")
        if name == "cuda" and not _BUILT_WITH_CUDA:
            raise RuntimeError(f"cnnkern: backend 'cuda' is not available: {_WITHOUT_CUDA}")
        self.name = name
        with _lock:
            self._previous = None if _active is None else _active[0]
            _switch(name)

    def __enter__(self) -> "backend":
        return self

    def __exit__(self, *exception: object) -> None:
        _switch(self._previous)

    def __repr__(self) -> str:
        return f"backend({self.name!r})"


def _cuda_kernel(operator: str) -> str:
    if _active is not None:
        return _LABELS[_active[0]]
    if operator in _CUDA_OPERATORS:
        return "CUDA C++"
    if _extension is None:
        return f"{_LABELS[_default_name]}: {_NOT_BUILT}"
    reason = "the extension has no CUDA kernel of this operator" if _BUILT_WITH_CUDA else _WITHOUT_CUDA
    return f"{_LABELS[_default_name]}: {reason}"


def _cpu_kernel(operator: str) -> str:
    if _extension is None:
        return f"eager PyTorch: {_NOT_BUILT}"
    if _has_kernel(operator, "CPU"):
        return f"C++ {_extension.cpu_capability()}"
    return "none: the extension has no CPU kernel for this operator"


def kernels_on(device: str) -> str:
    """Whose kernels answer on "cpu" or "cuda", by name alone: those of batch norm, as of any operator."""
    kernel = _cpu_kernel("bn_act") if device == "cpu" else _cuda_kernel("bn_act")
    return kernel.partition(":")[0].removeprefix("C++ ")


def status() -> dict[str, dict[str, str]]:
    """Which kernel answers for which device, as ``{operator: {"cpu": kernel, "cuda": kernel}}``.

    A kernel is ``"C++ AVX512"`` (or AVX2, DEFAULT), ``"CUDA C++"``, ``"Triton"``, ``"eager PyTorch"``, the latter two
    with ``": "`` and the reason where they answer because nothing else does, or ``"none: "`` with the reason.
    """
    return {operator: {"cpu": _cpu_kernel(operator), "cuda": _cuda_kernel(operator)} for operator in _operators()}
