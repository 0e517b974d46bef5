"""The rules of the latency model one at a time, their monotony, and what a placement adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipefit.cost_models import latency
from pipefit.cost_models.clock import LAUNCH_QUEUE
from pipefit.cost_models.latency import (
    LatencyModel,
    attention_kernel,
    kernel_flops,
    kernel_seconds,
    num_launches,
)
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
from pipefit.errors import InvalidRequest

MIB = 1 << 20

A100 = Gpu(
    name="a100-80gb",
    architecture="ampere",
    compute_capability=(8, 0),
    total_bytes=80 << 30,
    free_bytes=80 << 30,
    flops_per_s={"float16": 312e12, "bfloat16": 312e12, "float32": 19.5e12, "tf32": 156e12},
    memory_bytes_per_s=2039e9,
    l2_bytes=40 * MIB,
    num_sms=108,
    clock_hz=1.41e9,
    pcie_generation=4,
    pcie_lanes=16,
    tdp_w=400,
    server=True,
)
H100 = replace(
    A100,
    name="h100-sxm",
    architecture="hopper",
    compute_capability=(9, 0),
    flops_per_s={"bfloat16": 989.4e12, "float16": 989.4e12, "float32": 66.9e12, "tf32": 494.7e12},
    memory_bytes_per_s=3352e9,
    l2_bytes=50 * MIB,
    num_sms=132,
    clock_hz=1.98e9,
)
T4 = replace(
    A100,
    name="t4",
    architecture="turing",
    compute_capability=(7, 5),
    flops_per_s={"float16": 65e12, "bfloat16": 8.1e12, "float32": 8.1e12},
    memory_bytes_per_s=320e9,
    l2_bytes=4 * MIB,
    num_sms=40,
    clock_hz=1.59e9,
    tdp_w=70,
)
BIG = 256 * MIB
"""More than the L2 cache of each GPU here."""


def gemm(m: int, n: int, k: int, *, dtype: str = "bfloat16", batch: int = 1) -> Kernel:
    return Kernel(
        kind="gemm",
        name="aten.mm",
        dtype=dtype,
        read_bytes=2 * batch * (m * k + n * k),
        write_bytes=2 * batch * m * n,
        shape=(batch, m, n, k),
    )


def attention(
    batch: int,
    heads: int,
    rows: int,
    columns: int,
    size: int,
    *,
    dtype: str = "bfloat16",
    masked: bool = False,
) -> Kernel:
    return Kernel(
        kind="attention",
        name="aten._scaled_dot_product_flash_attention",
        dtype=dtype,
        read_bytes=2 * batch * heads * (rows + 2 * columns) * size,
        write_bytes=2 * batch * heads * rows * size,
        shape=(batch, heads, rows, columns, size, size),
        masked=masked,
    )


def conv(
    channels: int, pixels: int, *, dtype: str = "float16", channels_last: bool = False
) -> Kernel:
    size = 2 * channels * pixels * pixels
    weight = 2 * 9 * channels * channels
    return Kernel(
        kind="conv",
        name="aten.convolution",
        dtype=dtype,
        read_bytes=size + weight,
        write_bytes=size,
        shape=(1, channels, channels, 1, 0, pixels, pixels, pixels, pixels, 3, 3),
        input_bytes=size,
        weight_bytes=weight,
        output_bytes=size,
        channels_last=channels_last,
    )


def elementwise(num_bytes: int, **fields: Any) -> Kernel:
    kernel = Kernel(
        kind="elementwise",
        name="aten.add",
        dtype="bfloat16",
        read_bytes=num_bytes // 2,
        write_bytes=num_bytes - num_bytes // 2,
    )
    return replace(kernel, **fields)


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


# -- one launch


def test_a_large_product_runs_at_its_share_of_the_peak() -> None:
    kernel = gemm(128 * 108, 128 * 8, 8192)
    expected = kernel_flops(kernel) * (1 + 67 / 8192) / (0.78 * 312e12)
    assert kernel_seconds(kernel, A100) == pytest.approx(expected + latency.FLOOR_S)


def test_a_short_reduction_pays_for_filling_the_pipeline() -> None:
    long, short = gemm(128 * 108, 12800, 3200), gemm(128 * 108, 128000, 320)
    assert kernel_flops(long) == kernel_flops(short)
    ratio = (1 + 67 / 320) / (1 + 67 / 3200)
    busy = [latency._arithmetic_s(k, A100, "native") for k in (short, long)]
    assert busy[0] / busy[1] == pytest.approx(ratio)


def test_tiles_that_do_not_fill_the_sms_cost_the_root_of_what_is_idle() -> None:
    full, quarter = gemm(128 * 108, 128, 4096), gemm(128 * 27, 128, 4096)
    busy = [latency._arithmetic_s(k, A100, "native") for k in (full, quarter)]
    # A quarter of the work at half the rate.
    assert busy[1] == pytest.approx(busy[0] / 2)


def test_a_product_with_few_columns_is_padded_to_64() -> None:
    assert latency._arithmetic_s(gemm(13824, 4, 3072), A100, "native") == pytest.approx(
        latency._arithmetic_s(gemm(13824, 64, 3072), A100, "native")
    )


def test_a_head_of_40_costs_as_much_as_one_of_64() -> None:
    narrow, wide = attention(2, 8, 4096, 4096, 40), attention(2, 8, 4096, 4096, 64)
    assert kernel_flops(narrow) < kernel_flops(wide)
    assert latency._arithmetic_s(narrow, A100, "flash") == pytest.approx(
        latency._arithmetic_s(wide, A100, "flash")
    )


def test_77_keys_cost_as_much_as_128() -> None:
    few, many = attention(2, 8, 4096, 77, 64), attention(2, 8, 4096, 128, 64)
    assert latency._arithmetic_s(few, A100, "flash") == latency._arithmetic_s(many, A100, "flash")


def test_flux_attention_on_an_h100_takes_48_ms_a_forward() -> None:
    """The fit's own figure: 57 calls of 24 heads on 4608 tokens."""
    assert 57 * kernel_seconds(attention(1, 24, 4608, 4608, 128), H100) == pytest.approx(
        48e-3, rel=0.03
    )


def test_copying_the_layout_of_a_convolution_ends_with_channels_last() -> None:
    planar = kernel_seconds(conv(512, 128), A100)
    last = kernel_seconds(conv(512, 128, channels_last=True), A100)
    sizes = 2 * 512 * 128 * 128, 2 * 512 * 128 * 128, 2 * 9 * 512 * 512
    copies_s = sum(latency._memory_s(2 * size, A100) for size in sizes)
    assert planar - last == pytest.approx(copies_s)


def test_fp32_convolutions_run_in_tf32_and_products_do_not() -> None:
    assert latency._matrix_rate(conv(512, 128, dtype="float32"), A100, 0.52) == 0.52 * 156e12
    assert latency._matrix_rate(gemm(512, 512, 512, dtype="float32"), A100, 0.78) == 0.9 * 19.5e12
    assert latency._matrix_rate(conv(512, 128, dtype="float32"), T4, 0.52) == 0.9 * 8.1e12


def test_parts_that_accumulate_at_half_rate_come_closer_to_it() -> None:
    half = replace(A100, half_rate_accumulate=True)
    assert latency._matrix_rate(conv(512, 128), half, 0.52) == pytest.approx(0.52 * 1.6 * 312e12)
    assert latency._matrix_rate(gemm(512, 512, 512), half, 0.78) == pytest.approx(0.95 * 312e12)


def test_a_card_fed_by_the_slot_keeps_half_of_its_rate() -> None:
    fed = replace(T4, tdp_w=280)
    kernel = gemm(512, 512, 512, dtype="float16")
    capped, free = (latency._matrix_rate(kernel, gpu, 0.78) for gpu in (T4, fed))
    assert capped == pytest.approx(0.51 * free)


def test_bytes_take_70_percent_of_the_bandwidth_and_less_in_cache() -> None:
    assert kernel_seconds(elementwise(BIG), A100) == pytest.approx(
        BIG / (0.7 * 2039e9) + latency.FLOOR_S
    )
    assert kernel_seconds(elementwise(8 * MIB), A100) == pytest.approx(
        8 * MIB / (2.3 * 0.7 * 2039e9) + latency.FLOOR_S
    )


def test_group_norm_is_two_launches_and_three_passes() -> None:
    norm = elementwise(BIG, kind="norm", name="aten.native_group_norm")
    assert num_launches(norm, A100) == 2
    assert kernel_seconds(norm, A100) == pytest.approx(
        1.5 * BIG / (0.7 * 2039e9) + 2 * latency.FLOOR_S
    )


def test_an_embedding_reads_the_rows_it_returns() -> None:
    lookup = elementwise(BIG, kind="index", read_bytes=BIG, write_bytes=1024)
    assert kernel_seconds(lookup, A100) < 2 * latency.FLOOR_S


def test_a_transposed_convolution_counts_its_inputs() -> None:
    # 1 image, 64 -> 32 channels, 16² -> 32², 4 x 4 taps
    kernel = replace(conv(64, 16), shape=(1, 64, 32, 1, 1, 16, 16, 32, 32, 4, 4))
    assert kernel_flops(kernel) == 2 * 16 * 16 * 64 * 32 * 4 * 4


def test_groups_divide_the_work_of_a_convolution() -> None:
    kernel = conv(64, 16)
    depthwise = replace(kernel, shape=(1, 64, 64, 64, *kernel.shape[4:]))
    assert kernel_flops(kernel) == 64 * kernel_flops(depthwise)


@pytest.mark.parametrize(
    ("kernel", "gpu", "expected"),
    [
        (attention(1, 8, 64, 64, 64), A100, "flash"),
        (attention(1, 8, 64, 64, 64, masked=True), A100, "efficient"),
        (attention(1, 8, 64, 64, 512), A100, "efficient"),
        (attention(1, 8, 64, 64, 64, dtype="float32"), A100, "efficient"),
        (attention(1, 8, 64, 64, 64, dtype="float16"), T4, "efficient"),
        (attention(1, 8, 64, 64, 64, dtype="bfloat16"), T4, "math"),
    ],
)
def test_sdpa_takes_flash_where_it_can_and_math_only_where_it_must(
    kernel: Kernel, gpu: Gpu, expected: str
) -> None:
    assert attention_kernel(kernel, gpu, "native") == expected


def test_the_attention_asked_for_is_the_one_counted() -> None:
    kernel = attention(2, 10, 4096, 4096, 64)
    flash, efficient, math_ = (
        kernel_seconds(kernel, A100, name) for name in ("flash", "efficient", "math")
    )
    assert flash < efficient < math_
    assert num_launches(kernel, A100, "math") == latency.MATH_ATTENTION_LAUNCHES


def test_math_attention_launches_as_many_kernels_as_it_is_said_to() -> None:
    kernel = attention(1, 8, 64, 64, 64)
    assert len(latency._unfused(kernel)) == num_launches(kernel, A100, "math")
    masked = replace(kernel, masked=True)
    assert len(latency._unfused(masked)) == num_launches(masked, A100, "math")


@pytest.mark.parametrize(
    ("figures", "named"),
    [
        ({"flops_per_s": {}}, "fp32 rate is"),
        ({"memory_bytes_per_s": 0.0}, "memory bandwidth is"),
        ({"num_sms": 0, "clock_hz": 0.0}, "number of SMs and clock are"),
    ],
)
def test_a_gpu_without_figures_is_refused_by_name(figures: Mapping[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        kernel_seconds(elementwise(BIG), replace(A100, **figures))


def test_the_cpu_stands_for_a_gpu_by_its_cores() -> None:
    cpu = Gpu(name="cpu", architecture="cpu", total_bytes=1, free_bytes=1, num_sms=4)
    kernel = gemm(4096, 4096, 4096)
    assert kernel_seconds(kernel, cpu) == pytest.approx(kernel_flops(kernel) / 48e9)
    assert kernel_seconds(elementwise(BIG), cpu) == BIG / latency.CPU_BYTES_PER_S


kernels_of_any_kind = st.one_of(
    st.builds(gemm, st.integers(1, 9999), st.integers(1, 9999), st.integers(1, 9999)),
    st.builds(
        attention,
        st.integers(1, 2),
        st.integers(1, 32),
        st.integers(1, 9999),
        st.integers(1, 9999),
        st.sampled_from([8, 40, 64, 80, 128, 160, 256, 512]),
        masked=st.booleans(),
    ),
    st.builds(conv, st.integers(1, 1024), st.integers(1, 512), channels_last=st.booleans()),
    st.builds(elementwise, st.integers(0, 1 << 34)),
)


@given(
    kernel=kernels_of_any_kind,
    faster=st.floats(1, 10),
    wider=st.floats(1, 10),
    cache=st.floats(1, 10),
)
def test_a_gpu_with_higher_rates_is_never_slower(
    kernel: Kernel, faster: float, wider: float, cache: float
) -> None:
    better = replace(
        A100,
        flops_per_s={k: v * faster for k, v in A100.flops_per_s.items()},
        memory_bytes_per_s=A100.memory_bytes_per_s * wider,
        l2_bytes=int(A100.l2_bytes * cache),
        clock_hz=A100.clock_hz * faster,
    )
    assert kernel_seconds(kernel, better) <= kernel_seconds(kernel, A100) * (1 + 1e-12)


@given(kernel=kernels_of_any_kind, more=st.integers(0, 1 << 34))
def test_more_bytes_are_never_faster(kernel: Kernel, more: int) -> None:
    heavier = replace(kernel, read_bytes=kernel.read_bytes + more)
    assert kernel_seconds(heavier, A100) >= kernel_seconds(kernel, A100)


@given(kernel=kernels_of_any_kind)
def test_no_launch_beats_the_floor(kernel: Kernel) -> None:
    assert kernel_seconds(kernel, A100) >= latency.FLOOR_S * num_launches(kernel, A100)


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
