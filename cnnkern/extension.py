"""The compiled extension, for what asks more of it than operators. None where the package was installed without it.

An extension loads beside the torch release that it was built against, and no other. One of another build is an error
with what to do, not a reason to do without; so is a name that it lacks. Which release that is stands in a file beside
it, which the build writes: an extension that finds other symbols than it expects may crash before it can be asked.
"""

import importlib
import sys
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

import torch  # loads the libraries that the extension links against

NAME, BUILT_FOR = "cnnkern._C", "cnnkern._built_for"


def release(version: str) -> str:
    """The release that an extension is bound to: "2.14" of "2.14.1+cu130"."""
    return ".".join(version.split(".")[:2])


def _is_there(module: str) -> bool:
    """Whether this package has it, in its own folder: finders of editable installs offer that of another checkout."""
    place = sys.modules[__package__].__path__
    return sys.modules.get(module, module) is not None and PathFinder.find_spec(module, place) is not None


def _load() -> ModuleType | None:
    """Raises ImportError, which says what to run, for an extension that does not belong to the torch that is here."""
    if not _is_there(NAME):
        return None
    if not _is_there(BUILT_FOR):
        raise ImportError("nothing says which torch it was built for: it is of an older build")
    built_for = importlib.import_module(BUILT_FOR).TORCH
    if release(built_for) != release(torch.__version__):
        raise ImportError(f"it was built for torch {built_for}, and torch {torch.__version__} is installed")
    return importlib.import_module(NAME)


extension: Any = _load()
