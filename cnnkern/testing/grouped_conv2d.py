"""The row of grouped_conv2d."""

from typing import Any

import torch
from torch import Tensor

from cnnkern import functional, reference
from cnnkern.testing.case import Case, Layer, Shape, randn
from cnnkern.testing.shapes import GROUPED_LAYERS


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def grouped_conv2d_inputs(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    *,
    generator: torch.Generator,
    width: int = 1,
    kernel: int | tuple[int, int] = 3,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    multiplier: int = 1,
    bias: bool = True,
    smooth: bool = False,
) -> dict[str, Any]:
    """Arguments of conv2d with groups of `width` channels, C rounded up to two whole groups or more.

    Pictures smaller than the kernel are given as many more rows and columns as it needs.
    """
    n, channels, *picture = shape
    kernel, paddings, dilations = _pair(kernel), _pair(padding), _pair(dilation)
    height, columns = (
        max(size, d * (k - 1) + 1 - 2 * p) for size, k, p, d in zip(picture, kernel, paddings, dilations, strict=True)
    )
    groups = max(2, -(-channels // width))
    x = randn((n, groups * width, height, columns), generator, dtype)
    scale = (width * kernel[0] * kernel[1]) ** -0.5  # outputs of about one
    weight = randn((groups * width * multiplier, width, *kernel), generator, torch.float64) * scale
    return {
        "input": x,
        "weight": weight.to(dtype),
        "bias": randn((groups * width * multiplier,), generator, dtype) if bias else None,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
    }


def _settings(a: dict[str, Any]) -> tuple:
    return (_pair(a["stride"]), _pair(a["padding"]), _pair(a["dilation"]), a["groups"])


def forward_call(inputs: dict[str, Any]) -> tuple:
    a = inputs
    return torch.ops.cnnkern.grouped_conv2d.default, (a["input"], a["weight"], a["bias"], *_settings(a))


def backward_call(inputs: dict[str, Any], dy: Tensor) -> tuple:
    a = inputs
    mask = [True, True, a["bias"] is not None]
    return torch.ops.cnnkern.grouped_conv2d_backward.default, (dy, a["input"], a["weight"], *_settings(a), mask)


def output_shape(layer: Layer) -> Shape:
    n, c, *picture = layer.shape
    a = layer.arguments
    return (n, c, *((size + 2 * a["padding"] - a["kernel"]) // a["stride"] + 1 for size in picture))


GROUPED_CONV2D = Case(
    name="grouped_conv2d",
    function=functional.conv2d,
    reference=reference.conv2d,
    inputs=grouped_conv2d_inputs,
    differentiable=("input", "weight", "bias"),
    mutated=(),
    variants={
        "depthwise 3x3": {},
        "depthwise 3x3 stride 2": {"stride": 2, "bias": False},
        "depthwise 5x5": {"kernel": 5, "padding": 2},
        "depthwise 7x7": {"kernel": 7, "padding": 3},
        "depthwise 4x9 stride 2": {"kernel": (4, 9), "padding": (0, 5), "stride": 2},
        "width 2": {"width": 2},
        "width 4": {"width": 4, "bias": False},
        "width 4 stride 2": {"width": 4, "stride": 2},
        "width 8": {"width": 8},
        "width 16 stride 2": {"width": 16, "stride": 2},
        "width 20": {"width": 20},
        "width 3": {"width": 3},  # from here on ATen's own
        "dilated": {"dilation": 2, "padding": 2},
        "two outputs per channel": {"multiplier": 2},
    },
    shapes=((1, 1, 1, 1), (2, 3, 4, 5), (1, 17, 7, 7), (3, 16, 15, 17), (2, 33, 9, 29), (1, 5, 31, 3)),
    gradcheck_shapes=((2, 2, 3, 3),),
    forward_call=forward_call,
    backward_call=backward_call,
    bench_layers=GROUPED_LAYERS,
    bench_variant="depthwise 3x3",
    forward_traffic=(1, 1),
    backward_traffic=(2, 1),
    output_shape=output_shape,
    ranks=(4,),
    empty_shapes=((0, 3, 4, 5),),
    float32_parameters=False,
)
