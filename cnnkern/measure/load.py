"""The model that a command line names: of torchvision, timm, the zoo, or made by a function in a file."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from cnnkern.measure.values import ModelError, one_line
from cnnkern.models.registry import get_builder, list_models, unknown_model

FORMS = "torchvision:NAME, timm:NAME, zoo:NAME or path/file.py:FUNCTION"


@dataclass(frozen=True)
class Loaded:
    """A model, its converted form if its author provides one, and its usual input."""

    name: str
    model: nn.Module
    converted: nn.Module | None = None
    example: tuple[Any, ...] | None = None  # arguments of a call
    size: tuple[int, ...] | None = None  # of one image: (channels, height, width)


def load(spec: str) -> Loaded:
    """The model that `spec` names, with random weights: nothing is downloaded. Raises ModelError where it has none."""
    source, _, name = spec.partition(":")
    if source == "zoo":
        return _of_zoo(spec, name)
    if source == "torchvision":
        return _of_torchvision(spec, name)
    if source == "timm":
        return _of_timm(spec, name)
    path, colon, function = spec.rpartition(":")
    if colon and path.endswith(".py"):
        return _of_file(spec, Path(path), function)
    hint = f": did you mean zoo:{spec}?" if spec in list_models() else ""
    raise ModelError(f"expected MODEL to be {FORMS}; got {spec!r}{hint}")


def _package(name: str) -> ModuleType:
    if importlib.util.find_spec(name) is None:
        raise ModelError(f"models of {name} need the package {name}, which is not installed: `pip install {name}`")
    return importlib.import_module(name)


def _unknown(source: str, name: str, known: list[str]) -> ModelError:
    near = difflib.get_close_matches(name, known, n=3)
    hint = f": did you mean {' or '.join(near)}?" if near else f"; it has {len(known)} models"
    return ModelError(f"{source} has no model {name!r}{hint}")


def _of_zoo(spec: str, name: str) -> Loaded:
    if name not in list_models():
        raise ModelError(unknown_model(name, "`cnnkern zoo` lists the models"))
    build = get_builder(name)
    plain, fused = build(fused=False), build(fused=True)
    fused.load_state_dict(plain.state_dict())
    return Loaded(spec, plain, fused, size=build.input_size)


def _of_torchvision(spec: str, name: str) -> Loaded:
    models = _package("torchvision").models
    if name not in models.list_models():
        raise _unknown("torchvision", name, models.list_models())
    builder = models.get_model_builder(name)
    # Detectors and segmenters would download a backbone.
    backbone = {"weights_backbone": None} if "weights_backbone" in builder.__annotations__ else {}
    size = 299 if name == "inception_v3" else 224
    frames = (3, 16, 112, 112) if builder.__module__.startswith("torchvision.models.video") else (3, size, size)
    return Loaded(spec, models.get_model(name, weights=None, **backbone), size=frames)


def _of_timm(spec: str, name: str) -> Loaded:
    timm = _package("timm")
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    model = timm.create_model(name, pretrained=False)
    return Loaded(spec, model, size=tuple(model.default_cfg["input_size"]))


def _of_file(spec: str, path: Path, function: str) -> Loaded:
    """A file's function returns a model, or a model and an example: a tensor or a tuple of arguments."""
    if not path.is_file():
        raise ModelError(f"there is no file {path}")
    place = importlib.util.spec_from_file_location(path.stem, path)
    assert place is not None
    assert place.loader is not None  # of every .py
    module = importlib.util.module_from_spec(place)
    sys.path.insert(0, str(path.resolve().parent))  # so that it can import its neighbours
    sys.modules[path.stem] = module
    made = _run(path, "the file", lambda: place.loader.exec_module(module))
    make = getattr(module, function, None)
    if not callable(make):
        raise ModelError(f"{path} has no function {function!r}")
    made = _run(path, f"{function}()", make)
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"expected {function}() of {path} to return a torch.nn.Module, or one and an example input; got "
            f"{type(model).__name__}"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(f"{function}() of {path} returned a torch.jit module, which cannot be converted")
    if example is not None and not isinstance(example, tuple):
        example = (example,)
    return Loaded(spec, model, example=example)


def _run(path: Path, what: str, function: Any) -> Any:
    try:
        return function()
    except Exception as error:  # of a user's own code, whatever it is
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f.lineno for f in reversed(frames) if Path(f.filename) == path), None)
        where = f"{path}:{line}" if line else str(path)
        raise ModelError(f"{where}: {what} raised {type(error).__name__}: {one_line(error)}") from error
