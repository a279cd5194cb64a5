"""One row an operator, `CASES`, from which the tests and the benchmarks follow, and the one judge of results.

A result is held to what eager PyTorch achieves at the same dtype, both measured against the same mathematics in
float64 (:func:`assert_as_good_as`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    forward_call: Callable[[dict[str, Any]], tuple]  # arguments of `inputs` -> (operator, positional arguments)
    backward_call: Callable[[dict[str, Any], Tensor], tuple]  # ... and dy -> (gradient operator, arguments)
    # Tensors of x's size that the least possible traffic (read, written) consists of.
    forward_traffic: tuple[int, int]
    backward_traffic: tuple[int, int]


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


def _near_kink(inputs: dict[str, Any], distance: float) -> Tensor:
    """Elements whose pre-activation is as good as zero, but not zero throughout as behind a weight of zero."""
    pre = reference.batch_norm_act(**{**to_float64(_copied(inputs)), "act": "none"})
    return (pre.abs() < distance) & (pre != 0)


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
) -> dict[str, Any]:
    """Arguments of batch_norm_act: offsets and scales that differ from channel to channel, one weight of zero.

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
        variant = {"training": training, "weight": weight, "bias": bias, "running": running, "smooth": True}
        return batch_norm_inputs(shape, dtype, generator=generator, momentum=momentum, eps=eps, act=act, **variant)
    # Rounding must not decide on which side of the kink an element falls: its whole gradient hangs on it. Such an
    # element takes its neighbour's value, which moves the statistics a little, so twice.
    for _ in range(2 if act == "relu" else 0):
        if inputs["input"].numel() == 0:
            break
        near = _near_kink(inputs, 1e-5)
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


# The shapes of ResNet-50's batch norms at 224x224, batch 32.
RESNET50_BATCH_NORMS = (
    (32, 64, 112, 112),
    (32, 64, 56, 56),
    (32, 256, 56, 56),
    (32, 128, 56, 56),
    (32, 128, 28, 28),
    (32, 512, 28, 28),
    (32, 256, 28, 28),
    (32, 256, 14, 14),
    (32, 1024, 14, 14),
    (32, 512, 14, 14),
    (32, 512, 7, 7),
    (32, 2048, 7, 7),
)

CASES: dict[str, Case] = {
    "bn_act": Case(
        name="bn_act",
        function=functional.batch_norm_act,
        reference=reference.batch_norm_act,
        inputs=batch_norm_inputs,
        differentiable=("input", "weight", "bias"),
        mutated=("running_mean", "running_var"),
        variants={
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
        },
        shapes=(
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
        ),
        gradcheck_shapes=((3, 2, 2, 2), (4, 3), (2, 2, 3)),
        forward_call=bn_act_forward_call,
        backward_call=bn_act_backward_call,
        bench_shapes={"resnet50": RESNET50_BATCH_NORMS},
        bench_variant="train relu",
        forward_traffic=(1, 1),
        backward_traffic=(2, 1),
    )
}
