"""Batch norms with deferred results, and the report of how these results were computed."""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from cnnkern import compat
from cnnkern.extension import extension
from cnnkern.nn.batchnorm import _FusedBatchNorm
from cnnkern.ops import route, tuned
from cnnkern.ops.bn_act import batch_norm_act

Site = extension and extension.Site  # without the extension nothing is deferred
# Looked up once, because every call needs them.
_is_compiling, _materialise_waiting = torch.compiler.is_compiling, extension and extension.materialise_waiting


def _learn_parts() -> None:
    """Shows the extension what a part of a storage looks like: safetensors makes the weights of a file such parts."""
    whole = torch.empty(2, dtype=torch.uint8)
    extension.learn_parts(whole, torch.empty(0, dtype=torch.uint8).set_(whole.untyped_storage()[:1]))


if extension:
    _learn_parts()

SITE = "_cnnkern_site"  # in a converted layer: how its results were computed
FOLDED_SITE = "_cnnkern_folded_site"  # in a batch norm after a folded convolution: the same for both together
NAMES = {"relu": "ReLU", "relu6": "ReLU6", "leaky_relu": "LeakyReLU", "sigmoid": "Sigmoid", "silu": "SiLU"}
NAMES |= {"hardswish": "Hardswish", "elu": "ELU", "gelu": "GELU", "gelu_tanh": "GELU(tanh)", "mish": "Mish"}
NAMES |= {"hardsigmoid": "Hardsigmoid", "prelu": "PReLU"}
NAMES |= {"add": "add", "0": "0", "BatchNorm": "BatchNorm"} | {
    f"add + {act}": f"add + {name}" for act, name in NAMES.items()
}


class Deferring(_FusedBatchNorm):
    """A batch norm with deferred results."""

    _counts_refused_calls = True

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle, which read tensors without an operator."""
        for statistic in (self.running_mean, self.running_var):
            if statistic is not None:
                statistic.detach()  # materialises the results that have yet to update it
        return self.__dict__

    def deferred(self, input: Tensor) -> Tensor:
        """The batch norm without an activation; its result is deferred if possible."""
        return self._normalize(input, self._defer)

    def _defer(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        *_: Any,
    ) -> Tensor:
        """The operator that :meth:`_normalize` calls."""
        arguments = (running_mean, running_var, weight, bias, training, momentum, eps)
        if _is_compiling():
            return _compiled(input, *arguments)
        if Site is None or route.is_pytorchs((input,), arguments[:4]):
            return batch_norm_act(input, *arguments, "none")
        if type(input) is not Tensor or (input.is_cuda and _is_captured_unseen()) or _frees_parameters(self):
            return batch_norm_act(input, *arguments, "none")
        site = self.__dict__.get(SITE)
        if site is None:
            site = self.__dict__[SITE] = Site()
        if tuned.table is not None:
            operator, act = _usual(site)
            if tuned.loses(operator, input, weight, bias, act, training):
                return route.by_pytorch(batch_norm_act, input, *arguments, "none")
        if _may_free_parameters():
            site.compute_activations()
        return site.batch_norm(input, *arguments)


def compute_on_return(model: nn.Module) -> None:
    """Registers a forward hook: when the model returns, nothing is deferred, so others may write to its inputs."""
    if Site is not None and _compute_deferred not in model._forward_hooks.values():
        model.register_forward_hook(_compute_deferred)


def forget_hook(module: nn.Module) -> None:
    """Removes that hook from a model that is not converted any more."""
    for key, hook in list(module._forward_hooks.items()):
        if hook is _compute_deferred:
            del module._forward_hooks[key]


def _compute_deferred(module: nn.Module, inputs: Any, output: Any) -> None:
    if not _is_compiling():
        _materialise_waiting()


def _compiled(input: Tensor, *arguments: Any) -> Tensor:
    """The batch norm under torch.compile and in exported programs. Under torch.compile it is cnnkern's if the graph
    pass of :mod:`cnnkern.conversion.joining` fuses it with what follows. Otherwise it is PyTorch's, and Inductor fuses
    it."""
    if not torch.compiler.is_exporting():
        if Site is None or not route.joins(input, arguments[4]) or not compat.has_lists_of_passes():
            return route.by_pytorch(batch_norm_act, input, *arguments, "none")
        _install_pass()
    return batch_norm_act(input, *arguments, "none")


@compat.constant_while_traced  # it runs then
def _install_pass() -> None:
    from cnnkern.conversion import joining  # imports Inductor

    joining.install()


def _usual(site: Any) -> tuple[str, str]:
    """The function of :mod:`cnnkern.functional` for a batch norm and what it was fused with, and its activation."""
    fused = {name: n for name, n in site.fusions().items() if n > 0}
    name = max(fused, key=lambda name: fused[name]) if fused else "none"
    if name.startswith("add"):
        return "batch_norm_add_act", "none" if name == "add" else name.removeprefix("add + ")
    return "batch_norm_act", "none" if name == "0" else name


def _is_captured_unseen() -> bool:
    """Whether a CUDA graph is being captured and the extension, built without CUDA, cannot tell. The capture might end
    before a deferred result is used."""
    return not extension.sees_captures() and torch.cuda.is_current_stream_capturing()


def _frees_parameters(norm: _FusedBatchNorm) -> bool:
    """Whether the parameters are freed at the end of the call: the batch norm is a unit of FSDP2 by itself."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(norm, fsdp.FSDPModule)


def _may_free_parameters() -> bool:
    """Whether parameters may be freed at the end of a unit of FSDP, which may be between an activation and the
    convolution that would compute it."""
    return "torch.distributed.fsdp" in sys.modules and torch.distributed.is_initialized()


def became(layer: str, site: Any) -> tuple[str, str]:
    """The kind of layer in a report, by what its results were fused with so far, and why they were not."""
    if Site is None:
        return layer, "not fused, which needs the compiled extension"
    fused = {} if site is None else {name: n for name, n in site.fusions().items() if n > 0}
    if fused:
        return f"{layer} + {NAMES[max(fused, key=lambda name: fused[name])]}", ""
    alone = {} if site is None else site.alone()
    reason = max(alone, key=lambda name: alone[name]) if alone else "has not run: what it is fused with is known then"
    return layer, reason.replace("aten::", "")
