"""The compiled extension, for what is not an operator. None if the package was installed without it.

An extension only loads with the torch release that it was built against. With any other release, or if a name is
missing in it, the import raises an error that says what to do. The build writes the release to a file, because an
extension that finds unexpected symbols may crash before it can report anything.
"""

import importlib
import sys
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

import torch  # loads the libraries that the extension links against

NAME, BUILT_FOR = "cnnkern._C", "cnnkern._built_for"


def release(version: str) -> str:
    """The release for which an extension is valid: "2.14" of "2.14.1+cu130"."""
    return ".".join(version.split(".")[:2])


def _is_there(module: str) -> bool:
    """Whether the extension is in this package's folder: editable installs may also find another checkout's."""
    place = sys.modules[__package__].__path__
    return sys.modules.get(module, module) is not None and PathFinder.find_spec(module, place) is not None


def _load() -> ModuleType | None:
    """Raises ImportError, which says what to run, if the extension was built against another torch than the
    installed."""
    if not _is_there(NAME):
        return None
    if not _is_there(BUILT_FOR):
        raise ImportError("nothing says which torch it was built for: it is of an older build")
    built_for = importlib.import_module(BUILT_FOR)
    if release(built_for.TORCH) != release(torch.__version__):
        raise ImportError(f"it was built for torch {built_for.TORCH}, and torch {torch.__version__} is installed")
    if not hasattr(built_for, "CPU"):
        raise ImportError("nothing says which instruction sets it was built for: it is of an older build")
    _check_instruction_set(built_for.CPU.split())
    return importlib.import_module(NAME)


def _check_instruction_set(built: list[str]) -> None:
    """A build for one machine alone (CNNKERN_CPU=native) has kernels for one instruction set."""
    if "DEFAULT" in built:
        return
    here = torch.backends.cpu.get_cpu_capability()
    if here not in built:
        raise ImportError(
            f"it was built with CNNKERN_CPU=native for {' '.join(built)} alone, and torch uses {here} here"
        )


extension: Any = _load()
