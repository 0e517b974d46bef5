"""Bad input is one sentence that says what to do, and changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.end_to_end.small_runs import untouched
from tests.small_pipelines import small_call

import pipefit
from pipefit.planner import api
from pipefit.planner.catalog import reference_machine
from pipefit.planner.snapshot import differences, snapshot

CARD = reference_machine(["rtx-4060"])


def _sentence(error: Exception) -> str:
    text = str(error)
    assert "\n" not in text
    assert text[0].isupper()
    assert text.rstrip().endswith((".", "?"))
    return text


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ("8 gigs", "with a unit"),
        ("-1GB", "positive"),
        ("0", "positive"),
        ("150%", "share"),
        (float("nan"), "finite"),
        (True, "8GB"),
        ({3: "8GB"}, "GPU 3"),
        ({}, "no GPU"),
        ([], "no GPU"),
    ],
)
def test_a_budget_that_is_none_is_refused(budget: Any, says: str) -> None:
    pipe, _ = untouched("flux")
    before = snapshot(pipe)
    with pytest.raises(pipefit.InvalidRequest) as caught:
        pipefit.auto_optimize(pipe, budget, call=small_call("flux"), device="cpu")
    assert says in _sentence(caught.value)
    assert differences(before, snapshot(pipe)) == ()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"call": {"heigth": 64}}, "height"),
        ({"quality": "hihg"}, "high"),
        ({"with_": ["vae_tilling"]}, "vae_tiling"),
        ({"with_": ["vae_tiling@vea"]}, "vae"),
        ({"with_": ["vae_tiling:tile=3@vae"]}, "tile_px"),
        ({"with_": ["vae_tiling@transformer"]}, "cannot work in tiles"),
        ({"without": ["modle_offload"]}, "model_offload"),
        ({"with_": ["model_offload"], "without": ["model_offload"]}, "drop one"),
        ({"without": "modle_offload"}, "model_offload"),
        ({"with_": ["model_offload@vae"]}, "leave @vae out"),
        ({"with_": ["model_offload", "sequential_offload"]}, "choose one"),
        ({"with_": ["model_offload", "resident@vae"]}, "choose one"),
        (
            {"with_": ["vae_tiling:tile_px=32@vae", "vae_tiling:tile_px=16"]},
            "required twice on vae",
        ),
        ({"quality": "exact", "with_": ["vae_tiling:tile_px=32@vae"]}, "of quality high"),
        ({"ram": "many"}, "with a unit"),
        ({"device": "cuda:7"}, "not there"),
        ({"device": "tpu"}, "not understood"),
    ],
)
def test_a_request_with_a_slip_names_what_was_meant(asked: dict[str, Any], says: str) -> None:
    pipe, _ = untouched("flux")
    before = snapshot(pipe)
    arguments = {"call": small_call("flux"), "device": "cpu", **asked}
    with pytest.raises(pipefit.InvalidRequest) as caught:
        pipefit.auto_optimize(pipe, "8GB", **arguments)
    assert says in _sentence(caught.value)
    assert differences(before, snapshot(pipe)) == ()


@pytest.mark.parametrize(
    "strategies",
    [
        ["model_offload@vae"],
        ["model_offload", "sequential_offload"],
        ["vae_tiling:tile_px=32@vae", "vae_tiling:tile_px=16@vae"],
    ],
)
def test_a_prediction_of_what_contradicts_itself_is_refused(strategies: list[str]) -> None:
    pipe, _ = untouched("flux")
    with pytest.raises(pipefit.InvalidRequest) as caught:
        api.predict(pipe, strategies, call=small_call("flux"), machine=api.cpu_machine())
    _sentence(caught.value)


def test_a_device_may_be_torchs_own_object() -> None:
    pipe, _ = untouched("flux")
    plan = pipefit.auto_optimize(
        pipe, "1GB", call=small_call("flux"), device=torch.device("cpu"), dry_run=True
    )
    assert plan.machine.gpus[0].architecture == "cpu"


def test_planning_does_not_draw_from_the_callers_generator() -> None:
    pipe, _ = untouched("flux")
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in (1, 2)]
    states = [generator.get_state() for generator in generators]
    for given in (generators[0], generators[1:]):
        call = {**small_call("flux"), "generator": given, "max_sequence_length": 16}
        api.plan(pipe, "1GB", call=call, machine=api.cpu_machine(), rehearse=False)
    for generator, state in zip(generators, states, strict=True):
        assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("subject", [torch.nn.Linear(2, 2), 7, None])
def test_what_is_no_pipeline_is_refused(subject: Any) -> None:
    with pytest.raises(pipefit.InvalidRequest) as caught:
        pipefit.auto_optimize(subject, "8GB", device="cpu")
    assert "DiffusionPipeline" in _sentence(caught.value)


def test_an_unknown_pipeline_offers_the_closest() -> None:
    with pytest.raises(pipefit.UnknownName) as caught:
        pipefit.plan("flux.1-dve", "8GB", machine=CARD)
    assert "flux.1-dev" in _sentence(caught.value)


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(pipefit.InvalidRequest) as caught:
        pipefit.plan(str(tmp_path), "8GB", machine=CARD)
    assert "model_index.json" in _sentence(caught.value)


def test_a_folder_that_names_a_class_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxxPipeline"}))
    with pytest.raises(pipefit.InvalidRequest) as caught:
        pipefit.plan(str(tmp_path), "8GB", machine=CARD)
    assert "FluxxPipeline" in _sentence(caught.value)


RECORDED = "group_offload:offload_type=leaf_level,use_stream=true,record_stream=true@transformer"


@pytest.mark.parametrize(
    ("machine", "with_", "rehearse"),
    [
        (api.cpu_machine(), (), False),
        (CARD, (), False),
        (CARD, (RECORDED,), False),
        pytest.param(api.cpu_machine(), (), True, marks=pytest.mark.slow),
        pytest.param(CARD, (), True, marks=pytest.mark.slow),
        pytest.param(CARD, (RECORDED,), True, marks=pytest.mark.slow),
    ],
)
def test_a_budget_smaller_than_a_layer_names_the_smallest_that_works(
    machine: pipefit.Machine, with_: tuple[str, ...], rehearse: bool
) -> None:
    pipe, _ = untouched("flux")
    asked: dict[str, Any] = {"call": small_call("flux"), "machine": machine, "with_": with_}
    asked |= {"quality": "exact", "rehearse": rehearse}
    with pytest.raises(pipefit.NoPlanFits) as caught:
        api.plan(pipe, "4KiB", **asked)
    smallest = caught.value.smallest_budget_bytes
    assert set(smallest) >= {"exact", "high"}
    # Sums choose what is replayed, and need not order plans as replays do to the last byte.
    assert smallest["high"] <= smallest["exact"] * 1.001
    assert "smallest budget that works" in _sentence(caught.value)
    for budget_bytes in (smallest["exact"], smallest["exact"] * 11 // 10):
        peak = api.plan(pipe, budget_bytes, **asked).prediction.peak_vram[0]
        assert peak.process_bytes + peak.slack_bytes <= budget_bytes


def test_a_quality_at_which_the_budget_would_do_is_advised() -> None:
    pipe, _ = untouched("cogvideox")
    asked: dict[str, Any] = {"call": small_call("cogvideox"), "machine": CARD, "quality": "exact"}
    with pytest.raises(pipefit.NoPlanFits) as far_off:
        api.plan(pipe, "4KiB", **asked)
    assert "allow quality" not in _sentence(far_off.value)
    smallest = far_off.value.smallest_budget_bytes
    assert smallest["high"] < smallest["exact"]
    with pytest.raises(pipefit.NoPlanFits, match="; allow quality high, raise the budget, or"):
        api.plan(pipe, smallest["high"], **asked)
    asked["quality"] = "high"
    assert api.plan(pipe, smallest["high"], **asked).quality == "high"


@pytest.mark.slow
def test_too_little_ram_for_the_weights_is_said() -> None:
    with pytest.raises(pipefit.NoPlanFits) as caught:
        pipefit.plan("flux.1-dev", "8GB", machine=CARD, ram="8GB")
    assert "RAM" in _sentence(caught.value)


@pytest.mark.slow
def test_flux_on_an_8_gb_card_fits_and_says_why() -> None:
    plan = pipefit.plan("flux.1-dev", "8GB", machine=CARD)
    assert plan.prediction.peak_vram[0].process_bytes <= 8 * 10**9
    assert all(option.reason for option in plan.options)
    assert plan.alternatives
    assert {phase.name for phase in plan.prediction.phases} == {
        "encode_prompt",
        "denoise",
        "decode",
    }


@pytest.mark.slow
def test_a_prediction_of_everything_resident_is_of_exactly_that() -> None:
    machine = reference_machine(["h100"])
    found = pipefit.predict("flux.1-dev", machine=machine)
    assert {o.strategy for o in found.options} == {"resident"}
    # Published: 33.85 GiB allocated on an H100, 22.64 with model offload.
    assert found.peak_vram[0].allocated_bytes / 2**30 == pytest.approx(33.85, rel=0.01)
    offloaded = pipefit.predict("flux.1-dev", ["model_offload"], machine=machine)
    assert offloaded.peak_vram[0].allocated_bytes / 2**30 == pytest.approx(22.64, rel=0.01)


@pytest.mark.slow
def test_model_offload_is_refused_where_a_class_orders_it_in_its_own_way() -> None:
    machine = reference_machine(["rtx-4060"])
    with pytest.raises(pipefit.InvalidRequest, match="model_cpu_offload_seq"):
        pipefit.predict("audioldm2", ["model_offload"], machine=machine)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("streaming:resident_block=1@transformer", "it knows resident_blocks"),
        ("streaming:resident_block=1", "it knows resident_blocks"),
        ("group_offload:foo=1@vae", "has no parameter 'foo'"),
    ],
)
def test_a_parameter_with_a_slip_is_refused(spec: str, says: str) -> None:
    pipe, _ = untouched("flux")
    with pytest.raises(pipefit.InvalidRequest, match=says):
        api.predict(pipe, [spec], call=small_call("flux"), machine=reference_machine(["rtx-4060"]))


def test_a_plan_says_where_its_process_is_larger_than_a_budget_of_ram() -> None:
    pipe, _ = untouched("flux")
    machine = reference_machine(["rtx-4060"])
    asked = {"call": small_call("flux"), "machine": machine, "rehearse": False}
    small, enough = (api.plan(pipe, "1GB", ram=ram, **asked) for ram in ("1.5GB", "8GB"))
    assert "Host RAM is above the 1.40 GiB asked for" in " ".join(small.assumptions)
    assert "Host RAM is above" not in " ".join(enough.assumptions)
