"""Converts an existing model to the fused layers, in place or as a copy that shares its parameters.

A layer is replaced by giving its module another class, so that it keeps its parameters, its place and its hooks. The
model's own code is unchanged and runs in every call. A converted batch norm returns a tensor whose values are computed
when they are used. If an activation or an addition uses them, one kernel computes both (csrc/deferred).
"""

import copy
import functools
import sys
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cnnkern import recomputation
from cnnkern.conversion.deferral import SITE, Deferring, compute_on_return, forget_hook
from cnnkern.conversion.layers import (
    NORMS,
    kind_now,
    originals,
    replace,
    replacements,
)
from cnnkern.conversion.verify import check_results
from cnnkern.nn.batchnorm import _FusedBatchNorm


@dataclass(frozen=True)
class Replacement:
    """A layer: its path, the kind it became (empty if it was not converted), and why."""

    path: str
    kind: str
    reason: str = ""


@dataclass
class ConversionReport:
    """What :func:`convert` or :func:`fold` did: an entry per layer that it replaced or could not replace.

    It shows what a batch norm was fused with after the model has run. ``print`` shows the report, and ``counts`` has
    the number of layers by kind.
    """

    entries: list[Replacement] = field(default_factory=list)
    made_by: str = "cnnkern.convert"
    nothing: str = "no norm and no grouped convolution in this model, nothing to convert"
    recompute: bool = False

    @property
    def counts(self) -> dict[str, int]:
        return dict(Counter(e.kind or "not converted" for e in self.entries))

    def __str__(self) -> str:
        recomputes = "; the backward pass recomputes results of norms" if self.recompute else ""
        if not self.entries:
            return f"{self.made_by}: {self.nothing}{recomputes}"
        width = max(len(e.path) for e in self.entries)
        lines = [
            f"{e.path:{width}}  {e.kind or 'not converted'}{f' ({e.reason})' if e.reason else ''}" for e in self.entries
        ]
        total = ", ".join(f"{n} {kind}" for kind, n in sorted(self.counts.items()))
        return "\n".join([f"{self.made_by}: {total}{recomputes}", *lines])


def convert(model: nn.Module, inplace: bool = False, verify: Any = None, *, recompute: bool = False) -> nn.Module:
    """Returns the model with its norms, grouped convolutions and max poolings on cnnkern's kernels. Each batch norm is
    fused with the activation or the residual addition after it.

    The result shares parameters and buffers with ``model`` and has the same state-dict keys, so an existing optimiser
    still works, and checkpoints fit both. Results are the same within rounding, in training and in eval mode: the
    model's own forward pass runs unchanged. Subclasses of batch norm and layer norm are not converted.

    :func:`conversion_report` lists what was replaced and, after the model has run, what was fused. :func:`revert`
    undoes the conversion. Converting twice changes nothing, except that ``recompute`` can be switched on later.

    Args:
        model: The model.
        inplace: Whether to change the model itself and return it, instead of a copy.
        verify: An example input, a tuple of arguments, or a dict of keyword arguments. Outputs, gradients and buffers
            of the original and of the result are compared on it, in training and in eval mode, in float64 if the
            model runs in float64.
        recompute: Whether every call of the model runs within :func:`cnnkern.recompute`: the backward pass recomputes
            results of norms, which are not saved. That saves memory, takes a little time and changes no gradient. It
            applies to calls of the whole model, and not under :func:`torch.compile`.

    Raises :class:`ConversionError` if results differ under ``verify``, in which case ``model`` is unchanged; TypeError
    if ``model`` is not an ``nn.Module`` or is a ``torch.jit`` module, and if ``recompute`` is not a bool; RuntimeError
    for ``recompute`` without the compiled extension.
    """
    check_module("convert", model)
    if not isinstance(recompute, bool):
        raise TypeError(f"cnnkern.convert: recompute must be True or False; got {recompute!r}")
    if recompute:
        recomputation.check_extension("convert")
    if verify is not None:
        check_results(model, lambda m: convert(m, inplace=True, recompute=recompute), verify)
    if not inplace:
        model = _sharing_copy(model)
    inner = uncompiled(model)
    if "_cnnkern_report" not in inner.__dict__:
        inner.__dict__["_cnnkern_report"] = convert_layers(inner)
        # A single layer is part of a model, in which something may be fused with it.
        if not isinstance(inner, Deferring) and any(isinstance(module, Deferring) for module in inner.modules()):
            compute_on_return(inner)
    if recompute:
        recomputation.switch_on(inner)
    return model


def revert(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Undoes :func:`convert`: the original layers, with the current parameters and statistics."""
    check_module("revert", model)
    classes = originals()
    for path, module in model.named_modules():
        if "_cnnkern_converted" in module.__dict__ and recomputation.plain_class(module) not in classes:
            raise TypeError(
                f"cnnkern.revert: {path!r} has become a {type(module).__name__} since it was converted; "
                "undo that first, for example with torch.nn.utils.parametrize.remove_parametrizations"
            )
    if not inplace:
        model = _sharing_copy(model)
    for module in model.modules():
        recomputation.switch_off(module)
        if module.__dict__.pop("_cnnkern_converted", False):
            module.__class__ = classes[type(module)]
            module.__dict__.pop("act", None)
            module.__dict__.pop(SITE, None)
        module.__dict__.pop("_cnnkern_report", None)
        forget_hook(module)
    return model


def conversion_report(model: nn.Module) -> ConversionReport:
    """What :func:`convert` did to this model or, if it is not converted yet, what it would do.

    For each batch norm it shows what its results have been fused with. Raises what :func:`convert` raises.
    """
    check_module("conversion_report", model)
    model = uncompiled(model)
    if "_cnnkern_report" not in model.__dict__:
        model = convert(model)
    made = model.__dict__["_cnnkern_report"]
    modules = dict(model.named_modules())

    entries = []
    for entry in made.entries:
        module = modules.get(entry.path)
        if isinstance(module, _FusedBatchNorm):
            entries.append(Replacement(entry.path, *kind_now(module)))
        elif module is None:
            entries.append(Replacement(entry.path, "", "no longer in the model"))
        elif entry.kind and "_cnnkern_converted" not in vars(module):
            entries.append(Replacement(entry.path, "", f"has become a {type(module).__name__} since"))
        elif not hasattr(module, "became"):
            entries.append(entry)
        elif (found := module.became()) is not None:  # a folded convolution
            entries.append(Replacement(entry.path, *found))
    return ConversionReport(entries, made.made_by, made.nothing, recomputation.is_on(model))


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside of torch.compile's, which loses attributes of its own when it is copied."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # which takes a second to import, and there is none without it
    return model._orig_mod if dynamo is not None and isinstance(model, dynamo.OptimizedModule) else model


def convert_layers(model: nn.Module) -> ConversionReport:
    """Replaces a model's layers where they are."""
    report, table, ours = ConversionReport(), replacements(), originals()
    for path, module in model.named_modules():
        kind = recomputation.plain_class(module)
        replacement, wanted = table.get(kind, (None, bool))
        if replacement is not None and wanted(module):
            replace(module, replacement)
            report.entries.append(Replacement(path, type(module).__name__))
        elif kind is nn.SyncBatchNorm:
            report.entries.append(
                Replacement(path, "", "convert the model first, then call cnnkern.nn.convert_sync_batchnorm")
            )
        elif isinstance(module, NORMS) and kind not in ours and not isinstance(module, _FusedBatchNorm):
            report.entries.append(
                Replacement(path, "", f"{type(module).__name__} may do more than the class that it inherits from")
            )
    return report


def check_module(name: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"cnnkern.{name}: expected a torch.nn.Module; got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"cnnkern.{name}: a torch.jit module cannot be converted; convert the model that it was made from"
        )


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
_HOOKS += ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_state_dict_pre_hooks")


def _owners(hook: Any) -> Iterator[Any]:
    """The objects that a hook reports to, which are to stay the same in a copy. Modules are copied with the model."""
    if isinstance(hook, functools.partial):
        for part in (hook.func, *hook.args, *hook.keywords.values()):
            yield from _owners(part)
    elif isinstance(hook, types.MethodType):
        yield from _owners(hook.__self__)
    elif not isinstance(hook, nn.Module | types.FunctionType | type | types.BuiltinFunctionType):
        yield hook


def _sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree around the same parameters and buffers.

    The dictionaries that hold them are the same ones too, so that what moves or casts one model does it to both.
    """
    shared: list[Any] = []
    for module in model.modules():
        shared += [module._parameters, module._buffers, *module._parameters.values(), *module._buffers.values()]
        # What copy.deepcopy refuses: tensors kept of an earlier call.
        shared += [v for v in vars(module).values() if isinstance(v, Tensor) and not v.is_leaf]
        for hooks in (getattr(module, name, {}) for name in _HOOKS):
            shared += [owner for hook in hooks.values() for owner in _owners(hook)]
    copied = copy.deepcopy(model, memo={id(value): value for value in shared if value is not None})
    copies = dict(copied.named_modules())
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and path in copies:  # it copies its tensors, whatever is shared
            for name, value in (*module._parameters.items(), *module._buffers.items()):
                setattr(copies[path], name, value)
    return copied
