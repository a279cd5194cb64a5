"""Marks parameters of a test that run in `make prove` instead of `make test`."""

from collections.abc import Iterable

import pytest


def proved(values: Iterable, tested: Iterable = ()) -> list:
    """The values as parameters, marked slow except those in `tested`, which have to be among them."""
    values, tested = list(values), list(tested)
    assert all(value in values for value in tested), "a row that there is not"
    return [value if value in tested else pytest.param(value, marks=pytest.mark.slow) for value in values]
