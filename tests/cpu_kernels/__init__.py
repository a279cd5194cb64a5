"""Builds csrc/cpu for the tests, for one instruction set, and lets it answer in place of the extension's own kernels.

A *tool* is how the kernels are compiled: ``plain``, in which planted faults are looked for (tests/faults), or with a
sanitizer, whose report ends the process. ``CNNKERN_KERNELS_OF`` names the files, of all operators without it.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import native

HERE = Path(__file__).parent
BUILD = native.ROOT / "build" / "cpu_kernels"
# A call for each access that is checked, where a function has many: in place, the checks of a convolution's unrolled
# loops took the compiler five minutes and three gigabytes.
CALLS = "--param=asan-instrumentation-with-call-threshold=100"
ADDRESS = native.address()
# The compiler is what takes time: two types. Vectors of float64 have fewer lanes than a byte of a mask has bits.
TOOLS = {
    "plain": native.Tool(("-DSECOND_TYPE=kDouble",)),
    "address+undefined": ADDRESS._replace(flags=("-DSECOND_TYPE=kBFloat16", CALLS, *ADDRESS.flags)),
    "thread": native.THREAD._replace(flags=("-DSECOND_TYPE=kDouble", f"-I{HERE / 'threads'}", *native.THREAD.flags)),
}
# As setup.py has it, for AVX2 where there is a choice: the instruction set whose masks have most threads at one byte.
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fvisibility=hidden", "-fno-math-errno"]
FLAGS += ["-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function"]
if os.uname().machine == "x86_64":
    FLAGS += ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"]
else:
    FLAGS += ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"]


def build(tool: str) -> Path:
    """The library of a tool, brought up to date. Raises RuntimeError with the compiler's message."""
    files = native.sources("cpu", ".cpp")
    flags = [*FLAGS, *TOOLS[tool].flags]
    folder = BUILD / tool
    objects = [
        native.compiled(path, folder / f"{path.stem}.o", *flags, "-include", str(HERE / "types.h")) for path in files
    ]
    name = "kernels" if len(files) == len(list((native.ROOT / "csrc" / "cpu").rglob("*.cpp"))) else files[0].stem
    registration = native.compiled(
        HERE / "registration.cpp", folder / f"{name}_registration.o", *flags, *native.operators_of(files, "cpu")
    )
    objects.append(registration)
    target = folder / f"{name}.so"
    command = ["g++", *TOOLS[tool].flags, "-fopenmp", "-shared", *map(str, objects), *native.torch_libraries()]
    return native.make(target, [*command, "-o", str(target)], lambda: objects)


@contextmanager
def answering(tool: str) -> Iterator[None]:
    """A context in which the kernels that `tool` has compiled answer for CPU tensors."""
    library = ctypes.CDLL(str(build(tool)))
    library.cpu_kernels_install()
    try:
        yield
    finally:
        library.cpu_kernels_uninstall()


def environment(tool: str) -> dict[str, str]:
    """What a process needs in its environment to load the kernels of `tool`: with several threads of its own."""
    return native.environment(TOOLS[tool]) | {"OMP_NUM_THREADS": "3"}
