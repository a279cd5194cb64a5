"""`torch.utils.flop_counter` counts a converted model like the original, in any order of imports."""

import copy
import sys

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import cnnkern
from cnnkern import testing
from tests.child import run_child

CONVOLUTION = testing.CASES["grouped_conv2d"]


def counted(function, *arguments) -> tuple[int, int]:
    """FLOPs of the call and of its backward pass."""
    with FlopCounterMode(display=False) as forward:
        y = function(*arguments)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("variant", CONVOLUTION.variants)
def test_convolutions(variant):
    for shape in CONVOLUTION.gradcheck_shapes:
        inputs = CONVOLUTION.inputs(
            shape, torch.float32, generator=torch.Generator().manual_seed(0), **CONVOLUTION.variants[variant]
        )
        # All gradients, those of the parameters alone, that of the input alone.
        for wanted in (("input", "weight", "bias"), ("weight", "bias"), ("input",)):
            both = []
            for function in (CONVOLUTION.function, CONVOLUTION.reference):
                arguments = {
                    n: v.detach().requires_grad_(n in wanted) if isinstance(v, torch.Tensor) else v
                    for n, v in inputs.items()
                }
                both.append(counted(lambda f=function, a=arguments: f(**a)))
            assert both[0] == both[1]
            assert min(both[0]) > 0


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "mobilenet_v2", "convnext_tiny"])
def test_converted_models(name):
    model = torchvision.models.get_model(name, weights=None, num_classes=10)
    converted = cnnkern.convert(copy.deepcopy(model))
    x = torch.randn(2, 3, 64, 64)
    assert counted(converted, x) == counted(model, x)
    # Each child of the model is charged with its own.
    with FlopCounterMode(display=False) as ours:
        converted(x)
    with FlopCounterMode(display=False) as theirs:
        model(x)
    for child, _ in model.named_children():
        mine, expected = (
            sum(counter.get_flop_counts().get(f"{type(m).__name__}.{child}", {}).values())
            for counter, m in ((ours, converted), (theirs, model))
        )
        assert mine == expected, child


def test_what_eager_counts_nothing_for():
    layers = (nn.BatchNorm2d(4), nn.LayerNorm(6))
    x = torch.randn(2, 4, 5, 6)
    for layer in layers:
        assert counted(cnnkern.convert(copy.deepcopy(layer)), x) == counted(layer, x) == (0, 0)


PROGRAM = """
import sys
{first}
{second}
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    cnnkern.nn.GroupedConv2d(8, 8, 3, groups=8)(torch.randn(1, 8, 5, 5))
assert counter.get_total_flops() == 2 * 8 * 9 * 9, counter.get_total_flops()
import importlib
importlib.reload(torch.utils.flop_counter)
with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
    cnnkern.nn.GroupedConv2d(8, 8, 3, groups=8)(torch.randn(1, 8, 5, 5))
assert counter.get_total_flops() == 2 * 8 * 9 * 9, counter.get_total_flops()
"""
COUNTER = "import torch, torch.utils.flop_counter"
CNNKERN = "import torch, cnnkern"


@pytest.mark.parametrize(
    ("first", "second"),
    [(COUNTER, CNNKERN), (f"{CNNKERN}; assert 'torch.utils.flop_counter' not in sys.modules", COUNTER)],
)
def test_in_either_order_of_imports(first, second):
    program = PROGRAM.format(first=first, second=second)
    done = run_child([sys.executable, "-c", program])
    assert done.returncode == 0, done.stderr
