"""How far the host runs ahead with ``record_stream``, and what holds it back."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.cost_models.workloads import GPU, linear_stack, routine, workload

from pipefit.cost_models.clock import LAUNCH_QUEUE, TO_GPU, TO_HOST, Clock
from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.memory import MemoryModel, PhaseMemory, simulate
from pipefit.cost_models.placement import GroupOffload
from pipefit.cost_models.prediction import Choice
from pipefit.cost_models.units import MIB
from pipefit.cost_models.workload import SYNCHRONISE, Event, Kernel, Workload

RTX_3090 = replace(
    GPU,
    flops_per_s={"float32": 35.6e12, "bfloat16": 71e12},
    memory_bytes_per_s=936e9,
    num_sms=82,
    clock_hz=1.7e9,
    pcie_generation=4,
    pcie_lanes=16,
)
STREAMED = GroupOffload(offload_type="leaf_level", use_stream=True)
RECORDED = replace(STREAMED, record_stream=True)
LAYERS, LAYER_BYTES = 12, 32 * MIB
LAYER_COPY_S = LAYER_BYTES / 25.2e9


def product(seconds: float) -> Kernel:
    """Return a matrix product that takes about *seconds*."""
    columns = int(seconds * 55e12 / 2 / 4096 / 4096)
    return Kernel(
        kind="gemm",
        name="aten.mm",
        dtype="bfloat16",
        read_bytes=LAYER_BYTES,
        write_bytes=MIB,
        shape=(1, columns, 4096, 4096),
        weight_bytes=LAYER_BYTES,
    )


def denoising(compute_s: float, *, steps: int = 4, reads_values: bool = True) -> Workload:
    """A stack of equal layers, each computing that long; the pipeline may wait for every step."""
    stack = linear_stack("transformer", [LAYER_BYTES] * LAYERS)
    layer = routine(("a", 0, MIB), ("k", 0), ("f", 0))
    forward = routine(*(("c", 0, f"blocks.{i}", (), ()) for i in range(LAYERS)))
    step: list[Event] = [("c", 1, "/transformer", (), ())]
    if reads_values:
        step.append(("k", 1))
    return workload(
        [stack],
        [layer, forward],
        step * steps,
        [("transformer", "forward", steps)],
        (product(compute_s), SYNCHRONISE),
    )


def replayed(found: Workload, placement: GroupOffload, gpu: Gpu = RTX_3090) -> PhaseMemory:
    (phase,) = simulate(found, {"transformer": Choice(placement=placement)}, gpu)
    return phase


def test_slow_kernels_let_dropped_weights_pile_up_in_reserved_memory_only() -> None:
    found = denoising(4 * LAYER_COPY_S)
    plain, recorded = replayed(found, STREAMED), replayed(found, RECORDED)
    assert recorded.allocated_bytes == plain.allocated_bytes
    piled = (recorded.reserved_bytes - plain.reserved_bytes) / LAYER_BYTES
    # While 12 layers are copied, 3 are computed; two are there in any case.
    assert piled == pytest.approx(12 * 3 / 4 - 2, abs=1)


def test_copies_slower_than_kernels_leave_nothing_to_pile_up() -> None:
    found = denoising(0.5 * LAYER_COPY_S)
    piled = (
        replayed(found, RECORDED).reserved_bytes - replayed(found, STREAMED).reserved_bytes
    ) / LAYER_BYTES
    assert piled <= 1


def test_weights_that_the_host_must_page_lock_first_do_not_pile_up() -> None:
    found = denoising(1.5 * LAYER_COPY_S)
    free = replayed(found, RECORDED).reserved_bytes
    for more in ({"low_cpu_mem_usage": True}, {"offload_to_disk_path": "weights"}):
        assert replayed(found, replace(RECORDED, **more)).reserved_bytes < free


def test_what_no_value_read_stops_runs_ahead_over_several_steps() -> None:
    waiting, free = denoising(2 * LAYER_COPY_S), denoising(2 * LAYER_COPY_S, reads_values=False)
    ahead, behind = (replayed(found, RECORDED).reserved_bytes for found in (free, waiting))
    assert ahead > behind + 6 * LAYER_BYTES


def test_weights_that_pile_up_are_waited_for_before_memory_runs_out() -> None:
    found = denoising(4 * LAYER_COPY_S, steps=20, reads_values=False)
    free = replayed(found, RECORDED)
    small = replace(RTX_3090, total_bytes=free.process_bytes // 2)
    held = replayed(found, RECORDED, small)
    assert held.process_bytes <= small.total_bytes
    assert held.allocated_bytes == free.allocated_bytes


def test_the_search_counts_recorded_streams_as_allocated_memory_is_counted() -> None:
    found = denoising(4 * LAYER_COPY_S)
    model = MemoryModel(found, RTX_3090)
    (added_bytes,) = model.phase_bytes(found.components[0], Choice(placement=RECORDED))
    assert added_bytes + model.carried_bytes[0] == replayed(found, RECORDED).allocated_bytes


def test_a_full_queue_of_launches_blocks_the_host() -> None:
    clock = Clock()
    clock.launch(LAUNCH_QUEUE, host_s=1e-5, gpu_s=0.01)
    assert clock.host_s < 1 < 9 < clock.done_s(0)
    ahead_s = clock.done_s(0) - clock.host_s
    for _ in range(LAUNCH_QUEUE):
        clock.launch(1, host_s=1e-5, gpu_s=0.01)
    assert clock.done_s(0) - clock.host_s == pytest.approx(ahead_s, rel=0.1)


def test_events_of_freed_weights_take_places_in_the_queue() -> None:
    clock, without = Clock(), Clock()
    for _ in range(2 * LAUNCH_QUEUE):
        span = clock.launch(1, host_s=1e-5, gpu_s=0.01)
        assert clock.record_event() == clock.done_s(0) == span.end_s
        without.launch(1, host_s=1e-5, gpu_s=0.01)
    assert clock.done_s(0) == pytest.approx(without.done_s(0), rel=1e-3)
    ahead_s, ahead_without_s = (c.done_s(0) - c.host_s for c in (clock, without))
    assert ahead_s == pytest.approx(ahead_without_s / 2, rel=0.01)


def test_a_blocking_copy_holds_the_host_and_another_one_its_stream() -> None:
    clock = Clock()
    clock.copy(2.0, stream=1, engine=TO_GPU, is_blocking=True)
    assert clock.host_s == 2
    clock.copy(3.0, stream=1, engine=TO_GPU)
    assert clock.host_s == 2
    clock.synchronise(1)
    assert clock.host_s == 5


def test_streams_share_engines_and_each_direction_has_its_own() -> None:
    clock = Clock()
    assert clock.copy(2.0, stream=1, engine=TO_GPU) == (0, 2)
    assert clock.copy(2.0, stream=2, engine=TO_GPU) == (2, 4)
    assert clock.copy(2.0, stream=3, engine=TO_HOST) == (0, 2)
    assert clock.launch(1, host_s=0.5, gpu_s=1.0) == (0.5, 1.5)
    assert clock.launch(1, host_s=0.0, gpu_s=1.0, stream=4) == (1.5, 2.5)


def test_a_stream_waits_for_an_event_of_another_and_the_host_does_not() -> None:
    clock = Clock()
    clock.copy(2.0, stream=1, engine=TO_GPU)
    arrived_s = clock.record_event(1)
    clock.wait(0, arrived_s)
    assert clock.launch(1, host_s=0.25, gpu_s=1.0) == (2, 3)
    assert clock.host_s == 0.25
    clock.synchronise()
    assert clock.host_s == clock.done_s() == 3


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("launch"), st.integers(0, 2), st.floats(0, 1)),
            st.tuples(st.just("copy"), st.integers(0, 2), st.floats(0, 1)),
            st.tuples(st.just("event"), st.integers(0, 2), st.floats(0, 1)),
            st.tuples(st.just("synchronise"), st.integers(0, 2), st.floats(0, 1)),
        ),
        max_size=60,
    )
)
def test_time_never_goes_back_and_nothing_is_done_twice_at_once(
    queued: list[tuple[str, int, float]],
) -> None:
    clock = Clock()
    spans: dict[str, list[tuple[float, float]]] = {"launch": [], "copy": []}
    for kind, stream, seconds in queued:
        before_s, stream_before_s = clock.host_s, clock.done_s(stream)
        if kind == "launch":
            span = clock.launch(2, host_s=seconds / 3, gpu_s=seconds, stream=stream)
            spans[kind].append(span)
        elif kind == "copy":
            span = clock.copy(seconds, stream=stream, engine=TO_GPU)
            spans[kind].append(span)
        elif kind == "event":
            assert clock.record_event(stream) >= stream_before_s
        else:
            clock.synchronise(stream)
            assert clock.host_s >= clock.done_s(stream)
        assert clock.host_s >= before_s
        assert clock.done_s(stream) >= stream_before_s
    for one_engine in spans.values():
        busy = sorted(s for s in one_engine if s[0] < s[1])
        if one_engine is spans["copy"]:  # a span of two launches may have a gap for another stream
            for (_, end_s), (begin_s, _) in pairwise(busy):
                assert end_s <= begin_s + 1e-9


def test_a_copy_that_waits_for_kernels_holds_up_no_other_stream() -> None:
    clock = Clock()
    clock.launch(1, host_s=0.0, gpu_s=5.0)
    assert clock.copy(1.0, stream=0, engine=TO_GPU) == (5, 6)
    assert clock.copy(2.0, stream=1, engine=TO_GPU) == (0, 2)
    assert clock.copy(3.0, stream=2, engine=TO_GPU) == (2, 5)
    assert clock.copy(3.0, stream=3, engine=TO_GPU) == (6, 9)
