"""Batch norms and additions of tensors in any strides: the input, the residual and the incoming gradient."""

import itertools

import pytest
import torch

from cnnkern import testing

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
