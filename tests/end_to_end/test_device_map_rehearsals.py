"""Predictions for two GPUs against the real hooks on two virtual ones, phase by phase on each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.small_pipelines import small_call
from tests.strategies.test_device_map import CARDS, CASES, untouched

from pipefit.cost_models.memory import MemoryModel, simulate
from pipefit.cost_models.placement import Resident
from pipefit.cost_models.prediction import Choice
from pipefit.planner import api
from pipefit.planner.catalog import reference_machine
from pipefit.planner.plan import call_seconds
from pipefit.planner.rehearse import rehearse
from pipefit.planner.trace import trace
from pipefit.strategies import strategy, traits_of
from pipefit.strategies.strategy import Option

SAME = 0.005
"""Share by which the allocated peak of a phase may be off, as for one GPU."""


def choice_of(options: list[Option], component: str) -> Choice:
    placement, device = Resident(), None
    for option in (option for option in options if option.component == component):
        placement = strategy(option.strategy).placement(option.parameters) or placement
        device = option.parameters.get("device", device)
    return Choice(placement=placement, device=device)


@pytest.mark.parametrize("case", CASES)
def test_each_gpu_allocates_what_the_replay_says(case: str) -> None:
    name, options = CASES[case]
    pipe, _ = untouched(name)
    workload = trace(pipe, small_call(name), name=name, traits=traits_of)
    chosen = options(pipe)
    choices = {c.name: choice_of(chosen, c.name) for c in workload.components}
    rehearsal = rehearse(pipe, chosen, small_call(name), CARDS)
    held = {(p.component, p.entry, p.device): p for p in rehearsal.phases}
    for gpu in CARDS:
        peaks = simulate(workload, choices, gpu, main=0)
        model = MemoryModel(workload, gpu)
        sums = [model.phase_bytes_on(c, choices[c.name], gpu.index, 0) for c in workload.components]
        base = model.carried_bytes if gpu.index == 0 else (model.cublas_bytes,) * len(peaks)
        for phase, peak, *added in zip(workload.phases, peaks, base, *sums, strict=True):
            rehearsed = held[phase.component, phase.entry, gpu.index]
            found_bytes = rehearsed.allocated_bytes
            assert peak.allocated_bytes == pytest.approx(found_bytes, rel=SAME)
            assert peak.reserved_bytes == pytest.approx(rehearsed.reserved_bytes, rel=0.06)
            # The sums that the search adds up have both workspaces in every phase.
            assert sum(added) >= found_bytes * (1 - SAME)
            assert sum(added) <= found_bytes * (1 + SAME) + model.cublas_bytes


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("pixart_sigma", "device_map:mode=auto,max_memory=0:{most}+1:{twice}@transformer"),
        ("pixart_sigma", "device_map:mode=sequential,max_memory=1:{twice}+0:{most}@transformer"),
        ("flux", "device_map:mode=balanced,max_memory=0:1GB+1:2GB"),
    ],
)
def test_a_stock_map_with_max_memory_is_carried_out_as_it_is_predicted(
    name: str, asked: str
) -> None:
    pipe, _ = untouched(name)
    whole = sum(p.numel() * p.element_size() for p in pipe.transformer.parameters())
    asked = asked.format(most=f"{5 * whole // 6}B", twice=f"{2 * whole}B")
    pair = reference_machine(["rtx-4060", "rtx-4060"], ram_bytes=32 * 10**9)
    predicted = api.predict(pipe, [asked], call=small_call(name), machine=pair)
    assert any({"device", "map"} & {*o.parameters} for o in predicted.options)
    main = predicted.peak_vram[0].device
    rehearsal = rehearse(pipe, predicted.options, small_call(name), pair.gpus, main=main)
    held = {(p.component, p.entry, p.device): p.allocated_bytes for p in rehearsal.phases}
    assert {phase.device for phase in predicted.phases} == {0, 1}
    for phase in predicted.phases:
        found_bytes = held[phase.component, phase.entry, phase.device]
        assert phase.allocated_bytes == pytest.approx(found_bytes, rel=SAME)


@pytest.mark.slow
def test_a_split_that_streams_keeps_its_budgets_and_its_time_in_full_size() -> None:
    on = reference_machine(["rtx-4090", "rtx-4090"], ram_bytes=128 * 10**9)
    call = {"height": 512, "width": 512, "num_inference_steps": 4}
    budgets = {0: 9 * 10**9, 1: 9 * 10**9}
    made = {"call": call, "machine": on, "quality": "exact", "rehearse": False}
    plan = api.plan("flux.1-schnell", budgets, **made)
    option = next(o for o in plan.options if o.component == "transformer")
    assert {*option.parameters} == {"split", "resident_blocks"}
    verified = api.verify(plan, "flux.1-schnell", call=call)
    assert verified.holds
    predicted, rehearsed = next(
        (one, other) for one, other in verified.phases if one and one.name == "denoise"
    )
    assert call_seconds(predicted, rehearsed) == pytest.approx(predicted.seconds, rel=0.05)
    alone = api.plan("flux.1-schnell", budgets, **made, without=["device_map"])
    assert plan.prediction.latency.call_s < 0.7 * alone.prediction.latency.call_s
    said = re.search(
        r"([\d.]+) s predicted, in twelve rounds .*`(resident_blocks=.*)`\), and ([\d.]+) s from",
        (Path(__file__).parents[2] / "docs" / "devices.md").read_text(encoding="utf-8"),
    )
    assert said is not None
    assert said[1] == f"{plan.prediction.latency.call_s:.2f}"
    assert said[2] == f"resident_blocks={option.parameters['resident_blocks']}"
    assert len(option.parameters["split"].split("+")) == 2 * 12
    assert said[3] == f"{alone.prediction.latency.call_s:.2f}"
