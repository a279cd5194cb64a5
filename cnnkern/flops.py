"""FLOP formulas of cnnkern's operators for `torch.utils.flop_counter`: the same as for PyTorch's.

It counts convolutions, but no norms, additions and activations. Importing it imports Triton, which `import cnnkern`
does not. So the formulas are registered when other code imports it: an import finder before all others notices that.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

COUNTER = "torch.utils.flop_counter"


def _register(counter: ModuleType) -> None:
    formulas, aten, ours = counter.flop_registry, torch.ops.aten, torch.ops.cnnkern
    if ours.grouped_conv2d in formulas:
        return

    def forward(x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int, *, out_val: Any):
        settings = (stride, padding, dilation, False, (0,), groups)
        return formulas[aten.convolution](x, weight, bias, *settings, out_val=out_val)

    def backward(
        dy: Any,
        x: Any,
        weight: Any,
        stride: Any,
        padding: Any,
        dilation: Any,
        groups: int,
        output_mask: Sequence[bool],
        *,
        out_val: Any,
    ):
        settings = (stride, padding, dilation, False, (0,), groups, output_mask)
        return formulas[aten.convolution_backward](dy, x, weight, None, *settings, out_val=out_val)

    counter.register_flop_formula(ours.grouped_conv2d, get_raw=True)(forward)
    counter.register_flop_formula(ours.grouped_conv2d_backward, get_raw=True)(backward)


class _AtImport(MetaPathFinder):
    """Finds the counter's module by the other finders, and registers the formulas after it was loaded."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _register(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def count_flops() -> None:
    """Registers the formulas: now if `torch.utils.flop_counter` is imported, else when it is."""
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER])
    sys.meta_path.insert(0, _AtImport())
