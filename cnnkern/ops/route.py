"""Which operators compute a call: ours, or PyTorch's own as :mod:`cnnkern.reference` has them: decided here alone.

Every function of :mod:`cnnkern.functional` asks :func:`is_pytorchs` first, and where that is so it is
:func:`by_pytorch`.
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

# Tensors that hold their data themselves, and those that torch.compile and torch.export trace with, which know our
# operators by their fakes.
_KNOWN_TYPES = frozenset({Tensor, nn.Parameter, FakeTensor, FunctionalTensor})
_KNOWN_OR_NONE = _KNOWN_TYPES | {type(None)}
_DEFAULT_FUNCTIONS = (Tensor.__torch_function__.__func__, nn.Parameter.__torch_function__)  # type: ignore[attr-defined]
# Looked up once: every call of a layer asks.
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

    >>> with cnnkern.keep_operators():
    ...     program = torch.export.export(model, (x,))
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

    1. For tensors that we have no kernels for they do: :func:`has_kernels` and, of their types, :func:`_is_known`.
    2. In a program that is exported or traced they do, except within :func:`keep_operators`.
    3. Under torch.compile they do where Inductor makes more of them: :func:`_left_to_inductor`, of operators that
       Inductor fuses.

    4. They do where `cnnkern tune` found them faster on this machine: the functions ask :mod:`cnnkern.ops.tuned` last.

    Two inputs that PyTorch would broadcast or promote are ours in 2 and 3, to be refused.

    `fuses`: the operator is one pass over memory. `training`: it takes statistics. `shards`: it has strategies for
    DTensors (cnnkern/ops/sharding.py).
    """
    for t in inputs:
        if type(t) not in _KNOWN_TYPES:
            if not isinstance(t, Tensor):  # ours to refuse, unless it computes with torch's functions
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
    """A call of `function`, of :mod:`cnnkern.functional`, as its namesake in :mod:`cnnkern.reference` computes it.

    Under `torch.fx` it becomes one node of the graph, as calls of torch.nn.functional do.
    """
    proxies = tuple(a for a in arguments if isinstance(a, fx.Proxy))
    if proxies:
        return handle_torch_function(function, proxies, *arguments)
    return getattr(reference, function.__name__)(*arguments)


def has_kernels(t: Tensor) -> bool:
    """Whether a tensor is laid out, and where, as our kernels take it: not sparse, nested, quantized, on no accelerator
    but CUDA's."""
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
    """Whether our operators take an object of a type that is not among the usual ones.

    A subclass without behaviour of its own is its data, and PyTorch puts the class back on what it gives. One with
    behaviour, `__torch_function__` for torch's functions or `__torch_dispatch__` for its operators, knows PyTorch's and
    nothing of ours.
    """
    kind = type(t)
    if getattr(kind, "__torch_dispatch__", None) is not Tensor.__torch_dispatch__:
        return shards and _is_sharded(t, input)
    function = kind.__torch_function__
    return getattr(function, "__func__", function) in _DEFAULT_FUNCTIONS


def _is_sharded(t: Any, input: Any) -> bool:
    """Whether this is a DTensor, beside another."""
    if type(t).__name__ != "DTensor" or _is_compiling():
        return False
    from torch.distributed.tensor import DTensor  # which somebody has imported to make one

    import cnnkern.ops.sharding  # noqa: F401  (registers our strategies)

    return isinstance(t, DTensor) and isinstance(input, DTensor)


def _left_to_inductor(input: Tensor, training: bool) -> bool:
    """Whether a layer that is one pass over memory is to be PyTorch's own operators, for Inductor to fuse.

    Without gradients it is, unless it takes statistics: a norm with running statistics, an addition and an activation
    join whatever stands before and behind them, which an operator of ours, a call inside of the graph, would prevent.

    With gradients, in training, it is where images are contiguous: Inductor chooses another layout for what it may, and
    our operators bind it to this one. On a CPU whole models were a few hundredths slower with them than with grouped
    convolutions alone exchanged. On a GPU Inductor turns a contiguous network into one in channels_last, in half the
    time. In channels_last our operators were faster on a CPU, and stay (docs/results.md, whole models).
    """
    if not torch.is_grad_enabled():
        return not training
    return input.dim() >= 4 and input.is_contiguous()


def joins(input: Tensor, training: bool) -> bool:
    """Whether a converted batch norm under torch.compile is ours, which a pass over the graph joins with the addition
    and the activation that follow (cnnkern/conversion/joining.py). Else it is PyTorch's, for Inductor to fuse.

    It is where whole models were faster with our operators than with Inductor's batch norms (docs/results.md): in
    training, with gradients, on a CPU, of images in channels_last.
    """
    if not (training and torch.is_grad_enabled() and input.device.type == "cpu" and input.dtype in _JOINED_TYPES):
        return False
    layout = _CHANNELS_LAST.get(input.dim())
    return layout is not None and input.is_contiguous(memory_format=layout) and not input.is_contiguous()
