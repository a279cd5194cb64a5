"""Fused kernels for the layers that every convolutional network repeats, as drop-in `torch.nn` modules."""

try:
    import torch  # noqa: F401  (loads the libraries that the extension links against)

    from cnnkern import _C  # noqa: F401  (registers torch.ops.cnnkern.*)
except ImportError as error:
    raise ImportError(
        f"cnnkern: the compiled extension cannot be loaded ({error}). It has to be built against the installed torch: "
        "run `make` in the repository, or `pip install --no-build-isolation .` in an environment that has torch."
    ) from error

from cnnkern import functional, nn
from cnnkern.convert import ConversionReport, conversion_report, convert, revert

__version__ = "0.1.0"
__all__ = ["ConversionReport", "conversion_report", "convert", "functional", "nn", "revert"]
