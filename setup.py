"""Builds the extension `cnnkern._C`, and says which torch it is for; the rest stands in pyproject.toml.

CNNKERN_CUDA=0|1 leaves the CUDA kernels out or insists on them; by default they are built whenever a
toolkit and a CUDA build of torch are there, GPU or not. CNNKERN_CPU=native builds CPU kernels for this machine's
instruction set alone, for which the extension then is. CNNKERN_EXTENSION=0 builds no extension at all, where there is
no compiler: Triton's kernels are then used on a GPU, and PyTorch's own operators on the CPU. That is what other systems
than Linux get.

An extension loads with the torch release that it was built against alone. What is built with it therefore asks for that
release, carries its name in the version (0.1.0+torch2.14.cu130, without CUDA 0.1.0+torch2.14), and notes it in
cnnkern/_built_for.py, which cnnkern/extension.py reads before it loads anything.
"""

import importlib.util
import os
import re
import sys
from pathlib import Path

import setuptools
from packaging.requirements import Requirement  # which setuptools brings, as tomli

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parent
EXTENSION = os.environ.get("CNNKERN_EXTENSION", "1" if sys.platform == "linux" else "0") != "0"
if EXTENSION and sys.platform != "linux":
    raise SystemExit(
        f"cnnkern: the extension is built on Linux alone, and this is {sys.platform}: unset CNNKERN_EXTENSION"
    )


def supported_torch() -> Requirement:
    """The releases of torch that the extension can be built against, each by itself."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        return Requirement(tomllib.load(file)["tool"]["cnnkern"]["torch"])


def check_torch() -> str:
    """Ends a build that would be of no use, before anything of it begins. Returns the release of torch: "2.14"."""
    wanted = supported_torch()
    advice = f"`pip install '{wanted}'` first, or leave --no-build-isolation out, and pip fetches one for the build"
    try:
        from torch import __version__ as found
    except ImportError as error:
        raise SystemExit(f"cnnkern: torch cannot be imported ({error}), and is needed to build: {advice}") from error
    if not wanted.specifier.contains(found, prereleases=True):
        raise SystemExit(
            f"cnnkern: torch {found} is not supported: the extension needs {wanted}, to build as well as to load: "
            f"{advice}"
        )
    return ".".join(found.split(".")[:2])


def torch_requirement() -> str:
    """What is installed beside it: the release that the extension is for; without one all from the oldest on."""
    if RELEASE:
        return f"torch=={RELEASE}.*"
    oldest = next(s for s in supported_torch().specifier if s.operator == ">=")
    return f"torch{oldest}"


def version() -> str:
    (plain,) = re.findall(r'^__version__ = "(.*)"', (ROOT / "cnnkern" / "__init__.py").read_text(), re.MULTILINE)
    return f"{plain}+torch{RELEASE}{CUDA}" if RELEASE else plain


# A source distribution is for every release.
RELEASE = check_torch() if EXTENSION and "sdist" not in sys.argv else None
CUDA, extension = "", {}
if RELEASE:
    # It imports torch, which a package without the extension is made without. By path: that folder has a wheel.py too.
    spec = importlib.util.spec_from_file_location("build_extension", ROOT / "tools" / "build_extension.py")
    build_extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build_extension)
    extension = build_extension.arguments()
    CUDA = build_extension.local_version()
packages = [
    "cnnkern",
    "cnnkern.conversion",
    "cnnkern.eager",
    "cnnkern.measure",
    "cnnkern.models",
    "cnnkern.nn",
    "cnnkern.ops",
    "cnnkern.testing",
    "cnnkern.triton_kernels",
]
# The bare names belong to other distributions.
elsewhere = {"cnnkern.triton_kernels": "triton_kernels", "cnnkern.csrc": "csrc", "cnnkern.benchmarks": "benchmarks"}
rooms = [f"cnnkern.benchmarks{room}" for room in ("", ".gpu_minutes", ".show", ".studies", ".suite")]
setuptools.setup(
    version=version(),
    install_requires=[torch_requirement(), "numpy", "rich"],
    packages=[*packages, "cnnkern.csrc", *rooms],
    package_dir=elsewhere,
    include_package_data=False,  # no other source
    **extension,
)
