"""docs/strategies.md says what the strategies say."""

from __future__ import annotations

import itertools
import re

import pytest
from benchmarks.strategy_catalogue import APPLIES, NO_EFFECT, Asked, ask_catalogue
from benchmarks.strategy_pictures import Measured, pair, pairs
from benchmarks.strategy_tables import (
    APART,
    DOCUMENT,
    NOTHING,
    TOGETHER,
    WHERE,
    YES,
    letter,
    pictures,
    sentence,
    together,
    where,
)

from pipefit.planner.catalog import pipeline_entry, pipeline_names
from pipefit.strategies import BUILT_IN
from pipefit.strategies.strategy import Quality

TEXT = DOCUMENT.read_text(encoding="utf-8")

NAMES = [one.name for one in BUILT_IN]

QUICK = ("stable-diffusion-v1-5", "flux.1-schnell", "ltx-video-0.9.0")
"""Pipelines whose components are built in the fast suite."""


def section(template: str) -> str:
    """Return the part of the document that a template begins."""
    title = template.split("\n", 1)[0]
    return TEXT.split(f"{title}\n")[1].split("\n## ")[0]


def table(text: str) -> tuple[list[str], dict[str, list[str]]]:
    """Return the heads of the columns and the cells of each strategy's row."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    (head, _), body = rows[:2], rows[2:]
    return head, {
        next(cell.strip("`") for cell in row if cell.startswith("`")): row for row in body
    }


def reasons(text: str) -> dict[str, str]:
    return dict(re.findall(r"^(\d+)\. (.+)$", text, flags=re.MULTILINE))


def columns_of(class_name: str) -> list[str]:
    """Return the columns in which a class is: more than one if its configurations differ."""
    listed = re.findall(r"^- \*\*([A-Z]+)\*\*: (.+)$", section(WHERE), flags=re.MULTILINE)
    return [column for column, classes in listed if re.search(rf"\b{class_name}\b", classes)]


def test_every_component_class_of_the_catalogue_and_every_strategy_is_in_the_table() -> None:
    _, rows = table(section(WHERE))
    assert list(rows) == NAMES
    for name in pipeline_names():
        for about in pipeline_entry(name)["components"].values():
            assert re.search(rf"\b{about['class']}\b", section(WHERE)), about["class"]


def test_every_strategy_applies_to_some_class_or_needs_more_than_a_class() -> None:
    _, rows = table(section(WHERE))
    assert [name for name, row in rows.items() if YES not in row] == ["sharded_checkpoint"]
    (why,) = {reasons(section(WHERE))[mark] for mark in rows["sharded_checkpoint"][2:]}
    assert "file" in why


@pytest.mark.parametrize("name", QUICK)
def test_the_table_says_what_the_strategies_say_of_a_pipeline_s_components(name: str) -> None:
    head, rows = table(section(WHERE))
    said = {YES: APPLIES, NOTHING: NO_EFFECT, **reasons(section(WHERE))}
    for asked in ask_catalogue([name]):
        listed = [
            tuple(said[rows[one][head.index(column)]] for one in NAMES)
            for column in columns_of(asked.class_name)
        ]
        assert asked.outcomes in listed


@pytest.mark.slow
def test_the_table_of_classes_is_what_the_strategies_say_of_the_whole_catalogue() -> None:
    assert where(ask_catalogue()) in TEXT


def test_the_table_of_pairs_is_what_the_strategies_say_of_one_pipeline() -> None:
    head, rows = table(section(TOGETHER))
    said = reasons(section(TOGETHER))
    for first, second in itertools.combinations(NAMES, 2):
        cell = rows[first][head.index(str(NAMES.index(second) + 1))]
        found = pair(first, second, ["stable_diffusion"])
        if found.shares_component:
            assert cell == YES
        elif found.excluded:  # unless another pipeline has a component that takes both
            assert cell == YES or said[cell.removeprefix(f"{APART} ")] == sentence(found.excluded)


@pytest.mark.slow
def test_the_table_of_pairs_is_what_the_strategies_say() -> None:
    assert together(pairs()) in TEXT


def test_a_class_whose_configurations_differ_names_their_pipelines() -> None:
    applies = tuple(APPLIES for _ in BUILT_IN)
    refused = ("It is too wide.", *applies[1:])
    text = where(
        [
            Asked(class_name="A", pipeline="one", component="a", outcomes=applies),
            Asked(class_name="A", pipeline="two", component="a", outcomes=refused),
            Asked(class_name="B", pipeline="two", component="b", outcomes=refused),
        ]
    )
    assert "- **A**: A (as in two), B" in text
    assert "- **B**: A (as in one)" in text
    assert f"| `{NAMES[0]}` | {BUILT_IN[0].quality.value} | 1 | {YES} |" in text
    assert text.endswith("1. It is too wide.")


def test_a_picture_s_row_names_where_it_is_worst() -> None:
    rows = [
        Measured(
            strategy=NAMES[0], label="s:x=1", quality=Quality.HIGH, pipeline=name,
            largest=largest, psnr_db=psnr_db,
        )
        for name, largest, psnr_db in (("one", 0.5, 40.0), ("two", 0.25, 30.0))
    ]  # fmt: skip
    assert "| `s:x=1` | high | 2 | 5.0e-01 (one) | 30.0 (two) |" in pictures(rows)


def test_columns_go_on_after_z() -> None:
    assert [letter(i) for i in (0, 25, 26, 27)] == ["A", "Z", "AA", "AB"]
