"""The command `cnnkern`, also `python -m cnnkern`.

It starts without torch and without the extension, for `cnnkern doctor` has to say what is wrong with them.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import runpy
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

BUILD = "run `make` in the repository, or `pip install --no-build-isolation .` there in an environment that has torch"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the sub-command that `arguments`, by default those of the process, name; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # no character is worth an error, on a terminal that does not have it
            stream.reconfigure(errors="backslashreplace")
    try:
        status = run(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        fail("interrupted")
        return 130
    except BrokenPipeError:  # whoever read it has seen enough; Python would complain when it closes the stream
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        return fail(str(error))


def run(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="cnnkern", description="Fused kernels for convolutional networks.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "doctor",
        help="show versions, the kernel of each operator and whether it gives correct results, and what is missing",
    )
    handed_on = {"bench": bench, "train": train, "tune": tune}
    commands.add_parser(
        "bench",
        add_help=False,
        help="time a model with and without cnnkern's layers; without a model, run the benchmark suite",
    )
    commands.add_parser(
        "tune",
        add_help=False,
        help="time cnnkern's operators against PyTorch's on this machine, and use the faster one from then on",
    )
    commands.add_parser("train", add_help=False, help="train a model of the zoo (see cnnkern train --help)")
    zoo_parser = commands.add_parser(
        "zoo",
        help="list the models of the zoo with parameters, operations and fused layers",
        description="Without a command it lists the models with parameters, operations and fused layers.",
    )
    actions = zoo_parser.add_subparsers(dest="action")
    show_parser = actions.add_parser("show", help="show the layers of one model")
    show_parser.add_argument("name", metavar="NAME", help="the model; `cnnkern zoo` lists all")
    show_parser.add_argument(
        "--input", type=image_size, metavar="C,H,W", help="the shape of its input (default: the model's usual input)"
    )
    show_parser.add_argument(
        "--eager", action="store_true", help="show the model in PyTorch's own operators, without fused layers"
    )
    compare_parser = actions.add_parser("compare", help="train models on handwritten digits and draw them side by side")
    compare_parser.add_argument("names", metavar="NAME", nargs="+", help="the models; `cnnkern zoo` lists all")
    compare_parser.add_argument(
        "--epochs",
        type=positive,
        default=5,
        help="how many times to go through the training images (default: %(default)s)",
    )
    compare_parser.add_argument(
        "--side",
        type=positive,
        default=48,
        help="the largest height and width of an image, in pixels (default: %(default)s)",
    )
    compare_parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/compare"),
        metavar="DIR",
        help="the folder to write to (default: %(default)s)",
    )
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in handed_on:
        return handed_on[arguments[0]](list(arguments[1:]))
    options = parser.parse_args(arguments)
    return zoo(options) if options.command == "zoo" else doctor()


def fail(message: str) -> int:
    print(f"cnnkern: {' '.join(message.split())}", file=sys.stderr)
    return 1


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


def bench(arguments: list[str]) -> int:
    """`cnnkern bench MODEL ...`, and without a model the benchmark suite."""
    return (bench_model if names_model(arguments) else bench_suite)(arguments)


def names_model(arguments: list[str]) -> bool:
    """Whether these arguments of `cnnkern bench` are about a model: its name may stand behind options, and what stands
    first and is no option is meant as one."""
    if any(re.match(r"(torchvision|timm|zoo):|.*\.py:", a) for a in arguments):
        return True
    return arguments in (["-h"], ["--help"]) or (bool(arguments) and not arguments[0].startswith("-"))


def bench_model(arguments: list[str]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch.profiler's notes on its own work, read at its first use
    if problem := extension_problem():
        return fail(problem)
    from cnnkern.measure.command import main as bench_main

    return bench_main(arguments)


def tune(arguments: list[str]) -> int:
    """Hands `arguments` to `cnnkern.measure.tune_command`."""
    if problem := extension_problem():
        return fail(problem)
    from cnnkern.measure.tune_command import main as tune_main

    return tune_main(arguments)


def bench_suite(arguments: list[str]) -> int:
    """Hands `arguments` to the benchmark suite: of the checkout that this package is imported from, else installed."""
    checkout, suite = Path(__file__).resolve().parents[1], "cnnkern.benchmarks"
    if all((checkout / path).exists() for path in ("benchmarks/__main__.py", "pyproject.toml")):
        sys.path.insert(0, str(checkout))
        suite = "benchmarks"
    if problem := extension_problem() or missing_packages("bench", "pytest", "pytest_benchmark", "jinja2"):
        return fail(problem)
    os.environ["CNNKERN_TUNE"] = "0"  # the suite, in processes that it starts, times our kernels and no one else's
    sys.argv = ["cnnkern bench", *arguments]
    runpy.run_module(suite, run_name="__main__", alter_sys=True)
    return 0


def train(arguments: list[str]) -> int:
    """Hands `arguments` to `cnnkern.train`."""
    if problem := extension_problem() or missing_packages("train", "torchvision", "matplotlib", "sklearn"):
        return fail(problem)
    from cnnkern.train import main as train_main

    # As an exception, so that a file which is being written is not left half done.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return train_main(arguments)


def zoo(options: argparse.Namespace) -> int:
    """Prints the table of all models, or the layers of one; or trains several and compares them."""
    packages = {"show": ("torchinfo",), "compare": ("torchvision", "matplotlib", "sklearn")}.get(options.action, ())
    if problem := extension_problem() or missing_packages(f"zoo {options.action}", *packages):
        return fail(problem)
    from rich.console import Console

    from cnnkern import zoo
    from cnnkern.models.registry import list_models, unknown_model

    if options.action is None:
        zoo.table(Console(highlight=False, width=None if sys.stdout.isatty() else 240))
        return 0
    for name in [options.name] if options.action == "show" else options.names:
        if name not in list_models():
            return fail(unknown_model(name, "`cnnkern zoo` lists the models"))
    if options.action == "compare":
        from cnnkern.zoo_compare import compare

        names = list(dict.fromkeys(options.names))
        return compare(names, epochs=options.epochs, side=options.side, output=options.output)
    try:
        print(zoo.show(options.name, options.input, fused=not options.eager))
    except ValueError as error:
        return fail(str(error))
    return 0


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0; got {text!r}")
    return int(text)


def image_size(text: str) -> tuple[int, ...]:
    """(channels, height, width) of "1,96,96"."""
    size = tuple(int(part) for part in text.split(",") if part.isdecimal() and int(part) > 0)
    if len(size) != 3 or text.count(",") != 2:
        raise argparse.ArgumentTypeError(f"expected channels,height,width such as 1,96,96; got {text!r}")
    return size


def missing_packages(command: str, *names: str) -> str | None:
    """What to install before `cnnkern` with this command can run, in one line; None where all is there."""
    absent = [name.replace("_", "-") for name in names if importlib.util.find_spec(name) is None]
    extra = "bench" if command == "bench" else "train"
    return f"cnnkern {command} needs {', '.join(absent)}: `pip install 'cnnkern[{extra}]'`" if absent else None


Rows = Iterable[tuple[str, ...]]
CORRECT = "gives correct results"
DEVICES = {"cpu": "CPU", "cuda": "GPU"}


def doctor() -> int:
    """Prints what is installed, the kernel of each operator and what is missing; 0 where the kernels work."""
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
        return fail(problem)
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
            return fail(f"the {DEVICES[device]} kernels do not work: {'; '.join(wrong)}")
    return 0


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
