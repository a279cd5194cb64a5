"""Writes docs/gpu-report.md: what compiled code and the emulator's memory profile say about the GPU kernels.

`make gpu-report` runs this. It judges every kernel for every architecture first, and ends with an error and no page
where one does not keep the thresholds.
"""

import hashlib
import math
import re
import sys
from collections.abc import Iterable, Sequence

from cnnkern import testing
from gpu_gate import cuda, gate, predicted, traffic, triton_code
from gpu_gate.cache import ROOT
from gpu_gate.machine_code import Kernel

PAGE = ROOT / "docs" / "gpu-report.md"
# Of NVIDIA's data sheets: bytes per second of memory, float32 operations per second without tensor cores.
GPUS = {"A100 SXM 80 GB": (2039e9, 19.5e12), "H100 SXM": (3350e9, 66.9e12)}
# Networks whose largest and smallest layers the bounds are given for.
LAYERS = 4


def stamp() -> str:
    """What the page is of: the kernels' sources, and these programs."""
    patterns = (
        "csrc/cuda/**/*.*",
        "csrc/activations.h",
        "triton_kernels/*.py",
        "tests/gpu_gate/*.*",
        "tests/emulator/*.cpp",
    )
    digest = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in ROOT.glob(pattern)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"<!-- of sources {digest.hexdigest()[:16]} -->"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], numbers_from: int = 1) -> str:
    marks = ["---" if i < numbers_from else "---:" for i in range(len(head))]
    lines = [head, marks, *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def span(values: Iterable[float], form: str = "{}") -> str:
    found = sorted(set(values))
    return form.format(found[0]) if len(found) == 1 else f"{form.format(found[0])}-{form.format(found[-1])}"


def families(kernels: list[Kernel]) -> dict[str, list[Kernel]]:
    """The instantiations of each kernel function: for whole vectors of 16 bytes, and for what is not aligned."""
    found: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        function = kernel.name.split("<")[0]
        elements = re.search(r"^(?:add_relu|map|own|reduce|ln)_.*, (?:true|1)>$", kernel.name)
        found.setdefault(f"`{function}`" + (", not aligned" if elements else ""), []).append(kernel)
    return dict(sorted(found.items()))


def family_rows(kernels: dict[str, list[Kernel]], kind: str) -> Iterable[Sequence[object]]:
    by_family = [families(compiled) for compiled in kernels.values()]
    for name, members in by_family[0].items():
        same = [compiled[name] for compiled in by_family]
        occupancies = [[k.occupancy(gate.limits_of(k, kind).dynamic_shared) for k in group] for group in same]
        yield (
            name,
            len(members),
            each(span(k.registers for k in group) for group in same),
            each(span(group, "{:.0%}") for group in occupancies),
            each(max(k.whole.local + k.spills for k in group) for group in same),
            each(max(k.stack for k in group) for group in same),
            each(max(k.shared for k in group) for group in same),
        )


def each(values: Iterable[object]) -> str:
    """Of each architecture, or once where they are the same."""
    found = [str(value) for value in values]
    return found[0] if len(set(found)) == 1 else " · ".join(found)


def round_of(kernel: Kernel) -> str:
    """Loads and stores of the loop that moves most at once: `8x128 1x8` are eight of 128 bits and one of eight."""
    code = max(kernel.loops or [kernel.whole], key=lambda c: (c.wide()[0] + c.wide()[1], c.accesses()))
    sides = [
        " ".join(f"{n}x{w}" for w, n in sorted(widths.items(), reverse=True)) for widths in (code.loads, code.stores)
    ]
    return " / ".join(side or "0" for side in sides) + ("" if kernel.loops else " (no loop)")


def is_shown(kernel: Kernel, kind: str) -> bool:
    limits = gate.limits_of(kernel, kind)
    plain = not re.search("OtherActivation|Identity|ThroughNothing|, false>, |Half|double", kernel.name)
    return plain and (limits.round != (0, 0) or limits.whole != (0, 0))


def shown_rows(kernels: dict[str, list[Kernel]]) -> Iterable[Sequence[object]]:
    by_name = {a: {k.name: k for k in compiled} for a, compiled in kernels.items()}
    first = next(iter(kernels.values()))
    for kernel in first:
        if not is_shown(kernel, "cuda"):
            continue
        same = [by_name[a][kernel.name] for a in kernels]
        occupancies = [k.occupancy(gate.limits_of(k, "cuda").dynamic_shared) for k in same]
        yield (
            f"`{kernel.name}`",
            each(k.registers for k in same),
            each(f"{o:.0%}" for o in occupancies),
            each(round_of(k) for k in same),
        )


def triton_rows(kernels: dict[str, list[Kernel]]) -> Iterable[Sequence[object]]:
    labels = sorted({kernel.name.rpartition(" ")[0] for compiled in kernels.values() for kernel in compiled})
    for label in labels:
        cells = []
        for compiled in kernels.values():
            members = [k for k in compiled if k.name.rpartition(" ")[0] == label]
            occupancy = min(k.occupancy() for k in members)
            spills = max(k.whole.local + k.spills for k in members)
            cells.append(
                f"{span(k.registers for k in members)}, {occupancy:.0%}{f', {spills} spills' if spills else ''}"
            )
        yield (label, *cells)


def size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def traffic_rows(calls: list[traffic.Call]) -> Iterable[Sequence[object]]:
    for call in calls:
        per_kernel = call.by_kernel().values()
        sectors = sum(t.sectors for t in call.traffic) / sum(t.ideal for t in call.traffic)
        wide = max(ratio for ratio, _, _ in per_kernel)
        yield (
            f"{call.operator} {call.direction}",
            " ".join([size(call.shape), call.layout, *(f"{n} {v}" for n, v in call.arguments.items())]),
            f"{call.asked():.2f}",
            f"{call.least:.2f}",
            f"{wide:.3f}" if wide else "-",
            f"{sectors:.3f}",
        )


def bound_rows(calls: list[traffic.Call]) -> Iterable[Sequence[object]]:
    """For some layers of the network that each operator's benchmarks name first."""
    cases = (testing.CASES[name] for name in dict.fromkeys(call.operator for call in calls))
    for case in (case for case in cases if case.bench_layers):
        layers = next(iter(case.bench_layers.values()))
        for layer in layers[:: max(1, len(layers) // LAYERS)][:LAYERS]:
            read, written = case.elements(layer, training=True)
            moved = 4 * (read + written)
            operations = 0
            if "weight" in case.differentiable and case.output_shape:
                width, kernel = layer.arguments.get("width", 1), layer.arguments["kernel"]
                taps = math.prod(kernel) if isinstance(kernel, tuple) else kernel**2
                operations = 3 * 2 * math.prod(case.output_shape(layer)) * width * taps  # output, dx, dweight
            bounds = []
            for memory, arithmetic in GPUS.values():
                seconds = max(moved / memory, operations / arithmetic)
                by = "memory" if seconds == moved / memory else "arithmetic"
                bounds.append(f"{seconds * 1e6:.1f}, {by}")
            yield (case.name, str(layer), f"{moved / 1e6:.1f}", *bounds)


def page(
    cuda_kernels: dict[str, list[Kernel]], triton_kernels: dict[str, list[Kernel]], calls: list[traffic.Call]
) -> str:
    timed = "gpu.md" if (ROOT / "docs" / "gpu.md").exists() else "results.md#on-a-gpu"
    count = len(next(iter(cuda_kernels.values())))
    usage = ("kernel", "instantiations", "registers", "occupancy", "spills", "stack", "shared")
    sheets = " and ".join(f"{name} ({m / 1e9:.0f} GB/s, {a / 1e12:.1f} TFLOP/s)" for name, (m, a) in GPUS.items())
    return f"""# GPU kernels: what is known without a GPU

`make gpu-report` writes this page and needs no GPU. **Nothing on it was timed, except the
last table's measured column.** Times are in [{timed.partition("#")[0]}]({timed}).

- Registers, spills, shared memory, occupancy and access widths are read from machine code.
- Sectors and bytes are counted while the kernels run on [the emulator](emulator.md).
- Bounds are computed from data sheets.

Every kernel is within the limits of `tests/gpu_gate/thresholds.py`, which also lists the exceptions with their reasons.
Otherwise this command and `make prove` fail. `make prove` checks all kernels in the built extension, and a part of them
for the other architectures. This command checks all kernels for all architectures.

## CUDA C++: every kernel that ships

All {count} instantiations in the built extension. For architectures without machine code in it they are compiled from
its PTX, as a driver does. Three values are those for {" · ".join(cuda_kernels)}.

- **Spills** are accesses to local memory.
- **Stack** and **shared** are in bytes. Shared memory is the static one of a block; from sm_90 on it includes the 1024
  bytes per block that the system reserves.
- **Occupancy** is the share of a multiprocessor's threads that registers, shared memory and threads of a block allow.
  It leaves out the dynamic shared memory of layer norms and convolutions, which depends on the shape.
- **Not aligned** are the instantiations for tensors that do not begin, or whose planes do not end, with whole vectors
  of 16 bytes.

{table(usage, family_rows(cuda_kernels, "cuda"))}
## CUDA C++: the hot loops

Aligned kernels of float32 and bfloat16, with ReLU, in training. The last column has the loads / stores of global
memory in one iteration of the loop that moves most: their number and their width in bits. The loads of an iteration
are in flight together. 8-bit accesses are bytes of a ReLU's mask.

{table(("kernel", "registers", "occupancy", "loads / stores of an iteration"), shown_rows(cuda_kernels))}
## Triton: registers and occupancy

Compiled ahead of time for a few shapes in float32, bfloat16 and float16: the range of registers, the lowest
occupancy, and spills if there are any. On gfx942 these are vector registers, and waves of a SIMD.

{table(("kernel", *triton_kernels), triton_rows(triton_kernels))}
## CUDA C++: memory traffic

Float32 on the emulator, without caches.

- **Requested** are the 32-byte sectors that all warps touch, in bytes per element of x. A second pass over a tensor
  that is still in L2 is requested twice and moved once.
- **Least** is what any implementation has to move: each tensor once.
- **Sectors** is the number of sectors that a request touches, divided by the number that its bytes fill: of 16-byte
  accesses in the worst kernel, and of all accesses together. On these aligned shapes a test limits it to 1.1 for
  16-byte accesses, and for all accesses of every kernel with a tenth of the call's bytes, except those that
  `thresholds.py` lists.

{table(("operator", "call", "requested", "least", "sectors, 16 bytes", "sectors, all"), traffic_rows(calls), 2)}
## Bounds

Training (forward and backward) in float32: the least bytes, and the least microseconds in which a GPU can move them
from and to memory or do the arithmetic, for {sheets}; and which of the two is the
bound. If a tensor stays in L2 from forward to backward, less is moved.

{table(("operator", "layer", "MB", *GPUS), bound_rows(calls), 2)}
## Predicted and measured

**Predicted**: the bytes that the kernels move, at the rate of a copy in the measured run, and
{predicted.LAUNCH * 1e6:.0f} us for each launch. Batch norms read what they sum twice. A pass of a convolution moves its
input and its result. A tensor that is still in L2 when it is read again takes less than predicted.
**Measured**: the published run `{predicted.MEASURED}` ({predicted.origin()}).
Times are in microseconds. "training" is forward and backward. Kernels may be newer than the measurement: those of
`layer_norm2d` on contiguous 7x7 planes are.

{table(("operator", "call", "layout", "predicted", "measured", "ratio"), predicted.table_rows(), 3)}
{stamp()}
"""


def main() -> int:
    try:
        of_cuda = {a: cuda.kernels(a, everything=True) for a in cuda.ARCHITECTURES}
    except cuda.Unavailable as reason:
        print(f"make gpu-report: {reason}", file=sys.stderr)
        return 1
    of_triton = {a: triton_code.kernels(a, everything=True) for a in triton_code.ARCHITECTURES}
    violations = [
        line
        for kind, compiled in (("cuda", of_cuda), ("triton", of_triton))
        for kernels in compiled.values()
        for line in gate.judge(kernels, kind)
    ]
    if violations:
        print("\n".join(["these do not keep tests/gpu_gate/thresholds.py:", *violations]), file=sys.stderr)
        return 1
    PAGE.write_text(page(of_cuda, of_triton, traffic.calls()))
    counts = [sum(map(len, compiled.values())) for compiled in (of_cuda, of_triton)]
    print(f"{PAGE.relative_to(ROOT)}: {counts[0]} compiled kernels in CUDA C++, {counts[1]} in Triton")
    return 0


if __name__ == "__main__":
    sys.exit(main())
