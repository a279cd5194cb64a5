"""Environments and sources outside of the checkout, for tools/wheel.py and tools/matrix.py."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What the build needs beside torch, as pyproject.toml has it, and the package when it runs.
BUILD = ("setuptools>=77", "wheel", "ninja", "pybind11", "numpy")
RUN = ("numpy", "rich")


def nvcc_for(torch: str) -> tuple[str, ...]:
    """What to install beside PyPI's torch of this release ("2.11") to compile CUDA kernels: torch pins which version of
    it. Nothing for releases before 2.11: they are built with CUDA 12, whose compiler PyPI does not have."""
    return ("cuda-toolkit[nvcc,crt,nvvm,cccl]",) if [int(part) for part in torch.split(".")[:2]] >= [2, 11] else ()


class Failed(Exception):
    """What is wrong, in a line or with the output that says so."""


def run(
    *command: str | Path, cwd: Path | None = None, code: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The finished process. Raises Failed where it ends with another status than `code`."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "ATEN_CPU_CAPABILITY")}
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"  # the build finds ninja there
    arguments = [str(part) for part in command]
    done = subprocess.run(arguments, cwd=cwd or ROOT, env=kept | environment, capture_output=True, text=True)
    if done.returncode != code:
        said = (done.stdout + done.stderr)[-6000:]
        raise Failed(f"{' '.join(arguments)[:200]} ended with status {done.returncode}, not {code}:\n{said}")
    return done


def say(text: str) -> None:
    print(text, flush=True)


def processor_time() -> float:
    """Seconds of processor time that the finished child processes took, theirs included. Other work on the machine and
    the number of compilers at a time change it little, where elapsed time would be of no use in a table."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def with_torch(folder: Path, torch: str, python: str, *packages: str) -> Path:
    """The interpreter of a new environment in `folder`: Python `python` ("3.12"), the newest torch of the release
    `torch` ("2.11"), `packages`. uv installs them where it is on the path: its environments share their files on the
    disk. Raises Failed where there is no such interpreter or no such torch for it."""
    base = shutil.which(f"python{python}")
    if base is None:
        raise Failed(f"there is no python{python} on the path")
    wanted = (f"torch=={torch}.*", *packages)
    if uv := shutil.which("uv"):
        run(uv, "venv", "--quiet", "--python", base, folder)
        run(uv, "pip", "install", "--quiet", "--python", folder, *wanted)
    else:
        run(base, "-m", "venv", folder)
        run(folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *wanted)
    return folder / "bin" / "python"


def copy_sources(folder: Path) -> Path:
    """A copy of the checkout, as git would commit it now: what is built there is nothing that was built before."""
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def build_wheel(python: Path, sources: Path, out: Path, **environment: str) -> Path:
    """A wheel of these sources for the torch of this environment."""
    before = set(out.glob("*.whl"))
    path = f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"  # ninja is there
    setup = "import setuptools.build_meta as backend, sys; print(backend.build_wheel(sys.argv[1]))"
    out.mkdir(parents=True, exist_ok=True)
    run(python, "-c", setup, out.resolve(), cwd=sources, PATH=path, **environment)
    return (set(out.glob("*.whl")) - before).pop()


def install_wheel(python: Path, wheel: Path) -> None:
    """Into this environment, with nothing that it asks for."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run(*pip, "install", "--no-deps", "--no-index", "--force-reinstall", wheel)
