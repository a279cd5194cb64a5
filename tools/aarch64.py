"""Builds the package for aarch64 on a machine that is none, and tries it there under emulation: no GPU, no board.

    python3 tools/aarch64.py                  builds, runs `cnnkern doctor` and operators' tests, and says what came out
    python3 tools/aarch64.py --folder DIR     keeps what it downloads and builds in DIR, so that a second call is short

Needs qemu-aarch64-static (Debian's qemu-user-static), g++-aarch64-linux-gnu, uv and ninja on the path, and apt-get and
dpkg, which fetch an aarch64 Python from Debian's mirrors as files: nothing is installed on this machine, and no
administrator is needed. setup.py runs in that Python, so that what it asks of the machine and of torch is answered as
an aarch64 machine would; the compilers that it starts are this machine's own. qemu has been seen to hang where setup.py
starts one beside other threads: a second call with --folder goes on from what is compiled. torch is the newest release
whose aarch64 wheel needs no CUDA libraries.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from elsewhere import BUILD, RUN, Failed, copy_sources, run, say

TORCH, PYTHON = "2.10", "3.11"
DEBIAN = (f"python{PYTHON}", f"libpython{PYTHON}-dev", "libgomp1", "libstdc++6", "zlib1g")
PROGRAMS = {
    "qemu-aarch64-static": "qemu-user-static",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "uv": "uv, of PyPI",
    "ninja": "ninja-build",
    "apt-get": "apt",
}
# Small shapes and few, for an emulated machine is slow.
TESTS = "arrive_in_any_layout or memory_format or empty_batch or reruns_are_bit_equal"


def aarch64_python(root: Path, scratch: Path) -> None:
    """Debian's aarch64 Python with all that it needs, unpacked into `root`."""
    state = scratch / "apt"
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (state / folder).mkdir(parents=True)
    (state / "status").touch()  # of a machine on which nothing is installed: every dependency is fetched
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Install-Recommends": "0",
        "APT::Sandbox::User": "",
        "Debug::NoLocking": "1",
        "Dir::State": state / "state",
        "Dir::State::status": state / "status",
        "Dir::Cache": state / "cache",
    }
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in settings.items())]
    run(*apt, "update")
    run(*apt, "--yes", "--download-only", "install", *DEBIAN)
    for package in (state / "cache" / "archives").glob("*.deb"):
        run("dpkg", "-x", package, root)
    # Python.h asks for a file of that folder; all of /usr/include would hide the headers of the compiler's own.
    (root / "usr/include" / f"python{PYTHON}" / "aarch64-linux-gnu").symlink_to("../aarch64-linux-gnu")


def packages(site: Path) -> None:
    """torch and what the build and the tests need, for aarch64."""
    needed = (f"torch=={TORCH}.*", *(name for name in BUILD if name != "ninja"), *RUN, "pytest", "hypothesis")
    platform = ["--python-platform", "aarch64-manylinux_2_28", "--python-version", PYTHON, "--only-binary", ":all:"]
    run("uv", "pip", "install", "--quiet", "--target", site, *platform, *needed)


class Emulated:
    """The aarch64 Python of `folder`, with its packages and the sources before them."""

    def __init__(self, folder: Path, sources: Path):
        self.root, self.site, self.sources = folder / "root", folder / "site", sources

    def run(self, *arguments: str | Path, **environment: str) -> str:
        """What it prints. Raises Failed."""
        path = os.pathsep.join((str(self.sources), str(self.site)))
        command = ["qemu-aarch64-static", "-L", self.root, self.root / f"usr/bin/python{PYTHON}", "-s"]
        # elsewhere.run leaves out what the caller's shell has of these.
        places = {"PYTHONHOME": str(self.root / "usr"), "PYTHONPATH": path}
        return run(*command, *arguments, cwd=self.sources, **places, **environment).stdout


def build(python: Emulated) -> None:
    """The extension, beside the sources."""
    compiler = "aarch64-linux-gnu-g++"
    compilers = {
        "CC": compiler,
        "CXX": compiler,
        "LDSHARED": f"{compiler} -shared",
        "LDCXXSHARED": f"{compiler} -shared",
    }
    compilers["CPLUS_INCLUDE_PATH"] = str(python.root / "usr/include" / f"python{PYTHON}")
    python.run("setup.py", "-q", "build_ext", "--inplace", CNNKERN_CUDA="0", **compilers)


def tried(python: Emulated) -> str:
    """What came of it, in a sentence."""
    torch = python.run("-c", "import torch; print(torch.__version__)").strip()
    (capability,) = re.findall(r"instruction set +([^;\n]*)", python.run("-m", "cnnkern", "doctor"))
    say(f"  cnnkern doctor: every operator gives correct results, instruction set {capability}; operators' tests")
    options = ["-q", "-p", "no:cacheprovider", "-W", "default", "-k", TESTS, "tests/test_battery.py"]
    (passed,) = re.findall(r"(\d+) passed", python.run("-m", "pytest", *options))
    return f"torch {torch}, aarch64 under qemu: {passed} of the operators' tests pass, instruction set {capability}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keeps everything there")
    options = parser.parse_args(argv)
    try:
        if lacking := [package for program, package in PROGRAMS.items() if not shutil.which(program)]:
            raise Failed(f"not on the path: {', '.join(lacking)}")
        with tempfile.TemporaryDirectory(prefix="cnnkern-aarch64-") as scratch:
            folder = (options.folder or Path(scratch)).resolve()
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "root").exists():
                say("Unpacking an aarch64 Python")
                aarch64_python(folder / "root", Path(scratch))
            if not (folder / "site").exists():
                say(f"Installing torch {TORCH} for aarch64")
                packages(folder / "site")
            python = Emulated(folder, copy_sources(folder / "source"))
            say("Building the extension (minutes)")
            begin = time.monotonic()
            build(python)
            say(f"  built in {time.monotonic() - begin:.0f} s")
            say(tried(python))
    except (Failed, OSError) as error:
        print(f"cnnkern: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
