"""`pipefit plan NAME --vram 8GB --gpu rtx-4060 --json` answers for every pipeline that we know."""

from __future__ import annotations

import json

import pytest

from pipefit.planner.catalog import pipeline_names
from pipefit.planner.cli import main
from pipefit.planner.plan import Plan

BUDGET_BYTES = 8 * 10**9

SMALL_ONES = ("stable-cascade", "kandinsky-2-2-prior", "stable-diffusion-v1-5")
"""Pipelines quick enough for every run; the others are marked slow."""


@pytest.mark.parametrize(
    "name",
    [
        name if name in SMALL_ONES else pytest.param(name, marks=pytest.mark.slow)
        for name in pipeline_names()
    ],
)
def test_the_command_answers_with_a_plan_or_with_the_smallest_budget(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["plan", name, "--vram", "8GB", "--gpu", "rtx-4060", "--json"])
    answer = json.loads(capsys.readouterr().out)
    if code == 0:
        plan = Plan.from_json(answer)
        assert plan.prediction.peak_vram[0].process_bytes <= BUDGET_BYTES
        assert all(phase.process_bytes <= BUDGET_BYTES for phase in plan.prediction.phases)
        assert plan.options
        assert all(option.reason for option in plan.options)
    else:
        assert code == 3
        assert answer["smallest_budget_bytes"]["high"] > BUDGET_BYTES
