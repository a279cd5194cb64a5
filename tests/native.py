"""Compiles C++ for the tests. Results are reused while sources, flags and versions are the same."""

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parent.parent
UNDEFINED = ("shift", "signed-integer-overflow", "integer-divide-by-zero")  # what kernels could do of it


class Tool(NamedTuple):
    """How kernels are compiled, and the runtime library that Python has to preload for that."""

    flags: tuple[str, ...] = ()
    runtime: str | None = None


PLAIN = Tool()


def address(*more: str) -> Tool:
    """AddressSanitizer, and the checks UNDEFINED and `more` of UBSan: all of them would take three times as long."""
    undefined = ",".join((*UNDEFINED, *more))
    return Tool((f"-fsanitize=address,{undefined}", f"-fno-sanitize-recover={undefined}"), "libasan.so")


THREAD = Tool(("-fsanitize=thread",), "libtsan.so")


def run(*command: str) -> str:
    """The output of a command. Raises RuntimeError with the output if it fails."""
    # Python may have been started under a sanitizer; the compiler is not.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"this does not build:\n{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def compiler() -> tuple[str, ...]:
    """g++, through ccache if that is installed, as in the extension's build."""
    return ("ccache", "g++") if shutil.which("ccache") else ("g++",)


@functools.cache
def _versions() -> str:
    return f"{torch.__version__} {run('g++', '--version')}"


def make(target: Path, command: list[str], inputs: Callable[[], Iterable[Path]]) -> Path:
    """Runs `command`, unless `target` was made from `inputs` with the same contents."""

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
            run(*command)
            stamp.write(fingerprint())  # of what the compiler has just found that it includes
    return target


def compiled(source: Path, target: Path, *flags: str) -> Path:
    """The object file of a source that includes PyTorch's headers."""
    include = Path(torch.__file__).parent / "include"
    command = [*compiler(), *flags, f"-I{ROOT / 'csrc'}", "-isystem", str(include)]
    command += ["-isystem", str(include / "torch" / "csrc" / "api" / "include")]
    command += ["-MMD", "-c", str(source), "-o", str(target)]

    def included() -> list[Path]:  # except the system's and PyTorch's, whose versions are part of the key
        listed = target.with_suffix(".d")
        return [Path(name) for name in re.split(r"[\s\\]+", listed.read_text())[1:] if name] if listed.exists() else []

    return make(target, command, included)


def sources(folder: str, suffix: str) -> list[Path]:
    """The files of a folder of csrc with the kernels: of one operator alone where CNNKERN_KERNELS_OF names it."""
    return sorted((ROOT / "csrc" / folder).rglob(f"{os.environ.get('CNNKERN_KERNELS_OF', '*')}{suffix}"))


def operators_of(files: Iterable[Path], backend: str) -> list[str]:
    """The flags by which registration.cpp registers what these files define, and no other operator."""
    text = "".join(path.read_text() for path in files)
    table = (ROOT / "csrc" / "kernels.h").read_text().partition("#define CNNKERN_OPERATORS(f)")[2]
    declared = re.findall(r" f\((\w+)\)", table)
    defined = [name for name in declared if re.search(rf"\b{name}_{backend}\(", text)]
    return [] if defined == declared else [f"-DOPERATORS_BUILT(f)={' '.join(f'f({name})' for name in defined)}"]


def torch_libraries() -> list[str]:
    """The flags that link a library to PyTorch's."""
    return [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]


def environment(tool: Tool) -> dict[str, str]:
    """The environment that a process needs to load what `tool` has compiled."""
    if tool.runtime is None:
        return {}
    libraries = [run("g++", f"-print-file-name={name}").strip() for name in (tool.runtime, "libstdc++.so")]
    return {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python never frees some memory
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # The interpreter and PyTorch are not instrumented; races are looked for between the kernels' accesses.
        "TSAN_OPTIONS": "report_signal_unsafe=0 ignore_noninstrumented_modules=1 halt_on_error=1",
        "OMP_NUM_THREADS": "1",
    }
