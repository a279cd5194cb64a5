"""The row of max_pool2d."""

from typing import Any

import torch
from torch import Tensor

from cnnkern import functional, reference
from cnnkern.testing.case import Case, Layer, Shape
from cnnkern.testing.shapes import POOL_LAYERS


def max_pool2d_inputs(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    *,
    generator: torch.Generator,
    kernel: int | tuple[int, int] = 3,
    stride: int | tuple[int, int] = 2,
    padding: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
    smooth: bool = False,
) -> dict[str, Any]:
    """Arguments of max_pool2d. Pictures smaller than the kernel are given as many more rows and columns as it needs.

    Numbers come from few, so that windows have equal ones; with `smooth` all of an image differ.
    """
    kernels, paddings = _pair(kernel), _pair(padding)
    picture = (max(n, k - 2 * p) for n, k, p in zip(shape[2:], kernels, paddings, strict=True))
    shape = (*shape[:2], *picture)
    x = torch.empty(shape, dtype=torch.float64)
    if smooth:
        x.copy_(torch.randperm(x.numel(), generator=generator).view(shape) / 8)
    else:
        x.copy_(torch.randint(-64, 64, shape, generator=generator) / 16)
    return {"input": x.to(dtype), "kernel_size": kernel, "stride": stride, "padding": padding, "ceil_mode": ceil_mode}


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _settings(a: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    return tuple(_pair(a[name]) for name in ("kernel_size", "stride", "padding"))


def forward_call(inputs: dict[str, Any]) -> tuple:
    return torch.ops.cnnkern.max_pool2d.default, (inputs["input"], *_settings(inputs), inputs["ceil_mode"])


def backward_call(inputs: dict[str, Any], dy: Tensor) -> tuple:
    x = inputs["input"].detach()
    operator, arguments = forward_call(inputs | {"input": x})
    channels_last = torch._prims_common.suggest_memory_format(x) == torch.channels_last
    settings = (list(x.shape[2:]), *_settings(inputs), channels_last)
    return torch.ops.cnnkern.max_pool2d_backward.default, (dy, operator(*arguments)[1], *settings)


def output_shape(layer: Layer) -> Shape:
    n, c, *picture = layer.shape
    a = {"kernel": 3, "stride": 2, "padding": 1} | layer.arguments
    return (n, c, *((size + 2 * a["padding"] - a["kernel"]) // a["stride"] + 1 for size in picture))


MAX_POOL2D = Case(
    name="max_pool2d",
    function=functional.max_pool2d,
    reference=reference.max_pool2d,
    inputs=max_pool2d_inputs,
    differentiable=("input",),
    mutated=(),
    variants={
        "plain": {},
        "2x2": {"kernel": 2, "padding": 0},
        "no padding": {"padding": 0, "ceil_mode": True},
        "2x2 padding": {"kernel": 2, "ceil_mode": True},
        "stride 1": {"stride": 1},
        "5x4 stride 1 3": {"kernel": (5, 4), "stride": (1, 3), "padding": (2, 1), "ceil_mode": True},
        "stride of more than the kernel": {"kernel": 2, "stride": 3, "padding": 1},
    },
    shapes=((1, 1, 1, 1), (2, 3, 4, 5), (1, 17, 7, 7), (3, 16, 15, 17), (2, 33, 9, 29), (1, 5, 31, 3), (2, 8, 12, 70)),
    gradcheck_shapes=((2, 2, 3, 4),),
    forward_call=forward_call,
    backward_call=backward_call,
    bench_layers=POOL_LAYERS,
    bench_variant="plain",
    forward_traffic=(1, 1),
    backward_traffic=(1, 1),
    output_shape=output_shape,
    ranks=(4,),
    empty_shapes=((0, 3, 4, 5),),
    float32_parameters=False,
)
