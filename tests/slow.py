"""Which rows of a table of parameters `make test` leaves to `make prove`."""

from collections.abc import Iterable

import pytest


def proved(values: Iterable, tested: Iterable = ()) -> list:
    """The values as parameters, slow but for those of `tested`, of which each has to be among them."""
    values, tested = list(values), list(tested)
    assert all(value in values for value in tested), "a row that there is not"
    return [value if value in tested else pytest.param(value, marks=pytest.mark.slow) for value in values]
