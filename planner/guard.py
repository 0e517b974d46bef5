"""Keep the promise at run time: hold torch's allocator to what the plan promised.

Without a bound the allocator keeps freed blocks until the whole GPU is full, so a plan that needs
3 GiB at a time may come to hold 13. With one it gives cached blocks back first, and a call heavier
than planned fails with torch's own out-of-memory error instead of taking what others use.
"""

from __future__ import annotations

from typing import Any

from pipefit.strategies.strategy import Undo


def hold_to_budget(device: Any, *, budget_bytes: int, context_bytes: int) -> Undo:
    """Bound the memory that torch reserves on *device*; return how to lift the bound again.

    The budget is for the process, so its context, which torch does not see, is taken off first.
    Only CUDA (and ROCm) have such a bound; elsewhere nothing is done.
    """
    import torch

    device = torch.device(device)
    if device.type != "cuda":
        return lambda: None
    before = torch.cuda.get_per_process_memory_fraction(device)
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    share = min(1.0, max(0.0, (budget_bytes - context_bytes) / total_bytes))
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(share, device)
    return lambda: torch.cuda.set_per_process_memory_fraction(before, device)
