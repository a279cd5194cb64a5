"""The command `cnnkern`, also `python -m cnnkern`.

It starts without torch and without the extension, for `cnnkern doctor` has to say what is wrong with them.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from cnnkern.doctor import doctor, extension_problem


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
    parser = argparse.ArgumentParser(
        prog="cnnkern",
        description="Fused kernels for convolutional networks.",
        epilog="`cnnkern COMMAND --help` lists the options of a command.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    shows = "show versions, the kernel of each operator and whether it gives correct results, and what is missing"
    commands.add_parser("doctor", help=shows, description=shows.capitalize() + ".")
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
    commands.add_parser("train", add_help=False, help="train a model of the zoo on images")
    zoo_parser = commands.add_parser(
        "zoo",
        help="list the models of the zoo (small and well-known networks) with parameters, operations and fused layers",
        description="Without a command: list the models of the zoo with parameters, operations and fused layers.",
    )
    actions = zoo_parser.add_subparsers(dest="action")
    layers, side_by_side = (
        "show the layers of one model",
        "train models on handwritten digits and draw them side by side",
    )
    show_parser = actions.add_parser("show", help=layers, description=layers.capitalize() + ".")
    show_parser.add_argument("name", metavar="NAME", help="the model; `cnnkern zoo` lists all")
    show_parser.add_argument(
        "--input", type=image_size, metavar="C,H,W", help="the shape of its input (default: the model's usual input)"
    )
    show_parser.add_argument(
        "--eager", action="store_true", help="show the model in PyTorch's own operators, without fused layers"
    )
    compare_parser = actions.add_parser("compare", help=side_by_side, description=side_by_side.capitalize() + ".")
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
    return zoo(options) if options.command == "zoo" else diagnose()


def diagnose() -> int:
    problem = doctor()
    return fail(problem) if problem else 0


def fail(message: str) -> int:
    print(f"cnnkern: {' '.join(message.split())}", file=sys.stderr)
    return 1


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
