"""Runs csrc/cuda on the CPU: builds it with g++ against the emulator, loads it, and lets it answer for the operators.

A *tool* is how the kernels are compiled: ``plain``, or with a sanitizer, whose report ends the process. See
docs/emulator.md.
"""

import ctypes
import os
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "emulator"
UNDEFINED = "alignment,shift,signed-integer-overflow,integer-divide-by-zero"
# The flags of each tool, and the runtime library that Python has to be started with.
TOOLS = {
    "plain": ([], None),
    # Of what is undefined, that which kernels do: all of it would take the compiler three times as long.
    "address+undefined": (
        [f"-fsanitize=address,{UNDEFINED}", f"-fno-sanitize-recover={UNDEFINED}"],
        "libasan.so",
    ),
    "thread": (["-fsanitize=thread"], "libtsan.so"),
}
# Contracting a*b+c would let forward and backward round differently; nvcc's calls of fma are spelled out.
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Werror"]
FLAGS += ["-Wno-unknown-pragmas"]
if os.uname().machine == "x86_64":
    FLAGS += ["-mfma"]


def _ninja(tools: list[str], kernels: list[Path]) -> str:
    """The build file: for each tool a library of `kernels` with their registration, and the program of faults."""
    import torch

    torch_root = Path(torch.__file__).parent
    lib, include = torch_root / "lib", torch_root / "include"
    lines = [
        f"flags = {' '.join(FLAGS)} -I{HERE} -I{ROOT / 'csrc'} -isystem {include} "
        f"-isystem {include / 'torch' / 'csrc' / 'api' / 'include'}",
        "rule compile",
        "  command = g++ $flags $tool -MD -MF $out.d $before -c -x c++ $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule library",
        f"  command = g++ -shared $tool $in -L{lib} -ltorch -ltorch_cpu -lc10 -o $out",
        "rule program",
        f"  command = g++ $tool $in -L{lib} -lc10 -Wl,-rpath,{lib} -o $out",
        # The runtime itself is compiled without a sanitizer for every tool: it speaks to them by their interfaces.
        f"build emulator.o: compile {HERE / 'emulator.cpp'}",
    ]
    for tool in tools:
        flags = " ".join(TOOLS[tool][0])
        objects = []
        for source in [*kernels, HERE / "registration.cpp", HERE / "faults.cpp"]:
            objects.append(f"{tool}/{source.name}.o")
            lines += [f"build {objects[-1]}: compile {source}", f"  tool = {flags}"]
            if source.suffix == ".cu":
                lines += [f"  before = -include {HERE / 'registration.h'}"]
        lines += [f"build {tool}/kernels.so: library {' '.join(objects[:-1])} emulator.o", f"  tool = {flags}"]
        lines += [f"build {tool}/faults: program {objects[-1]} emulator.o", f"  tool = {flags}"]
    return "\n".join(lines) + "\n"


def build(*targets: str) -> Path:
    """Brings ``TOOL/kernels.so`` and ``TOOL/faults`` up to date, all of them by default; returns their folder.

    Raises RuntimeError with the compiler's message.
    """
    import ninja

    BUILD.mkdir(parents=True, exist_ok=True)
    text = _ninja(list(TOOLS), sorted((ROOT / "csrc" / "cuda").glob("*.cu")))
    file = BUILD / "build.ninja"
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    command = [Path(ninja.BIN_DIR) / "ninja", "-j", str(os.cpu_count()), "-C", BUILD, *targets]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the emulator does not build:\n{done.stdout}{done.stderr}")
    return BUILD


def environment(tool: str) -> dict[str, str]:
    """What a process needs in its environment to load the kernels of `tool`."""
    _, runtime = TOOLS[tool]
    if runtime is None:
        return {}
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in (runtime, "libstdc++.so")
    ]
    return {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps what it has
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # The interpreter and PyTorch are not instrumented; races are looked for between the kernels' accesses.
        "TSAN_OPTIONS": "report_signal_unsafe=0 ignore_noninstrumented_modules=1 halt_on_error=1",
        "OMP_NUM_THREADS": "1",
    }


class Emulator:
    """A context in which the emulated CUDA kernels answer for CPU tensors."""

    def __init__(self, tool: str = "plain") -> None:
        self.library = ctypes.CDLL(str(build(f"{tool}/kernels.so") / tool / "kernels.so"))

    def __enter__(self) -> "Emulator":
        self.library.emulator_install()
        return self

    def __exit__(self, *exception: object) -> None:
        self.library.emulator_uninstall()
