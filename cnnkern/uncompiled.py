"""The operators where the extension was not built: schemas from csrc/ops.cpp, PyTorch's own operators on the CPU.

First derivatives only: second derivatives, forward mode and torch.func transforms need the extension.
"""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cnnkern import eager
from cnnkern.triton_kernels.check import recomputes_sum
from cnnkern.triton_kernels.layout import batch_norm_in_rows, memory_order

WARNING = (
    "cnnkern: the compiled extension is not there, so PyTorch's own operators compute on the CPU, at their speed; "
    "`make` in the repository, or `pip install --no-build-isolation .`, builds it"
)
_warned = False


def _schemas() -> list[tuple[str, str]]:
    """Those of csrc/ops.cpp, which a wheel has beside this file and a checkout beside the package. Each has a text that
    is not empty where Inductor may choose the strides of the operator's tensors."""
    here = Path(__file__).parent
    for folder in (here, here.parent):
        if (folder / "csrc" / "ops.cpp").exists():
            return re.findall(r'm\.def\("(.*?)"(, kAnyLayout)?\);', (folder / "csrc" / "ops.cpp").read_text())
    raise ImportError(f"cnnkern: csrc/ops.cpp, with the operators' schemas, is neither in {here} nor in {here.parent}")


def _with_warning(launcher: Callable) -> Callable:
    def launch(*arguments):
        global _warned
        if not _warned:
            _warned = True
            warnings.warn(WARNING, stacklevel=2)
        return launcher(*arguments)

    return launch


def _autograd(name: str) -> Callable:
    """The kernel of operator `name` on the Autograd key. Arguments and results of the gradient operator are known by
    their names: those of the operator, dy, output_mask, and d before the name of what a gradient is of."""
    operator = getattr(torch.ops.cnnkern, name).default
    gradient = getattr(torch.ops.cnnkern, f"{name}_backward").default
    inputs = [a.name for a in operator._schema.arguments]
    defaults = [a.default_value for a in operator._schema.arguments]
    mutated = [i for i, a in enumerate(operator._schema.arguments) if a.alias_info and a.alias_info.is_write]
    outputs = [r.name for r in operator._schema.returns]
    needed = [a.name for a in gradient._schema.arguments]
    returned = [r.name.removeprefix("d") for r in gradient._schema.returns]

    def below(*arguments: Any) -> Tensor | tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            results = operator(*arguments)
        for i in mutated:
            if arguments[i] is not None:
                torch.autograd.graph.increment_version(arguments[i])
        return results

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            results = below(*arguments)
            every = results if isinstance(results, tuple) else (results,)
            known = dict(zip(inputs, arguments, strict=True)) | dict(zip(outputs, every, strict=True))
            known |= {"channels_last": batch_norm_in_rows(arguments[0]), "order": memory_order(every[0])}
            known |= {"size": arguments[0].shape[2:]}
            act = known.get("act", "none")
            reads_bias = {"bn_act": act != "none", "bn_add_act": recomputes_sum(act), "bn_prelu": True}
            if not reads_bias.get(name, False):
                known |= {"bias": None, "residual": None}  # which that gradient does not read
            ctx.names = [n for n in needed if isinstance(known.get(n), Tensor)]
            ctx.save_for_backward(*(known[n] for n in ctx.names))
            ctx.others = {n: known[n] for n in needed if n in known and n not in ctx.names}
            ctx.mark_non_differentiable(*every[1:])
            return results

        @staticmethod
        @once_differentiable
        def backward(ctx, dy, *others):
            wanted = dict(zip(inputs, ctx.needs_input_grad, strict=False))
            # A hook may give what the operator returned back in other strides, which gradient operators refuse.
            saved = zip(ctx.names, ctx.saved_tensors, strict=True)
            known = {n: t.contiguous() if n in outputs else t for n, t in saved} | ctx.others
            known |= {"dy": dy, "output_mask": [wanted[n] for n in returned]}
            with torch._C._AutoDispatchBelowAutograd():
                grads = gradient(*(known[n] for n in needed))
            found = dict(zip(returned, grads if isinstance(grads, tuple) else (grads,), strict=True))
            if "residual" in wanted and "residual" not in found:
                found["residual"] = found["x"]  # add_relu: both have the one gradient
            return tuple(found[n] if wants else None for n, wants in wanted.items())

    def kernel(*arguments):
        arguments += tuple(defaults[len(arguments) :])  # the dispatcher leaves out those that are the defaults
        if not torch.is_grad_enabled() or not any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
            return below(*arguments)
        # What is saved may be refused when all is computed: what the call changes in place changes after that.
        copies = {i: arguments[i].detach().clone() for i in mutated if arguments[i] is not None}
        results = Function.apply(*(copies.get(i, a) for i, a in enumerate(arguments)))
        with torch.no_grad():
            for i, copy in copies.items():
                arguments[i].copy_(copy)
        return results

    return kernel


def _layer_norm_autocast(name: str) -> Callable:
    """The kernel of a layer norm on the AutocastCUDA key, as csrc/autograd/layer_norm.h has it."""
    operator = getattr(torch.ops.cnnkern, name).default
    names = [a.name for a in operator._schema.arguments]
    without = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)

    def in_float32(t: Any) -> Any:
        casts = isinstance(t, Tensor) and t.is_cuda and t.is_floating_point() and t.dtype != torch.float64
        return t.float() if casts else t

    def kernel(x, *others):
        with torch._C._ExcludeDispatchKeyGuard(without):
            known = dict(zip(names[1:], map(in_float32, others), strict=False))
            if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
                return operator(x, **known | {"wide": True})
            return operator(in_float32(x), **known)

    return kernel


_library = torch.library.Library("cnnkern", "DEF")  # for as long as it lives the operators are there
for _schema, _any_layout in _schemas():
    _library.define(_schema, tags=(torch.Tag.flexible_layout,) if _any_layout else ())
for _name, _launcher in eager.LAUNCHERS.items():
    _library.impl(_name, _with_warning(_launcher), "CPU")
for _function in eager.FORWARD:
    _library.impl(_function.__name__, _autograd(_function.__name__), "Autograd")
_library.impl("layer_norm", _layer_norm_autocast("layer_norm"), "AutocastCUDA")
_library.impl("layer_norm2d", _layer_norm_autocast("layer_norm2d"), "AutocastCUDA")
