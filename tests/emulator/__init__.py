"""Runs csrc/cuda on the CPU: builds it with g++ against the emulator, loads it, and lets it answer for the operators.

A *tool* is how the kernels are compiled: ``plain``, or with a sanitizer, whose report ends the process. See
docs/emulator.md.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "emulator"
UNDEFINED = "alignment,shift,signed-integer-overflow,integer-divide-by-zero"
# The flags of each tool, and the runtime library that Python has to be started with. The compiler is what takes time,
# so sanitizers see the element types that differ in what is done to memory: float32, and one of 16 bits for addresses.
TOOLS = {
    "plain": ([], None),
    # Of what is undefined, that which kernels do: all of it would take the compiler three times as long.
    "address+undefined": (
        ["-DEMULATOR_TYPES=2", f"-fsanitize=address,{UNDEFINED}", f"-fno-sanitize-recover={UNDEFINED}"],
        "libasan.so",
    ),
    "thread": (["-DEMULATOR_TYPES=1", "-fsanitize=thread"], "libtsan.so"),
}
PROFILED = "thread"  # the tool whose object file the profile links to a runtime of its own
# Contracting a*b+c would let forward and backward round differently; nvcc's calls of fma are spelled out.
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Werror"]
FLAGS += ["-Wno-unknown-pragmas"]
if os.uname().machine == "x86_64":
    FLAGS += ["-mfma"]


def _run(*command: str) -> str:
    # Python may have been started under a sanitizer; the compiler is not.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"the emulator does not build:\n{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


@functools.cache
def _versions() -> str:
    import torch

    return f"{torch.__version__} {_run('g++', '--version')}"


def _make(target: Path, command: list[str], inputs: Callable[[], Iterable[Path]]) -> Path:
    """Runs `command` unless `target` is what it made of the same `inputs`, by their contents and not their dates."""

    def fingerprint() -> str:
        digest = hashlib.sha256(f"{_versions()} {command}".encode())
        for path in inputs():
            digest.update(str(path).encode() + (path.read_bytes() if path.exists() else b"?"))
        return digest.hexdigest()

    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f"{target.name}.stamp").open("a+") as stamp:
        fcntl.flock(stamp, fcntl.LOCK_EX)  # other processes may want the same
        stamp.seek(0)
        if not (target.exists() and stamp.read() == fingerprint()):
            stamp.truncate(0)
            _run(*command)
            stamp.write(fingerprint())  # of what the compiler has just found that it includes
    return target


def _object(source: Path, target: Path, *flags: str) -> Path:
    import torch

    include = Path(torch.__file__).parent / "include"
    command = ["g++", *FLAGS, *flags, f"-I{HERE}", f"-I{ROOT / 'csrc'}", "-isystem", str(include)]
    command += ["-isystem", str(include / "torch" / "csrc" / "api" / "include")]
    command += ["-MMD", "-c", str(source), "-o", str(target)]

    def included() -> list[Path]:  # but for the system's and PyTorch's, which their versions stand for
        listed = target.with_suffix(".d")
        return [Path(name) for name in re.split(r"[\s\\]+", listed.read_text())[1:] if name] if listed.exists() else []

    return _make(target, command, included)


def build(target: str) -> Path:
    """The path of ``TOOL/kernels.so`` or ``TOOL/faults``, brought up to date.

    TOOL is one of TOOLS, or ``profile``: the kernels of PROFILED, linked to a runtime that counts (profile.cpp).

    Raises RuntimeError with the compiler's message.
    """
    import torch

    lib = Path(torch.__file__).parent / "lib"
    tool, name = target.split("/")
    flags, _ = TOOLS[PROFILED if tool == "profile" else tool]
    compiled = BUILD / (PROFILED if tool == "profile" else tool)
    if name == "faults":
        program = _object(HERE / "faults.cpp", compiled / "faults.o", *flags)
        link = [f"-L{lib}", "-lc10", f"-Wl,-rpath,{lib}"]
    else:
        # All kernels at once: reading PyTorch's headers takes the compiler longer than most of them.
        kernels = [
            option for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) for option in ("-include", str(path))
        ]
        program = _object(
            HERE / "registration.cpp",
            compiled / "kernels.o",
            *(*flags, "-include", str(HERE / "registration.h"), *kernels),
        )
        link = ["-shared", f"-L{lib}", "-ltorch", "-ltorch_cpu", "-lc10"]
    # The runtime itself is compiled without a sanitizer for every tool: it speaks to them by their interfaces.
    objects = [program, _object(HERE / "emulator.cpp", BUILD / "emulator.o")]
    if name != "faults":
        observer = "profile" if tool == "profile" else "launches"
        objects.append(_object(HERE / f"{observer}.cpp", BUILD / f"{observer}.o"))
    command = ["g++", *([] if tool == "profile" else flags), *map(str, objects), *link, "-o", str(BUILD / target)]
    return _make(BUILD / target, command, lambda: objects)


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
    lines = (line.split() for line in _run("nm", str(library)).splitlines())
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
    _, runtime = TOOLS[tool]
    if runtime is None:
        return {}
    libraries = [_run("g++", f"-print-file-name={name}").strip() for name in (runtime, "libstdc++.so")]
    return {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps what it has
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # The interpreter and PyTorch are not instrumented; races are looked for between the kernels' accesses.
        "TSAN_OPTIONS": "report_signal_unsafe=0 ignore_noninstrumented_modules=1 halt_on_error=1",
        "OMP_NUM_THREADS": "1",
    }


class Emulator:
    """A context in which the emulated CUDA kernels answer for CPU tensors.

    What they leave to PyTorch its CPU kernels compute without oneDNN, whose 16-bit gradients of small grouped weights
    depend on what its memory held before (torch 2.14.1).
    """

    def __init__(self, tool: str = "plain") -> None:
        self.library = ctypes.CDLL(str(build(f"{tool}/kernels.so")))

    def __enter__(self) -> "Emulator":
        self.onednn = torch.backends.mkldnn.set_flags(False)
        self.library.emulator_install()
        return self

    def __exit__(self, *exception: object) -> None:
        self.library.emulator_uninstall()
        torch.backends.mkldnn.set_flags(*self.onednn)

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
