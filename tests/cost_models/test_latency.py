"""The rules of the latency model one at a time, and what a placement adds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.cost_models.kernels import A100, BIG, H100, MIB, elementwise, gemm

from pipefit.cost_models import latency
from pipefit.cost_models.clock import LAUNCH_QUEUE
from pipefit.cost_models.latency import LatencyModel
from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.placement import (
    GroupOffload,
    ModelOffload,
    Placement,
    Resident,
    SequentialOffload,
    Streaming,
)
from pipefit.cost_models.residency import sequential_groups
from pipefit.cost_models.roofline import kernel_seconds
from pipefit.cost_models.transfers import (
    COPY_LATENCY_S,
    FRESH_HOST_BYTES_PER_S,
    GROUP_SYNC_S,
    PIN_BLOCK_BYTES_PER_S,
    PIN_LEAF_BYTES_PER_S,
    SEQUENTIAL_TENSOR_S,
    link_rates,
)
from pipefit.cost_models.workload import (
    SYNCHRONISE,
    Component,
    Event,
    Kernel,
    ModuleInfo,
    Phase,
    Routine,
    TensorInfo,
    Workload,
)


def workload(
    kernels: tuple[Kernel, ...],
    routines: tuple[tuple[Event, ...], ...],
    *,
    entry: str = "forward",
    component: Component | None = None,
) -> Workload:
    """Routine 0 is the component's call."""
    return Workload(
        pipeline="test",
        pipeline_class="Test",
        call={},
        components=(component,) if component else (),
        kernels=kernels,
        routines=tuple(
            Routine(
                module_class="M", entry=entry if i == 0 else "forward", events=events, returns=()
            )
            for i, events in enumerate(routines)
        ),
        root=(("c", 0, "/model", (), ()),),
        phases=(),
    )


# -- calls


def test_a_routine_is_the_sum_of_what_it_launches_and_calls() -> None:
    block: tuple[Event, ...] = (("k", 0), ("k", 1), ("a", 0, 8), ("f", 0))
    model: tuple[Event, ...] = (
        ("k", 1),
        *(("c", 1, f"blocks.{i}", (), ()) for i in range(60)),
    )
    kernels = (gemm(4096, 4096, 4096), elementwise(BIG))
    times = LatencyModel(workload(kernels, (model, block)), A100)
    cost = times.routine_cost(0)
    assert cost.num_launches == 121
    assert cost.gpu_s == pytest.approx(
        60 * kernel_seconds(kernels[0], A100) + 61 * kernel_seconds(kernels[1], A100)
    )
    assert times.executions(0)["blocks.59"] == 1


def test_the_same_module_called_by_another_method_is_not_a_second_execution() -> None:
    decode: tuple[Event, ...] = (("c", 1, "", (), ()),)
    inner: tuple[Event, ...] = (("c", 2, "decoder", (), ()), ("c", 2, "decoder", (), ()))
    times = LatencyModel(workload((elementwise(8),), (decode, inner, (("k", 0),))), A100)
    assert times.executions(0) == {"": 1, "decoder": 2}


def test_many_small_launches_take_as_long_as_the_host_needs() -> None:
    """Stable Diffusion 1.5's UNet: 789 launches cap an A100 at 24 steps a second, a 4090 at 41."""
    events: tuple[Event, ...] = (("k", 0),) * 789
    small = workload((elementwise(1024),), (events,))
    # The last one runs after it was issued.
    last_s = kernel_seconds(small.kernels[0], A100)
    assert LatencyModel(small, A100).call_seconds(0) == pytest.approx(789 * 53e-6 + last_s)
    desktop = replace(A100, server=False)
    assert LatencyModel(small, desktop).call_seconds(0) == pytest.approx(24.5e-3, rel=0.01)


def test_the_host_gets_no_further_ahead_than_its_queue_allows() -> None:
    """A tiled decoder: large kernels first, then many small ones that glue its tiles together."""
    events: tuple[Event, ...] = (*(("k", 0),) * 2000, *(("k", 1),) * 5000)
    tiled = workload((elementwise(BIG), elementwise(1024), SYNCHRONISE), (events,))
    large_s = kernel_seconds(tiled.kernels[0], A100)
    launch_s = latency.launch_seconds(A100)
    # In the time of the large ones the host could issue all.
    assert 7000 * launch_s < 2000 * large_s
    left = 5000 - LAUNCH_QUEUE
    expected_s = 2000 * large_s + left * launch_s
    assert LatencyModel(tiled, A100).call_seconds(0) == pytest.approx(expected_s, rel=0.02)
    waiting = (*events[:2000], ("k", 2), *events[2000:])
    synchronised = LatencyModel(workload(tiled.kernels, (waiting,)), A100)
    expected_s = 2000 * large_s + 5000 * launch_s
    assert synchronised.call_seconds(0) == pytest.approx(expected_s, rel=0.02)


def test_kernels_of_the_pipeline_itself_are_counted_apart_from_its_components() -> None:
    plain = workload((elementwise(BIG),), ((("k", 0),),))
    times = LatencyModel(replace(plain, root=(("k", 0), *plain.root, ("k", 0))), A100)
    assert times.own_seconds() == pytest.approx(2 * kernel_seconds(elementwise(BIG), A100))


# -- placements

BLOCK_BYTES = 512 * MIB
REST_BYTES = 64 * MIB
NUM_BLOCKS = 8


def model_of_blocks(entry: str = "forward", compute_bytes: int = BIG) -> Workload:
    """Eight blocks of one linear layer each, and a linear layer outside the list."""
    modules = [ModuleInfo(path="", class_name="Model")]
    modules.append(ModuleInfo(path="rest", class_name="Linear", is_leaf_layer=True))
    modules.append(
        ModuleInfo(path="blocks", class_name="ModuleList", is_block_list=True, is_container=True)
    )
    tensors = [TensorInfo(path="rest.weight", num_bytes=REST_BYTES, dtype="bfloat16", shape=(1, 1))]
    for i in range(NUM_BLOCKS):
        modules.append(ModuleInfo(path=f"blocks.{i}", class_name="Block"))
        modules.append(
            ModuleInfo(path=f"blocks.{i}.linear", class_name="Linear", is_leaf_layer=True)
        )
        tensors.append(
            TensorInfo(
                path=f"blocks.{i}.linear.weight",
                num_bytes=BLOCK_BYTES,
                dtype="bfloat16",
                shape=(1, 1),
            )
        )
    component = Component(
        name="model",
        class_name="Model",
        library="diffusers",
        tensors=tuple(tensors),
        modules=tuple(modules),
    )
    call: tuple[Event, ...] = (
        ("c", 2, "rest", (), ()),
        *(("c", 1, f"blocks.{i}", (), ()) for i in range(NUM_BLOCKS)),
    )
    block: tuple[Event, ...] = (("c", 2, "linear", (), ()),)
    return workload(
        (elementwise(compute_bytes),),
        (call, block, (("k", 0),)),
        entry=entry,
        component=component,
    )


def placed(
    placement: Placement, *, count: int = 1, entry: str = "forward", compute_bytes: int = BIG
) -> latency.PlacementTime:
    plan = model_of_blocks(entry, compute_bytes)
    return LatencyModel(plan, A100).placement_seconds(plan.components[0], [(0, count)], placement)


STREAMED_BYTES = NUM_BLOCKS * BLOCK_BYTES
WEIGHT_BYTES = STREAMED_BYTES + REST_BYTES
LINK = link_rates(A100)
STREAM_S = STREAMED_BYTES / LINK.h2d_streamed_bytes_per_s + NUM_BLOCKS * COPY_LATENCY_S
REST_S = LINK.round_trip_s(REST_BYTES, 1)


@pytest.mark.parametrize("waits", [False, True])
def test_a_call_whose_blocks_all_stay_takes_what_a_resident_one_does(waits: bool) -> None:
    """Also where the host's queue is full, or the host waits in the middle."""
    small: tuple[Event, ...] = (("k", 1),) * 5000
    pause: tuple[Event, ...] = (("k", 2),) if waits else ()
    plain = model_of_blocks()
    plan = workload(
        (elementwise(BIG), elementwise(1024), SYNCHRONISE),
        (
            (*plain.routines[0].events, *pause, *small),
            plain.routines[1].events,
            (("k", 0),) * 300,
        ),
        component=plain.components[0],
    )
    phase = Phase(name="denoise", component="model", entry="forward", calls=(0, 1))
    plan = replace(plan, root=(("c", 0, "/model", (), ()),) * 2, phases=(phase,))
    times = LatencyModel(plan, A100)
    all_blocks = NUM_BLOCKS + 1  # the layer outside of the list is one as well
    stay = Streaming(resident_blocks=all_blocks, when_idle="leave", max_block_bytes=BLOCK_BYTES)
    cold = times.streaming_seconds(replace(phase, calls=(0,)), stay, {})
    later = times.streaming_seconds(replace(phase, calls=(1,)), stay, {})
    assert later.call_s == pytest.approx(times.call_seconds(0), rel=0.01)
    assert cold.call_s > later.call_s
    assert (cold.h2d_bytes, later.h2d_bytes) == (WEIGHT_BYTES, 0)


BLOCK_STREAM = GroupOffload(offload_type="block_level", use_stream=True, record_stream=True)
LEAF_STREAM = GroupOffload(offload_type="leaf_level", use_stream=True, record_stream=True)
HEAVY = 1 << 40
"""Bytes of arithmetic per layer that take longer than any copy here."""


def test_resident_weights_cost_nothing_and_first_calls_are_like_later_ones() -> None:
    time = placed(Resident(), count=50)
    assert time.first_call_s == time.call_s == pytest.approx(50 * placed(Resident()).call_s)
    assert time.h2d_bytes == time.d2h_bytes == 0


def test_the_range_is_the_fits_ninetieth_percentile() -> None:
    time = placed(Resident())
    assert time.call_s / time.low_s == pytest.approx(1.3)
    assert time.call_s / time.high_s == pytest.approx(0.7)


def test_model_offload_moves_the_component_there_and_back_once_a_call() -> None:
    time, resident = placed(ModelOffload(), count=50), placed(Resident(), count=50)
    there_s = WEIGHT_BYTES / LINK.h2d_pageable_bytes_per_s
    back_s = WEIGHT_BYTES / LINK.d2h_pageable_bytes_per_s + WEIGHT_BYTES / FRESH_HOST_BYTES_PER_S
    assert time.call_s - resident.call_s == pytest.approx(there_s + back_s)
    assert time.h2d_bytes == time.d2h_bytes == WEIGHT_BYTES


def test_model_offload_of_flux_costs_what_was_published() -> None:
    """33.7 GB in and out of an H100: 15.1 s, diffusers#11682."""
    component = Component(
        name="model",
        class_name="Model",
        library="diffusers",
        tensors=(TensorInfo(path="w", num_bytes=int(33.7e9), dtype="bfloat16", shape=()),),
        modules=(),
    )
    moves = latency._component_moves(component, link_rates(H100), 1, 1)
    assert moves.exposed_s == pytest.approx(15.1, rel=0.03)


def test_model_offload_moves_as_often_as_the_chain_says() -> None:
    plan = model_of_blocks()
    time = LatencyModel(plan, A100).placement_seconds(
        plan.components[0], [(0, 1)], ModelOffload(), num_onloads=3, num_offloads=2
    )
    assert (time.h2d_bytes, time.d2h_bytes) == (3 * WEIGHT_BYTES, 2 * WEIGHT_BYTES)


def test_sequential_offload_pays_for_every_tensor() -> None:
    time, resident = placed(SequentialOffload()), placed(Resident())
    copies_s = WEIGHT_BYTES / LINK.h2d_pageable_bytes_per_s
    assert time.call_s - resident.call_s == pytest.approx(
        copies_s + (NUM_BLOCKS + 1) * SEQUENTIAL_TENSOR_S
    )
    assert (time.h2d_bytes, time.d2h_bytes) == (WEIGHT_BYTES, 0)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offload_without_a_stream_adds_both_ways(offload_type: Any) -> None:
    time = placed(GroupOffload(offload_type=offload_type))
    compute_s = placed(Resident()).call_s
    if offload_type == "leaf_level":  # the host waits at every layer: it issues, then the GPU runs
        cost = LatencyModel(model_of_blocks(), A100).routine_cost(0)
        compute_s = cost.gpu_s + cost.num_launches * latency.launch_seconds(A100)
    added_s = LINK.round_trip_s(WEIGHT_BYTES, NUM_BLOCKS + 1)
    assert time.call_s - compute_s == pytest.approx(added_s)
    assert time.first_call_s == time.call_s
    assert time.h2d_bytes == time.d2h_bytes == WEIGHT_BYTES


def test_streamed_blocks_hide_behind_arithmetic_and_the_rest_does_not() -> None:
    time = placed(BLOCK_STREAM, compute_bytes=HEAVY)
    resident = placed(Resident(), compute_bytes=HEAVY)
    assert time.call_s - resident.call_s == pytest.approx(REST_S)
    assert (time.h2d_bytes, time.d2h_bytes) == (WEIGHT_BYTES, REST_BYTES)


def test_light_arithmetic_waits_for_the_stream() -> None:
    time = placed(BLOCK_STREAM, compute_bytes=1024)
    assert time.call_s == pytest.approx(STREAM_S + REST_S)


def test_the_first_forward_is_not_overlapped_and_only_the_first() -> None:
    time, resident = placed(BLOCK_STREAM, count=50), placed(Resident())
    assert time.first_call_s - time.call_s == pytest.approx(min(resident.call_s, STREAM_S))


def test_without_record_stream_the_host_waits_for_every_group() -> None:
    waiting = replace(BLOCK_STREAM, record_stream=False)
    assert placed(waiting).call_s - placed(BLOCK_STREAM).call_s == pytest.approx(
        NUM_BLOCKS * GROUP_SYNC_S
    )


def test_low_cpu_mem_usage_pins_on_the_critical_path_slower_by_block_than_by_leaf() -> None:
    for stream, rate, size in (
        (BLOCK_STREAM, PIN_BLOCK_BYTES_PER_S, STREAMED_BYTES),
        (LEAF_STREAM, PIN_LEAF_BYTES_PER_S, WEIGHT_BYTES),
    ):
        pinning = replace(stream, low_cpu_mem_usage=True)
        assert placed(pinning).call_s - placed(stream).call_s == pytest.approx(size / rate)


def test_leaves_of_a_component_entered_by_decode_are_never_prefetched() -> None:
    by_decode = placed(LEAF_STREAM, entry="decode", compute_bytes=HEAVY)
    by_forward = placed(LEAF_STREAM, compute_bytes=HEAVY)
    leaves_s = WEIGHT_BYTES / LINK.h2d_streamed_bytes_per_s + (NUM_BLOCKS + 1) * COPY_LATENCY_S
    assert by_decode.call_s - by_forward.call_s == pytest.approx(leaves_s)
    assert by_decode.first_call_s == by_decode.call_s


def test_weights_of_modules_that_a_call_does_not_run_are_not_copied() -> None:
    plan = model_of_blocks()
    first_half = plan.routines[0].events[: 1 + NUM_BLOCKS // 2]
    shorter = replace(
        plan, routines=(replace(plan.routines[0], events=first_half), *plan.routines[1:])
    )
    time = LatencyModel(shorter, A100).placement_seconds(plan.components[0], [(0, 1)], LEAF_STREAM)
    assert time.h2d_bytes == REST_BYTES + NUM_BLOCKS // 2 * BLOCK_BYTES


placements = st.one_of(
    st.just(ModelOffload()),
    st.just(SequentialOffload()),
    st.builds(
        GroupOffload,
        offload_type=st.sampled_from(["block_level", "leaf_level"]),
        num_blocks_per_group=st.integers(1, 4),
        use_stream=st.booleans(),
        record_stream=st.booleans(),
        low_cpu_mem_usage=st.booleans(),
    ),
)


@given(placement=placements, compute_bytes=st.integers(0, 1 << 34), count=st.integers(1, 50))
def test_no_placement_beats_the_arithmetic_or_the_link(
    placement: Placement, compute_bytes: int, count: int
) -> None:
    time = placed(placement, count=count, compute_bytes=compute_bytes)
    resident = placed(Resident(), count=count, compute_bytes=compute_bytes)
    wire_s = time.h2d_bytes / LINK.h2d_pinned_bytes_per_s
    assert time.call_s >= max(resident.call_s, wire_s) * (1 - 1e-9)
    assert time.first_call_s >= time.call_s
    assert time.low_s < time.call_s < time.high_s


@given(placement=placements, lanes=st.sampled_from([4, 8]))
def test_a_narrower_link_is_never_faster(placement: Placement, lanes: int) -> None:
    plan = model_of_blocks()
    wide, narrow = (
        LatencyModel(plan, gpu).placement_seconds(plan.components[0], [(0, 2)], placement).call_s
        for gpu in (A100, replace(A100, pcie_lanes=lanes))
    )
    assert wide <= narrow


def test_on_the_cpu_only_the_hooks_of_sequential_offload_cost_anything() -> None:
    cpu = Gpu(name="cpu", architecture="cpu", total_bytes=1, free_bytes=1, num_sms=2)
    plan = model_of_blocks()
    resident_s, model_s, sequential_s = (
        LatencyModel(plan, cpu).placement_seconds(plan.components[0], [(0, 1)], placement).call_s
        for placement in (Resident(), ModelOffload(), SequentialOffload())
    )
    assert resident_s == pytest.approx(model_s)
    num_tensors = sum(len(g.tensor_bytes) for g in sequential_groups(plan.components[0]).groups)
    assert sequential_s - resident_s == pytest.approx(num_tensors * COPY_LATENCY_S)


def test_the_same_question_is_computed_once() -> None:
    times = LatencyModel(model_of_blocks(), A100)
    assert times.routine_cost(0) is times.routine_cost(0)
