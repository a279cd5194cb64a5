"""How many warps run a program: by rule, or timed on the GPU at hand where the user asks for it."""

import inspect
import os
from collections.abc import Callable, Hashable

import triton
import triton.language as tl
from cnnkern.triton_kernels import layout

SWITCH = "CNNKERN_TRITON_AUTOTUNE"
WARPS = (2, 4, 8, 16)


def enabled() -> bool:
    return os.environ.get(SWITCH) == "1"


class Tunable:
    """A kernel that may be launched again and again on the same arguments: it only writes what it does not read.

    ``kernel[grid](...)`` takes the number of warps from the launch (Triton's four where it names none) or, with
    CNNKERN_TRITON_AUTOTUNE=1 in the environment, whichever of WARPS `triton.autotune` finds fastest the first time that
    it meets a choice's key. Tiles, and with them scratch memory and grid, stay those of the rule.
    """

    def __init__(self, kernel) -> None:
        self.kernel = kernel
        parameters = inspect.signature(kernel.fn).parameters.values()
        self.names = [p.name for p in parameters]
        self.constants = [p.name for p in parameters if p.annotation is tl.constexpr]
        self.tuners: dict[Hashable, triton.runtime.Autotuner] = {}

    def key(self, programs: int, arguments: dict) -> Hashable:
        """What the choice depends on: the tile and every other constant, the types of the tensors and which of them are
        given, and the power of two of the number of programs, up to where they fill a GPU."""
        return (
            tuple(arguments[name] for name in self.constants),
            tuple(str(getattr(arguments[name], "dtype", arguments[name] is None)) for name in self.names),
            min(programs, layout.PROGRAMS).bit_length(),
        )

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        if not enabled():
            return self.kernel[grid]

        def launch(*args, num_warps: int | None = None, **kwargs) -> None:
            key = self.key(grid[0], dict(zip(self.names, args, strict=False)) | kwargs)
            if key not in self.tuners:
                configs = [triton.Config({}, num_warps=warps) for warps in WARPS]
                self.tuners[key] = triton.autotune(configs, key=[])(self.kernel)
            self.tuners[key][grid](*args, **kwargs)

        return launch
