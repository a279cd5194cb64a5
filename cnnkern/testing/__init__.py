"""One row an operator, `CASES`, from which the tests and the benchmarks follow, and the one judge of results.

A result is held to what eager PyTorch achieves at the same dtype, both measured against the same mathematics in
float64 (:func:`assert_as_good_as`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cnnkern import functional, reference

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """What tests and benchmarks need to know of one operator."""

    name: str
    function: Callable[..., Tensor]  # the public function ...
    reference: Callable[..., Tensor]  # ... and its specification, with the same signature
    inputs: Callable[..., dict[str, Any]]  # (shape, dtype, generator=, smooth=, **variant) -> arguments of both
    differentiable: tuple[str, ...]  # arguments that get gradients, where they are not None
    mutated: tuple[str, ...]  # arguments that the call changes in place
    variants: dict[str, dict[str, Any]]  # name -> keyword arguments of `inputs`
    shapes: tuple[Shape, ...]  # the battery's: ragged sizes, one element, every rank
    gradcheck_shapes: tuple[Shape, ...]
    bench_shapes: dict[str, tuple[Shape, ...]]  # network -> its shapes, each once
    bench_variant: str
    bench_others: tuple[str, ...] = field(default=(), kw_only=True)  # variants that a full run adds on two shapes
    forward_call: Callable[[dict[str, Any]], tuple]  # arguments of `inputs` -> (operator, positional arguments)
    backward_call: Callable[[dict[str, Any], Tensor], tuple]  # ... and dy -> (gradient operator, arguments)
    # Tensors of x's size that the least possible traffic (read, written) consists of.
    forward_traffic: tuple[int, int]
    backward_traffic: tuple[int, int]
    devices: tuple[str, ...] = ("cpu", "cuda")  # that have a kernel


def randn(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Normal numbers drawn in float64 and rounded, so that every dtype sees the same ones."""
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def with_layout(x: Tensor, layout: str) -> Tensor:
    """x with the same values in another memory layout: contiguous, channels_last, sliced or expanded."""
    if layout == "contiguous" or (layout == "channels_last" and x.dim() == 2):
        return x.contiguous()
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":  # every dimension cut out of a larger one
        larger = x.new_full([n + 2 for n in x.shape], float("nan"))
        view = larger[tuple(slice(1, n + 1) for n in x.shape)]
        return view.copy_(x)
    raise ValueError(f"unknown layout {layout!r}")


def run(
    function: Callable[..., Tensor], case: Case, inputs: dict[str, Any], dy: Tensor | None = None
) -> dict[str, Tensor]:
    """Calls `function` on copies of `inputs`; returns output, gradients and what the call changed in place.

    Leaves keep their memory layout. Without `dy` only the forward pass runs.
    """

    def leaf(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if name in case.mutated:
            return value.clone()
        return value.detach().requires_grad_(dy is not None and name in case.differentiable)

    arguments = {name: leaf(name, value) for name, value in inputs.items()}
    y = function(**arguments)
    results = {"output": y.detach()}
    if dy is not None:
        wanted = [n for n in case.differentiable if isinstance(arguments.get(n), Tensor)]
        grads = torch.autograd.grad(y, [arguments[n] for n in wanted], dy)
        results |= {f"grad of {n}": g for n, g in zip(wanted, grads, strict=True)}
    results |= {n: arguments[n] for n in case.mutated if isinstance(arguments.get(n), Tensor)}
    return results


def saved_bytes(function: Callable[[], Tensor]) -> int:
    """What autograd holds between the forward pass of `function` and its backward pass, each storage once."""
    storages: dict[int, tuple[Tensor, int]] = {}

    def pack(t: Tensor) -> Tensor:  # kept alive, or another storage might take its place
        return storages.setdefault(t.untyped_storage().data_ptr(), (t, t.untyped_storage().nbytes()))[0]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function()
    del y
    return sum(n for _, n in storages.values())


def to_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    return {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in inputs.items()}


def check(
    case: Case,
    inputs: dict[str, Any],
    dy: Tensor | None = None,
    function: Callable[..., Tensor] | None = None,
    slack: bool = True,
) -> None:
    """Asserts that `function`, the case's own by default, is as good as eager PyTorch on these inputs.

    Where terms cancel, in a sum of gradients or between a gradient and its mean, no algorithm does better than a few
    roundings of dy and of its inputs: what those of dy change is allowed on top, and with `slack` those of the inputs,
    which is too much where the mean is far above the deviation. For float64 inputs, where eager is no
    contender but the truth itself, and that truth a sum with rounding errors of its own, so is sqrt(n) roundings.
    """
    inputs64, dy64 = to_float64(inputs), None if dy is None else dy.double()
    out = run(function or case.function, case, inputs, dy)
    eager = run(case.reference, case, inputs, dy)
    ref = run(case.reference, case, inputs64, dy64)
    dtype = inputs["input"].dtype
    generator = torch.Generator().manual_seed(0)

    def rounded(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        sign = torch.randint(0, 2, value.shape, generator=generator).to(value) * 2 - 1
        return value * (1 + 8 * _arithmetic_eps(dtype) * sign)

    allowance = dict.fromkeys(ref, 0.0)
    for _ in range(3 if slack or dy is not None else 0):
        near_inputs = {n: rounded(v) for n, v in inputs64.items()} if slack else inputs64
        near = run(case.reference, case, near_inputs, rounded(dy64))
        allowance = {name: max(a, _largest(near[name] - ref[name])) for name, a in allowance.items()}
    if dtype == torch.float64:
        n = inputs["input"].numel()
        allowance = {name: a + n**0.5 * _arithmetic_eps(dtype) * _largest(ref[name]) for name, a in allowance.items()}
    assert_as_good_as(out, eager, ref, allowance)


def _arithmetic_eps(dtype: torch.dtype) -> float:
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def _largest(t: Tensor) -> float:
    t = t[t.isfinite()].abs()
    return t.max().item() if t.numel() else 0.0


def assert_as_good_as(
    out: dict[str, Tensor], eager: dict[str, Tensor], ref: dict[str, Tensor], allowance: dict[str, float] | None = None
) -> None:
    """Asserts |out - ref| <= 2 |eager - ref| + allowance + tiny in every tensor, with errors taken in the largest norm.

    `tiny` is the rounding of the tensor's largest value and eight units of the arithmetic beneath it: eager's own
    error is a draw of rounding errors too, and may be as small as none. Where the truth is NaN or infinite, so are
    eager and the result; where eager alone overflows, nothing is asked.
    """
    assert out.keys() == eager.keys() == ref.keys()
    for name, mine in out.items():
        theirs, truth = eager[name], ref[name].double()
        assert mine.shape == theirs.shape, f"{name}: shape {tuple(mine.shape)} against {tuple(theirs.shape)}"
        assert mine.dtype == theirs.dtype, f"{name}: {mine.dtype} against {theirs.dtype}"
        eps = torch.finfo(mine.dtype).eps / 2 + 8 * _arithmetic_eps(mine.dtype)
        mine, theirs = mine.double(), theirs.double()
        finite = theirs.isfinite() & truth.isfinite()
        assert torch.equal(mine.isnan() | ~truth.isnan(), theirs.isnan() | ~truth.isnan()), f"{name}: NaN lost or made"
        assert not (mine.isnan() & ~theirs.isnan()).any(), f"{name}: NaN where eager has none"
        infinite = truth.isinf() & theirs.isinf()
        assert torch.equal(mine[infinite], theirs[infinite]), f"{name}: infinities other than eager's"
        assert mine[finite].isfinite().all(), f"{name}: not finite where eager is"
        allowed = (
            2 * _largest((theirs - truth)[finite]) + eps * _largest(truth[finite]) + (allowance or {}).get(name, 0.0)
        )
        error = _largest((mine - truth)[finite])
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e} (twice eager's, and tiny)"


# ---- bn_act -----------------------------------------------------------------------------------------------------


# Where an activation's derivative jumps.
KINKS = {"relu": (0.0,), "relu6": (0.0, 6.0), "leaky_relu": (0.0,), "hardswish": (-3.0, 3.0)}


def _near_kink(inputs: dict[str, Any], distance: float) -> Tensor:
    """Elements whose pre-activation is as good as at a kink, but not zero throughout as behind a weight of zero."""
    add = "residual" in inputs
    function = reference.batch_norm_add_act if add else reference.batch_norm_act
    pre = function(**{**to_float64(_copied(inputs)), "act": "none"})
    if add and inputs["input"].dtype in (torch.bfloat16, torch.float16):
        # Eager rounds the batch norm before it adds: by up to half a unit of a term of 8 or so.
        distance = max(distance, 4 * torch.finfo(inputs["input"].dtype).eps)
    near = [(pre - kink).abs() < distance for kink in KINKS.get(inputs["act"], ())]
    return torch.stack(near).any(0) & (pre != 0) if near else torch.zeros_like(pre, dtype=torch.bool)


def batch_norm_inputs(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    *,
    generator: torch.Generator,
    training: bool = True,
    weight: bool = True,
    bias: bool = True,
    running: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
    parameter_dtype: torch.dtype | None = None,
    smooth: bool = False,
    residual: bool = False,
) -> dict[str, Any]:
    """Arguments of batch_norm_act, or with `residual` of batch_norm_add_act: offsets and scales that differ from
    channel to channel, one weight of zero.

    With `smooth`, for finite differences, no weight is zero and no element near the activation's kink.
    """
    channels, parameters = shape[1], parameter_dtype or dtype
    scale = randn((1, channels) + (1,) * (len(shape) - 2), generator, torch.float64)
    x = (randn(shape, generator, torch.float64) * (0.5 + scale.abs()) + 2 * scale).to(dtype)
    w = randn((channels,), generator, parameters)
    if channels > 2 and not smooth:
        w[channels // 2] = 0
    inputs = {
        "input": x,
        **({"residual": randn(shape, generator, torch.float64).to(dtype)} if residual else {}),
        "running_mean": randn((channels,), generator, parameters) if running else None,
        "running_var": randn((channels,), generator, parameters).abs() + 0.5 if running else None,
        "weight": w if weight else None,
        "bias": randn((channels,), generator, parameters) if bias else None,
        "training": training,
        "momentum": momentum,
        "eps": eps,
        "act": act,
    }
    if smooth and _near_kink(inputs, 1e-3).any():
        variant = {"training": training, "weight": weight, "bias": bias, "running": running, "residual": residual}
        variant |= {"momentum": momentum, "eps": eps, "act": act, "smooth": True}
        return batch_norm_inputs(shape, dtype, generator=generator, **variant)
    # Rounding must not decide on which side of the kink an element falls: its whole gradient hangs on it. Such an
    # element takes its neighbour's value, which moves the statistics a little, so twice.
    for _ in range(2 if act in KINKS else 0):
        if inputs["input"].numel() == 0:
            break
        near = _near_kink(inputs, 1e-5)
        if residual:
            inputs["residual"] = torch.where(near, inputs["residual"] + 1, inputs["residual"])
        else:
            inputs["input"] = torch.where(near, inputs["input"].roll(1), inputs["input"])
    return inputs


def _copied(inputs: dict[str, Any]) -> dict[str, Any]:
    return {n: v.detach().clone() if isinstance(v, Tensor) else v for n, v in inputs.items()}


def bn_act_forward_call(inputs: dict[str, Any]) -> tuple:
    a = inputs
    vectors = (a["weight"], a["bias"], a["running_mean"], a["running_var"])
    return torch.ops.cnnkern.bn_act.default, (a["input"], *vectors, a["training"], a["momentum"], a["eps"], a["act"])


def bn_act_backward_call(inputs: dict[str, Any], dy: Tensor) -> tuple:
    a = inputs
    operator, arguments = bn_act_forward_call(_copied(a))
    _, mean, rstd = operator(*arguments)
    mask = [True, a["weight"] is not None, a["bias"] is not None]
    return torch.ops.cnnkern.bn_act_backward.default, (
        *(dy, a["input"], a["weight"], a["bias"], mean, rstd, a["training"], a["act"], mask),
    )


# ---- bn_add_act -------------------------------------------------------------------------------------------------


def batch_norm_add_inputs(shape: Shape, dtype: torch.dtype = torch.float32, **variant: Any) -> dict[str, Any]:
    return batch_norm_inputs(shape, dtype, residual=True, **variant)


def bn_add_act_forward_call(inputs: dict[str, Any]) -> tuple:
    x, *rest = bn_act_forward_call(inputs)[1]
    return torch.ops.cnnkern.bn_add_act.default, (x, inputs["residual"], *rest)


def bn_add_act_backward_call(inputs: dict[str, Any], dy: Tensor) -> tuple:
    a = inputs
    operator, arguments = bn_add_act_forward_call(_copied(a))
    _, mean, rstd, mask = operator(*arguments)
    wanted = [True, True, a["weight"] is not None, a["bias"] is not None]
    return torch.ops.cnnkern.bn_add_act_backward.default, (
        *(dy, a["input"], a["weight"], a["bias"], mean, rstd, mask, a["training"], a["act"], wanted),
    )


# ---- add_relu ---------------------------------------------------------------------------------------------------


def add_relu_inputs(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    *,
    generator: torch.Generator,
    smooth: bool = False,
    parameter_dtype: torch.dtype | None = None,
    running: bool = True,
) -> dict[str, Any]:
    """Arguments of add_relu; parameters and running statistics are asked for by the battery, and there are none."""
    x, other = (randn(shape, generator, torch.float64).to(dtype) for _ in range(2))
    return {"input": x, "other": torch.where((x + other).abs() < 1e-3, other + 1, other)}


def add_relu_backward_call(inputs: dict[str, Any], dy: Tensor) -> tuple:
    y, mask = torch.ops.cnnkern.add_relu(inputs["input"].detach(), inputs["other"].detach())
    return torch.ops.cnnkern.add_relu_backward.default, (dy, mask, not y.is_contiguous())


# ---- the rows ---------------------------------------------------------------------------------------------------

# The shapes at 224x224 of the batch norms of three networks, each shape once, and of those that a residual follows.


def _at(side: int, *channels: int) -> list[Shape]:
    return [(32, c, side, side) for c in channels]


def _batch(n: int, shapes: Sequence[Shape]) -> tuple[Shape, ...]:
    return tuple((n, *shape[1:]) for shape in shapes)


RESNET50 = (
    *_at(112, 64),
    *_at(56, 64, 256, 128),
    *_at(28, 128, 512, 256),
    *_at(14, 256, 1024, 512),
    *_at(7, 512, 2048),
)
RESNEXT50 = tuple(_at(7, 1024))  # what ResNet-50 does not have
DENSENET121 = (  # what neither has: a step of 32 channels from layer to layer
    *_at(56, *(c for c in range(64, 257, 32) if c not in (64, 128, 256))),
    *_at(28, *(c for c in range(128, 513, 32) if c not in (128, 256, 512))),
    *_at(14, 128, *(c for c in range(256, 1025, 32) if c not in (256, 512, 1024))),
    *_at(7, 128, *(c for c in range(512, 1025, 32) if c not in (512, 1024))),
)
RESNET50_ADDS = (*_at(56, 256), *_at(28, 512), *_at(14, 1024), *_at(7, 2048))

BATCH_NORM_BENCH_SHAPES = {
    "resnet50": RESNET50,
    "resnext50": RESNEXT50,
    "densenet121": DENSENET121,
    "resnet50 batch 1": _batch(1, RESNET50),
    "resnext50 batch 1": _batch(1, RESNEXT50),
    "densenet121 batch 1": _batch(1, DENSENET121),
}
ADD_BENCH_SHAPES = {"resnet50": RESNET50_ADDS, "resnet50 batch 1": _batch(1, RESNET50_ADDS)}

BATCH_NORM_VARIANTS = {
    "train relu": {},
    "train none": {"act": "none"},
    "eval relu": {"training": False},
    "eval none": {"training": False, "act": "none"},
    "no affine": {"weight": False, "bias": False},
    "weight alone": {"bias": False},
    "bias alone, eval": {"weight": False, "training": False},
    "no running statistics": {"running": False},
    "momentum 0": {"momentum": 0.0},
    "momentum 1, large eps": {"momentum": 1.0, "eps": 0.1},
}
RAGGED_SHAPES = (
    (3, 1),
    (5, 7),
    (64, 33),
    (3, 5, 2),
    (2, 3, 17),
    (2, 8, 4, 4),
    (1, 1, 1, 5),
    (7, 1, 5, 3),
    (3, 17, 7, 7),
    (2, 16, 15, 17),
    (33, 67, 3, 5),
    (2, 2, 97, 101),
    (1, 130, 11, 13),
    (2, 3, 4, 5, 3),
    (1, 4, 129, 130),
)

CASES: dict[str, Case] = {
    "bn_act": Case(
        name="bn_act",
        function=functional.batch_norm_act,
        reference=reference.batch_norm_act,
        inputs=batch_norm_inputs,
        differentiable=("input", "weight", "bias"),
        mutated=("running_mean", "running_var"),
        variants=BATCH_NORM_VARIANTS
        | {
            "train relu6": {"act": "relu6"},
            "train leaky_relu": {"act": "leaky_relu"},
            "train sigmoid": {"act": "sigmoid"},
            "eval silu": {"act": "silu", "training": False},
            "train silu": {"act": "silu"},
            "train hardswish": {"act": "hardswish"},
        },
        shapes=RAGGED_SHAPES,
        gradcheck_shapes=((3, 2, 2, 2), (4, 3), (2, 2, 3)),
        forward_call=bn_act_forward_call,
        backward_call=bn_act_backward_call,
        bench_shapes=BATCH_NORM_BENCH_SHAPES,
        bench_variant="train relu",
        bench_others=(
            *("train none", "train relu6", "train leaky_relu", "train sigmoid", "train silu", "train hardswish"),
        ),
        forward_traffic=(1, 1),
        backward_traffic=(2, 1),
    ),
    "bn_add_act": Case(
        name="bn_add_act",
        function=functional.batch_norm_add_act,
        reference=reference.batch_norm_add_act,
        inputs=batch_norm_add_inputs,
        differentiable=("input", "residual", "weight", "bias"),
        mutated=("running_mean", "running_var"),
        variants=BATCH_NORM_VARIANTS,
        shapes=RAGGED_SHAPES,
        gradcheck_shapes=((3, 2, 2, 2), (4, 3), (2, 2, 3)),
        forward_call=bn_add_act_forward_call,
        backward_call=bn_add_act_backward_call,
        bench_shapes=ADD_BENCH_SHAPES,
        bench_variant="train relu",
        bench_others=("train none",),
        forward_traffic=(2, 1),
        backward_traffic=(2, 2),
        devices=("cpu",),
    ),
    "add_relu": Case(
        name="add_relu",
        function=functional.add_relu,
        reference=reference.add_relu,
        inputs=add_relu_inputs,
        differentiable=("input", "other"),
        mutated=(),
        variants={"plain": {}},
        shapes=RAGGED_SHAPES,
        gradcheck_shapes=((3, 2, 2, 2), (4, 3), (2, 2, 3)),
        forward_call=lambda inputs: (torch.ops.cnnkern.add_relu.default, (inputs["input"], inputs["other"])),
        backward_call=add_relu_backward_call,
        bench_shapes=ADD_BENCH_SHAPES,
        bench_variant="plain",
        forward_traffic=(2, 1),
        backward_traffic=(1, 1),
        devices=("cpu",),
    ),
}
