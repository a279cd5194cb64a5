"""The worst errors of cnnkern, eager PyTorch and torch.compile against float64, on difficult numbers.

`python -m benchmarks.studies.accuracy` prints them as the table of docs/kernels.md. An error is the largest difference
over the tensor, divided by the largest value of the truth.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from cnnkern import testing
from cnnkern.testing import CASES, Case

SHAPE = (8, 32, 28, 28)
NUMBERS: dict[str, tuple[torch.dtype, Callable[[Tensor], Tensor]]] = {
    "normal": (torch.float32, lambda x: x),
    "normal, bfloat16": (torch.bfloat16, lambda x: x),
    "mean of 1e4 deviations": (torch.float32, lambda x: x + 1e4),
    "mean of 1e6 deviations": (torch.float32, lambda x: x + 1e6),
    "deviation of 1e-2 at 1e4": (torch.float32, lambda x: x * 1e-2 + 1e4),
    "around 1e30": (torch.float32, lambda x: x * 1e30),
    "around 1e-30": (torch.float32, lambda x: x * 1e-30),
    "denormal": (torch.float32, lambda x: x * 1e-40),
    "constant": (torch.float32, lambda x: torch.full_like(x, 3.0)),
}


def errors(case: Case, numbers: str) -> dict[str, tuple[float, float]]:
    """contender -> (error of the output, largest error of a gradient), without an activation that has a kink."""
    dtype, change = NUMBERS[numbers]
    generator = torch.Generator().manual_seed(0)
    variant = {"act": "none"} if "act" in case.inputs(SHAPE, generator=generator) else {}
    inputs = case.inputs(SHAPE, torch.float32, generator=generator, **variant)
    inputs = {n: v.to(dtype) if isinstance(v, Tensor) else v for n, v in inputs.items()}
    inputs["input"] = change(testing.randn(SHAPE, generator, torch.float64)).to(dtype)
    shape = testing.run(case.reference, case, inputs)["output"].shape
    dy = testing.randn(shape, generator, dtype)
    truth = testing.run(case.reference, case, testing.to_float64(inputs), dy.double())
    torch._dynamo.reset()
    contenders = {"cnnkern": case.function, "eager": case.reference, "torch.compile": torch.compile(case.reference)}

    def error(found: dict[str, Tensor], name: str) -> float:
        largest = truth[name].abs().max().item()
        return (found[name].double() - truth[name]).abs().max().item() / (largest or 1.0)

    results = {}
    for contender, function in contenders.items():
        found = testing.run(function, case, inputs, dy)
        gradients = [error(found, n) for n in truth if n.startswith("grad")]
        results[contender] = error(found, "output"), max(gradients)
    return results


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m benchmarks.studies.accuracy", description=__doc__).parse_args(argv)
    print("| operator | numbers | | cnnkern | eager | torch.compile |\n|---|---|---|---:|---:|---:|")
    for case in CASES.values():
        for numbers in NUMBERS:
            found = errors(case, numbers)
            for i, what in enumerate(("output", "gradients")):
                row = [case.name, numbers, what] + [f"{found[c][i]:.1e}" for c in found]
                print(f"| {' | '.join(row)} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
