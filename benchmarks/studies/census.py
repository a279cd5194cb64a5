"""What a model does with the outputs of its batch norms, told without cnnkern: all operators are watched while it runs.

Each call of a batch norm gets one of these:

- `relu`, say: the output goes to this activation and to nothing else;
- `add`, `add + relu`: to an addition to a tensor of its shape and dtype and to nothing else, and the sum to this
  activation and to nothing else;
- `several`: to one of these and to something else too;
- otherwise the operators that it goes to, which are none that a batch norm is computed with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NORMS = ("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
PLAIN = ("relu", "sigmoid", "silu", "hardswish", "mish", "hardsigmoid")
ACTIVATIONS = (*PLAIN, "relu6", "leaky_relu", "elu", "gelu", "gelu_tanh", "prelu")
SEVERAL = "several"


def activation(name: str, args: tuple, kwargs: dict) -> str | None:
    """The activation of docs/convert.md that this operator is, by PyTorch's names and numbers."""
    in_place, name = name.endswith("_"), name.rstrip("_")
    numbers = [*args[1:], *kwargs.values()]
    if name in PLAIN:
        return name
    if name in ("prelu", "_prelu_kernel"):
        return "prelu"
    if name == "hardtanh":
        return "relu6" if numbers == [0, 6] else None
    if name == "leaky_relu":
        return None if in_place and numbers and numbers[0] < 0 else name
    if name == "elu":
        return name if numbers[1:] in ([], [1], [1, 1]) and not (in_place and numbers and numbers[0] < 0) else None
    if name == "gelu":
        return "gelu_tanh" if "tanh" in numbers else "gelu"
    return None


@dataclass
class Output:
    """A batch norm's output, or a sum that has one of those, and what it goes to."""

    tensor: Tensor
    norm: str = ""  # the module's path; of a sum: none
    uses: list[str] = field(default_factory=list)
    sums: list[Sum] = field(default_factory=list)
    supported: bool = False  # one of the uses is

    def use(self, name: str, supported: bool) -> None:
        self.uses.append(name)
        self.supported = self.supported or supported

    @property
    def kind(self) -> str:
        if not self.supported:
            return ", ".join(sorted(set(self.uses))) or "nothing"
        if len(self.uses) > 1:
            return SEVERAL
        return self.sums[0].kind if self.sums else self.uses[0]


@dataclass
class Sum:
    """An addition of a batch norm's output; both of its terms may be one."""

    output: Output
    terms: list[Output]

    @property
    def kind(self) -> str:
        behind = self.output.uses
        single = len(behind) == 1 and self.output.supported and not self.output.sums
        return f"add + {behind[0]}" if single else "add"

    @property
    def is_alone(self) -> bool:
        """Whether one of its terms goes to nothing else."""
        return any(term.norm and len(term.uses) == 1 for term in self.terms)


class Census(TorchDispatchMode):
    """Watches the operators of a model's forward pass: `with Census(model): model(x)`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.outputs: list[Output] = []
        self.additions: list[Sum] = []
        self._watched: dict[int, Output] = {}
        self._running: list[str] = []
        self._handles = []
        for path, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                self._handles.append(module.register_forward_pre_hook(self._entering(path)))
                self._handles.append(module.register_forward_hook(self._left, always_call=True))

    def _entering(self, path: str) -> Callable[..., None]:
        return lambda *_: self._running.append(path)

    def _left(self, *_: Any) -> None:
        self._running.pop()

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name == "add_" and is_zero(args[1]):
            return func(*args, **kwargs)  # which changes nothing
        if name != "detach":  # which autograd makes of what it saves
            self._note(name, args, kwargs)
        result = func(*args, **kwargs)
        self._follow(name, args, kwargs, result)
        return result

    def _note(self, name: str, args: tuple, kwargs: dict) -> None:
        found = [self._watched[id(t)] for t in tree_leaves((args, kwargs)) if id(t) in self._watched]
        act = activation(name, args, kwargs)
        for output in found:
            if name.endswith("_") and output.uses[-1:] == ["clone"]:  # autograd's, for the gradient
                output.uses.pop()
            other = name.rstrip("_")
            output.use(act or (f"another {other}" if other in (*ACTIVATIONS, "add") else other), act is not None)

    def _follow(self, name: str, args: tuple, kwargs: dict, result: Any) -> None:
        if name in NORMS and self._running:
            self.outputs.append(self._watch(result[0], self._running[-1]))
            return
        terms = [self._watched[id(t)] for t in args[:2] if id(t) in self._watched]
        if name.endswith("_"):  # what follows is no use of what was
            for t in args[:1]:
                self._watched.pop(id(t), None)
        if name in ("add", "add_") and terms and kwargs.get("alpha", 1) == 1 and is_of_alike(args, result):
            total = Sum(self._watch(result, ""), terms)
            for term in terms:
                term.supported, term.uses[-1] = True, "add"
                term.sums.append(total)
            if any(term.norm for term in terms):
                self.additions.append(total)

    def _watch(self, tensor: Tensor, norm: str) -> Output:
        self._watched[id(tensor)] = output = Output(tensor, norm)
        return output

    def returned(self, tensors: list[Tensor]) -> None:
        """What the model returns is used by whoever called it."""
        for t in tensors:
            if id(t) in self._watched:
                self._watched[id(t)].use("the caller", False)

    def kinds(self) -> Counter[tuple[str, str]]:
        """Of each batch norm, by its path, how many of its outputs are of which kind."""
        return Counter((output.norm, output.kind) for output in self.outputs)


def is_of_alike(args: tuple, result: Tensor) -> bool:
    """Whether an addition is of two tensors alike; a number is one of no dimensions here."""
    a, b = args[:2]
    both = isinstance(a, Tensor) and isinstance(b, Tensor) and a is not b
    return both and a.shape == b.shape and a.dtype == b.dtype == result.dtype


def is_zero(term: object) -> bool:
    """Whether an addition is of the number 0, as one is of a branch that a block does not have."""
    return not isinstance(term, Tensor) and term == 0


def is_fusible(kind: str) -> bool:
    """Whether one kernel computes a batch norm whose output is of this kind with what it goes to."""
    return kind in ACTIVATIONS or kind.startswith("add")
