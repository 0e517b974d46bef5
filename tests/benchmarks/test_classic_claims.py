"""What diffusers' guides claim comes out of the planner as predictions."""

from __future__ import annotations

import itertools

import pytest
from benchmarks.classic_claims import (
    DOC,
    MEMORY,
    TIMES,
    TOLERANCE,
    MemoryClaim,
    TimeClaim,
    can_be_asked,
    holds,
    predicted_bytes,
    predicted_s,
    report,
)

ASKED = [claim for claim in TIMES if can_be_asked(claim)]


@pytest.mark.parametrize("claim", ASKED, ids=lambda claim: claim.name)
def test_a_classic_time_is_predicted_within_a_fifth(claim: TimeClaim) -> None:
    assert predicted_s(claim) == pytest.approx(claim.published_s, rel=TOLERANCE)


def test_the_classic_times_come_in_the_published_order() -> None:
    assert len(ASKED) >= 5
    for slower, faster in itertools.pairwise(ASKED):
        assert predicted_s(faster) < predicted_s(slower), faster.name


@pytest.mark.parametrize("claim", MEMORY, ids=lambda claim: claim.name)
def test_a_classic_memory_claim_holds_and_only_thanks_to_its_strategy(claim: MemoryClaim) -> None:
    assert holds(claim, predicted_bytes(claim, claim.strategies))
    if claim.otherwise is not None:
        assert not holds(claim, predicted_bytes(claim, claim.otherwise))


@pytest.mark.slow
def test_the_page_is_what_the_benchmark_writes() -> None:
    assert DOC.read_text(encoding="utf-8") == report()
