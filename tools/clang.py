"""Whether clang takes the CPU sources too, for Linux and for macOS: it compiles each and links none.

    .venv/bin/python tools/clang.py                        with clang++, for this machine
    .venv/bin/python tools/clang.py --compiler "python3 -m ziglang c++" --target aarch64-macos
    .venv/bin/python tools/clang.py csrc/cpu/add_relu.cpp  these sources alone

`pip install ziglang` brings clang with the C and C++ libraries of both systems. torch's headers are
.venv's. Each source is compiled once, without the vector instructions of x86. Warnings are errors, but for those of
headers. Prints what does not pass, and ends with status 1 if anything did not.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor

import build_extension
from elsewhere import ROOT
from torch.utils import cpp_extension

# Not needed to find errors; and clang's OpenMP is a library of its own, without which its pragmas are skipped.
LEFT_OUT = ("-O3", "-fopenmp")
# Flags that it does not need, and `&` of two conditions, which is meant: `&&` would be a branch in a loop of vectors.
ALLOWED = ("-Wno-unused-command-line-argument", "-Wno-bitwise-instead-of-logical")
FOLDERS = ("", "autograd/", "deferred/", "cpu/**/")


def command(compiler: str, target: str) -> list[str]:
    flags = [flag for flag in build_extension.extension().extra_compile_args["cxx"] if flag not in LEFT_OUT]
    headers = [*cpp_extension.include_paths(), sysconfig.get_path("include"), sysconfig.get_path("purelib")]
    return [
        *shlex.split(compiler),
        *(["-target", target] if target else []),
        *("-c", "-O0", "-Werror", "-I", str(ROOT / "csrc")),
        *(part for folder in headers for part in ("-isystem", folder)),
        *('-DCNNKERN_CPU="DEFAULT"', "-DCNNKERN_CPU_DEFAULT=1", "-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"),
        *("-DTORCH_API_INCLUDE_EXTENSION_H", "-DTORCH_EXTENSION_NAME=_C"),
        *flags,
        *ALLOWED,
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", help="default: all of the extension without CUDA")
    parser.add_argument("--compiler", default="clang++", help="a clang, with its arguments")
    parser.add_argument("--target", default="", help="another system than this, as clang names it: aarch64-macos")
    options = parser.parse_args(argv)
    if not shutil.which(shlex.split(options.compiler)[0]):
        said = f"there is no {options.compiler} on the path: `pip install ziglang`, see --help"
        print(f"cnnkern: {said}", file=sys.stderr)
        return 1
    sources = options.sources or [name for folder in FOLDERS for name in build_extension.sources(f"{folder}*.cpp")]
    begin = command(options.compiler, options.target)
    with (
        tempfile.TemporaryDirectory(prefix="cnnkern-clang-") as scratch,
        ThreadPoolExecutor(build_extension.JOBS) as pool,
    ):

        def passes(name: str) -> bool:
            out = f"{scratch}/{name.replace('/', '-')}.o"
            done = subprocess.run([*begin, "-o", out, name], cwd=ROOT, capture_output=True, text=True)
            print(f"{name}: {'passes' if done.returncode == 0 else done.stderr}", flush=True)
            return done.returncode == 0

        return int(not all(list(pool.map(passes, sources))))


if __name__ == "__main__":
    sys.exit(main())
