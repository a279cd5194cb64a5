"""Compares a module with its counterpart in torch.nn, and both with float64."""

import copy

import torch

from cnnkern import testing


def output_and_gradients(module, x, dy):
    """By name."""
    x = x.detach().requires_grad_()
    y = module(x)
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(y, [x, *parameters], dy)
    return {"output": y.detach(), **dict(zip(("input", *names), gradients, strict=True))}


def assert_as_good_as_twin(ours, theirs, x):
    """Output and gradients of a module and of torch.nn's, whose parameters are equal."""
    dy = torch.randn(theirs(x).shape)
    truth = output_and_gradients(copy.deepcopy(theirs).double(), x.double(), dy.double())
    testing.assert_as_good_as(output_and_gradients(ours, x, dy), output_and_gradients(theirs, x, dy), truth)
