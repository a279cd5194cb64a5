"""Errors of cnnkern.functional's convolutions of sequences and volumes beside torch.nn.functional's."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cnnkern import functional

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
