"""A folder for a GPU machine without a network: this package, built here for that machine's Python and torch.

Needed here: a checkout, that Python, a network for pip, and CUDA's compiler (`nvcc`, as requirements.txt installs it).
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from ..suite import machine
from ..suite.place import ROOT

TORCH, PYTHON, ARCHITECTURE = "2.11.0", "3.12", "9.0"
LIMIT = 64 * 2**20  # bytes that are easily carried
TOOLS = ("setuptools>=77", "ninja", "pybind11", "numpy", "packaging", "wheel")
PURE = ("rich", "markdown-it-py", "mdurl", "pygments")  # what the package needs beside torch and numpy
LEFT_OUT = ("*.so", "build", "dist", "results", ".git", ".venv", "__pycache__", "node_modules", "*.egg-info")


class Missing(Exception):
    """What this machine lacks; one line."""


def interpreter(version: str) -> Path:
    """A Python of this version that runs. Raises Missing where there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [Path(path) for path in [shutil.which(f"python{version}")] if path]
    found += sorted(pyenv.glob(f"{version}.*/bin/python{version}"))
    for path in found:
        if subprocess.run([path, "-c", "import venv"], capture_output=True).returncode == 0:
            return path
    raise Missing(f"--prepare needs Python {version}, as the GPU machine has: none runs here")


def compiler() -> Path:
    """The folder that holds CUDA's compiler. Raises Missing where there is none."""
    places = [Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13", *map(Path, sys.path)]
    places = [place if place.name == "cu13" else place / "nvidia" / "cu13" for place in places]
    named = os.environ.get("CUDA_HOME")
    for home in [*([Path(named)] if named else []), *places, Path("/usr/local/cuda")]:
        if (home / "bin" / "nvcc").exists():
            return home
    raise Missing("--prepare needs nvcc: `pip install -r requirements.txt` installs it, or set CUDA_HOME")


def run(*command: str | Path, **environment: str) -> None:
    """Raises Missing with the last line that a command said, where it fails."""
    arguments = [str(part) for part in command]
    print("  " + " ".join(arguments)[:150], flush=True)
    done = subprocess.run(arguments, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()
        raise Missing(f"`{' '.join(arguments)[:80]}` ended with status {done.returncode}: {said[-1]}")


def sources(folder: Path) -> Path:
    """A copy of the checkout. Raises Missing outside one."""
    if ROOT is None:
        raise Missing("--prepare builds from a checkout, and this is an installed package")
    tree = folder / "source"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return tree


def prepare(folder: Path, torch: str, python: str, architecture: str) -> int:
    """Builds into `folder`/site. Raises Missing where something is missing, before anything is downloaded if it can."""
    base, home = interpreter(python), compiler()
    site = folder / "site"
    if site.exists():
        raise Missing(f"{site} is there already: name another folder, or remove it")
    with tempfile.TemporaryDirectory(prefix="cnnkern-prepare-") as scratch:
        tree = sources(Path(scratch))
        run(base, "-m", "venv", Path(scratch) / "venv")
        there = Path(scratch) / "venv" / "bin" / "python"
        pip = (there, "-m", "pip", "--disable-pip-version-check", "-q")
        run(*pip, "install", f"torch=={torch}", *TOOLS)
        built = Path(scratch) / "wheels"
        environment = {"CUDA_HOME": str(home), "CNNKERN_CUDA": "1", "CNNKERN_EXTENSION": "1"}
        environment["TORCH_CUDA_ARCH_LIST"] = architecture
        environment["PATH"] = f"{there.parent}{os.pathsep}{os.environ.get('PATH', '')}"  # ninja is there
        run(*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", built, tree, **environment)
        run(*pip, "install", "--no-deps", "--target", site, *built.glob("*.whl"), *PURE)
    size = sum(path.stat().st_size for path in site.rglob("*") if path.is_file())
    print(f"{site}: {size / 2**20:.0f} MiB" + (", more than is easily carried" if size > LIMIT else ""))
    print(f"there: CNNKERN_COMMIT={machine.commit()} PYTHONPATH={site} python3 -m cnnkern.benchmarks.gpu_minutes")
    return 0
