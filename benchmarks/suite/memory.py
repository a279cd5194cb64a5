"""The most memory that a call holds."""

from collections.abc import Callable

import torch


def peak_bytes(step: Callable[[], object], device: str) -> int:
    """What PyTorch's allocator has handed out at most while `step` ran, beyond what it had before.

    Activations, gradients and temporary tensors; not what a library allocates for itself, nor what the allocator keeps.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    # The public summary adds up an operator's allocations and loses their order.
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most
