"""Reports against golden files; PIPEFIT_UPDATE_GOLDEN=1 rewrites them, to be read in the diff."""

from __future__ import annotations

import io
import os
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from tests.planner.hand_built import MACHINE, PLAN, PREDICTED

from pipefit.cost_models.units import GIB
from pipefit.planner.plan import Rehearsed, RehearsedPeak
from pipefit.planner.report import (
    REPORT_WIDTH,
    catalogue_report,
    machine_report,
    plan_report,
    prediction_report,
    to_text,
)
from pipefit.strategies.strategy import Option

GOLDEN = Path(__file__).parents[1] / "golden"
CATALOGUE = {
    "pipelines": [
        {"name": "flux.1-dev", "pipeline_class": "FluxPipeline", "task": "text-to-image"}
    ],
    "gpus": [{"name": "rtx-4060", "architecture": "ada", "total_bytes": 8 * GIB}],
}


@pytest.mark.parametrize(
    ("name", "report"),
    [
        ("plan", plan_report(PLAN)),
        ("prediction", prediction_report(PREDICTED)),
        ("machine", machine_report(MACHINE)),
        ("catalogue", catalogue_report(CATALOGUE)),
    ],
)
def test_a_report_looks_as_it_did(name, report) -> None:
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("PIPEFIT_UPDATE_GOLDEN"):
        file.write_text(to_text(report), encoding="utf-8")
    assert to_text(report) == file.read_text(encoding="utf-8")


def test_a_plan_fits_one_screen() -> None:
    lines = to_text(plan_report(PLAN)).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= REPORT_WIDTH


def test_a_plan_over_its_budget_says_so() -> None:
    tight = replace(PLAN, policy=replace(PLAN.policy, budget_bytes={0: 6 * GIB}))
    assert "DOES NOT FIT: GPU 0 peaks at 6.70 GiB in denoise" in to_text(plan_report(tight))


def test_a_rehearsal_is_shown_beside_the_prediction_of_its_phase() -> None:
    assert "rehearsed" not in to_text(plan_report(PLAN))
    held = RehearsedPeak(
        name="decode",
        component="vae",
        entry="decode",
        allocated_bytes=6 * GIB,
        reserved_bytes=6 * GIB,
        process_bytes=6 * GIB + GIB // 2,
    )
    other = replace(held, component="transformer", entry="forward", process_bytes=GIB)
    checked = replace(PLAN, rehearsal=Rehearsed(phases=(other, held), within_budget=True))
    lines = to_text(plan_report(checked)).splitlines()
    assert "rehearsed: 6.50 GiB in decode, predicted 3.00 GiB" in lines
    assert len(lines) <= 40


def test_a_plan_says_why_it_was_not_rehearsed() -> None:
    plan = replace(PLAN, not_rehearsed="would take about 40 s; `pipefit verify` does it")
    lines = to_text(plan_report(plan)).splitlines()
    assert "not rehearsed: would take about 40 s; `pipefit verify` does it" in lines


def test_an_alternative_shows_only_what_it_does_differently() -> None:
    other = replace(
        PLAN.alternatives[0],
        options=(*PLAN.options[:-1], Option(strategy="vae_slicing", component="vae")),
    )
    text = to_text(plan_report(replace(PLAN, alternatives=(other,))))
    rejected = text[text.index("rejected") :]
    assert "vae_slicing @vae" in rejected
    assert "group_offload" not in rejected


def test_a_long_alternative_leaves_room_for_the_reason() -> None:
    names = ("text_encoder", "text_encoder_2", "transformer", "vae")
    long = tuple(Option(strategy="channels_last", component=name) for name in names)
    plan = replace(PLAN, alternatives=(replace(PLAN.alternatives[0], options=long),))
    [line] = [line for line in str(plan).splitlines() if line.startswith("channels_last")]
    assert "…" in line
    assert line.endswith("24.00 GiB  40.0 s  16.55 GiB over in denoise")


@pytest.mark.parametrize("missing_bytes", [0, 1])
def test_a_prediction_that_does_not_fit_says_so(missing_bytes: int) -> None:
    [gpu], [peak] = PREDICTED.machine.gpus, PREDICTED.peak_vram
    held_bytes = peak.process_bytes + peak.slack_bytes - missing_bytes
    machine = replace(PREDICTED.machine, gpus=(replace(gpu, total_bytes=held_bytes),))
    said = to_text(prediction_report(replace(PREDICTED, machine=machine)))
    assert ("This does not fit, not even with all " in said) == bool(missing_bytes)


def test_a_prediction_without_reasons_has_no_column_for_them() -> None:
    bare = [replace(option, reason="") for option in PREDICTED.options]
    assert "why" in to_text(prediction_report(PREDICTED))
    assert "why" not in to_text(prediction_report(replace(PREDICTED, options=tuple(bare))))


def test_a_machine_without_a_gpu_is_said_plainly() -> None:
    assert to_text(machine_report(replace(MACHINE, gpus=()))).startswith("No GPU was found.")


def test_a_console_that_cannot_show_blocks_gets_ascii() -> None:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"), width=REPORT_WIDTH)
    console.print(plan_report(replace(PLAN, prediction=replace(PLAN.prediction, assumptions=()))))
    console.file.flush()
    assert b"#############." in raw.getvalue()
