"""Each rule with the published peak that established it, in units of one tensor of the decoder."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipefit.cost_models.context import DEFAULT_CONTEXT_BYTES, context_bytes
from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.units import GIB, MIB
from pipefit.cost_models.workload import Kernel
from pipefit.cost_models.workspace import cublas_bytes, scratch_bytes, workspace_bytes

PLANE = 128 * 1024 * 1024 * 2
WEIGHT = 256 * 256 * 9 * 2
UPSAMPLER = Kernel(
    kind="conv",
    name="aten.convolution",
    dtype="bfloat16",
    read_bytes=2 * PLANE + WEIGHT,
    write_bytes=2 * PLANE,
    shape=(1, 256, 256, 1, 0, 1024, 1024, 1024, 1024, 3, 3),
    input_bytes=2 * PLANE,
    weight_bytes=WEIGHT,
    output_bytes=2 * PLANE,
)
"""FLUX.1's autoencoder at 1024², up block 2: the kernel at the peak of batch 1."""


def gpu(capability: tuple[int, int] | None, architecture: str = "unknown") -> Gpu:
    return Gpu(
        name="any",
        architecture=architecture,
        compute_capability=capability,
        total_bytes=24 * GIB,
        free_bytes=24 * GIB,
    )


H100, A100, T4 = gpu((9, 0), "hopper"), gpu((8, 0), "ampere"), gpu((7, 5), "turing")


@pytest.mark.parametrize("card", [H100, A100, gpu(None, "ada"), gpu((12, 0), "blackwell")])
def test_16_bit_convolutions_convert_input_weight_and_result(card: Gpu) -> None:
    assert workspace_bytes(UPSAMPLER, card) == 4 * PLANE + WEIGHT


def test_older_cards_write_the_result_directly() -> None:
    assert workspace_bytes(replace(UPSAMPLER, dtype="float16"), T4) == 2 * PLANE + WEIGHT


def test_fp32_convolutions_write_the_result_directly() -> None:
    assert workspace_bytes(replace(UPSAMPLER, dtype="float32"), A100) == 2 * PLANE + WEIGHT


def test_unknown_hardware_gets_the_larger_rule() -> None:
    unknown = gpu(None)
    for kernel in (UPSAMPLER, replace(UPSAMPLER, dtype="float32")):
        assert workspace_bytes(kernel, unknown) == max(
            workspace_bytes(kernel, card) for card in (H100, A100, T4)
        )


def test_channels_last_needs_only_the_weight_in_that_layout() -> None:
    last = replace(UPSAMPLER, channels_last=True)
    assert workspace_bytes(last, H100) == WEIGHT
    assert workspace_bytes(replace(last, weight_channels_last=True), H100) == 0


def test_an_input_that_is_not_contiguous_is_copied_first() -> None:
    odd = replace(UPSAMPLER, contiguous_input=False)
    assert scratch_bytes(odd, H100) == (2 * PLANE, 4 * PLANE + WEIGHT)


def test_indexing_beyond_31_bits_ends_the_conversions() -> None:
    """FLUX batch 8 pays the usual scratch, batch 16 none."""
    batch_8 = replace(UPSAMPLER, input_bytes=16 * PLANE, output_bytes=8 * PLANE)
    assert batch_8.input_bytes == 2 * 2**31
    assert workspace_bytes(batch_8, H100) == 24 * PLANE + WEIGHT
    assert workspace_bytes(replace(batch_8, input_bytes=32 * PLANE), H100) == 0


def test_depthwise_convolutions_need_none() -> None:
    depthwise = replace(UPSAMPLER, shape=(1, 256, 256, 256, 0, 1024, 1024, 1024, 1024, 3, 3))
    assert workspace_bytes(depthwise, H100) == 0


def test_fused_attention_needs_none_and_math_holds_two_score_matrices() -> None:
    fused = Kernel(
        kind="attention",
        name="aten._scaled_dot_product_flash_attention_for_cpu",
        dtype="float16",
        read_bytes=1,
        write_bytes=1,
        shape=(1, 24, 4608, 4608, 128, 128),
    )
    scores = 24 * 4608 * 4608 * 4
    assert workspace_bytes(fused, H100) == 0
    math = replace(fused, name="aten._scaled_dot_product_attention_math")
    assert workspace_bytes(math, H100) == 2 * scores + 24 * 4608 * 3 * 128 * 4
    assert workspace_bytes(replace(math, dtype="float32"), H100) == 2 * scores


def test_bfloat16_attention_falls_back_to_math_before_ampere() -> None:
    kernel = Kernel(
        kind="attention",
        name="aten._scaled_dot_product_flash_attention_for_cpu",
        dtype="bfloat16",
        read_bytes=1,
        write_bytes=1,
        shape=(1, 1, 1024, 1024, 64, 64),
    )
    assert workspace_bytes(kernel, T4) > 2 * 4 * MIB > 0 == workspace_bytes(kernel, A100)


def test_other_kernels_and_the_cpu_need_none() -> None:
    assert workspace_bytes(replace(UPSAMPLER, kind="norm"), H100) == 0
    assert workspace_bytes(UPSAMPLER, gpu(None, "cpu")) == 0
    assert cublas_bytes(gpu(None, "cpu")) == 0


def test_cublas_takes_more_from_hopper_on() -> None:
    assert cublas_bytes(A100) == cublas_bytes(T4) == 8_519_680
    assert cublas_bytes(H100) == cublas_bytes(gpu(None)) == 32 * MIB


def test_a_measured_context_wins_over_the_table() -> None:
    assert context_bytes(replace(H100, context_bytes=5)) == 5
    assert context_bytes(H100) == DEFAULT_CONTEXT_BYTES
    assert 0.59 * GIB <= context_bytes(gpu((12, 0), "blackwell")) <= 0.65 * GIB
