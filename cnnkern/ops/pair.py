"""Settings of two-dimensional operators that are one number or two."""

from collections.abc import Sequence


def pair(operator: str, name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """One number for both dimensions, or one each. `operator` and `name`, of the setting, are for the error."""
    # Told by the type of a sequence: NumPy's integers, which PyTorch's functions take, are no int.
    both = tuple(value) * (2 if len(value) == 1 else 1) if isinstance(value, (list, tuple)) else (value, value)
    if len(both) != 2:
        raise RuntimeError(f"{operator}: expected {name} to be one number or two; got {value}")
    return both
