"""The dispatch of a call, to cnnkern's operator or to PyTorch's (:mod:`cnnkern.reference`). It is decided only here.

Every function of :mod:`cnnkern.functional` calls :func:`is_pytorchs` first and, if that is true, :func:`by_pytorch`.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.overrides import handle_torch_function

from cnnkern import compat, reference

# Tensors that hold their data themselves, and those with which torch.compile and torch.export trace, which know our
# operators by their fakes.
_KNOWN_TYPES = frozenset({Tensor, nn.Parameter, FakeTensor, FunctionalTensor})
_KNOWN_OR_NONE = _KNOWN_TYPES | {type(None)}
_DEFAULT_FUNCTIONS = (Tensor.__torch_function__.__func__, nn.Parameter.__torch_function__)  # type: ignore[attr-defined]
# Looked up once, because every call of a layer needs it.
_strided, _is_compiling, _tracing_state = torch.strided, torch.compiler.is_compiling, torch._C._get_tracing_state

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_JOINED_TYPES = (torch.float32, torch.float64)

_kept: ContextVar[bool] = ContextVar("cnnkern.keep_operators", default=False)


@contextlib.contextmanager
def keep_operators() -> Iterator[None]:
    """Within this block an exported or traced program calls cnnkern's operators.

    ``torch.export``, ``torch.onnx.export`` and ``torch.jit.trace`` otherwise record PyTorch's operators instead of
    cnnkern's, so that the program runs without cnnkern. A program with cnnkern's operators needs ``import cnnkern``,
    and runs on cnnkern's kernels. AOTInductor can compile it, and Python can load it again. It cannot be exported to
    ONNX.

        with cnnkern.keep_operators():
            program = torch.export.export(model, (x,))
    """
    token = _kept.set(True)
    try:
        yield
    finally:
        _kept.reset(token)


@compat.constant_while_traced
def keeps_operators() -> bool:
    """Whether this runs within :func:`keep_operators`."""
    return _kept.get()


def is_pytorchs(
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor | None],
    *,
    fuses: bool = False,
    training: bool = False,
    shards: bool = False,
) -> bool:
    """Whether PyTorch's own operators compute a call of these tensors.

    They do in four cases:

    1. There is no kernel for the tensors: :func:`has_kernels` and, for their types, :func:`_is_known`.
    2. A program is exported or traced, except within :func:`keep_operators`.
    3. Under torch.compile, if Inductor fuses the operator better: :func:`_left_to_inductor`.
    4. `cnnkern tune` found PyTorch's faster on this machine. The functions check :mod:`cnnkern.ops.tuned` last.

    In cases 2 and 3, two inputs that PyTorch would broadcast or promote go to cnnkern's operator, which refuses them.

    `fuses`: the operator is one pass over memory. `training`: it computes statistics. `shards`: it has strategies for
    DTensors (cnnkern/ops/sharding.py).
    """
    for t in inputs:
        if type(t) not in _KNOWN_TYPES:
            if not isinstance(t, Tensor):  # cnnkern's operator refuses it, unless it overrides torch's functions
                return hasattr(type(t), "__torch_function__")
            if not _is_known(t, inputs[0], shards):
                return True
        if not has_kernels(t):
            return True
    for parameter in parameters:
        if type(parameter) not in _KNOWN_OR_NONE and not _is_known(parameter, inputs[0], shards):
            return True
    if _is_compiling():
        if torch.compiler.is_exporting():
            return not keeps_operators() and alike(*inputs)
        return fuses and _left_to_inductor(inputs[0], training) and alike(*inputs)
    if _tracing_state() is not None:
        return not keeps_operators() and alike(*inputs)
    return False


def by_pytorch(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Computes a call of `function` (:mod:`cnnkern.functional`) by its namesake in :mod:`cnnkern.reference`.

    Under `torch.fx` it becomes one node of the graph, as calls of torch.nn.functional do.
    """
    proxies = tuple(a for a in arguments if isinstance(a, fx.Proxy))
    if proxies:
        return handle_torch_function(function, proxies, *arguments)
    return getattr(reference, function.__name__)(*arguments)


def has_kernels(t: Tensor) -> bool:
    """Whether the kernels support a tensor's layout and device: not sparse, nested or quantized, on a CPU or on
    CUDA."""
    return t.layout is _strided and (t.is_cpu or t.is_cuda or t.is_meta) and not t.is_nested and not t.is_quantized


def alike(input: Tensor, *others: Tensor) -> bool:
    """Whether PyTorch would neither broadcast nor promote these."""
    if _is_compiling() or _tracing_state() is None:
        return _alike(input, *others)
    with warnings.catch_warnings():  # of torch.jit.trace, that it records no comparison
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return _alike(input, *others)


def _alike(input: Tensor, *others: Tensor) -> bool:
    return all(other.shape == input.shape and other.dtype == input.dtype for other in others)


def _is_known(t: Any, input: Any, shards: bool) -> bool:
    """Whether cnnkern's operators accept an object of an unusual type.

    They accept a subclass of Tensor without behaviour of its own: PyTorch restores the class of results. A subclass
    with `__torch_function__` or `__torch_dispatch__` may only know PyTorch's functions and operators.
    """
    kind = type(t)
    if getattr(kind, "__torch_dispatch__", None) is not Tensor.__torch_dispatch__:
        return shards and _is_sharded(t, input)
    function = kind.__torch_function__
    return getattr(function, "__func__", function) in _DEFAULT_FUNCTIONS


def _is_sharded(t: Any, input: Any) -> bool:
    """Whether this is a DTensor, used together with another one."""
    if type(t).__name__ != "DTensor" or _is_compiling():
        return False
    from torch.distributed.tensor import DTensor  # already imported, if there is a DTensor

    import cnnkern.ops.sharding  # noqa: F401  (registers cnnkern's strategies)

    return isinstance(t, DTensor) and isinstance(input, DTensor)


def _left_to_inductor(input: Tensor, training: bool) -> bool:
    """Whether PyTorch's operators compute a layer that is one pass over memory, so that Inductor can fuse it.

    Without gradients they do, unless the layer computes statistics: Inductor fuses a norm with running statistics, an
    addition or an activation with the operators before and after it. It cannot fuse across cnnkern's operators.

    With gradients they do if images are contiguous: Inductor may choose another memory layout, which cnnkern's
    operators would prevent. On a CPU whole models were a few hundredths slower with them than with only the grouped
    convolutions replaced. On a GPU Inductor converts a contiguous network to channels_last, which halves the time. In
    channels_last cnnkern's operators were faster on a CPU, so they are used (docs/results.md, whole models).
    """
    if not torch.is_grad_enabled():
        return not training
    return input.dim() >= 4 and input.is_contiguous()


def joins(input: Tensor, training: bool) -> bool:
    """Whether cnnkern computes a converted batch norm under torch.compile. A graph pass then fuses it with the addition
    and the activation that follow (cnnkern/conversion/joining.py). Otherwise it is PyTorch's, and Inductor fuses it.

    True where whole models were faster with cnnkern's operators than with Inductor's batch norms (docs/results.md): in
    training with gradients, on a CPU, with images in channels_last.
    """
    if not (training and torch.is_grad_enabled() and input.device.type == "cpu" and input.dtype in _JOINED_TYPES):
        return False
    layout = _CHANNELS_LAST.get(input.dim())
    return layout is not None and input.is_contiguous(memory_format=layout) and not input.is_contiguous()
