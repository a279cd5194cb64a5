"""Why a call that torch.compile has made is far slower than eager's: read off its code and a profile of one call."""

import re
import time
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

SLOW = 0.5  # of eager's speed, below which a reason is looked for
# A mask is stored and loaded element by element: `VecMask::from(const bool*)` and its `store` are no vector code.
MASK = re.compile(r"bool ?\*")
# A vector whose elements lie apart, or partly in the padding, is filled one element at a time.
SCATTERED = re.compile(r"tmpbuf\[\w+\] = in_ptr")
COPIES = ("aten::copy_", "aten::clone", "aten::contiguous")


def compiling(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """(what the call returns, the code that Inductor generates while it compiles)."""
    from torch._inductor.utils import run_and_get_code

    result, code = run_and_get_code(function, *arguments)
    return result, "\n".join(code)


def why_slow(step: Callable[[], object], eager: Callable[[], object], code: str) -> str:
    """One line, the reasons that were found in it; says so where there is none of those that are known."""
    seconds = min(_seconds(step) for _ in range(3))
    ours, theirs = _profiled(step), _profiled(eager)
    found = []
    kernels = sum(t for name, t in ours.items() if name.startswith(("## Call", "aten::", "mkldnn")))
    if kernels < seconds / 2:
        found.append(f"{1e6 * (seconds - kernels):.0f} us of a call are guards and wrappers, not kernels")
    copied = sum(ours.get(name, 0.0) - theirs.get(name, 0.0) for name in COPIES)
    if copied > 0.05 * seconds:
        found.append(
            f"{1e3 * copied:.2g} ms of a call are copies into another memory format, which eager does not make"
        )
    if MASK.search(code):
        found.append("what ReLU's backward pass needs is kept as a tensor of bool, written and read element by element")
    if SCATTERED.search(code):
        found.append("inputs with a stride or padding are loaded element by element")
    return "slow because " + "; ".join(found) if found else "slow for none of the reasons that are looked for"


def _seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _profiled(step: Callable[[], object]) -> dict[str, float]:
    """Seconds of each operator's own in one call."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    return {event.key: event.self_cpu_time_total / 1e6 for event in found.key_averages()}
