"""The search against brute force, and the properties that users rely on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipefit.planner import search as search_module
from pipefit.planner.search import (
    Candidate,
    Limits,
    Problem,
    Selection,
    alternatives,
    search,
    select,
    smallest_budget,
)


@st.composite
def problems(draw: st.DrawFn, name: str = "mixed") -> Problem:
    """A problem small enough for brute force; small figures make ties likely."""
    figures = st.integers(0, draw(st.sampled_from([2, 8, 1000])))
    num_phases = draw(st.integers(1, 3))
    per_phase = st.tuples(*[figures] * num_phases)
    candidate = st.builds(
        Candidate,
        key=st.just(""),
        phase_bytes=per_phase,
        call_s=st.one_of(st.integers(0, 3).map(float), st.floats(0, 5)),
        host_bytes=figures,
        pinned_bytes=figures,
        quality_rank=st.integers(0, 2),
        num_strategies=st.integers(0, 2),
        stock=st.sampled_from(["", "resident", "leaves"]),
    )
    groups = draw(st.lists(st.lists(candidate, min_size=1, max_size=4), min_size=1, max_size=3))
    return Problem(
        name=name,
        phases=("encode_prompt", "denoise", "decode")[:num_phases],
        base_bytes=draw(per_phase),
        base_s=draw(st.floats(0, 2)),
        components={
            f"component_{i}": [replace(c, key=f"option {j}") for j, c in enumerate(group)]
            for i, group in enumerate(groups)
        },
    )


bounds = st.one_of(st.none(), st.integers(0, 4000), st.integers(0, 40))
limits = st.builds(Limits, budget_bytes=bounds, ram_bytes=bounds, pinnable_bytes=bounds)


@st.composite
def on_several_gpus(draw: st.DrawFn) -> tuple[list[Problem], Limits]:
    """Problems whose columns are about one or two GPUs, each with a budget of its own or none."""
    found = []
    for name in ("mixed on GPU 0", "mixed on GPU 1")[: draw(st.integers(1, 2))]:
        problem = draw(problems(name))
        gpus = st.lists(
            st.integers(0, 1), min_size=len(problem.phases), max_size=len(problem.phases)
        )
        found.append(replace(problem, devices=tuple(draw(gpus))))
    budgets = st.dictionaries(st.integers(0, 1), st.integers(0, 4000) | st.integers(0, 40))
    return found, Limits(budget_bytes=draw(budgets), ram_bytes=draw(bounds))


@st.composite
def several_problems(draw: st.DrawFn) -> list[Problem]:
    """One to three ways of placing the same pipeline."""
    names = ("mixed", "model_offload", "sequential")[: draw(st.integers(1, 3))]
    return [draw(problems(name)) for name in names]


def all_selections(problem: Problem) -> list[Selection]:
    names = sorted(problem.components)
    return [
        select(problem, dict(zip(names, choice, strict=True)))
        for choice in itertools.product(*(problem.components[name] for name in names))
    ]


def keeps(selection: Selection, problem: Problem, bounds: Limits) -> bool:
    budgets = bounds.budget_bytes
    own = budgets if isinstance(budgets, dict) else dict.fromkeys(problem.devices, budgets)
    per_gpu = [
        (held, own.get(device))
        for held, device in zip(selection.phase_bytes, problem.devices, strict=False)
    ]
    pairs = (
        *(per_gpu or [(selection.peak_bytes, budgets)]),
        (selection.host_bytes, bounds.ram_bytes),
        (selection.pinned_bytes, bounds.pinnable_bytes),
    )
    return all(most is None or used <= most for used, most in pairs)


def rules(selection: Selection) -> tuple:
    """What decides between selections whose times count as equal, in the order of the rules."""
    chosen = selection.choices.values()
    return (
        selection.quality_rank,
        selection.peak_bytes,
        selection.num_strategies,
        selection.call_s,
        sum(c.quality_rank for c in chosen),
        sum(sum(c.phase_bytes) + c.host_bytes + c.pinned_bytes for c in chosen),
        selection.problem,
        tuple(c.key for c in chosen),
    )


def brute_force(asked: Sequence[Problem], bounds: Limits) -> Selection | None:
    fitting = [s for problem in asked for s in all_selections(problem) if keeps(s, problem, bounds)]
    if not fitting:
        return None
    within_ns = min(time_ns(s) for s in fitting) * 102 // 100
    rank = min(s.quality_rank for s in fitting if time_ns(s) <= within_ns)
    worst = max(c.quality_rank for p in asked for group in p.components.values() for c in group)

    def fast_enough(rank: int) -> list[Selection]:
        good = [s for s in fitting if s.quality_rank <= rank]
        most_ns = min([within_ns, *(time_ns(s) for s in good if is_stock(s, asked, rank))])
        return [s for s in good if time_ns(s) <= most_ns]

    whatever = min(fast_enough(worst), key=lambda s: rules(s)[1:4])
    good = fast_enough(rank)
    not_slower = [s for s in good if time_ns(s) <= time_ns(whatever)]
    return min(not_slower or good, key=rules)


def time_ns(selection: Selection) -> int:
    return round(selection.call_s * 1e9)


def is_stock(selection: Selection, asked: Sequence[Problem], rank: int) -> bool:
    """Whether one way of diffusers is chosen wherever it is offered, and elsewhere another."""
    problem = next(p for p in asked if p.name == selection.problem)
    groups = {
        name: [c for c in group if c.quality_rank <= rank]
        for name, group in problem.components.items()
    }

    def is_in(way: str, name: str) -> bool:
        offered = {c.stock for c in groups[name]} - {""}
        taken = selection.choices[name].stock
        return taken == way if way in offered else taken in (offered or {""})

    ways = {c.stock for group in groups.values() for c in group} - {""}
    return any(all(is_in(way, name) for name in groups) for way in ways)


def test_a_plan_within_the_tolerance_is_not_slower_than_diffusers_on_its_own() -> None:
    small = Candidate(key="streamed", phase_bytes=(1,), call_s=1.01)
    stock = Candidate(key="resident", phase_bytes=(8,), call_s=1.0)
    limits = Limits(budget_bytes=8)
    assert search([one_component(small, stock)], limits).choices["unet"] == small
    problem = one_component(small, replace(stock, stock="resident"))
    chosen = search([problem], limits)
    assert chosen.choices["unet"].key == "resident"
    assert [one.reason for one in alternatives([problem], limits, chosen)] == [
        "slower than diffusers on its own, or than at lower quality"
    ]


@pytest.fixture(params=[1 << 16, 2], ids=["enumerating", "branching"])
def _every_way(request: pytest.FixtureRequest):
    """Small problems never need a bound; with a low threshold they use every part of the search."""
    before = search_module.MAX_ENUMERATED
    search_module.MAX_ENUMERATED = request.param
    yield
    search_module.MAX_ENUMERATED = before


@pytest.mark.usefixtures("_every_way")
class TestAgainstBruteForce:
    @settings(max_examples=40, deadline=None)
    @given(on_several_gpus())
    def test_each_gpu_keeps_its_own_budget_as_in_brute_force(self, asked) -> None:
        found, bounds = asked
        assert search(found, bounds) == brute_force(found, bounds)

    @settings(max_examples=40, deadline=None)
    @given(asked=several_problems(), bounds=limits)
    def test_the_selection_is_the_one_that_brute_force_finds(self, asked, bounds) -> None:
        assert search(asked, bounds) == brute_force(asked, bounds)

    @settings(max_examples=40, deadline=None)
    @given(asked=several_problems(), bounds=limits)
    def test_the_smallest_budget_is_the_smallest_that_works(self, asked, bounds) -> None:
        least = smallest_budget(asked, bounds)
        if least is None:
            assert brute_force(asked, replace(bounds, budget_bytes=None)) is None
        else:
            assert brute_force(asked, replace(bounds, budget_bytes=least)) is not None
            assert brute_force(asked, replace(bounds, budget_bytes=least - 1)) is None


@settings(max_examples=40, deadline=None)
@given(asked=several_problems(), bounds=limits, order=st.randoms(use_true_random=False))
def test_the_order_of_the_input_does_not_matter(asked, bounds, order) -> None:
    def shuffled(items):
        return order.sample(list(items), len(items))

    mixed = [
        replace(
            problem,
            components={
                name: shuffled(problem.components[name]) for name in shuffled(problem.components)
            },
        )
        for problem in shuffled(asked)
    ]
    assert search(mixed, bounds) == search(asked, bounds)


@settings(max_examples=40, deadline=None)
@given(asked=several_problems(), bounds=limits, extra=st.integers(0, 1000))
def test_more_budget_is_never_slower_than_the_tolerance(asked, bounds, extra) -> None:
    """The best time falls with the budget; the winner may be 2 % above it, by the tie rules."""
    if bounds.budget_bytes is None:
        bounds = replace(bounds, budget_bytes=500)
    less = search(asked, bounds)
    more = search(asked, replace(bounds, budget_bytes=bounds.budget_bytes + extra))
    if less is not None:
        assert more is not None
        assert round(more.call_s * 1e9) * 100 <= round(less.call_s * 1e9) * 102


def one_component(*candidates: Candidate) -> Problem:
    return Problem(
        name="mixed", phases=("denoise",), base_bytes=(0,), components={"unet": candidates}
    )


def test_a_problem_without_candidates_has_no_selection() -> None:
    assert search([one_component()], Limits()) is None
    assert search([], Limits()) is None


def test_a_candidate_with_the_wrong_number_of_phases_is_refused() -> None:
    with pytest.raises(ValueError, match="each phase"):
        one_component(Candidate(key="resident", phase_bytes=(1, 2), call_s=1.0))


RESIDENT = Candidate(key="resident", phase_bytes=(10,), call_s=1.0)
TILED = Candidate(key="tiled", phase_bytes=(6,), call_s=1.5, quality_rank=1)
STREAMED = Candidate(key="streamed", phase_bytes=(2,), call_s=4.0)


def test_alternatives_say_what_was_over_budget_and_what_was_slower() -> None:
    problem = one_component(RESIDENT, TILED, STREAMED)
    bounds = Limits(budget_bytes=7)
    chosen = search([problem], bounds)
    lost = alternatives([problem], bounds, chosen)
    assert chosen.choices["unet"] == TILED
    assert [(r.selection.choices["unet"].key, r.reason) for r in lost] == [
        ("resident", "0.00 GiB over in denoise"),
        ("streamed", "2.7 times as slow"),
    ]


def test_an_alternative_that_counts_as_equal_says_by_which_rule_it_lost() -> None:
    exact = Candidate(key="exact", phase_bytes=(9,), call_s=1.01)
    rounded = Candidate(key="rounded", phase_bytes=(5,), call_s=1.0, quality_rank=1)
    problem = one_component(exact, rounded)
    chosen = search([problem], Limits())
    [lost] = alternatives([problem], Limits(), chosen)
    assert chosen.choices["unet"] == exact
    assert lost.reason == "as fast, but lower quality"


def test_the_better_quality_costs_time_only_where_it_must() -> None:
    rounded = Candidate(key="rounded", phase_bytes=(5,), call_s=1.0, quality_rank=1)
    small = Candidate(key="small", phase_bytes=(6,), call_s=1.01)
    quick = Candidate(key="quick", phase_bytes=(9,), call_s=1.0)
    problem = one_component(rounded, small, quick)
    chosen = search([problem], Limits(budget_bytes=9))
    assert chosen.choices["unet"] == quick
    lost = alternatives([problem], Limits(budget_bytes=9), chosen)
    assert "slower than diffusers on its own, or than at lower quality" in [r.reason for r in lost]
    assert search([problem], Limits(budget_bytes=8)).choices["unet"] == small


def test_alternatives_name_the_host_memory_that_was_missing() -> None:
    pinned = Candidate(key="pinned", phase_bytes=(1,), call_s=1.0, pinned_bytes=3 << 30)
    paged = Candidate(key="paged", phase_bytes=(1,), call_s=2.0)
    problem, bounds = one_component(pinned, paged), Limits(pinnable_bytes=1 << 30)
    [lost] = alternatives([problem], bounds, search([problem], bounds))
    assert lost.reason == "2.00 GiB more than can be pinned"
