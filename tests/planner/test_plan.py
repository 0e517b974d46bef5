"""Plans as JSON, there and back."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.planner.hand_built import MACHINE, PLAN, PREDICTED

from pipefit.cost_models.prediction import DevicePeak, Latency, PhasePrediction, Prediction
from pipefit.errors import InvalidRequest
from pipefit.planner.plan import Alternative, Plan, Rehearsed, RehearsedPeak
from pipefit.planner.policy import Policy
from pipefit.strategies.strategy import Option, Quality

# the keys of design section 6
PREDICTION_KEYS = {
    "schema", "pipeline", "call", "machine", "peak_vram", "host_ram_bytes", "pinned_bytes",
    "disk_bytes", "latency", "phases", "assumptions",
}  # fmt: skip
PHASE_KEYS = {
    "name", "component", "entry", "calls", "device", "seconds", "allocated_bytes",
    "weights_bytes", "activation_bytes", "workspace_bytes", "carried_bytes",
}  # fmt: skip

texts = st.text(max_size=8)
num_bytes = st.integers(0, 2**50)
seconds = st.floats(0, 1e9)
values = st.one_of(st.none(), st.booleans(), st.integers(-(2**50), 2**50), seconds, texts)
options = st.builds(
    Option,
    strategy=texts,
    component=st.none() | texts,
    parameters=st.dictionaries(texts, values, max_size=3),
    reason=texts,
)


def several(of: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(of, max_size=3).map(tuple)


def from_types(cls: type, **more: st.SearchStrategy) -> st.SearchStrategy:
    by_type = {"int": num_bytes, "float": seconds, "str": texts}
    fields = {name: by_type[hint] for name, hint in cls.__annotations__.items() if hint in by_type}
    return st.builds(cls, **{**fields, **more})


plans = from_types(
    Plan,
    call=st.dictionaries(texts, values, max_size=3),
    machine=st.just(MACHINE),
    policy=st.builds(
        Policy,
        budget_bytes=st.dictionaries(st.integers(0, 8), num_bytes, max_size=3),
        ram_bytes=st.none() | num_bytes,
        quality=st.sampled_from(Quality),
        required=several(options),
        forbidden=several(texts),
        notes=several(texts),
    ),
    options=several(options),
    prediction=from_types(
        Prediction,
        peak_vram=several(from_types(DevicePeak)),
        phases=several(from_types(PhasePrediction)),
        latency=from_types(Latency),
        assumptions=several(texts),
    ),
    quality=st.sampled_from(Quality),
    alternatives=several(from_types(Alternative, options=several(options))),
    versions=st.dictionaries(texts, texts, max_size=2),
    rehearsal=st.none()
    | st.builds(Rehearsed, phases=several(from_types(RehearsedPeak)), within_budget=st.booleans()),
)


@settings(max_examples=60, deadline=None)
@given(plan=plans)
def test_a_plan_survives_json(plan: Plan) -> None:
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_a_plan_saved_before_there_were_rehearsals_is_read() -> None:
    data = PLAN.to_json()
    assert data.pop("rehearsal") is None
    assert data.pop("not_rehearsed") == ""
    assert Plan.from_json(data) == PLAN


def test_the_json_of_a_plan_has_the_keys_of_the_design() -> None:
    data = PLAN.to_json()
    assert data["schema"] == "pipefit.plan/1"
    assert set(data) >= PREDICTION_KEYS | {"options", "alternatives", "quality", "fingerprint"}
    assert set(data["phases"][0]) >= PHASE_KEYS
    assert set(data["options"][0]) == {"strategy", "component", "parameters", "reason"}
    assert set(data["alternatives"][0]) == {
        "options", "process_bytes", "call_s", "rejected_because",
    }  # fmt: skip


def test_the_json_of_a_prediction_has_the_keys_of_the_design() -> None:
    data = PREDICTED.to_json()
    assert data["schema"] == "pipefit.prediction/1"
    assert set(data) >= PREDICTION_KEYS
    assert set(data["peak_vram"][0]) >= {
        "device", "allocated_bytes", "reserved_bytes", "process_bytes",
    }  # fmt: skip
    assert set(data["latency"]) >= {"first_call_s", "call_s"}


@pytest.mark.parametrize("data", [{}, {"schema": "pipefit.prediction/1"}, [], None])
def test_what_is_no_plan_is_refused(data) -> None:
    with pytest.raises(InvalidRequest, match="not a saved plan"):
        Plan.from_json(data)


@pytest.mark.parametrize(
    "damage", [{"latency": {}}, {"phases": [{}]}, {"quality": "superb"}, {"policy": None}]
)
def test_a_damaged_plan_is_refused(damage) -> None:
    with pytest.raises(InvalidRequest, match="damaged"):
        Plan.from_json({**PLAN.to_json(), **damage})


def test_a_printed_plan_is_its_report() -> None:
    assert str(PLAN).startswith("flux.1-dev on rtx-4060")
