"""How setup.py builds the extension `cnnkern._C`: sources, flags, instruction sets, CUDA."""

import hashlib
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The toolkit that PyPI's nvidia-* wheels install; found before torch looks for one.
PYPI_CUDA = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13"
if "CUDA_HOME" not in os.environ and (PYPI_CUDA / "bin" / "nvcc").exists():
    os.environ["CUDA_HOME"] = str(PYPI_CUDA)

import torch  # noqa: E402
from setuptools._distutils import ccompiler  # noqa: E402
from torch.utils import cpp_extension  # noqa: E402


def cpu_capabilities() -> dict[str, list[str]]:
    """Flags of each instruction set for which the files of csrc/cpu are compiled; csrc/for_this_cpu.h picks one at load
    time. With CNNKERN_CPU=native that of this machine alone, so that each file is compiled once."""
    flags: dict[str, list[str]] = {"DEFAULT": []}
    if platform.machine() in ("x86_64", "AMD64"):
        flags["AVX2"] = ["-mavx2", "-mfma", "-mf16c"]
        flags["AVX512"] = [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq")] + flags["AVX2"]
        # g++ 12 warns of its own intrinsics (GCC bug 105593)
        flags["AVX512"] += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
    asked = os.environ.get("CNNKERN_CPU", "")
    if asked not in ("", "all", "native"):
        raise SystemExit(f"cnnkern: CNNKERN_CPU must be all, native or unset; got {asked!r}")
    if asked != "native":
        return flags
    here = torch.backends.cpu.get_cpu_capability()
    name = here if here in flags else "DEFAULT"
    return {name: flags[name]}


CPU_CAPABILITIES = cpu_capabilities()


def cpu_macros() -> list[tuple[str, str]]:
    """Which of them csrc has copies of."""
    return [
        ("CNNKERN_CPU", f'"{" ".join(CPU_CAPABILITIES)}"'),
        *((f"CNNKERN_CPU_{name}", "1") for name in CPU_CAPABILITIES),
    ]


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"csrc/{pattern}"))


def wants_cuda() -> bool:
    asked = os.environ.get("CNNKERN_CUDA", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"cnnkern: CNNKERN_CUDA must be 0, 1 or unset; got {asked!r}")
    possible = cpp_extension.CUDA_HOME is not None and torch.version.cuda is not None
    if asked == "1" and not possible:
        raise SystemExit(
            f"cnnkern: CNNKERN_CUDA=1 needs nvcc and a CUDA build of torch; found CUDA_HOME={cpp_extension.CUDA_HOME}, "
            f"torch {torch.__version__}. `pip install -r requirements.txt` installs both."
        )
    return possible and asked != "0"


def cuda_architectures() -> str:
    """Those of the GPUs that are here. Without one sm_80, and PTX that later GPUs compile when they first load it."""
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(found)) or "8.0+PTX"


CUDA = wants_cuda()
MEMORY = 3 << 29  # bytes for a compiler: the largest sources of csrc take more than 1 GB


def available_memory() -> int:
    """Bytes: the machine's, or what a container may have of it."""
    (kilobytes,) = re.findall(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    limit = Path("/sys/fs/cgroup/memory.max")
    limits = re.findall(r"^\d+$", limit.read_text()) if limit.exists() else []  # "max" where there is none
    return min([int(kilobytes) << 10, *map(int, limits)])


def jobs(cores: int, memory: int) -> int:
    """Compilers at a time: what MAX_JOBS says, or one a core, fewer where there is no memory for so many."""
    asked = os.environ.get("MAX_JOBS", "")
    if asked and not (asked.isdigit() and int(asked)):
        raise SystemExit(f"cnnkern: MAX_JOBS must be a whole number from 1 on, or unset; got {asked!r}")
    return int(asked) if asked else max(1, min(cores, memory // MEMORY))


JOBS = jobs(len(os.sched_getaffinity(0)), available_memory())


class BuildExtension(cpp_extension.BuildExtension):
    """Compiles csrc/cpu once for each instruction set, each into its own folder."""

    def finalize_options(self):
        super().finalize_options()
        # One place whatever the command (pip gives a fresh one each time), so that ninja finds what it has built.
        self.build_temp = str(ROOT / "build" / sys.implementation.cache_tag / ("cuda" if CUDA else "cpu"))

    def run(self):
        super().run()
        # cnnkern/extension.py reads it before it loads the extension, which can crash beside another torch.
        package = ROOT / "cnnkern" if self.inplace else Path(self.build_lib) / "cnnkern"
        says = (
            '"""Written by the build: the torch and the instruction sets that the extension beside this file is for."""'
        )
        built_for = f'TORCH = "{torch.__version__}"\nCPU = "{" ".join(CPU_CAPABILITIES)}"'
        (package / "_built_for.py").write_text(f"{says}\n\n{built_for}\n")

    def build_extension(self, ext):
        self.force = True  # ninja knows what is out of date; distutils does not know the headers
        # A function that several objects carry (an inline one of the standard library, say) is taken from the
        # first object that has it, so objects are linked in rising order of instruction set: whoever calls it
        # gets a copy that needs no more than the caller does.
        at_once = min(JOBS, len(CPU_CAPABILITIES))
        os.environ["MAX_JOBS"] = str(JOBS // at_once)  # of each ninja that torch starts
        with ThreadPoolExecutor(at_once + 1) as pool:
            precompiled = pool.submit(self.precompile, ext)
            objects = pool.map(lambda item: self.compile_cpu(ext, *item), CPU_CAPABILITIES.items())
            ext.extra_objects += itertools.chain.from_iterable(objects)
        os.environ["MAX_JOBS"] = str(JOBS)
        ext.extra_compile_args["cxx"] += precompiled.result()
        super().build_extension(ext)

    def precompile(self, ext) -> list[str]:
        """Compiles csrc/precompiled.h, if the compiler is g++. Returns the flags with which other files use it."""
        compiler, header = cpp_extension.get_cxx_compiler(), ROOT / "csrc" / "precompiled.h"
        if not cpp_extension.check_compiler_is_gcc(compiler):
            return []
        folders = [*ext.include_dirs, *self.compiler.include_dirs, sysconfig.get_path("include")]
        flags = [*self.compiler.compiler_so[1:], *ccompiler.gen_preprocess_options(ext.define_macros, folders)]
        flags += ext.extra_compile_args["cxx"]
        # g++ compares flags, but not the headers themselves: what they depend on is in the folder's name.
        version = subprocess.run([compiler, "-v"], capture_output=True, text=True, check=True).stderr
        made_of = [compiler, version, torch.__version__, torch.version.git_version, header.read_text(), *flags]
        name = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:16]
        folder = Path(self.build_temp) / f"precompiled-{name}"
        if not (folder / "torch.h.gch").exists():
            for old in Path(self.build_temp).glob("precompiled-*"):  # half a gigabyte each
                shutil.rmtree(old)
            folder.mkdir(parents=True)
            (folder / "torch.h").write_text(header.read_text())
            partial = folder / "partial"
            subprocess.run([compiler, *flags, "-w", "-x", "c++-header", folder / "torch.h", "-o", partial], check=True)
            partial.rename(folder / "torch.h.gch")
        os.environ.setdefault("CCACHE_SLOPPINESS", "pch_defines,time_macros")  # else ccache does not keep what uses it
        # Pragmas of torch's headers that switch a warning off are not kept.
        return ["-include", str(folder / "torch.h"), "-Winvalid-pch", "-Wno-sign-compare"]

    def compile_cpu(self, ext, capability: str, flags: list[str]) -> list[str]:
        # Nothing here depends on CUDA, so builds with and without it share the objects.
        slowest_first = sorted(sources("cpu/**/*.cpp"), key=lambda path: "grouped_conv2d" not in path)
        return self.compiler.compile(
            slowest_first,
            output_dir=str(Path(self.build_temp).parent / capability),
            include_dirs=[str(ROOT / "csrc"), *cpp_extension.include_paths(), sysconfig.get_path("include")],
            extra_postargs=[
                *ext.extra_compile_args["cxx"],
                f"-DCPU_CAPABILITY={capability}",
                f"-DCPU_CAPABILITY_{capability}",
                *flags,
            ],
        )


def extension():
    # Contracting a*b+c on its own would let forward and backward round differently, and the emulator than a GPU: fma is
    # spelled out where meant.
    cxx = ["-O3", "-g0", "-std=c++20", "-fopenmp", "-ffp-contract=off", "-fvisibility=hidden", "-Wall"]
    cxx += ["-fno-math-errno"]  # nobody reads errno, and for its sake square roots would not become vectors
    cxx += ["-Wno-unknown-pragmas", "-Wno-unused-function"]
    if os.environ.get("CNNKERN_WERROR") == "1":
        cxx.append("-Werror")
    # Lines of source for a profiler would double the size: NVCC_APPEND_FLAGS=-lineinfo builds with them.
    nvcc = ["-O3", "-std=c++20", "--fmad=false", "--threads=2", "-Xfatbin", "-compress-all"]
    macros = cpu_macros()
    include_dirs, libraries, library_dirs = [str(ROOT / "csrc")], [], []
    files = sources("*.cpp") + sources("autograd/*.cpp") + sources("deferred/*.cpp")
    if CUDA:
        # The wheels bring the headers of a GPU-less machine: no versionless libcudart.so, cccl in a folder of its own.
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", cuda_architectures())
        home = Path(cpp_extension.CUDA_HOME)
        macros.append(("CNNKERN_CUDA", f'"{torch.version.cuda}"'))
        macros.append(("CNNKERN_CUDA_ARCHITECTURES", f'"{os.environ["TORCH_CUDA_ARCH_LIST"]}"'))
        files += sources("cuda/**/*.cu")
        include_dirs += [str(home / "include"), str(home / "include" / "cccl")]
    Extension = cpp_extension.CUDAExtension if CUDA else cpp_extension.CppExtension
    ext = Extension(
        "cnnkern._C",
        files,
        include_dirs=include_dirs,
        define_macros=macros,
        libraries=libraries,
        library_dirs=library_dirs,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=["-fopenmp"],
    )
    if CUDA and not list(Path(cpp_extension.CUDA_HOME).glob("lib*/libcudart.so")):
        # libtorch_cuda already loads the runtime, and the wheel has no libcudart.so to link against.
        ext.libraries.remove("cudart")
        ext.extra_link_args += [str(path) for path in Path(cpp_extension.CUDA_HOME).glob("lib/libcudart.so.*")]
    return ext


def arguments() -> dict[str, object]:
    """Of setuptools.setup()."""
    return {"ext_modules": [extension()], "cmdclass": {"build_ext": BuildExtension}}


def local_version() -> str:
    """What a version says of the CUDA kernels: ".cu130", or nothing where there are none."""
    return f".cu{torch.version.cuda.replace('.', '')}" if CUDA else ""
