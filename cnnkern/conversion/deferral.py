"""Batch norms whose results wait for what uses them, and what became of those results."""

from typing import Any

import torch
from torch import Tensor

from cnnkern import compat
from cnnkern.extension import extension
from cnnkern.nn.batchnorm import _FusedBatchNorm
from cnnkern.ops import route, tuned
from cnnkern.ops.bn_act import batch_norm_act

Site = extension and extension.Site  # without the extension nothing waits


def _learn_parts() -> None:
    """Shows the extension what parts of a storage look like, on which safetensors puts the weights of a file."""
    whole = torch.empty(2, dtype=torch.uint8)
    extension.learn_parts(whole, torch.empty(0, dtype=torch.uint8).set_(whole.untyped_storage()[:1]))


if extension:
    _learn_parts()

SITE = "_cnnkern_site"  # in a converted layer: what became of its results
FOLDED_SITE = "_cnnkern_folded_site"  # in a batch norm behind a folded convolution: the same of those of both
NAMES = {"relu": "ReLU", "relu6": "ReLU6", "leaky_relu": "LeakyReLU", "sigmoid": "Sigmoid", "silu": "SiLU"}
NAMES |= {"hardswish": "Hardswish", "elu": "ELU", "gelu": "GELU", "gelu_tanh": "GELU(tanh)", "mish": "Mish"}
NAMES |= {"hardsigmoid": "Hardsigmoid", "prelu": "PReLU"}
NAMES |= {"add": "add", "0": "0", "BatchNorm": "BatchNorm"} | {
    f"add + {act}": f"add + {name}" for act, name in NAMES.items()
}


def deferred(norm: _FusedBatchNorm, input: Tensor) -> Tensor:
    """The batch norm without an activation, which waits for one where it can."""

    def waiting(input: Tensor, *arguments: Any) -> Tensor:
        *arguments, _, _ = arguments
        if torch.compiler.is_compiling():
            return _compiled(input, *arguments)
        if Site is None or route.is_pytorchs((input,), arguments[:4]):
            return batch_norm_act(input, *arguments, "none")
        if type(input) is not Tensor or _is_captured_unseen(input):
            return batch_norm_act(input, *arguments, "none")
        site = norm.__dict__.get(SITE)
        if site is None:
            site = norm.__dict__[SITE] = Site()
        if tuned.table is not None:
            operator, act = _usual(site)
            if tuned.loses(operator, input, arguments[2], arguments[3], act, arguments[4]):
                return route.by_pytorch(batch_norm_act, input, *arguments, "none")
        return site.batch_norm(input, *arguments)

    return norm._normalize(input, waiting)


def _compiled(input: Tensor, *arguments: Any) -> Tensor:
    """The batch norm under torch.compile and in exported programs. In a graph of torch.compile it is ours where the
    pass of :mod:`cnnkern.conversion.joining` joins it with what follows, else PyTorch's, for Inductor to do so."""
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
    """The function of :mod:`cnnkern.functional` that a batch norm with what followed it is, and its activation."""
    fused = {name: n for name, n in site.fusions().items() if n > 0}
    name = max(fused, key=lambda name: fused[name]) if fused else "none"
    if name.startswith("add"):
        return "batch_norm_add_act", "none" if name == "add" else name.removeprefix("add + ")
    return "batch_norm_act", "none" if name == "0" else name


def _is_captured_unseen(input: Tensor) -> bool:
    """Whether a CUDA graph is being captured, which may end before somebody asks for a result, and the extension, built
    without CUDA, cannot tell."""
    return input.is_cuda and not extension.sees_captures() and torch.cuda.is_current_stream_capturing()


def became(layer: str, site: Any) -> tuple[str, str]:
    """What a report calls a layer by what its results were fused with so far, and why they were not."""
    fused = {} if site is None else {name: n for name, n in site.fusions().items() if n > 0}
    if fused:
        return f"{layer} + {NAMES[max(fused, key=lambda name: fused[name])]}", ""
    alone = {} if site is None else site.alone()
    reason = max(alone, key=lambda name: alone[name]) if alone else "has not run: what it is fused with is known then"
    return layer, reason.replace("aten::", "")
