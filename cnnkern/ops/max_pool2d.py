"""Max pooling that saves a byte per output. Kernels: csrc/cpu, csrc/cuda, triton_kernels; autograd: csrc/autograd."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cnnkern.ops import route
from cnnkern.ops.pair import pair
from cnnkern.triton_kernels import check
from cnnkern.triton_kernels.pooling import WINDOW

_max_pool2d = torch.ops.cnnkern.max_pool2d.default
_NAME = "cnnkern::max_pool2d"
_FAST_ON_A_GPU = frozenset({((3, 3), (2, 2)), ((2, 2), (2, 2))})  # kernel and stride (csrc/cuda/max_pool2d.cuh)
_INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


def max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``F.max_pool2d(...)`` that saves one byte per output for backward, instead of the input.

    All arguments of ``F.max_pool2d`` are accepted. PyTorch's kernel computes a dilation other than 1, windows of more
    than 256 elements, ``return_indices=True``, integers and images without a batch dimension.
    Results are bit-equal to PyTorch's: of equal values the first is the maximum, NaN is larger than any number, and
    padding is minus infinity.

    Shapes: ``input`` (N, C, H, W) or (C, H, W); the result (N, C, H', W') or (C, H', W'), where H' is floor((H + 2 *
    padding - kernel_size) / stride) + 1, rounded up with ``ceil_mode``. ``stride`` None is ``kernel_size``.
    Dtypes: float32, float64, bfloat16 or float16. The result has PyTorch's strides.

    Raises RuntimeError, as PyTorch does, for a padding of more than half of the kernel, an output without elements and
    inputs of other ranks; NotImplementedError for other dtypes.
    """
    kernel = pair(_NAME, "kernel_size", kernel_size)
    strides = kernel if stride is None or stride == [] else pair(_NAME, "stride", stride)
    if (
        return_indices
        or route.is_pytorchs((input,), (), fuses=True, shards=True)
        or _is_left(input, kernel, strides, pair(_NAME, "dilation", dilation))
    ):
        arguments = (input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        return route.by_pytorch(max_pool2d, *arguments)  # type: ignore[arg-type]
    return _max_pool2d(input, kernel, strides, pair(_NAME, "padding", padding), ceil_mode)[0]


def _is_left(input: Tensor, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]) -> bool:
    """Whether PyTorch computes this call.

    On a CPU it computes channels_last without gradients: its kernel was faster for some shapes and at most a quarter
    slower for others, and cnnkern's also writes bytes that only the gradient needs. On a GPU it computes the windows
    that have no specialised kernel: the generic kernel reached a tenth of the memory bandwidth
    (`benchmarks/studies/max_pool2d.cu`), and has not been compared with PyTorch's.
    """
    if input.dim() == 3 or input.dtype in _INTEGERS or dilation != (1, 1):
        return True
    if input.is_cpu and input.dim() == 4 and not input.is_contiguous() and not _wants_gradient(input):
        return True
    if input.is_cuda and (kernel, stride) not in _FAST_ON_A_GPU:
        return True
    return kernel[0] * kernel[1] > WINDOW


def _wants_gradient(input: Tensor) -> bool:
    return input.requires_grad and torch.is_grad_enabled()


@torch.library.register_fake("cnnkern::max_pool2d")
def _(x, kernel_size, stride, padding, ceil_mode):
    check.floating(_NAME, x)
    y, indices = torch.ops.aten.max_pool2d_with_indices(x, kernel_size, stride, padding, 1, ceil_mode)
    return y, torch.empty_like(indices, dtype=torch.uint8)


@torch.library.register_fake("cnnkern::max_pool2d_backward")
def _(dy, positions, size, kernel_size, stride, padding, channels_last):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((*dy.shape[:2], *size), dtype=dy.dtype, device=dy.device, memory_format=memory_format)
