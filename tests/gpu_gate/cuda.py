"""The machine code of the CUDA C++ kernels: all that the built extension holds, and what ptxas makes of its PTX.

The extension carries machine code for the architectures that it was built for, and PTX from which a driver compiles
for later ones. So does this, with the ptxas of the toolkit.
"""

import functools
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import cnnkern
from gpu_gate.cache import BUILD, fingerprint, kept
from gpu_gate.machine_code import Kernel, read_cubin, run, spelled, toolkit, version

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
# The element types that `make test` has ptxas compile for; None: all, as `make gpu-report` does for every architecture.
SAMPLES = {"sm_80": None, "sm_90a": ("float", "c10::BFloat16"), "sm_100": ("c10::Half",)}


class Unavailable(Exception):
    """Why there is no machine code to judge."""


class Module(NamedTuple):
    """What the extension has of one file of csrc/cuda."""

    cubins: dict[str, bytes]  # by architecture
    ptx: dict[str, bytes]


def element_type(name: str) -> str | None:
    found = re.search(r"[<, ](float|double|c10::BFloat16|c10::Half)[,>]", name)
    return found[1] if found else None


@functools.cache
def modules() -> dict[str, Module]:
    """By the number that cuobjdump gives a source file's part. Raises Unavailable."""
    if not cnnkern._C.build_info()["cuda"]:
        raise Unavailable("the extension was built without CUDA")
    cuobjdump = toolkit("cuobjdump")
    if cuobjdump is None:
        raise Unavailable("needs cuobjdump, which `pip install -r requirements.txt` brings with Triton")
    found: dict[str, Module] = {}
    with tempfile.TemporaryDirectory() as folder:
        run(cuobjdump, "-xelf", "all", "-xptx", "all", cnnkern._C.__file__, cwd=Path(folder))
        for path in sorted(Path(folder).iterdir()):
            *_, stem, architecture, kind = path.name.split(".")
            module = found.setdefault(stem, Module({}, {}))
            (module.cubins if kind == "cubin" else module.ptx)[architecture] = path.read_bytes()
    return found


def from_ptx(stem: str, ptx: bytes, architecture: str, types: tuple[str, ...] | None) -> list[Kernel]:
    ptxas = toolkit("ptxas")
    symbols = re.findall(r"\.entry (\w+)", ptx.decode())
    chosen = [s for s, n in zip(symbols, spelled(symbols), strict=True) if types is None or element_type(n) in types]
    if not chosen:
        return []
    name = f"cuda/{stem}.{architecture}{'' if types is None else '.sample'}"

    def compile_all() -> list[Kernel]:
        source, cubin = (BUILD / f"{name}.{kind}" for kind in ("ptx", "cubin"))
        source.write_bytes(ptx)
        run(ptxas, f"-arch={architecture}", "-e", ",".join(chosen), "-o", cubin, source)
        kernels = read_cubin(cubin, architecture)
        source.unlink()
        cubin.unlink()
        return kernels

    return kept(name, fingerprint([ptx, architecture, version("ptxas"), version("cuobjdump"), *chosen]), compile_all)


def from_cubin(stem: str, code: bytes, architecture: str) -> list[Kernel]:
    name = f"cuda/{stem}.{architecture}"

    def read() -> list[Kernel]:
        cubin = BUILD / f"{name}.cubin"
        cubin.write_bytes(code)
        kernels = read_cubin(cubin, architecture)
        cubin.unlink()
        return kernels

    return kept(name, fingerprint([code, architecture, version("cuobjdump")]), read)


def kernels(architecture: str, everything: bool = False) -> list[Kernel]:
    """The kernels that ship, compiled for one of ARCHITECTURES, in the order of their names.

    All that the extension has machine code for; where ptxas has to compile, those of SAMPLES, or `everything`.
    Raises Unavailable.
    """
    by_name: dict[str, Kernel] = {}
    for stem, module in modules().items():
        code = module.cubins.get(architecture) or module.cubins.get(architecture.rstrip("a"))
        if code is not None:
            found = from_cubin(stem, code, architecture)
        elif not module.ptx:
            raise Unavailable(f"the extension has neither machine code for {architecture} nor PTX")
        elif toolkit("ptxas") is None:
            raise Unavailable("needs ptxas, which `pip install -r requirements.txt` brings")
        else:
            found = from_ptx(
                stem, next(iter(module.ptx.values())), architecture, None if everything else SAMPLES[architecture]
            )
        by_name |= {kernel.name: kernel for kernel in found}  # several files may have the same kernel
    return [by_name[name] for name in sorted(by_name)]


def planted() -> list[Kernel]:
    """The kernels of planted.cu, for sm_80."""
    source = Path(__file__).with_name("planted.cu")

    def compile_and_read() -> list[Kernel]:
        cubin = BUILD / "planted.cubin"
        run(toolkit("nvcc"), "-cubin", "-arch=sm_80", "-std=c++20", "-O3", "-o", cubin, source)
        return read_cubin(cubin, "sm_80")

    return kept("planted", fingerprint([source.read_bytes(), version("nvcc"), version("cuobjdump")]), compile_and_read)
