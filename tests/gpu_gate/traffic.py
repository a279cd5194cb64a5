"""What the CUDA kernels ask of global memory: counted on the emulator, a call of each operator on aligned shapes."""

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import emulator
import torch

from cnnkern import testing

# By operator: (layout, shape, what else Case.inputs is told), each cut into blocks in a way of its own.
CALLS: dict[str, tuple[tuple[str, tuple[int, ...], dict[str, object]], ...]] = {
    **dict.fromkeys(
        ("bn_act", "bn_add_act", "bn_prelu", "sync_bn"),
        (
            ("contiguous", (4, 128, 16, 16), {}),  # a block a channel
            ("contiguous", (2, 8, 96, 96), {}),  # slices of a channel
            ("channels_last", (4, 128, 16, 16), {}),  # strips of rows
        ),
    ),
    "add_relu": (("contiguous", (4, 128, 16, 16), {}),),
    "layer_norm": (
        ("contiguous", (256, 512), {}),  # rows that a group of threads holds
        ("contiguous", (4, 32768), {}),  # slices of a row
    ),
    # In channels_last cuDNN has the groups of several channels.
    "grouped_conv2d": (
        *(("contiguous", (2, 64, 32, 32), more) for more in ({}, {"kernel": 7, "padding": 3}, {"width": 8})),
        *(("channels_last", (2, 64, 32, 32), more) for more in ({}, {"kernel": 7, "padding": 3})),
    ),
    "layer_norm2d": (*(("contiguous", (2, 96, n, n), {}) for n in (32, 7)), ("channels_last", (2, 96, 32, 32), {})),
    "max_pool2d": (
        *(("channels_last", (2, 64, 32, 32), more) for more in ({}, {"kernel": 2, "padding": 0})),
        *(("contiguous", (2, 64, 32, 32), more) for more in ({}, {"kernel": 2, "padding": 0})),
    ),
}


class Call(NamedTuple):
    """A call of an operator, or of its gradient operator, in float32."""

    operator: str
    layout: str
    shape: tuple[int, ...]
    arguments: dict[str, object]  # what else Case.inputs was told
    direction: str  # forward or backward
    elements: int  # of x
    least: float  # bytes an element that have to be moved
    traffic: tuple[emulator.Traffic, ...]

    def asked(self) -> float:
        """Bytes an element in the sectors that all warps touch, caches left out."""
        return 32 * sum(t.sectors for t in self.traffic) / self.elements

    def by_kernel(self) -> dict[str, tuple[float, float, int]]:
        """(sectors over ideal ones of 16-byte accesses, and of all; bytes), in the order of the names."""
        sums = defaultdict(lambda: [0, 0, 0, 0, 0])
        for t in self.traffic:
            wide = t.width >= 16
            for i, n in enumerate((t.sectors * wide, t.ideal * wide, t.sectors, t.ideal, t.bytes)):
                sums[t.kernel][i] += n
        return {k: (w / wi if wi else 0.0, s / si, b) for k, (w, wi, s, si, b) in sorted(sums.items())}


def calls(operators: Iterable[str] | None = None) -> list[Call]:
    """Runs the calls of CALLS, or of some operators, on the emulator."""
    found = []
    with emulator.Emulator("profile") as machine:
        for name in operators or CALLS:
            case = testing.CASES[name]
            for layout, shape, arguments in CALLS[name]:
                generator = torch.Generator().manual_seed(0)
                inputs = case.inputs(shape, torch.float32, generator=generator, **arguments)
                x = inputs["input"]
                inputs |= {
                    n: testing.with_layout(v, layout)
                    for n, v in inputs.items()
                    if isinstance(v, torch.Tensor) and v.shape == x.shape
                }
                y = testing.run(case.reference, case, inputs)["output"]
                dy = testing.with_layout(testing.randn(y.shape, generator, torch.float32), layout)
                ratio = y.numel() / x.numel()
                for direction, (operator, given), (read, written) in (
                    ("forward", case.forward_call(inputs), case.forward_traffic),
                    ("backward", case.backward_call(inputs, dy), case.backward_traffic),
                ):
                    machine.profile()  # of what went before
                    operator(*given)
                    least = read + written * ratio if direction == "forward" else read - 1 + ratio + written
                    traffic = tuple(machine.profile())
                    found.append(Call(name, layout, tuple(shape), arguments, direction, x.numel(), 4 * least, traffic))
    return found
