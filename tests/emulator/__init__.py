"""Runs csrc/cuda on the CPU: builds it with g++ against the emulator, loads it, and lets it answer for the operators.

A *tool* is how the kernels are compiled: ``plain``, or with a sanitizer, whose report ends the process. See
docs/emulator.md.
"""

import ctypes
import os
import re
from pathlib import Path
from typing import NamedTuple

import native
import torch

from cnnkern.ops import tuned

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "emulator"


def _of_types(count: int, tool: native.Tool = native.PLAIN) -> native.Tool:
    return tool._replace(flags=(f"-DEMULATOR_TYPES={count}", *tool.flags))


# The compiler is what takes time, so sanitizers see the element types that differ in what is done to memory: float32,
# and one of 16 bits for addresses.
TOOLS = {
    "plain": native.PLAIN,
    "float32": _of_types(1),  # what planted faults are found in
    "address+undefined": _of_types(2, native.address("alignment")),
    "thread": _of_types(1, native.THREAD),
}
PROFILED = "thread"  # the tool whose object file the profile links to a runtime of its own
# Contracting a*b+c would let forward and backward round differently; nvcc's calls of fma are spelled out.
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Werror"]
FLAGS += ["-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]  # g++ 12 finds the latter in PyTorch's SmallVector
if os.uname().machine == "x86_64":
    FLAGS += ["-mfma"]


def _object(source: Path, target: Path, *flags: str) -> Path:
    return native.compiled(source, target, *FLAGS, *flags, f"-I{HERE}")


def build(target: str) -> Path:
    """The path of ``TOOL/kernels.so`` or ``TOOL/faults``, brought up to date.

    TOOL is one of TOOLS, or ``profile``: what PROFILED compiles, linked to a runtime that counts (profile.cpp).

    Raises RuntimeError with the compiler's message.
    """
    lib = Path(torch.__file__).parent / "lib"
    tool, name = target.split("/")
    flags = TOOLS[PROFILED if tool == "profile" else tool].flags
    compiled = BUILD / (PROFILED if tool == "profile" else tool)
    if name == "faults":
        program = _object(HERE / "faults.cpp", compiled / "faults.o", *flags)
        link = [f"-L{lib}", "-lc10", f"-Wl,-rpath,{lib}"]
    else:
        # All kernels at once: reading PyTorch's headers takes the compiler longer than most of them.
        sources = native.sources("cuda", ".cu")
        included = [option for path in sources for option in ("-include", str(path))]
        program = _object(
            HERE / "registration.cpp",
            compiled / "kernels.o",
            *(*flags, *native.operators_of(sources, "cuda"), "-include", str(HERE / "registration.h"), *included),
        )
        link = ["-shared", *native.torch_libraries()]
    # The runtime itself is compiled without a sanitizer for every tool: it speaks to them by their interfaces.
    objects = [program, _object(HERE / "emulator.cpp", BUILD / "emulator.o")]
    objects.append(_object(HERE / "tensor_cores.cpp", BUILD / "tensor_cores.o", "-O3"))
    observer = "profile" if tool == "profile" else None if name == "faults" else "launches"
    if observer:
        objects.append(_object(HERE / f"{observer}.cpp", BUILD / f"{observer}.o"))
    command = ["g++", *([] if tool == "profile" else flags), *map(str, objects), *link, "-o", str(BUILD / target)]
    return native.make(BUILD / target, command, lambda: objects)


class Traffic(NamedTuple):
    """What a kernel's warps asked of global memory by accesses of one kind and width."""

    kernel: str  # as C++ spells it, without namespaces and parameters
    kind: str  # load, store or atomic
    width: int  # bytes of a lane
    requests: int  # of a warp each
    sectors: int  # of 32 bytes, that these touched
    ideal: int  # as many as the same bytes fill
    bytes: int


def _functions(library: str | Path) -> dict[int, str]:
    """The symbols of a library's functions by their addresses, but for the parts that the compiler cuts from some."""
    lines = (line.split() for line in native.run("nm", str(library)).splitlines())
    return {int(f[0], 16): f[2] for f in lines if len(f) == 3 and f[1] in "tTwW" and "." not in f[2]}


def kernels(tool: str) -> set[str]:
    """Every kernel in the library of a tool, as C++ spells it, without namespaces and parameters.

    Kernels are known by their names; tests/test_cuda_sources.py holds them to that.
    """
    from gpu_gate.machine_code import spelled

    functions = spelled(list(_functions(build(f"{tool}/kernels.so")).values()))
    return {name for name in functions if re.fullmatch(r"\w+_kernel(<.*>)?", name)}


def environment(tool: str) -> dict[str, str]:
    """What a process needs in its environment to load the kernels of `tool`."""
    needed = native.environment(TOOLS[tool])
    if "TSAN_OPTIONS" in needed:
        # Each of the 2560 threads of five blocks is a fiber with a history of its own, of two megabytes by default: for
        # the stack of the access before the one that is reported. What is found does not hang on it.
        needed["TSAN_OPTIONS"] += " history_size=0"
    return needed


class Emulator:
    """A context in which the emulated CUDA kernels answer for CPU tensors.

    What they leave to PyTorch its CPU kernels compute without oneDNN, whose 16-bit gradients of small grouped weights
    depend on what its memory held before (torch 2.14.1). Convolutions of float32 are not in TF32, as the CPU has none;
    a test of TF32 sets torch.backends.cudnn.allow_tf32 inside.
    """

    def __init__(self, tool: str = "plain") -> None:
        self.library = ctypes.CDLL(str(build(f"{tool}/kernels.so")))

    def __enter__(self) -> "Emulator":
        self.onednn = torch.backends.mkldnn.set_flags(False)
        self.tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
        self.library.emulator_install()
        return self

    def __exit__(self, *exception: object) -> None:
        self.library.emulator_uninstall()
        torch.backends.mkldnn.set_flags(*self.onednn)
        torch.backends.cudnn.allow_tf32 = self.tf32

    def gives_to_our_kernels(self, calls: list[tuned.Call]) -> None:
        """Until the end of the context these kernels see a table of `cnnkern tune` that says so."""
        for call in calls:
            _, dtype, numbers = call.own_convolution()
            name = str(dtype).removeprefix("torch.")
            assert name in ("float32", "bfloat16", "float16")
            self.library.emulator_own_convolution(
                name.encode(), (ctypes.c_int64 * len(numbers))(*numbers), ctypes.c_size_t(len(numbers))
            )

    def _rows(self, function: str) -> list[tuple[str, list[str]]]:
        """The lines that a function of the library returns, each of which begins with a kernel's address."""
        from gpu_gate.machine_code import spelled

        call = getattr(self.library, function)
        call.restype = ctypes.c_char_p
        rows = [line.split() for line in call().decode().splitlines()]
        functions = _functions(self.library._name)
        names = spelled([functions[int(offset)] for offset, *_ in rows]) if rows else []
        return [(name, rest) for name, (_, *rest) in zip(names, rows, strict=True)]

    def launches(self) -> dict[str, int]:
        """Every kernel launched in this process, and the bytes of dynamic shared memory that it had at most."""
        return {name: int(most) for name, (most,) in self._rows("emulator_launches")}

    def profile(self) -> list[Traffic]:
        """The memory traffic of what ran since the last call. For the tool ``profile`` alone."""
        return sorted(Traffic(name, kind, *map(int, n)) for name, (kind, *n) in self._rows("emulator_profile"))

    def moved(self) -> int:
        """Bytes of the sectors that the launches since the last call read, and of those that they wrote.

        Each counts once a launch: as where a cache forgets nothing in a launch, and everything between two. For the
        tool ``profile`` alone.
        """
        take = self.library.emulator_moved
        take.restype = ctypes.c_uint64
        return take()
