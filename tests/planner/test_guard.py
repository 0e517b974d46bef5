"""The allocator's bound: set from the budget, lifted again, absent where torch has none."""

from __future__ import annotations

import pytest
import torch

from pipefit.planner.guard import hold_to_budget


def test_the_cpu_has_no_bound_to_set() -> None:
    hold_to_budget("cpu", budget_bytes=1, context_bytes=0)()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_what_the_budget_leaves_is_all_that_torch_reserves() -> None:
    before = torch.cuda.get_per_process_memory_fraction()
    lift = hold_to_budget("cuda:0", budget_bytes=3 << 30, context_bytes=1 << 30)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(5 << 29, dtype=torch.uint8, device="cuda:0")
        torch.empty(3 << 29, dtype=torch.uint8, device="cuda:0")
    finally:
        lift()
    assert torch.cuda.get_per_process_memory_fraction() == before
