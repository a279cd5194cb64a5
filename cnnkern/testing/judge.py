"""The one judge of results: as good as eager PyTorch at the same dtype, both measured against float64."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cnnkern.testing.case import Case, run


def to_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    return {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in inputs.items()}


def _to_cpu(values: dict[str, Any]) -> dict[str, Any]:
    return {n: v.cpu() if isinstance(v, Tensor) else v for n, v in values.items()}


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

    The truth is computed on the CPU, whatever the device: on a GPU PyTorch's hardswish has a constant of single
    precision in float64 too. Eager gets storage of its own, as cuDNN wants it aligned.
    """
    inputs64, dy64 = to_float64(_to_cpu(inputs)), None if dy is None else dy.cpu().double()
    out = _to_cpu(run(function or case.function, case, inputs, dy))
    own = {n: v.clone() if isinstance(v, Tensor) else v for n, v in inputs.items()}
    eager = _to_cpu(run(case.reference, case, own, None if dy is None else dy.clone()))
    ref = run(case.reference, case, inputs64, dy64)
    dtype = inputs["input"].dtype
    generator = torch.Generator().manual_seed(0)

    def rounded(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        sign = torch.randint(0, 2, value.shape, generator=generator).to(value) * 2 - 1
        near = value * (1 + 8 * _arithmetic_eps(dtype) * sign)
        # What is denormal is rounded to a multiple of the smallest number there is, however small it is itself.
        smallest = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).smallest_normal
        denormal = (value.abs() < smallest) & (value != 0)
        return torch.where(denormal, value + 8 * _arithmetic_eps(dtype) * sign * smallest, near)

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
