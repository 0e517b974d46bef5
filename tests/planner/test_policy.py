"""Budgets, qualities and strategies as people write them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from tests.planner.hand_built import MACHINE

from pipefit.cost_models import serial
from pipefit.cost_models.machine import Machine
from pipefit.cost_models.units import GIB
from pipefit.errors import InvalidRequest, UnknownName
from pipefit.planner.policy import (
    Policy,
    budget_notes,
    check_strategy_name,
    parse_budget,
    parse_quality,
    parse_strategy_spec,
    parse_value,
)
from pipefit.strategies.strategy import Option, Quality

TWO_GPUS = replace(
    MACHINE,
    gpus=(
        replace(MACHINE.gpus[0], total_bytes=8 * GIB, free_bytes=7 * GIB),
        replace(MACHINE.gpus[0], index=1, total_bytes=16 * GIB, free_bytes=15 * GIB),
    ),
)
STRATEGIES = ("group_offload", "resident", "vae_tiling")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("6GB", {0: 6 * 10**9, 1: 6 * 10**9}),
        (5 * GIB, {0: 5 * GIB, 1: 5 * GIB}),
        ("50%", {0: 4 * GIB, 1: 8 * GIB}),
        (None, {0: 7 * GIB, 1: 15 * GIB}),
        ({1: "12GiB"}, {1: 12 * GIB}),
        ("0=6GiB, 1=80%", {0: 6 * GIB, 1: int(16 * GIB * 0.8)}),
        (["6GiB"], {0: 6 * GIB, 1: 6 * GIB}),
        (["6GiB", "12GiB"], {0: 6 * GIB, 1: 12 * GIB}),
        (["1=12GiB"], {1: 12 * GIB}),
        ("10GiB", {0: 8 * GIB, 1: 10 * GIB}),
    ],
)
def test_a_budget_is_bytes_by_gpu_and_at_most_its_total(asked, expected) -> None:
    assert parse_budget(asked, TWO_GPUS) == expected


def test_a_budget_above_the_total_is_noted() -> None:
    [note] = budget_notes("10GiB", TWO_GPUS)
    assert "10.00 GiB is more than GPU 0" in note
    assert budget_notes("8GiB", TWO_GPUS) == ()


@pytest.mark.parametrize(
    "asked",
    [
        "8 gigs", "-1GB", "0", "150%", "", "GB", "1e400GB", "nan",
        math.nan, math.inf, -8e9, 0, True, 8, "8", {}, {2: "8GB"}, {0: "8 gigs"}, {True: "8GB"},
        {0: None}, "0=8GB,0=9GB", "0=8GB,9GB", ["8GB", "8GB", "8GB"], [], object(), b"8GB",
    ],
)  # fmt: skip
def test_a_budget_that_is_none_is_refused_in_one_sentence(asked) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_budget(asked, TWO_GPUS)
    assert "\n" not in str(caught.value)


def test_a_small_bare_number_is_taken_for_forgotten_gigabytes() -> None:
    with pytest.raises(InvalidRequest, match='write "8GB"'):
        parse_budget(8, TWO_GPUS)


def test_a_budget_without_a_gpu_says_what_to_do() -> None:
    with pytest.raises(InvalidRequest, match="none was found"):
        parse_budget("8GB", Machine(gpus=(), host=MACHINE.host))


def test_quality_is_one_of_four_words() -> None:
    assert parse_quality("exact") is Quality.EXACT
    with pytest.raises(UnknownName, match="did you mean high"):
        parse_quality("hihg")


def test_a_strategy_without_components_goes_everywhere() -> None:
    assert parse_strategy_spec("resident", strategies=STRATEGIES) == [Option(strategy="resident")]


def test_a_strategy_with_components_is_one_option_each() -> None:
    spec = "group_offload:offload_type=leaf_level,use_stream=true@transformer,vae"
    parameters = {"offload_type": "leaf_level", "use_stream": True}
    assert parse_strategy_spec(spec, strategies=STRATEGIES, components=("transformer", "vae")) == [
        Option(strategy="group_offload", component=name, parameters=parameters)
        for name in ("transformer", "vae")
    ]


@pytest.mark.parametrize(
    "spec",
    ["", ":", "resident:", "resident@", "resident:x", "resident:=1", "resident:x=", "a b",
     "resident:x=1,@vae", "resident@vae,"],
)  # fmt: skip
def test_a_strategy_that_breaks_the_grammar_is_refused(spec) -> None:
    with pytest.raises(InvalidRequest, match="write"):
        parse_strategy_spec(spec, strategies=STRATEGIES)


def test_unknown_names_answer_with_the_closest() -> None:
    with pytest.raises(UnknownName, match="did you mean vae_tiling"):
        parse_strategy_spec("vae_tilling", strategies=STRATEGIES)
    with pytest.raises(UnknownName, match="did you mean unet"):
        parse_strategy_spec("resident@unit", strategies=STRATEGIES, components=("unet", "vae"))
    with pytest.raises(UnknownName):
        check_strategy_name("magic", STRATEGIES)


@pytest.mark.parametrize(
    ("text", "value"),
    [("false", False), ("None", None), ("-3", -3), ("2.5", 2.5), ("nan", "nan"), ("x y", "x y")],
)
def test_values_are_read_as_people_mean_them(text, value) -> None:
    assert parse_value(text) == value


def test_a_policy_survives_json() -> None:
    policy = Policy(
        budget_bytes={0: 8, 1: 9},
        quality=Quality.EXACT,
        required=(Option(strategy="vae_tiling", component="vae", parameters={"tile_px": 512}),),
        forbidden=("compile",),
    )
    assert serial.from_json(Policy, serial.to_json(policy)) == policy
