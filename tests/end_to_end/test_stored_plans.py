"""Plans that store weights in fewer bits: what they need, and that they are put in force."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from tests.small_pipelines import flux, picture, small_call

from pipefit import apply, auto_optimize, plan
from pipefit.cost_models.machine import Gpu
from pipefit.errors import NoPlanFits
from pipefit.planner.api import verify
from pipefit.planner.catalog import reference_machine
from pipefit.planner.decide import Candidates
from pipefit.planner.policy import Policy
from pipefit.planner.pricing import Pricing
from pipefit.planner.search import Limits
from pipefit.planner.workloads import observe
from pipefit.strategies.strategy import Option, Quality

NO_LIBRARIES = Gpu(name="cpu", architecture="cpu", total_bytes=1 << 40, free_bytes=1 << 40)
"""Without workspaces: next to those of cuBLAS, small pipelines are nothing."""
MACHINE = replace(reference_machine(["rtx-4060"]), gpus=(NO_LIBRARIES,))

ALL_OFFLOADS = ("group_offload", "streaming", "model_offload", "sequential_offload")

SAME = 0.02
"""Share by which the allocated peak of a phase may be off."""


CALL = {**small_call("flux"), "output_type": "latent"}
"""Without the decoder, next to whose activations the weights of a small model are nothing."""


def _planned(pipe: Any, budget: int, quality: Quality) -> Any:
    return plan(
        pipe,
        budget,
        call=CALL,
        machine=MACHINE,
        quality=quality,
        without=ALL_OFFLOADS,
        rehearse=False,
    )


@pytest.fixture(scope="module")
def pipe() -> Any:
    """A FLUX whose denoiser is wide enough for its weights to count."""
    torch.set_num_threads(1)  # ten times faster than several for tensors of this size
    made = flux()
    config = {**made.transformer.config, "num_attention_heads": 24}
    made.transformer = diffusers.FluxTransformer2DModel.from_config(config)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def smallest(pipe: Any) -> dict[str, int]:
    """By quality, the least budget for *pipe* if all weights stay on the GPU."""
    with pytest.raises(NoPlanFits) as caught:
        _planned(pipe, 2048, Quality.HIGH)
    return dict(caught.value.smallest_budget_bytes)


def test_casting_makes_a_budget_fit_that_otherwise_does_not(
    pipe: Any, smallest: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    budget_bytes = (smallest["balanced"] + smallest["high"]) // 2
    assert budget_bytes < smallest["high"]
    with pytest.raises(NoPlanFits):
        _planned(pipe, budget_bytes, Quality.HIGH)
    made = _planned(pipe, budget_bytes, Quality.BALANCED)
    assert made.quality is Quality.BALANCED
    stored = [o for o in made.options if o.strategy == "layerwise_casting"]
    assert "transformer" in {o.component for o in stored}
    assert all("this way" in o.reason for o in stored)

    found = verify(made, pipe, call=CALL)
    assert found.holds
    assert not any("clips" in message for message in caplog.messages)  # no values, nothing to say
    for expected, phase in zip(made.prediction.phases, found.rehearsal.phases, strict=True):
        assert (phase.component, phase.entry) == (expected.component, expected.entry)
        assert phase.allocated_bytes == pytest.approx(expected.allocated_bytes, rel=SAME)


def test_a_plan_of_casts_is_applied_and_taken_back(pipe: Any, smallest: dict[str, int]) -> None:
    before = picture(pipe, "flux")
    made = _planned(pipe, smallest["balanced"], Quality.BALANCED)
    with apply(pipe, made):
        assert not picture(pipe, "flux").equal(before)
    assert picture(pipe, "flux").equal(before)


ON_NVIDIA = replace(MACHINE, gpus=(replace(NO_LIBRARIES, compute_capability=(8, 9)),))
"""What the search offers quantisation on."""


def test_a_plan_quantises_what_is_loaded_and_is_taken_back(
    pipe: Any, smallest: dict[str, int]
) -> None:
    pytest.importorskip("torchao", reason="needs `pip install torchao`")
    budget_bytes = (smallest["balanced"] + smallest["high"]) // 2
    made = plan(
        pipe,
        budget_bytes,
        call=CALL,
        machine=ON_NVIDIA,
        quality=Quality.BALANCED,
        without=(*ALL_OFFLOADS, "layerwise_casting"),
        rehearse=False,
    )
    assert made.quality is Quality.BALANCED
    stored = {o.component: o.parameters for o in made.options if o.strategy == "quantization"}
    assert stored["transformer"] == {"backend": "torchao", "type": "int8_weight_only"}
    assert any(
        "transformer is quantised by torchao once the plan is applied" in note
        for note in made.prediction.assumptions
    )

    found = verify(made, pipe, call=CALL)
    assert found.holds
    for expected, phase in zip(made.prediction.phases, found.rehearsal.phases, strict=True):
        assert phase.allocated_bytes == pytest.approx(expected.allocated_bytes, rel=SAME)

    before = picture(pipe, "flux")
    with apply(pipe, made):
        assert not picture(pipe, "flux").equal(before)
    assert picture(pipe, "flux").equal(before)


def test_quantisation_that_is_asked_for_is_put_in_force_on_what_is_loaded(pipe: Any) -> None:
    pytest.importorskip("torchao", reason="needs `pip install torchao`")
    before, linear = picture(pipe, "flux"), pipe.transformer.proj_out
    weight = linear.weight
    asked = "quantization:backend=torchao,type=int8_weight_only@transformer"
    with auto_optimize(pipe, call=CALL, quality="balanced", device="cpu", with_=asked) as applied:
        assert "quantization" in {option.strategy for option in applied.plan.options}
        assert linear.weight is not weight
        assert not picture(pipe, "flux").equal(before)
    assert linear.weight is weight
    assert picture(pipe, "flux").equal(before)


def test_the_better_quality_is_planned_where_it_fits_as_well(
    pipe: Any, smallest: dict[str, int]
) -> None:
    roomy = smallest["high"] * 4
    assert smallest["low"] <= smallest["balanced"] < smallest["high"]
    high, balanced = (_planned(pipe, roomy, q) for q in (Quality.HIGH, Quality.BALANCED))
    assert balanced.options == high.options
    assert balanced.prediction.latency == high.prediction.latency


def test_weights_whose_loading_breaks_the_budget_leave_the_other_ways(pipe: Any) -> None:
    int8 = {"backend": "bitsandbytes", "type": "int8"}
    asked = Option(strategy="quantization", component="transformer", parameters=int8)
    policy = Policy(
        budget_bytes={0: 1 << 40}, quality=Quality.LOW, forbidden=("layerwise_casting",)
    )
    ways = [
        observe(pipe, CALL, gpu=NO_LIBRARIES, policy=replace(policy, required=required))[-1]
        for required in ((), (asked,))
    ]
    plain, packed = (
        Pricing(one.workload, NO_LIBRARIES, load_options=one.load_options) for one in ways
    )
    candidates = Candidates([plain, packed], policy)
    loading_bytes = packed.memory.loading_bytes()
    left = candidates.loadable(loading_bytes - 1)
    assert left == Candidates([plain], policy).problems
    assert candidates.loadable(loading_bytes) == candidates.problems
    alone = Candidates([packed], policy)
    assert alone.best(Limits(budget_bytes=loading_bytes - 1)) is None
    held = alone.smallest(Limits())
    assert held is not None
    assert held.promised_bytes >= loading_bytes
