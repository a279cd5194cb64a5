"""`cnnkern doctor`: versions, the kernel of each operator and whether it gives correct results, and what is missing.

It starts without torch and without the extension, for it has to say what is wrong with them.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

BUILD = "run `make` in the repository, or `pip install --no-build-isolation .` there in an environment that has torch"

Rows = Iterable[tuple[str, ...]]
CORRECT = "gives correct results"
DEVICES = {"cpu": "CPU", "cuda": "GPU"}


def extension_problem() -> str | None:
    """Why the compiled extension cannot be used, and what to do, in one line; None where it can."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error}): `pip install torch`, then {BUILD}"
    try:
        from cnnkern.extension import extension
    except ImportError as error:
        return f"the extension does not load with torch {torch.__version__} ({error}): rebuild it; {BUILD}"
    if extension is None:
        return f"the extension is not built for Python {platform.python_version()} in {Path(__file__).parent}: {BUILD}"
    return None


def doctor() -> str | None:
    """Prints what is installed, each operator's kernel and what is missing. Returns in a line what does not work."""
    from rich.console import Console
    from rich.table import Table

    # Lines of a file or a pipe are for grep: they are not wrapped.
    width = None if sys.stdout.isatty() else 240
    console = Console(highlight=False, markup=False, emoji=False, width=width)

    def show(title: str, rows: Rows) -> None:
        table, rows = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0)), list(rows)
        for _ in range(max(map(len, rows), default=0)):
            table.add_column(overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(title, style="bold")
        console.print(table)

    problem = extension_problem()
    show("Versions", versions())
    if problem:
        return problem
    show("CPU", cpu())
    show("GPU", gpus())
    results = {device: check_kernels(device) for device in devices()}
    show("Kernels", kernels(results))
    show("Tuned", tables())
    console.print("Missing", style="bold")
    for line in missing() or ["nothing"]:
        console.print(line, soft_wrap=True)
    for device, found in results.items():
        if wrong := [f"{name}: {result}" for name, result in found.items() if result != CORRECT]:
            return f"the {DEVICES[device]} kernels do not work: {'; '.join(wrong)}"
    return None


def version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def versions() -> Rows:
    yield "cnnkern", f"{version('cnnkern')} in {Path(__file__).parent}"
    yield "Python", f"{platform.python_version()} {sys.executable}"
    for name in ("torch", "torchvision", "triton"):
        yield name, version(name)
    if "torch" in sys.modules:
        import torch

        yield "torch's CUDA", torch.version.cuda or "none: a CPU build of torch"
    yield "nvcc", nvcc() or "none"
    if extension := sys.modules.get("cnnkern._C"):
        info = extension.build_info()
        yield "extension", f"built by {info['compiler']} for torch {info['torch']}"
        yield "CUDA kernels", f"CUDA {info['cuda']} for {info['cuda_architectures']}" if info["cuda"] else "not built"


def nvcc() -> str | None:
    """Release and place of the CUDA compiler that a build would use."""
    pypi = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13"
    homes = [os.environ.get("CUDA_HOME"), pypi, "/usr/local/cuda"]
    places = [Path(home) / "bin" / "nvcc" for home in homes if home]
    places[-1:-1] = [Path(path) for path in [shutil.which("nvcc")] if path]
    for place in places:
        if place.exists():
            said = subprocess.run([place, "--version"], capture_output=True, text=True).stdout
            release = re.search(r"release \S+ V(\S+)", said)
            return f"{release[1] if release else 'of unknown release'} {place}"
    return None


def cpu_flags() -> set[str]:
    """The features that Linux reports for the first processor; none elsewhere."""
    path = Path("/proc/cpuinfo")
    match = re.search(r"^flags\s*:(.*)$", path.read_text(), re.M) if path.exists() else None
    return set(match[1].split()) if match else set()


def capability_of_cpu() -> str:
    """The best instruction set of this CPU that torch, and cnnkern with it, tells apart."""
    flags = cpu_flags()
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma"} <= flags:
        return "AVX512"
    return "AVX2" if {"avx2", "fma"} <= flags else "DEFAULT"


def cpu() -> Rows:
    import torch

    from cnnkern import _C

    path = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.*)$", path.read_text(), re.M) if path.exists() else None
    yield "model", model[1] if model else platform.processor() or platform.machine()
    yield "threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors"
    built = _C.build_info()["cpu_capabilities"]
    yield "instruction set", f"{_C.cpu_capability()} in use; the CPU has {capability_of_cpu()}; built for {built}"


def gpus() -> Rows:
    import torch

    if not torch.cuda.is_available():
        yield ("none",)
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", device.name, f"sm_{device.major}{device.minor}", f"{device.total_memory / 2**30:.0f} GB"


def devices() -> list[str]:
    """Those that kernels can be run on here."""
    import torch

    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def check_kernels(device: str) -> dict[str, str]:
    """Runs every operator on the device, forward and backward: CORRECT or what is wrong, by operator."""
    import torch

    from cnnkern import testing
    from cnnkern.ops import tuned

    results = {}
    for name, case in testing.CASES.items():
        generator = torch.Generator().manual_seed(0)
        shape = case.gradcheck_shapes[0]
        inputs = case.inputs(shape, torch.float32, generator=generator)
        output = testing.run(case.reference, case, inputs)["output"]
        dy = testing.randn(output.shape, generator, torch.float32)
        inputs = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
        try:
            with tuned.using(None):  # our kernels, whatever is faster
                testing.check(case, inputs, dy.to(device))
            results[name] = CORRECT
        except (AssertionError, RuntimeError) as error:
            results[name] = str(error).splitlines()[0]
    return results


def kernels(results: dict[str, dict[str, str]]) -> Rows:
    """A row for each operator and device: the kernel, and whether it gives correct results here."""
    import torch

    from cnnkern import backends, testing

    case_of = {operator: case.name for case in testing.CASES.values() for operator in case.operators}
    for operator, devices in backends.status().items():
        for device, kernel in devices.items():
            name = kernel.partition(":")[0]
            # One run goes through an operator and its gradient.
            result = results.get(device, {}).get(case_of[operator], "")
            if device == "cuda" and not torch.cuda.is_available():
                result = f"{'built, ' if name == 'CUDA C++' else ''}not run: no GPU"
            yield operator, device, name, result


def tables() -> Rows:
    """This machine's tables of `cnnkern tune`: what they say, or why they do not count."""
    from cnnkern.ops import tuned

    for device in devices():
        yield device, tuned.summary(device)


def missing() -> list[str]:
    """What would make more kernels available, or faster ones, and how to get it."""
    import torch

    from cnnkern import _C, backends

    info, lines = _C.build_info(), []
    if info["torch"].partition("+")[0] != torch.__version__.partition("+")[0]:
        lines.append(
            f"the extension was built for torch {info['torch']}, torch {torch.__version__} is installed: {BUILD}"
        )
    used, best = _C.cpu_capability(), capability_of_cpu()
    if used != best:
        reason = os.environ.get("ATEN_CPU_CAPABILITY")
        why = f"ATEN_CPU_CAPABILITY={reason} is set: unset it" if reason else f"built for {info['cpu_capabilities']}"
        lines.append(f"{best} kernels: {used} is in use ({why})")
    if version("torchvision") == "not installed":
        lines.append("torchvision, for the models and the benchmarks: `pip install torchvision`")
    reasons: dict[tuple[str, str], list[str]] = {}
    for operator, devices in backends.status().items():
        for device, kernel in devices.items():
            _, _, reason = kernel.partition(": ")
            if reason:  # there is no kernel, or one takes another's place
                reasons.setdefault((device, reason), []).append(operator)
    lines += [f"{device} kernels of {', '.join(names)}: {reason}" for (device, reason), names in reasons.items()]
    if not torch.cuda.is_available():
        lines.append("a GPU that torch can use, for the CUDA and Triton kernels")
    elif version("triton") == "not installed":
        lines.append("triton, for the Triton kernels: `pip install triton`")
    return lines
