"""Which kernels compute CUDA tensors: the extension's, Triton's or PyTorch's own operators.

Every operator has one name in PyTorch's dispatcher. A backend is the implementation under that name on the CUDA
dispatch key. Nothing else in the package depends on which one it is, and switching needs no GPU.

The kernel on that key is registered once and stays, because the dispatcher must not free a kernel while a thread runs
it. Without CUDA C++ kernels it is a function that looks up the launcher in a table. With them it is the CUDA C++ kernel
(csrc/register_cuda.cpp), which reads a flag: if that is set, it calls the operator of the same name in
torch.ops.cnnkern_launchers, which is the same function.
"""

import importlib
import importlib.util
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from cnnkern import eager
from cnnkern.extension import extension

BACKENDS = ("cuda", "triton", "eager")
_LABELS = {"triton": "Triton", "eager": "eager PyTorch"}
# Modules of cnnkern.triton_kernels, and the operators that each has the launchers of.
_TRITON_KERNELS = {
    name: (name, f"{name}_backward")
    for name in (
        "bn_act",
        "bn_add_act",
        "bn_prelu",
        "add_relu",
        "grouped_conv2d",
        "layer_norm",
        "layer_norm2d",
        "max_pool2d",
    )
} | {"sync_bn": ("sync_bn_stats", "sync_bn", "sync_bn_sums", "sync_bn_backward")}
_WITHOUT_CUDA = (
    "the extension was built without CUDA; `CNNKERN_CUDA=1 pip install --no-build-isolation .` builds it with, given "
    "nvcc and a CUDA build of torch (requirements.txt has both)"
)
if torch.version.hip:
    _WITHOUT_CUDA = "this torch is built for ROCm, and the CUDA C++ kernels are for CUDA only"
_NOT_BUILT = "the extension was not built; `make`, or `pip install --no-build-isolation .`, builds it"

Launcher = Callable[..., Tensor | tuple[Tensor, ...]]


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
    """A launcher of a Triton kernel; Triton is imported at the first call, which takes a second."""

    def launch(*arguments):
        return getattr(importlib.import_module(f"cnnkern.triton_kernels.{module_name}"), operator)(*arguments)

    return launch


def _operators() -> list[str]:
    """Those that have a kernel per device. Others, such as bn_act_conv2d, consist of these."""
    names = torch._C._dispatch_get_all_op_names()
    found = (name.removeprefix("cnnkern::") for name in names if name.startswith("cnnkern::"))
    return sorted(name for name in found if not _has_kernel(name, "CompositeExplicitAutograd"))


def _has_kernel(operator: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"cnnkern::{operator}", key)


_BUILT_WITH_CUDA = extension is not None and bool(extension.build_info()["cuda"])


def _default_launchers() -> tuple[str, dict[str, Launcher]]:
    """The default launchers without CUDA C++ kernels."""
    if not _has_triton():
        return "eager", eager.LAUNCHERS
    pairs = [(module, operator) for module, operators in _TRITON_KERNELS.items() for operator in operators]
    return "triton", {operator: _imported_when_called(module, operator) for module, operator in pairs}


_default_name, _defaults = _default_launchers()
_lock = threading.RLock()
_active: str | None = None  # None: the extension's own kernels, or the defaults
_answering = _defaults  # replaced as a whole, so that a call finds the launchers of one backend


def _looked_up(operator: str) -> Launcher:
    def launch(*arguments):
        return _answering[operator](*arguments)

    return launch


def _register() -> torch.library.Library:
    if _BUILT_WITH_CUDA:
        library = torch.library.Library("cnnkern_launchers", "DEF")
        for operator in _operators():
            library.define(str(getattr(torch.ops.cnnkern, operator).default._schema).removeprefix("cnnkern::"))
    else:
        library = torch.library.Library("cnnkern", "IMPL")
    for operator in _operators():
        library.impl(operator, _looked_up(operator), "CUDA")
    return library


_library = _register()  # the registrations last as long as this object


def _switch(name: str | None) -> None:
    """A call from another thread during a switch uses the old or the new backend."""
    global _active, _answering
    launchers = _launchers(name) if name in _LABELS else None  # may raise, while nothing has changed
    with _lock:
        _active = None if launchers is None else name
        if not _BUILT_WITH_CUDA:
            _answering = launchers or _defaults
            return
        if launchers is not None:  # else they stay, for a call that has already asked the flag
            _answering = launchers
        extension.let_launchers_answer(launchers is not None)


class backend:
    """Selects the kernels for CUDA tensors, in the whole process: ``"cuda"``, ``"triton"`` or ``"eager"``.

    ``backend("triton")`` switches. ``with backend("triton"):`` switches, and switches back at the end of the block.
    ``"cuda"`` selects the extension's CUDA C++ kernels. ``"eager"`` selects PyTorch's operators with cnnkern's schemas,
    as a baseline (its gradient recomputes the output for the mask of the ReLU).

    The default is ``"cuda"`` if the extension was built with CUDA, otherwise ``"triton"`` if Triton is installed,
    otherwise ``"eager"``. :func:`status` shows it. A switch applies to all threads. A call that runs during a switch
    may use either backend.

    Raises ValueError for an unknown name and RuntimeError for a backend that is not available. Then nothing changes.
    """

    def __init__(self, name: str) -> None:
        if name not in BACKENDS:
            raise ValueError(f"cnnkern: backend must be one of {', '.join(BACKENDS)}; got {name!r}")
        if name == "cuda" and not _BUILT_WITH_CUDA:
            raise RuntimeError(f"cnnkern: backend 'cuda' is not available: {_WITHOUT_CUDA}")
        self.name = name
        with _lock:
            self._previous = _active
            _switch(name)

    def __enter__(self) -> "backend":
        return self

    def __exit__(self, *exception: object) -> None:
        _switch(self._previous)

    def __repr__(self) -> str:
        return f"backend({self.name!r})"


def _cuda_kernel() -> str:
    if _active is not None:
        return _LABELS[_active]
    if _BUILT_WITH_CUDA:
        return "CUDA C++"
    return f"{_LABELS[_default_name]}: {_NOT_BUILT if extension is None else _WITHOUT_CUDA}"


def _cpu_kernel(operator: str) -> str:
    if extension is None:
        return f"eager PyTorch: {_NOT_BUILT}"
    if _has_kernel(operator, "CPU"):
        return f"C++ {extension.cpu_capability()}"
    return "none: the extension has no CPU kernel for this operator"


def kernels_on(device: str) -> str:
    """The name of the kernels used on "cpu" or "cuda": those of batch norm, which hold for every operator."""
    kernel = _cpu_kernel("bn_act") if device == "cpu" else _cuda_kernel()
    return kernel.partition(":")[0].removeprefix("C++ ")


def status() -> dict[str, dict[str, str]]:
    """The kernel of each operator and device: ``{operator: {"cpu": kernel, "cuda": kernel}}``.

    A kernel is ``"C++ AVX512"`` (or AVX2, DEFAULT), ``"CUDA C++"``, ``"Triton"`` or ``"eager PyTorch"``. The latter two
    are followed by ``": "`` and a reason if they are used for lack of another; ``"none: "`` and a reason if there is
    none.
    """
    return {operator: {"cpu": _cpu_kernel(operator), "cuda": _cuda_kernel()} for operator in _operators()}
