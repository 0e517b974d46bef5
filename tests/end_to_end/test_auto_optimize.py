"""`auto_optimize` on real small pipelines: same picture before, under it and after undo."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.end_to_end.small_runs import untouched
from tests.small_pipelines import SMALL_PIPELINES, picture, small_call

import pipefit
from pipefit.planner.plan import Plan
from pipefit.planner.snapshot import differences, snapshot

PLENTY = "8GB"


def _plan(pipe: Any, name: str, budget: Any, **asked: Any) -> Plan:
    # Rehearsed plans are the subject of test_rehearsed_plans.py.
    asked = {"rehearse": False, **asked}
    made = pipefit.auto_optimize(
        pipe, budget, call=small_call(name), device="cpu", dry_run=True, **asked
    )
    assert isinstance(made, Plan)
    return made


def _smallest_bytes(pipe: Any, name: str, quality: str = "exact") -> int:
    with pytest.raises(pipefit.NoPlanFits) as caught:
        _plan(pipe, name, 2048, quality=quality)
    return caught.value.smallest_budget_bytes[quality]


@pytest.mark.parametrize("name", SMALL_PIPELINES)
def test_the_picture_is_bit_identical_at_every_budget(name: str) -> None:
    pipe, expected = untouched(name)
    before = snapshot(pipe, with_values=True)
    smallest = _smallest_bytes(pipe, name)
    resident = _plan(pipe, name, PLENTY, quality="exact", with_=["resident"])
    peak = resident.prediction.peak_vram[0]
    largest = peak.process_bytes + peak.slack_bytes
    seen = set()
    for budget, with_ in (
        (smallest, ()),
        # Sana is so small that what is kept for fragmentation is most where weights are fewest.
        (max(smallest, (smallest + largest) // 2), ()),
        (largest, ["resident"]),
    ):
        with pipefit.auto_optimize(
            pipe,
            budget,
            call=small_call(name),
            device="cpu",
            quality="exact",
            with_=with_,
            rehearse=False,
        ) as applied:
            peak = applied.plan.prediction.peak_vram[0]
            assert peak.process_bytes + peak.slack_bytes <= budget
            assert torch.equal(picture(pipe, name), expected)
        assert differences(before, snapshot(pipe, with_values=True)) == ()
        assert torch.equal(picture(pipe, name), expected)
        seen.add(tuple((o.strategy, o.component) for o in applied.plan.options))
    assert len(seen) > 1  # the budget decides


def test_a_dry_run_touches_nothing() -> None:
    pipe, expected = untouched("flux")
    before = snapshot(pipe, with_values=True)
    assert _plan(pipe, "flux", PLENTY).options
    assert differences(before, snapshot(pipe, with_values=True)) == ()
    assert torch.equal(picture(pipe, "flux"), expected)


def test_more_budget_is_never_slower() -> None:
    pipe, _ = untouched("stable_diffusion_xl_controlnet")
    name = "stable_diffusion_xl_controlnet"
    smallest = _smallest_bytes(pipe, name)
    times = [
        _plan(pipe, name, smallest * share // 4, quality="exact").prediction.latency.call_s
        for share in (4, 5, 6, 8, 12, 40)
    ]
    # Among times within 2 % the plan prefers less memory.
    assert all(later <= earlier * 1.02 for earlier, later in pairwise(times))


def test_a_saved_plan_is_applied_to_its_pipeline_and_to_no_other() -> None:
    pipe, expected = untouched("flux")
    plan = _plan(pipe, "flux", PLENTY, quality="exact")
    again = Plan.from_json(plan.to_json())
    with pipefit.apply(pipe, again):
        assert torch.equal(picture(pipe, "flux"), expected)
    other, _ = untouched("stable_diffusion_3")
    with pytest.raises(pipefit.PlanMismatch, match="plan again"):
        pipefit.apply(other, again)


def test_sixteen_bits_are_offered_to_a_float32_pipeline_and_taken_back() -> None:
    pipe, expected = untouched("stable_diffusion")
    name = "stable_diffusion"
    exact, high = _smallest_bytes(pipe, name), _smallest_bytes(pipe, name, "high")
    assert high < exact
    before = snapshot(pipe, with_values=True)
    with pipefit.auto_optimize(
        pipe, high, call=small_call(name), device="cpu", quality="high", rehearse=False
    ) as applied:
        assert {o.strategy for o in applied.plan.options} >= {"precision"}
        assert next(pipe.unet.parameters()).dtype == torch.bfloat16
        under = picture(pipe, name)
    assert (under - expected).abs().mean() < 0.1
    assert differences(before, snapshot(pipe, with_values=True)) == ()
    assert torch.equal(picture(pipe, name), expected)


def test_required_and_forbidden_strategies_are_heeded() -> None:
    pipe, _ = untouched("stable_diffusion_xl")
    name = "stable_diffusion_xl"
    plan = _plan(pipe, name, PLENTY, with_=["model_offload"])
    assert "model_offload" in {o.strategy for o in plan.options}
    plan = _plan(pipe, name, PLENTY, without=["model_offload", "sequential_offload", "precision"])
    assert not {"model_offload", "sequential_offload", "precision"} & {
        o.strategy for o in plan.options
    }
    plan = _plan(pipe, name, PLENTY, with_=["group_offload:offload_type=leaf_level@unet"])
    assert ("group_offload", "unet") in {(o.strategy, o.component) for o in plan.options}
