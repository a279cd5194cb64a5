"""Fused kernels for the layers that convolutional networks spend their time in, as drop-in `torch.nn` modules."""

import importlib
import itertools
import sys
from pathlib import Path

__version__ = "0.1.0"
__all__ = [
    "BenchmarkResult",
    "ConversionError",
    "ConversionReport",
    "backend",
    "backends",
    "benchmark",
    "conversion_report",
    "convert",
    "empty_cache",
    "fold",
    "functional",
    "keep_operators",
    "models",
    "nn",
    "recompute",
    "revert",
    "tune_malloc",
]


def _define_operators() -> None:
    """torch.ops.cnnkern.*: by the compiled extension, or where it was not built by cnnkern.uncompiled."""
    from cnnkern.extension import extension

    if extension is None:
        importlib.import_module("cnnkern.uncompiled")


try:
    _define_operators()
except ImportError as error:
    # The command line has to start where this fails: it says itself what is wrong.
    if Path(sys.argv[0]).name != "cnnkern" and ("-m", "cnnkern") not in itertools.pairwise(sys.orig_argv):
        if isinstance(error, ModuleNotFoundError) and error.name == "torch":
            raise ImportError("cnnkern: PyTorch is not installed; `pip install torch` installs it") from None
        raise ImportError(
            f"cnnkern: the compiled extension cannot be loaded ({error}). It has to be built against the installed "
            "torch: install the wheel that names its release (+torch2.14, say), or run `make` in the repository, or "
            "`pip install --no-build-isolation .` there in an environment that has torch."
        ) from error
else:
    from cnnkern import backends, functional, models, nn
    from cnnkern.backends import backend
    from cnnkern.conversion.convert import ConversionReport, conversion_report, convert, revert
    from cnnkern.conversion.fold import fold
    from cnnkern.conversion.verify import ConversionError
    from cnnkern.flops import count_flops
    from cnnkern.measure.result import BenchmarkResult
    from cnnkern.measure.run import benchmark
    from cnnkern.memory import empty_cache, tune_malloc
    from cnnkern.ops import tuned
    from cnnkern.ops.route import keep_operators
    from cnnkern.recomputation import recompute

    count_flops()
    tuned.load()
