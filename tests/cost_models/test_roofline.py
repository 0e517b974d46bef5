"""How long one launch takes: the rules one at a time, and their monotony."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.cost_models.kernels import A100, BIG, H100, MIB, elementwise, gemm

from pipefit.cost_models import roofline
from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.roofline import (
    attention_kernel,
    kernel_flops,
    kernel_seconds,
    num_launches,
)
from pipefit.cost_models.workload import Kernel
from pipefit.errors import InvalidRequest

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


def test_a_large_product_runs_at_its_share_of_the_peak() -> None:
    kernel = gemm(128 * 108, 128 * 8, 8192)
    expected = kernel_flops(kernel) * (1 + 67 / 8192) / (0.78 * 312e12)
    assert kernel_seconds(kernel, A100) == pytest.approx(expected + roofline.FLOOR_S)


def test_a_short_reduction_pays_for_filling_the_pipeline() -> None:
    long, short = gemm(128 * 108, 12800, 3200), gemm(128 * 108, 128000, 320)
    assert kernel_flops(long) == kernel_flops(short)
    ratio = (1 + 67 / 320) / (1 + 67 / 3200)
    busy = [roofline._arithmetic_s(k, A100, "native") for k in (short, long)]
    assert busy[0] / busy[1] == pytest.approx(ratio)


def test_tiles_that_do_not_fill_the_sms_cost_the_root_of_what_is_idle() -> None:
    full, quarter = gemm(128 * 108, 128, 4096), gemm(128 * 27, 128, 4096)
    busy = [roofline._arithmetic_s(k, A100, "native") for k in (full, quarter)]
    # A quarter of the work at half the rate.
    assert busy[1] == pytest.approx(busy[0] / 2)


def test_a_product_with_few_columns_is_padded_to_64() -> None:
    assert roofline._arithmetic_s(gemm(13824, 4, 3072), A100, "native") == pytest.approx(
        roofline._arithmetic_s(gemm(13824, 64, 3072), A100, "native")
    )


def test_a_head_of_40_costs_as_much_as_one_of_64() -> None:
    narrow, wide = attention(2, 8, 4096, 4096, 40), attention(2, 8, 4096, 4096, 64)
    assert kernel_flops(narrow) < kernel_flops(wide)
    assert roofline._arithmetic_s(narrow, A100, "flash") == pytest.approx(
        roofline._arithmetic_s(wide, A100, "flash")
    )


def test_77_keys_cost_as_much_as_128() -> None:
    few, many = attention(2, 8, 4096, 77, 64), attention(2, 8, 4096, 128, 64)
    assert roofline._arithmetic_s(few, A100, "flash") == roofline._arithmetic_s(many, A100, "flash")


def test_flux_attention_on_an_h100_takes_48_ms_a_forward() -> None:
    """The fit's own figure: 57 calls of 24 heads on 4608 tokens."""
    assert 57 * kernel_seconds(attention(1, 24, 4608, 4608, 128), H100) == pytest.approx(
        48e-3, rel=0.03
    )


def test_copying_the_layout_of_a_convolution_ends_with_channels_last() -> None:
    planar = kernel_seconds(conv(512, 128), A100)
    last = kernel_seconds(conv(512, 128, channels_last=True), A100)
    sizes = 2 * 512 * 128 * 128, 2 * 512 * 128 * 128, 2 * 9 * 512 * 512
    copies_s = sum(roofline._memory_s(2 * size, A100) for size in sizes)
    assert planar - last == pytest.approx(copies_s)


def test_fp32_convolutions_run_in_tf32_and_products_do_not() -> None:
    assert roofline._matrix_rate(conv(512, 128, dtype="float32"), A100, 0.52) == 0.52 * 156e12
    assert roofline._matrix_rate(gemm(512, 512, 512, dtype="float32"), A100, 0.78) == 0.9 * 19.5e12
    assert roofline._matrix_rate(conv(512, 128, dtype="float32"), T4, 0.52) == 0.9 * 8.1e12


def test_parts_that_accumulate_at_half_rate_come_closer_to_it() -> None:
    half = replace(A100, half_rate_accumulate=True)
    assert roofline._matrix_rate(conv(512, 128), half, 0.52) == pytest.approx(0.52 * 1.6 * 312e12)
    assert roofline._matrix_rate(gemm(512, 512, 512), half, 0.78) == pytest.approx(0.95 * 312e12)


def test_a_card_fed_by_the_slot_keeps_half_of_its_rate() -> None:
    fed = replace(T4, tdp_w=280)
    kernel = gemm(512, 512, 512, dtype="float16")
    capped, free = (roofline._matrix_rate(kernel, gpu, 0.78) for gpu in (T4, fed))
    assert capped == pytest.approx(0.51 * free)


def test_bytes_take_70_percent_of_the_bandwidth_and_less_in_cache() -> None:
    assert kernel_seconds(elementwise(BIG), A100) == pytest.approx(
        BIG / (0.7 * 2039e9) + roofline.FLOOR_S
    )
    assert kernel_seconds(elementwise(8 * MIB), A100) == pytest.approx(
        8 * MIB / (2.3 * 0.7 * 2039e9) + roofline.FLOOR_S
    )


def test_group_norm_is_two_launches_and_three_passes() -> None:
    norm = elementwise(BIG, kind="norm", name="aten.native_group_norm")
    assert num_launches(norm, A100) == 2
    assert kernel_seconds(norm, A100) == pytest.approx(
        1.5 * BIG / (0.7 * 2039e9) + 2 * roofline.FLOOR_S
    )


def test_an_embedding_reads_the_rows_it_returns() -> None:
    lookup = elementwise(BIG, kind="index", read_bytes=BIG, write_bytes=1024)
    assert kernel_seconds(lookup, A100) < 2 * roofline.FLOOR_S


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
    assert num_launches(kernel, A100, "math") == roofline.MATH_ATTENTION_LAUNCHES


def test_math_attention_launches_as_many_kernels_as_it_is_said_to() -> None:
    kernel = attention(1, 8, 64, 64, 64)
    assert len(roofline._unfused(kernel)) == num_launches(kernel, A100, "math")
    masked = replace(kernel, masked=True)
    assert len(roofline._unfused(masked)) == num_launches(masked, A100, "math")


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
    assert kernel_seconds(elementwise(BIG), cpu) == BIG / roofline.CPU_BYTES_PER_S


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
    assert kernel_seconds(kernel, A100) >= roofline.FLOOR_S * num_launches(kernel, A100)
