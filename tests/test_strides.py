"""Tensors in any strides: the input, the residual and the incoming gradient; and the strides of results, eager's."""

import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import cnnkern
from cnnkern import functional, reference, testing

SHAPE = (3, 17, 6, 7)
LAYOUTS = ("contiguous", "channels_last", "sliced", "permuted")
VARIANTS = ({}, {"training": False}, {"act": "none"})

variants = pytest.mark.parametrize(
    ("operator", "variant"),
    [*itertools.product(("bn_act", "bn_add_act"), VARIANTS), ("add_relu", {})],
    ids=lambda v: v if isinstance(v, str) else " ".join(f"{n} {value}" for n, value in v.items()) or "train relu",
)


def drawn(operator, variant, generator):
    """(case, inputs, names of those that have the input's shape)"""
    case = testing.CASES[operator]
    inputs = case.inputs(SHAPE, torch.float32, generator=generator, **variant)
    return case, inputs, [n for n in case.differentiable if inputs[n].shape == SHAPE]


@variants
def test_every_mix_of_layouts(operator, variant, generator):
    case, inputs, names = drawn(operator, variant, generator)
    dy = testing.randn(SHAPE, generator, torch.float32)
    for incoming, *layouts in itertools.product(LAYOUTS, repeat=1 + len(names)):
        placed = {n: testing.with_layout(inputs[n], layout) for n, layout in zip(names, layouts, strict=True)}
        testing.check(case, inputs | placed, testing.with_layout(dy, incoming))


@variants
def test_expanded_inputs_residuals_and_gradients(operator, variant, generator):
    case, inputs, names = drawn(operator, variant, generator)
    dys = torch.ones(()).expand(SHAPE), testing.randn((1, 17, 1, 1), generator, torch.float32).expand(SHAPE)
    for expanded, dy in itertools.product(([n] for n in names), dys):
        over_images = {n: inputs[n][:1].expand(SHAPE) for n in expanded}
        testing.check(case, inputs | over_images, dy)
        over_rows = {n: inputs[n][:, :, :, :1].expand(SHAPE) for n in expanded}
        testing.check(case, inputs | over_rows, dy)
    testing.check(case, inputs | {n: inputs[n][:1].expand(SHAPE) for n in names}, dys[1])


# ---- the strides of results ---------------------------------------------------------------------------------------


def any_layout(shape: list[int], random: random.Random) -> Tensor:
    """A tensor of the shape in strides of any kind."""
    kind = random.choice(
        ["contiguous", "channels_last", "permuted", "sliced", "permuted and sliced", "expanded", "odd"]
    )
    if kind in ("contiguous", "channels_last"):
        return testing.with_layout(torch.randn(shape), kind)
    order = list(range(len(shape)))
    if "permuted" in kind:
        random.shuffle(order)
    inverse = [order.index(d) for d in range(len(order))]
    if kind == "permuted":
        return torch.randn([shape[d] for d in order]).permute(inverse)
    if "sliced" in kind:
        larger = [n + random.choice([0, 1, 2]) for n in shape]
        return torch.randn([larger[d] for d in order]).permute(inverse)[tuple(slice(0, n) for n in shape)]
    if kind == "expanded":
        one = random.randrange(len(shape))
        return torch.randn([1 if d == one else n for d, n in enumerate(shape)]).expand(shape)
    x = torch.randn(shape)  # dimensions of one element may have any stride
    return x.as_strided(
        shape, [s if n > 1 else random.choice([1, 7, s]) for n, s in zip(shape, x.stride(), strict=True)]
    )


def layer_norm_arguments(x: Tensor) -> tuple:
    return x.shape[-1:], torch.randn(x.shape[-1]), torch.randn(x.shape[-1])


def batch_norm_arguments(x: Tensor) -> tuple:
    C = x.shape[1]
    return torch.zeros(C), torch.ones(C), torch.randn(C), torch.randn(C), True, 0.1, 1e-5


def convolution_weight(x: Tensor, random: random.Random) -> Tensor:
    return any_layout([random.choice([1, 2, 3]) * x.shape[1], 1, *[random.choice([1, 3])] * (x.dim() - 2)], random)


# name -> (numbers of dimensions, tensors of the input's shape, of ours, of eager)
FUZZED = {
    **{
        f"bn_act {act}": ((2, 3, 4, 5), 1, functional.batch_norm_act, reference.batch_norm_act, {"act": act})
        for act in reference.ACTIVATIONS
    },
    **{
        f"bn_add_act {act}": (
            (2, 3, 4, 5),
            2,
            functional.batch_norm_add_act,
            reference.batch_norm_add_act,
            {"act": act},
        )
        for act in reference.ACTIVATIONS
    },
    "add_relu": ((2, 3, 4, 5), 2, functional.add_relu, reference.add_relu, {}),
    "layer_norm": ((2, 3, 4, 5), 1, functional.layer_norm, reference.layer_norm, {}),
    "conv1d": ((3,), 1, functional.conv1d, F.conv1d, {}),
    "conv2d": ((4,), 1, functional.conv2d, F.conv2d, {}),
    "conv3d": ((5,), 1, functional.conv3d, F.conv3d, {}),
}


@pytest.mark.parametrize("name", FUZZED)
def test_results_and_gradients_have_eagers_strides(name):
    draw = random.Random(0)
    torch.manual_seed(0)
    ranks, count, ours, eager, keywords = FUZZED[name]
    seen = 0
    while seen < 400:
        shape = [draw.choice([1, 1, 2, 3, 4]) for _ in range(draw.choice(ranks))]
        if math.prod(shape) // shape[1] < 2:
            continue  # no variance
        tensors = [any_layout(shape, draw) for _ in range(count)]
        if count == 2 and draw.random() < 0.4:  # which most have in common
            tensors[1] = torch.empty_like(tensors[0]).normal_()
        if name.startswith("conv"):
            arguments: tuple = (convolution_weight(tensors[0], draw), None, 1, 1, 1, shape[1])
        elif name.startswith("bn"):
            arguments = batch_norm_arguments(tensors[0])
        else:
            arguments = layer_norm_arguments(tensors[0]) if name == "layer_norm" else ()

        def results(function, dy, tensors=tensors, arguments=arguments):
            leaves = [t.detach().requires_grad_() for t in tensors]
            y = function(
                *leaves, *(a.clone() if isinstance(a, Tensor) and a.dim() == 1 else a for a in arguments), **keywords
            )
            dy = torch.empty_like(y).normal_() if dy is None else dy
            return [y, *torch.autograd.grad(y, leaves, dy.expand(y.shape) if dy.dim() else dy)]

        shape_of_y = list(eager(*tensors, *arguments, **keywords).shape)
        for dy in (None, any_layout(shape_of_y, draw)):
            mine, theirs = ([t.stride() for t in results(function, dy)] for function in (ours, eager))
            assert mine == theirs, f"{shape} {[t.stride() for t in tensors]} {None if dy is None else dy.stride()}"
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = [mode.from_tensor(t) for t in tensors]
            fake = ours(*fakes, *(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments), **keywords)
        assert fake.stride() == theirs[0], f"fake {shape} {[t.stride() for t in tensors]}"
        seen += 1


def test_layer_norm2d_keeps_the_memory_format_of_its_input():
    """Where eager's formula, which permutes, always gives channels_last."""
    layer = cnnkern.nn.LayerNorm2d(5)
    for layout in ("contiguous", "channels_last"):
        x = testing.with_layout(torch.randn(2, 5, 3, 4), layout).requires_grad_()
        y = layer(x)
        assert y.stride() == x.stride()
        assert torch.autograd.grad(y.sum(), x)[0].stride() == x.stride()


def test_code_that_views_what_comes_out_of_a_batch_norm():
    x = torch.randn(2, 7, 6).transpose(1, 2)
    torch.testing.assert_close(cnnkern.nn.BatchNorm1d(6)(x).view(2, -1), nn.BatchNorm1d(6)(x).view(2, -1))
    pooled = torch.randn(3, 8, 1, 1).to(memory_format=torch.channels_last)
    assert cnnkern.nn.BatchNormReLU2d(8)(pooled).stride() == (8, 1, 1, 1)
    assert functional.add_relu(pooled, pooled).view(3, -1).shape == (3, 8)
