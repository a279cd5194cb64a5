"""What a threshold of compiled kernels is: limits, and rules that set them for kernels by name."""

import math
from typing import NamedTuple

ANY = math.inf


class Limits(NamedTuple):
    """At most, but where it says at least."""

    registers: int = 128  # of a thread: two blocks of 256 threads share a multiprocessor
    spills: float = 0  # accesses to local memory
    stack: int = 0  # bytes
    shared: int = 48 << 10  # bytes of a block, which it gets without asking
    dynamic_shared: int = 0  # bytes that a launch adds at most; not a threshold, what occupancy is computed with
    occupancy: float = 0.25  # at least
    # Of each innermost loop that touches global memory, or of a kernel's code if it has none.
    narrow: float = 0  # loads and stores of less than 16 bytes
    atomics: float = 0
    divisions: float = 0  # also square roots and calls of routines, of integers and of floating-point numbers
    functions: float = 0  # exponentials and their like
    fp64: float = 0  # instructions of float64 where elements are of another type
    # At least: the loads and stores of 16 bytes in one round of some loop, which are under way together; in all code.
    round: tuple[int, int] = (0, 0)
    whole: tuple[int, int] = (0, 0)


class Rule(NamedTuple):
    """Limits of the kernels whose names hold a pattern. The last one that says something about a limit decides it."""

    kind: str
    kernels: str  # regular expression
    because: str
    limits: dict[str, object]
    architectures: tuple[str, ...] = ()  # none: all


def cuda(kernels: str, because: str, *architectures: str, **limits: object) -> Rule:
    return Rule("cuda", kernels, because, limits, architectures)


def triton(kernels: str, because: str, *architectures: str, **limits: object) -> Rule:
    return Rule("triton", kernels, because, limits, architectures)
