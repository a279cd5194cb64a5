"""`make wheel`: builds wheel and source distribution into dist/, installs each outside the repository and tries it.

    .venv/bin/python tools/wheel.py            the source distribution is compiled from scratch, which takes minutes
    .venv/bin/python tools/wheel.py --quick    it is unpacked and compared with the checkout instead
    .venv/bin/python tools/wheel.py --tests    some of the operators' tests run on the installed wheel as well
    .venv/bin/python tools/wheel.py --torch 2.11 --python 3.12    the wheel alone, for another torch and Python
    .venv/bin/python tools/wheel.py --pure     the wheel without an extension, for every torch, into dist/pure/
    .venv/bin/python tools/wheel.py --sample csrc/cuda/batch_norm/bn_prelu.cu
                                               what one source takes, for one GPU architecture and for all of a wheel

Each environment is a fresh one that borrows the packages of .venv (torch, numpy, rich) by a .pth file, so that nothing
is downloaded; the editable cnnkern of .venv is not visible there. One for another torch is installed whole. A wheel's
name says what it is for: cnnkern-0.1.0+torch2.14.cu130-cp311-cp311-linux_x86_64.whl. CNNKERN_CUDA=0|1 are setup.py's;
CUDA kernels are for ARCHITECTURES unless TORCH_CUDA_ARCH_LIST says otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

from elsewhere import (
    BUILD,
    ROOT,
    RUN,
    Failed,
    build_wheel,
    copy_sources,
    install_wheel,
    nvcc_for,
    processor_time,
    run,
    say,
    with_torch,
)

DIST = ROOT / "dist"
LARGEST = 100_000_000  # bytes
PURE = DIST / "pure"  # apart, as pip would take it without a word where it finds no wheel for the torch that is there
TRIES = ("torchvision", "scikit-learn", "matplotlib", "jinja2", "pytest", "pytest-benchmark")  # of `cnnkern bench`
NOT_SHIPPED = (".ci/", ".gitignore")
# Of a wheel.
PARTS = (r"cnnkern/_C\..*\.so", r"cnnkern/py\.typed", r"cnnkern/triton_kernels/bn_act\.py", r".*/LICENSE")
PARTS += (
    r"cnnkern/_built_for\.py",
    r"cnnkern/benchmarks/suite/worker\.py",
    r"cnnkern/benchmarks/show/report\.html\.jinja",
)
# A100; RTX 30; RTX 40 and L4; H100 and H200; B200; RTX 50. PTX of the last, for what comes after.
ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
TESTS = "arrive_in_any_layout or memory_format or empty_batch or opcheck"

# What the installed package says of itself.
SMOKE = """
import json, sys
from importlib import metadata
from pathlib import Path
import torch
from torch import nn
import cnnkern
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten())
fused = cnnkern.convert(model, verify=torch.randn(2, 3, 9, 9))
fused(torch.randn(2, 3, 9, 9)).square().sum().backward()
assert all(p.grad is not None for p in model.parameters())
assert len(cnnkern.conversion_report(fused).counts) == 2, cnnkern.conversion_report(fused)
print(json.dumps({
    "place": str(Path(cnnkern.__file__).parent),
    "version": cnnkern.__version__,
    "metadata": metadata.version("cnnkern"),
    "typed": Path(cnnkern.__file__).with_name("py.typed").exists(),
    **{n: cnnkern._C.build_info()[n] for n in ("cpu_capabilities", "cuda")},
}))
"""

PURE_SMOKE = """
import warnings
import torch
from torch import nn
import cnnkern
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    fused = cnnkern.convert(model, verify=torch.randn(2, 3, 9, 9))
    fused(torch.randn(2, 3, 9, 9)).square().sum().backward()
assert [w for w in caught if "the compiled extension is not there" in str(w.message)], caught
assert all(p.grad is not None for p in model.parameters())
status = cnnkern.backends.status()["bn_act"]
assert status["cpu"].startswith("eager PyTorch"), status
"""


def architectures() -> dict[str, str]:
    """The setting that names the GPUs of a wheel: all that its CUDA compiles for, not those of this machine."""
    return {"TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES}


def build(source: Path, kind: str, out: Path) -> Path:
    """Builds a "wheel" or an "sdist" of this tree."""
    for stale in (source / "build").glob("lib*"):  # setuptools would pack what a deleted file has left there
        shutil.rmtree(stale)
    before = set(out.glob("*"))
    run(sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", out, source, **architectures())
    (made,) = set(out.glob("*")) - before
    return made


def say_built(wheel: Path, begin: float) -> None:
    say(f"  {wheel.stat().st_size / 1e6:.1f} MB, built in {time.monotonic() - begin:.0f} s")


def say_sample(source: str) -> None:
    """Compiles a CUDA source for sm_80 and for all of a wheel, and says processor time and size, as docs/install.md
    has them: a whole wheel takes long to build."""
    if not ((ROOT / source).is_file() and source.endswith(".cu")):
        raise Failed(f"--sample takes one of the sources csrc/cuda/**/*.cu, got {source}")
    import build_extension  # asks torch where CUDA is
    from torch.utils import cpp_extension

    if not build_extension.CUDA:
        raise Failed("--sample needs nvcc and a CUDA build of torch, and finds none")
    extension = build_extension.extension()
    flags = [*cpp_extension.COMMON_NVCC_FLAGS, "--compiler-options=-fPIC", *extension.extra_compile_args["nvcc"]]
    headers = [*extension.include_dirs, *cpp_extension.include_paths("cuda"), sysconfig.get_path("include")]
    flags += [part for folder in headers for part in ("-I", folder)]
    with tempfile.TemporaryDirectory(prefix="cnnkern-sample-") as scratch:
        for listed in ("8.0", ARCHITECTURES):
            made, begin = Path(scratch) / "sample.o", processor_time()
            run(Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc", "-c", source, "-o", made, *flags, *code_for(listed))
            taken = processor_time() - begin
            say(f"{source} for {listed}: {made.stat().st_size / 1e6:.1f} MB, {taken:.0f} s of processor time")


def code_for(listed: str) -> list[str]:
    """nvcc's options for architectures as TORCH_CUDA_ARCH_LIST names them: "8.0;9.0+PTX"."""
    options = []
    for name in listed.split(";"):
        number = name.removesuffix("+PTX").replace(".", "")
        for kind in ("sm", "compute") if name.endswith("+PTX") else ("sm",):
            options.append(f"-gencode=arch=compute_{number},code={kind}_{number}")
    return options


def check_wheel(wheel: Path) -> None:
    if (size := wheel.stat().st_size) > LARGEST:
        raise Failed(
            f"{wheel.name} has {size / 1e6:.0f} MB, and PyPI takes {LARGEST / 1e6:.0f} MB: build several, each with "
            "a part of the GPUs in TORCH_CUDA_ARCH_LIST"
        )
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for wanted in PARTS:
        if not any(re.fullmatch(wanted, name) for name in names):
            raise Failed(f"{wheel.name} has no {wanted}")
    if strays := [n for n in names if not re.match(r"cnnkern(-[^/]*\.dist-info)?/", n)]:
        raise Failed(f"{wheel.name} has files outside the package: {', '.join(strays[:5])}")


def check_sdist(sdist: Path, unpacked: Path) -> Path:
    """Unpacks it; every tracked file has to be in it as it is in the checkout. Returns the tree."""
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (tree,) = unpacked.iterdir()
    tracked = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.split("\0")
    wanted = [n for n in tracked if n and not n.startswith(NOT_SHIPPED) and (ROOT / n).is_file()]
    other = [n for n in wanted if not (tree / n).is_file() or (tree / n).read_bytes() != (ROOT / n).read_bytes()]
    if other:
        raise Failed(f"{sdist.name} lacks or changes {len(other)} files: {', '.join(other[:5])}")
    return tree


def environment(folder: Path, wheel: Path) -> Path:
    """The interpreter of a fresh environment in `folder` with this wheel, and with .venv's packages behind its own."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    install_wheel(python, wheel)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "packages-of-the-project.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def try_it(python: Path, version: str) -> dict[str, str]:
    """Smoke test, doctor under each instruction set, and the command line; what the package says of itself."""
    folder = python.parents[1]
    found = json.loads(run(python, "-I", "-c", SMOKE, cwd=folder).stdout.splitlines()[-1])
    if not Path(found["place"]).is_relative_to(folder):
        raise Failed(f"{found['place']} was imported, not the installed package")
    if found["version"] != version or found["metadata"].partition("+")[0] != version or not found["typed"]:
        raise Failed(f"the installed package says {found}, the checkout {version}")
    if platform.machine() in ("x86_64", "AMD64") and set(found["cpu_capabilities"].split()) != {
        "DEFAULT",
        "AVX2",
        "AVX512",
    }:
        raise Failed(f"the package has kernels for {found['cpu_capabilities']}, not for plain x86-64, AVX2 and AVX-512")
    if os.environ.get("CNNKERN_CUDA") == "0" and found["cuda"]:
        raise Failed("a build with CNNKERN_CUDA=0 has CUDA kernels")
    command = folder / "bin" / "cnnkern"
    for capability in found["cpu_capabilities"].split():
        # torch falls back to what the CPU has.
        said = run(command, "doctor", cwd=folder, ATEN_CPU_CAPABILITY=capability.lower()).stdout
        say(
            f"  cnnkern doctor, {re.search(r'instruction set +([^;]*)', said)[1]}: every operator gives correct results"
        )
    said = run(command, "bench", "--quick", "--filter", "overhead", "--seconds", "20", cwd=folder).stdout
    if not list(folder.glob("cnnkern-bench/*")):
        raise Failed(f"`cnnkern bench` of an installed package left no results in the current folder: {said}")
    say("  cnnkern bench: runs, and writes into the current folder")
    said = run(
        command, "bench", "zoo:lenet_relu", "--infer", "--input", "2,1,28,28", "--seconds", "0.1", cwd=folder
    ).stdout
    say(f"  cnnkern bench zoo:lenet_relu: {re.search('Results agree', said)[0].lower()}")
    return found


def run_tests(python: Path) -> None:
    """Some of the operators' tests on the installed package."""
    folder = python.parents[1]
    script = folder / "run_tests.py"
    script.write_text(
        "import sys, cnnkern, pytest\n"
        "assert cnnkern.__file__.startswith(sys.prefix), cnnkern.__file__\n"
        "sys.exit(pytest.main(sys.argv[1:]))\n"
    )
    options = ["--import-mode=importlib", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "-ra", "-q"]
    options += ["--rootdir", folder, "-o", "pythonpath=", "-k", TESTS, ROOT / "tests" / "test_battery.py"]
    say(run(python, script, *options, cwd=folder).stdout)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="do not compile the source distribution")
    parser.add_argument("--tests", action="store_true", help="run some of the operators' tests on the installed wheel")
    parser.add_argument("--torch", metavar="RELEASE", help="build the wheel for this release of torch: 2.11")
    default = ".".join(platform.python_version_tuple()[:2])
    parser.add_argument(
        "--python", default=default, metavar="VERSION", help=f"and for this Python (default: {default})"
    )
    parser.add_argument("--pure", action="store_true", help="build the wheel without an extension")
    parser.add_argument("--sample", metavar="SOURCE", help="compile one CUDA source alone, and say its size")
    options = parser.parse_args(argv)
    try:
        if options.sample:
            say_sample(options.sample)
        elif options.torch:
            make_for(options.torch, options.python)
        elif options.pure:
            make_pure()
        else:
            make(options)
    except (Failed, OSError) as error:
        print(f"cnnkern: {error}", file=sys.stderr)
        return 1
    return 0


def own_version() -> str:
    return re.search(r'^__version__ = "(.*)"', (ROOT / "cnnkern" / "__init__.py").read_text(), re.MULTILINE)[1]


def make_for(torch: str, python: str) -> None:
    """The wheel for another torch and Python, built and tried in an environment of its own. Raises as make() does."""
    with tempfile.TemporaryDirectory(prefix="cnnkern-wheel-") as scratch:
        say(f"Installing torch {torch} for Python {python}")
        nvcc = () if os.environ.get("CNNKERN_CUDA") == "0" else nvcc_for(torch)
        there = with_torch(Path(scratch) / "venv", torch, python, *BUILD, *RUN, *TRIES, *nvcc)
        say("Building the wheel (minutes)")
        begin = time.monotonic()
        wheel = build_wheel(there, copy_sources(Path(scratch) / "source"), Path(scratch) / "dist", **architectures())
        say_built(wheel, begin)
        check_wheel(wheel)
        install_wheel(there, wheel)
        found = try_it(there, own_version())
        DIST.mkdir(exist_ok=True)
        shutil.copy(wheel, DIST)
        say(f"dist/{wheel.name}: CPU {found['cpu_capabilities']}, CUDA {found['cuda'] or 'none'}")


def make_pure() -> None:
    """The wheel without an extension, tried with .venv's torch. Raises as make() does."""
    with tempfile.TemporaryDirectory(prefix="cnnkern-wheel-") as scratch:
        sources = copy_sources(Path(scratch) / "source")
        wheel = build_wheel(Path(sys.executable), sources, Path(scratch) / "dist", CNNKERN_EXTENSION="0")
        if not wheel.name.endswith("-py3-none-any.whl"):
            raise Failed(f"{wheel.name} is not for every Python and system")
        python = environment(Path(scratch) / "wheel", wheel)
        run(python, "-I", "-c", PURE_SMOKE, cwd=python.parents[1])
        PURE.mkdir(parents=True, exist_ok=True)
        shutil.copy(wheel, PURE)
        say(f"dist/pure/{wheel.name}: no extension, for every torch from the oldest on")


def make(options: argparse.Namespace) -> None:
    """Both distributions, built and tried. Raises Failed or, of a full disk for one, OSError."""
    version = own_version()
    DIST.mkdir(exist_ok=True)
    for old in DIST.glob("cnnkern-*"):
        old.unlink()
    with tempfile.TemporaryDirectory(prefix="cnnkern-wheel-") as scratch:
        say("Building the wheel")
        begin = time.monotonic()
        wheel = build(ROOT, "wheel", DIST)
        say_built(wheel, begin)
        check_wheel(wheel)
        python = environment(Path(scratch) / "wheel", wheel)
        found = try_it(python, version)
        if options.tests:
            run_tests(python)
        say(f"dist/{wheel.name}: CPU {found['cpu_capabilities']}, CUDA {found['cuda'] or 'none'}")
        say("Building the source distribution")
        sdist = build(ROOT, "sdist", DIST)
        tree = check_sdist(sdist, Path(scratch) / "unpacked")
        if not options.quick:
            say("Building from the source distribution (minutes)")
            (Path(scratch) / "dist").mkdir()
            built = build(tree, "wheel", Path(scratch) / "dist")
            try_it(environment(Path(scratch) / "sdist", built), version)
        say(f"dist/{sdist.name}: as the checkout" + (", not compiled" if options.quick else ", installed and tried"))


if __name__ == "__main__":
    sys.exit(main())
