"""The tables of `cnnkern tune`: on this machine, the calls that PyTorch's operators compute faster than cnnkern's, and
the convolutions that the built-in rule dispatches to PyTorch although cnnkern's kernels are faster.

If :data:`table` is not None, every function of :mod:`cnnkern.functional` calls :func:`loses` before it calls cnnkern's
operator. If the call is lost, it calls PyTorch's operators, and autograd theirs in the backward pass. So there is one
decision, before autograd records anything. The table is not used under torch.compile, in exported and traced programs,
and for tensors that are not plain data, where :mod:`cnnkern.ops.route` decides.

The convolutions for cnnkern's kernels are passed to the extension, whose dispatch rules look them up, pass by pass
(csrc/own_convolutions.h).

A table is a file for one device in the user's cache folder, read when cnnkern is imported. It is valid for the device,
the instruction set and the versions with which it was measured. Any other table is ignored, with a warning.
"""

from __future__ import annotations

import glob
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cnnkern import backends, reference
from cnnkern.extension import extension

_is_compiling = torch.compiler.is_compiling  # looked up once, because every call needs it
# The lost calls, which loses() looks up in every call of a function. None: there is no table, and no overhead.
table: Callable[[Call], bool] | None = None


LAYOUTS = {torch.contiguous_format: "contiguous", torch.channels_last: "channels_last"}


OwnConvolution = tuple[bool, torch.dtype, tuple[int, ...]]


class Call(NamedTuple):
    """A call, as far as its speed depends on it. `settings` are the operator's own, in the order it passes them."""

    operator: str  # the function in cnnkern.functional
    device: str  # cpu or cuda
    dtype: str
    parameters: str  # the dtype of its weight; none without
    layout: str  # contiguous or channels_last
    training: bool  # whether a gradient is needed
    threads: int  # of the CPU; 0 on a GPU
    shape: tuple[int, ...]
    settings: tuple[Any, ...]

    def key(self) -> Call:
        """The call with its class of shapes: batches of one power of two are one class."""
        return self._replace(shape=(self.shape[0].bit_length(), *self.shape[1:]))

    def own_convolution(self) -> OwnConvolution:
        """A convolution as csrc/own_convolutions.h identifies it; for a call in training, its backward pass."""
        numbers = (self.layout == "channels_last", self.training, self.threads, *self.key().shape, *self.settings[:10])
        return self.device == "cuda", getattr(torch, self.dtype), tuple(map(int, numbers))

    def __str__(self) -> str:
        way, shape = "training" if self.training else "inference", "x".join(map(str, self.shape))
        settings = " ".join(str(s) for s in self.settings)
        return " ".join(f"{self.operator} {shape} {settings} {self.dtype} {self.layout} {way}".split())


def loses(operator: str, input: Tensor, weight: Tensor | None, bias: Tensor | None, *settings: Any) -> bool:
    """Whether PyTorch's operators were faster in calls like this one. Only called if there is a table."""
    if _is_compiling() or table is None or type(input) is not Tensor or not (input.is_cpu or input.is_cuda):
        return False
    if type(table) is Table and not table.may_lose(operator, input, settings):
        return False
    call = describe(operator, input, weight, bias, settings)
    return call is not None and table(call)


def describe(
    operator: str, input: Tensor, weight: Tensor | None, bias: Tensor | None, settings: tuple[Any, ...]
) -> Call | None:
    """The call; None for one that is not tuned: an empty tensor, or neither contiguous nor channels_last."""
    device = input.device.type
    shape = tuple(input.shape)
    if 0 in shape or len(shape) < 2 or torch._C._get_tracing_state() is not None:
        return None
    layout = LAYOUTS.get(format_of(input), "")
    if not layout:
        return None
    dtype = input.dtype
    if operator == "conv2d" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    wanted = input.requires_grad or any(t is not None and t.requires_grad for t in (weight, bias))
    parameters = "none" if weight is None else _name(weight.dtype)
    if operator == "conv2d":
        parameters = _name(dtype)
    if operator == "layer_norm":  # rows are what counts
        if layout != "contiguous":
            return None
        width = settings[0]
        shape = (input.numel() // width, width)
    threads = torch.get_num_threads() if device == "cpu" else 0
    training = wanted and torch.is_grad_enabled()
    return Call(operator, device, _name(dtype), parameters, layout, training, threads, shape, settings)


def format_of(t: Tensor) -> torch.memory_format:
    """Contiguous or channels_last if the tensor is dense in that format; else preserve_format."""
    if t.is_contiguous():
        return torch.contiguous_format
    if t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.preserve_format


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def layer_norm2d_by_pytorch(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """In the input's memory format, as cnnkern's operator returns it. PyTorch's result is always channels_last."""
    return reference.layer_norm2d(input, weight, bias, eps).contiguous(memory_format=format_of(input))


@contextmanager
def using(other: Callable[[Call], bool] | None) -> Iterator[None]:
    """Another table for this block, in all threads; None for no table."""
    global table
    before, table = table, other
    try:
        yield
    finally:
        table = before


_own: dict[str, frozenset[OwnConvolution]] = {}  # what was passed to the extension, by device


@contextmanager
def own_convolutions(calls: Iterable[Call]) -> Iterator[None]:
    """In this block cnnkern's kernels compute these convolutions, and no others that the rule dispatches to PyTorch."""
    before = dict(_own)
    _tell({"these": frozenset(call.own_convolution() for call in calls)})
    try:
        yield
    finally:
        _tell(before)


def _tell(own: dict[str, frozenset[OwnConvolution]]) -> None:
    global _own
    if extension is not None and own != _own:
        extension.set_own_convolutions(list(frozenset().union(*own.values())))
    _own = own


# ---- the file ----


def folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "cnnkern")


def files() -> list[str]:
    """Those of all devices; none if the cache folder is missing or not readable."""
    return glob.glob(os.path.join(glob.escape(str(folder())), "tuned-*.json"))


def file_of(machine: dict[str, str]) -> Path:
    """The path of a table: one per processor or GPU model, and on a GPU one per backend."""
    text = f"{machine['device']} {machine['kernels']} {machine['name']}"
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return folder() / f"tuned-{slug}.json"


def this_machine(device: str) -> dict[str, str]:
    """What a table is valid for: the device's name, the backend or instruction set, and the versions."""
    from cnnkern.measure import machine

    found = machine.describe(device)
    facts = {"device": torch.device(device).type, "name": found.device_name, "kernels": found.kernels}
    return facts | {"torch": found.torch, "cnnkern": found.cnnkern}


class Measured(NamedTuple):
    """A timed call: the speedup of cnnkern's operator over PyTorch's, and its relative uncertainty.

    `own`: a convolution that the built-in rule dispatches to PyTorch, and that was faster on cnnkern's kernels. The
    speedup is theirs.
    """

    call: Call
    ratio: float
    chance: float
    own: bool = False

    @property
    def lost(self) -> bool:
        """Whether cnnkern's operator is significantly slower, by more than the threshold for another dispatch."""
        return self.ratio < 0.98 and self.ratio * (1 + self.chance) < 1


def save(machine: dict[str, str], measured: Iterable[Measured]) -> Path:
    """Writes a table, replacing an existing one, and returns its path."""
    path = file_of(machine)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {**m.call._asdict(), "ratio": round(m.ratio, 4), "chance": round(m.chance, 4), "own": m.own} for m in measured
    ]
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps({"machine": machine, "measured": rows}, indent=0) + "\n")
    unfinished.replace(path)
    return path


class StaleTable(Exception):
    """A table that is not valid here; the message says why."""


def read(path: Path, machine: dict[str, str]) -> list[Measured]:
    """The calls of a table. Raises StaleTable if it is another machine's or cannot be read."""
    try:
        found = json.loads(path.read_text())
        other = found["machine"]
        rows = [
            Measured(
                Call(*(_tuples(row[field]) for field in Call._fields)),
                row["ratio"],
                row["chance"],
                row.get("own", False),
            )
            for row in found["measured"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StaleTable(f"{path} is no table of `cnnkern tune` ({type(error).__name__})") from error
    for name, value in machine.items():
        if other.get(name) != value:
            raise StaleTable(f"{path} was made for {name} {other.get(name)}, and this is {value}")
    return rows


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def ignored() -> bool:
    """Whether CNNKERN_TUNE=0 switches all tables off. Raises ValueError for other values than 0 and 1."""
    asked = os.environ.get("CNNKERN_TUNE", "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"cnnkern: CNNKERN_TUNE must be 0, 1 or unset; got {asked!r}")
    return asked == "0"


class Table:
    """The keys of lost calls, by backend. A GPU's are read at its first call, so that the import does not initialise
    it."""

    def __init__(self, lost: dict[str, frozenset[Call]]) -> None:
        self.lost = lost  # by "cpu", and on a GPU by the name of the kernels
        self.tails: dict[str, dict[str, set[tuple[int, ...]]]] = {}  # shapes of lost calls without the batch size

    def may_lose(self, operator: str, input: Tensor, settings: tuple[Any, ...]) -> bool:
        """Whether any call of this shape is lost. This takes a tenth of the time of describing the call."""
        who = "cpu" if input.is_cpu else backends.kernels_on("cuda")
        if who not in self.tails:
            self._take_up(who, input.device.type)
        tail = settings[:1] if operator == "layer_norm" else input.shape[1:]
        return tail in self.tails[who].get(operator, ())

    def __call__(self, call: Call) -> bool:
        return call.key() in self.lost["cpu" if call.device == "cpu" else backends.kernels_on("cuda")]

    def _take_up(self, who: str, device: str) -> None:
        if who not in self.lost:
            self.lost[who] = take_up(device)
        tails: dict[str, set[tuple[int, ...]]] = {}
        for call in self.lost[who]:
            tails.setdefault(call.operator, set()).add(call.shape[1:])
        self.tails[who] = tails


def take_up(device: str) -> frozenset[Call]:
    """The keys of the lost calls in the device's table. Passes the table's convolutions to the extension."""
    path = file_of(machine := this_machine(device))
    measured: list[Measured] = []
    if os.path.exists(path):
        try:
            measured = read(path, machine)
        except StaleTable as error:
            warnings.warn(f"cnnkern: ignored: {error}; `cnnkern tune` makes a new one", stacklevel=2)
    convolutions = [(m.call.own_convolution(), m.own and not m.lost) for m in measured if m.call.operator == "conv2d"]
    ours = frozenset(key for key, own in convolutions if own) - {key for key, own in convolutions if not own}
    _tell({**_own, device: ours})
    won = {m.call.key() for m in measured if not m.lost}  # a class is lost if all measured calls of it are
    return frozenset(m.call.key() for m in measured) - won


def summary(device: str) -> str:
    """What this machine's table says, in a line, or why it is not valid."""
    path = file_of(machine := this_machine(device))
    if not os.path.exists(path):
        others = len(files())
        more = f" ({others} of other devices or kernels in {folder()})" if others else ""
        return f"no table{more}: `cnnkern tune MODEL` makes one"
    try:
        measured = read(path, machine)
    except StaleTable as error:
        return f"ignored: {error}: `cnnkern tune` makes a new one"
    said = f"calls: {len(measured)}, of which PyTorch's operators compute {sum(m.lost for m in measured)}"
    own = sum(m.own for m in measured)
    said += f" and cnnkern's kernels {own} that the built-in rule dispatches to PyTorch: {path}"
    return f"ignored, because CNNKERN_TUNE=0 is set: {said}" if ignored() else said


def load() -> None:
    """Uses this machine's tables, if there are valid ones."""
    global table
    table = None
    _tell({})
    if ignored():
        return
    found = files()
    if not found:
        return
    known = {"cpu": take_up("cpu")}
    if known["cpu"] or any(os.path.basename(name).startswith("tuned-cuda") for name in found):
        table = Table(known)
