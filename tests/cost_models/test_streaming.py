"""Times and bytes of streamed components: the limits that any overlap lies between."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.cost_models.workloads import linear_stack, tensor

from pipefit.cost_models.blocks import Block, Blocks, aligned
from pipefit.cost_models.clock import steps_of
from pipefit.cost_models.placement import Streaming
from pipefit.cost_models.streaming import (
    CallTimes,
    Window,
    cut_of,
    split_call_seconds,
    streamed_bytes,
    turns,
)
from pipefit.cost_models.transfers import BLOCK_HOOK_S, COPY_LATENCY_S
from pipefit.cost_models.units import MIB

RATE = 20e9
"""Bytes per second of the link here; a PCIe 4.0 x16 link reaches somewhat more."""

HOST_S = BLOCK_HOOK_S + COPY_LATENCY_S
"""What the host does for one streamed block."""


def equal_blocks(count: int, num_bytes: int) -> Blocks:
    blocks = tuple(
        Block(path=f"blocks.{i}", tensors=(tensor(f"blocks.{i}.weight", num_bytes),))
        for i in range(count)
    )
    return Blocks(blocks=blocks, rest=(), buffers=())


def windows(count: int, gpu_s: float, host_s: float = 0.0) -> list[Window]:
    """Return a window a block, for which the host takes *host_s*."""
    return [Window(i, steps_of([(1, gpu_s)], host_s)) for i in range(count)]


def call_times(parts: list[Window], cut: Blocks, placement: Streaming, **ahead: float) -> CallTimes:
    return CallTimes(parts, cut, placement, RATE, **ahead)


counts = st.integers(1, 24)
compute = st.floats(0, 0.05)
sizes = st.integers(1, 200).map(lambda mib: mib * MIB)


def placed(resident_blocks: int, num_slots: int, **more: Any) -> Streaming:
    more.setdefault("look_ahead", num_slots)
    return Streaming(resident_blocks=resident_blocks, num_slots=num_slots, **more)


@given(count=counts, gpu_s=compute, size=sizes, slots=st.integers(1, 4))
def test_with_nothing_streamed_a_call_takes_what_it_computes(
    count: int, gpu_s: float, size: int, slots: int
) -> None:
    times = call_times(windows(count, gpu_s), equal_blocks(count, size), placed(count, slots))
    assert times.later_s == pytest.approx(count * gpu_s)
    assert times.cold_s == pytest.approx(count * gpu_s)


@given(count=st.integers(2, 24), size=sizes, slots=st.integers(2, 4), resident=st.integers(0, 24))
def test_with_nothing_computed_a_call_takes_what_the_link_does(
    count: int, size: int, slots: int, resident: int
) -> None:
    resident = min(resident, count)
    num_streamed = count - resident
    times = call_times(windows(count, 0.0), equal_blocks(count, size), placed(resident, slots))
    link_s = num_streamed * size / RATE
    assert link_s <= times.later_s * (1 + 1e-9)
    assert times.later_s <= link_s + num_streamed * HOST_S


@given(
    count=st.integers(2, 24),
    gpu_s=compute,
    size=sizes,
    slots=st.integers(1, 4),
    resident=st.integers(0, 24),
)
def test_a_call_lies_between_full_overlap_and_none(
    count: int, gpu_s: float, size: int, slots: int, resident: int
) -> None:
    resident = min(resident, count)
    times = call_times(windows(count, gpu_s), equal_blocks(count, size), placed(resident, slots))
    link_s, compute_s = (count - resident) * size / RATE, count * gpu_s
    assert max(link_s, compute_s) <= times.later_s * (1 + 1e-9) + 1e-12
    assert times.later_s <= link_s + compute_s + count * HOST_S


@given(
    sizes_mib=st.lists(st.integers(1, 200), min_size=2, max_size=20),
    gpu_s=compute,
    slots=st.integers(1, 4),
    resident=st.integers(0, 20),
)
def test_another_slot_is_never_slower(
    sizes_mib: list[int], gpu_s: float, slots: int, resident: int
) -> None:
    blocks = tuple(
        Block(path=f"blocks.{i}", tensors=(tensor(f"blocks.{i}.weight", size * MIB),))
        for i, size in enumerate(sizes_mib)
    )
    cut = Blocks(blocks=blocks, rest=(), buffers=())
    resident = min(resident, len(blocks))
    one, more = (
        call_times(windows(len(blocks), gpu_s), cut, placed(resident, num))
        for num in (slots, slots + 1)
    )
    assert more.later_s <= one.later_s * (1 + 1e-9) + len(blocks) * HOST_S


@given(
    count=st.integers(2, 20),
    gpu_s=compute,
    size=sizes,
    slots=st.integers(1, 3),
    resident=st.integers(0, 18),
)
def test_another_resident_block_is_never_slower(
    count: int, gpu_s: float, size: int, slots: int, resident: int
) -> None:
    resident = min(resident, count - 1)
    cut = equal_blocks(count, size)
    one, more = (
        call_times(windows(count, gpu_s), cut, placed(num, slots))
        for num in (resident, resident + 1)
    )
    assert more.later_s <= one.later_s * (1 + 1e-9) + count * HOST_S


@given(
    count=counts,
    gpu_s=compute,
    host_s=st.floats(0, 0.01),
    size=sizes,
    slots=st.integers(1, 4),
    resident=st.integers(0, 24),
    when_idle=st.sampled_from(("stay", "leave")),
    host_memory=st.sampled_from(("pinned", "pageable")),
)
def test_a_cold_call_is_never_faster_than_a_later_one(
    count: int,
    gpu_s: float,
    host_s: float,
    size: int,
    slots: int,
    resident: int,
    when_idle: Any,
    host_memory: Any,
) -> None:
    placement = placed(min(resident, count), slots, when_idle=when_idle, host_memory=host_memory)
    times = call_times(windows(count, gpu_s, host_s), equal_blocks(count, size), placement)
    assert times.cold_s >= times.later_s * (1 - 1e-9) - count * HOST_S


@given(count=counts, gpu_s=compute, size=sizes, ahead_s=st.floats(0, 10))
def test_what_is_loaded_ahead_is_waited_for_less(
    count: int, gpu_s: float, size: int, ahead_s: float
) -> None:
    cut, placement = equal_blocks(count, size), placed(count, 1, when_idle="leave")
    cold, ahead = (
        call_times(windows(count, gpu_s), cut, placement, ahead_s=seconds).cold_s
        for seconds in (0.0, ahead_s)
    )
    least_s = max(count * gpu_s, count * size / RATE - ahead_s)
    assert least_s * (1 - 1e-9) - 1e-12 <= ahead <= cold * (1 + 1e-9)


def test_ordinary_memory_holds_the_host_up_and_page_locked_memory_does_not() -> None:
    cut, gpu_s = equal_blocks(8, 100 * MIB), 100 * MIB / RATE
    pinned, pageable = (
        call_times(windows(8, gpu_s, gpu_s / 2), cut, placed(0, 2, host_memory=one)).later_s
        for one in ("pinned", "pageable")
    )
    assert pinned == pytest.approx(8 * gpu_s, rel=0.01)
    assert pageable > 1.2 * pinned


@pytest.mark.parametrize("when_idle", ["stay", "leave"])
@pytest.mark.parametrize("resident_blocks", [0, 2, 5])
def test_bytes_lie_in_slots_at_home_and_on_the_host(when_idle: Any, resident_blocks: int) -> None:
    component = linear_stack("net", [1000] * 5, top_bytes=90_000)
    placement = placed(resident_blocks, 2, when_idle=when_idle, max_block_bytes=1000)
    found = streamed_bytes(component, placement)
    cut = cut_of(component, placement)
    assert len(cut.blocks) == 5
    num_streamed = 5 - resident_blocks
    slots = 2 * aligned(1000) if num_streamed else 0
    if when_idle == "stay":
        assert sum(found.loaded) == resident_blocks * 1000 + 90_000 + slots
        assert found.idle == found.loaded
        assert found.host == num_streamed * aligned(1000)
    else:
        assert sum(found.loaded) == resident_blocks * aligned(1000) + aligned(90_000) + slots
        assert found.idle == ()
        assert found.host == 5 * aligned(1000) + aligned(90_000)


def test_what_leaves_is_there_in_its_own_turn_and_in_that_of_the_one_before() -> None:
    order = ("text", "net", "vae")
    assert turns(order, "net", None) == (False, True, False)
    assert turns(order, "net", "text") == (True, True, False)


@given(
    count=st.integers(2, 24),
    gpu_s=compute,
    size=sizes,
    slots=st.integers(1, 4),
    resident=st.integers(0, 24),
)
def test_one_gpu_of_a_split_takes_as_long_as_streaming_on_it(
    count: int, gpu_s: float, size: int, slots: int, resident: int
) -> None:
    cut, how = equal_blocks(count, size), placed(min(resident, count - 1), slots)
    whole = windows(count, gpu_s)
    streamed = set(cut.streamed(how.resident_blocks))
    parts = [(0, w.block if w.block in streamed else None, w.steps) for w in whole]
    found_s = split_call_seconds(parts, {0: (cut, how)}, {0: RATE})
    assert found_s == pytest.approx(call_times(whole, cut, how).later_s, rel=1e-6, abs=1e-9)


@given(count=st.integers(2, 12), gpu_s=compute, size=sizes, slots=st.integers(1, 4))
def test_while_one_gpu_computes_the_links_of_all_copy(
    count: int, gpu_s: float, size: int, slots: int
) -> None:
    cut, how = equal_blocks(count, size), placed(0, slots)
    parts = [(i, w.block, w.steps) for i in (0, 1) for w in windows(count, gpu_s)]
    found_s = split_call_seconds(parts, {0: (cut, how), 1: (cut, how)}, {0: RATE, 1: 2 * RATE})
    links_s, computing_s = count * size / RATE, 2 * count * gpu_s
    assert found_s >= max(links_s, computing_s) * (1 - 1e-9)
    # What a ring holds is copied while the other GPU computes, and the first call of the next step
    # finds it there.
    one_after_the_other_s = 1.5 * links_s + computing_s
    assert found_s <= one_after_the_other_s + 2 * count * HOST_S
    if not gpu_s and slots >= count:
        assert found_s == pytest.approx(links_s, abs=2 * count * HOST_S)
