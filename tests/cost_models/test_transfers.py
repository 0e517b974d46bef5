"""Link rates: what is known wins, what is not is derived or refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.transfers import (
    PAGEABLE_BYTES_PER_S,
    PINNED_SHARE,
    link_rates,
    pcie_bytes_per_s,
)
from pipefit.errors import InvalidRequest

CARD = Gpu(name="card", total_bytes=1, free_bytes=1, pcie_generation=4, pcie_lanes=16)


def test_pcie_4_x16_carries_31_5_gigabytes_a_second() -> None:
    assert pcie_bytes_per_s(4, 16) == pytest.approx(31.5e9, rel=1e-3)


@pytest.mark.parametrize(("generation", "lanes"), [(0, 16), (7, 16), (4, 0), (4, -8)])
def test_a_link_that_does_not_exist_is_refused(generation: int, lanes: int) -> None:
    with pytest.raises(InvalidRequest, match="generation"):
        pcie_bytes_per_s(generation, lanes)


def test_pinned_copies_reach_a_share_of_the_link() -> None:
    assert link_rates(CARD).h2d_pinned_bytes_per_s == PINNED_SHARE * pcie_bytes_per_s(4, 16)
    newer = replace(CARD, pcie_generation=5)
    assert 55e9 < link_rates(newer).h2d_pinned_bytes_per_s < 56.4e9  # as nvbandwidth finds


def test_pageable_copies_are_bounded_by_the_host_on_a_fast_link_and_by_the_link_on_a_slow_one() -> (
    None
):
    slow = link_rates(replace(CARD, pcie_generation=3, pcie_lanes=4))
    assert link_rates(CARD).h2d_pageable_bytes_per_s == PAGEABLE_BYTES_PER_S
    assert slow.h2d_pageable_bytes_per_s == slow.h2d_pinned_bytes_per_s < PAGEABLE_BYTES_PER_S


def test_measured_rates_win() -> None:
    rates = link_rates(
        replace(
            CARD,
            h2d_pinned_bytes_per_s=20e9,
            h2d_pageable_bytes_per_s=6e9,
            d2h_pageable_bytes_per_s=5e9,
        )
    )
    assert rates.h2d_pinned_bytes_per_s == 20e9
    assert rates.h2d_pageable_bytes_per_s == 6e9
    assert rates.d2h_pageable_bytes_per_s == 5e9
    assert rates.round_trip_s(30e9) == pytest.approx(30 / 6 + 30 / 5)


def test_an_unknown_link_is_refused_with_what_to_state() -> None:
    with pytest.raises(InvalidRequest, match="--pcie"):
        link_rates(replace(CARD, pcie_lanes=None))


def test_unified_memory_is_copied_at_half_its_bandwidth() -> None:
    apple = Gpu(
        name="m3", total_bytes=1, free_bytes=1, unified_memory=True, memory_bytes_per_s=300e9
    )
    assert link_rates(apple).h2d_pinned_bytes_per_s == 150e9


def test_on_the_cpu_nothing_travels() -> None:
    rates = link_rates(Gpu(name="cpu", architecture="cpu", total_bytes=1, free_bytes=1))
    assert math.isinf(rates.h2d_pinned_bytes_per_s)
    assert rates.round_trip_s(1e12) == 0


@given(
    generation=st.integers(1, 6),
    lanes=st.sampled_from([1, 4, 8, 16]),
    more=st.integers(0, 5),
    num_bytes=st.integers(0, 10**12),
)
def test_a_faster_link_never_takes_longer(
    generation: int, lanes: int, more: int, num_bytes: int
) -> None:
    slow = link_rates(replace(CARD, pcie_generation=generation, pcie_lanes=lanes))
    fast = link_rates(replace(CARD, pcie_generation=min(6, generation + more), pcie_lanes=16))
    assert fast.round_trip_s(num_bytes) <= slow.round_trip_s(num_bytes)
    assert fast.h2d_streamed_bytes_per_s >= slow.h2d_streamed_bytes_per_s
