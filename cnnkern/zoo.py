"""`cnnkern zoo` and `cnnkern zoo show NAME`: the models with their sizes, and the layers of one."""

from __future__ import annotations

import inspect
from collections import Counter

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cnnkern.models import create_model, get_builder, list_models


def table(console: Console) -> None:
    """Prints of every model its usual input, parameters, operations per image, fused layers, and what it is."""
    columns = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("model", "input", "parameters", "GFLOP", "fused layers", "what it is"):
        columns.add_column(title, justify="right" if title in ("parameters", "GFLOP") else "left", overflow="fold")
    for name in list_models():
        size = get_builder(name).input_size
        model = on_meta(name)
        parameters = sum(p.numel() for p in model.parameters())
        layers = ", ".join(f"{n} {kind}" for kind, n in fused_layers(model).most_common()) or "none"
        columns.add_row(
            name, "x".join(map(str, size)), f"{parameters:,}", f"{flops(name, size) / 1e9:.3f}", layers, about(name)
        )
    console.print(columns)
    console.print("GFLOP: of one image in the forward pass, a multiplication and an addition counted as two.")


def about(name: str) -> str:
    """What a model is, in a line: the first sentence of its builder's docstring."""
    return (inspect.getdoc(get_builder(name)) or name).partition(". ")[0].removesuffix(".")


def on_meta(name: str, fused: bool = True, **kwargs: int) -> nn.Module:
    """The model without memory for its parameters. `kwargs` go to its builder."""
    with torch.device("meta"):
        return create_model(name, fused=fused, **kwargs).eval()


def fused_layers(model: nn.Module) -> Counter[str]:
    """How many layers of each class of `cnnkern.nn` the model has."""
    return Counter(type(m).__name__ for m in model.modules() if type(m).__module__.startswith("cnnkern.nn"))


def flops(name: str, size: tuple[int, ...]) -> int:
    """Of one image of ``size``; counted on the unfused reference, whose operators PyTorch's counter knows."""
    model = on_meta(name, fused=False)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty((1, *size), device="meta"))
    return counter.get_total_flops()


def show(name: str, size: tuple[int, ...] | None, fused: bool = True) -> str:
    """The table of the model's layers on one image of ``size``, (channels, height, width).

    Raises ValueError for an unknown model, or an input that it does not take.
    """
    import torchinfo

    usual = get_builder(name).input_size
    size = size or usual
    try:
        model = create_model(name, fused=fused, in_channels=size[0]).eval()
        return str(
            torchinfo.summary(
                model,
                input_size=(1, *size),
                col_names=("input_size", "output_size", "num_params", "mult_adds"),
                row_settings=("var_names",),
                depth=10,
                device="cpu",
                verbose=0,
            )
        )
    except RuntimeError as error:
        reason = " ".join(str(error.__cause__ or error).split())
        given, wanted = ("x".join(map(str, s)) for s in (size, usual))
        raise ValueError(f"{name} does not accept an input of {given} (usual: {wanted}): {reason}") from error
