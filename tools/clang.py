"""Whether clang takes the CPU sources too, for Linux and for macOS: it reads each, and compiles none.

    .venv/bin/python tools/clang.py                        with clang++, for this machine
    .venv/bin/python tools/clang.py --compiler "python3 -m ziglang c++" --target aarch64-macos
    .venv/bin/python tools/clang.py csrc/cpu/add_relu.cpp  these sources alone

`pip install ziglang` brings clang with the C and C++ libraries of both systems. torch's headers are
.venv's. Each source is read once, without the vector instructions of x86. Warnings are errors, but for those of
headers. Prints what does not pass, and ends with status 1 if anything did not.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor

import build_extension
from elsewhere import ROOT
from torch.utils import cpp_extension

# Those of g++ alone, and what the linker or OpenMP's library would be needed for.
NOT_CLANGS = ("-O3", "-g0", "-fopenmp")


def command(compiler: str, target: str) -> list[str]:
    flags = [flag for flag in build_extension.extension().extra_compile_args["cxx"] if flag not in NOT_CLANGS]
    headers = [*cpp_extension.include_paths(), sysconfig.get_path("include"), sysconfig.get_path("purelib")]
    return [
        *shlex.split(compiler),
        *(["-target", target] if target else []),
        *("-fsyntax-only", "-Werror", "-Wno-unused-command-line-argument", "-I", str(ROOT / "csrc")),
        *(part for folder in headers for part in ("-isystem", folder)),
        *("-DCNNKERN_X86=0", "-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"),
        *("-DTORCH_API_INCLUDE_EXTENSION_H", "-DTORCH_EXTENSION_NAME=_C"),
        *flags,
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", help="default: all of the extension without CUDA")
    parser.add_argument("--compiler", default="clang++", help="a clang, with its arguments")
    parser.add_argument("--target", default="", help="another system than this, as clang names it: aarch64-macos")
    options = parser.parse_args(argv)
    if not shutil.which(shlex.split(options.compiler)[0]):
        print(
            f"cnnkern: there is no {options.compiler} on the path: `pip install ziglang`, see --help", file=sys.stderr
        )
        return 1
    everything = [
        name
        for folder in ("", "autograd/", "deferred/", "cpu/**/")
        for name in build_extension.sources(f"{folder}*.cpp")
    ]
    begin = command(options.compiler, options.target)

    def passes(name: str) -> bool:
        done = subprocess.run([*begin, name], cwd=ROOT, capture_output=True, text=True)
        print(f"{name}: {'passes' if done.returncode == 0 else done.stderr}", flush=True)
        return done.returncode == 0

    with ThreadPoolExecutor(build_extension.JOBS) as pool:
        failed = [
            name
            for name, passed in zip(
                options.sources or everything, pool.map(passes, options.sources or everything), strict=True
            )
            if not passed
        ]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
