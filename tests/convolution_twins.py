"""Shared by the tests of convolutions of sequences and of volumes: errors as PyTorch's, and bit-equal reruns."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cnnkern import functional, testing

FLOAT, DOUBLE = torch.float32, torch.float64
MIXED = [(FLOAT, DOUBLE), (DOUBLE, FLOAT), (torch.complex64, FLOAT)]  # dtypes of input and weight that do not fit


def assert_same_error(name: str, shape: tuple[int, ...], weight: tuple[int, ...], keywords: dict[str, Any]) -> None:
    x, w = torch.randn(shape), torch.randn(weight)
    with pytest.raises(Exception) as theirs:  # noqa: PT011  the type is what is asked for
        getattr(F, name)(x, w, **keywords)
    with pytest.raises(theirs.type) as mine:
        getattr(functional, name)(x, w, **keywords)
    # That of another type of an argument says how the call was written; that of the bias's dtype is the operator's.
    if theirs.type is RuntimeError and "bias type" not in str(theirs.value):
        assert str(mine.value) == str(theirs.value)


def assert_same_error_for_dtypes(
    name: str, shape: tuple[int, ...], weight: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    x, w = torch.randn(shape).to(dtypes[0]), torch.randn(weight).to(dtypes[1])
    with pytest.raises(RuntimeError) as theirs:
        getattr(F, name)(x, w, groups=shape[1])
    with pytest.raises(RuntimeError) as mine:
        getattr(functional, name)(x, w, groups=shape[1])
    assert str(mine.value) == str(theirs.value)


def assert_reruns_are_bit_equal(name: str, drawn: Iterable[tuple[dict[str, Any], torch.Tensor]]) -> None:
    """Of each (inputs, dy), with one thread, one again and two."""
    threads = torch.get_num_threads()
    try:
        for inputs, dy in drawn:
            runs = []
            for n in (1, 1, 2):
                torch.set_num_threads(n)
                runs.append(testing.run(getattr(functional, name), testing.CASES["grouped_conv2d"], inputs, dy))
            for other, (key, value) in itertools.product(runs[1:], runs[0].items()):
                assert torch.equal(value, other[key]), key
    finally:
        torch.set_num_threads(threads)
