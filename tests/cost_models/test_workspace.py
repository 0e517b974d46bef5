"""Each rule with the published peak that established it, in units of one tensor of the decoder."""

from __future__ import annotations

from dataclasses import replace

import pytest

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


def test_unknown_hardware_gets_the_larger_of_cudnns_rules() -> None:
    unknown = gpu(None)
    for kernel in (replace(UPSAMPLER, dtype="float16"), replace(UPSAMPLER, dtype="float32")):
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


def test_trying_a_convolution_takes_its_tensors_and_two_results_more_and_the_flush() -> None:
    """FLUX.1-dev at batch 16, SDXL at batch 1: eight 128-channel tensors and Triton's buffer."""
    card = replace(A100, l2_bytes=40 * MIB, num_sms=108)
    tried = replace(UPSAMPLER, launcher="tried")
    assert scratch_bytes(tried, card) == (2 * PLANE, WEIGHT, *[2 * PLANE] * 3, 40 * MIB)
    unknown = replace(card, l2_bytes=0, num_sms=0)
    assert scratch_bytes(tried, unknown)[-1] == 256 * MIB
    assert scratch_bytes(tried, replace(card, num_sms=67)) == ()
    # What has one choice alone is not tried.
    transposed = (*tried.shape[:4], 1, *tried.shape[5:])
    assert scratch_bytes(replace(tried, shape=transposed), card) == ()
    line = replace(tried, shape=(1, 256, 256, 1, 0, 1024, 1024, 3))
    assert scratch_bytes(line, card) == ()
    for groups, kernel_size in ((1, 1), (256, 3)):
        chosen = replace(line, shape=(1, 256, 256, groups, 0, 1024, 1024, kernel_size))
        assert scratch_bytes(chosen, card)[:5] == (2 * PLANE, WEIGHT, *[2 * PLANE] * 3)
    # Apple's kernels are not timed, and AMD's compute units are not counted.
    apple = replace(unknown, architecture="apple", compute_capability=None)
    assert scratch_bytes(tried, apple) == ()
    amd = replace(unknown, architecture="rdna3", compute_capability=None, num_sms=32)
    assert scratch_bytes(tried, amd) == scratch_bytes(tried, unknown)


def test_trying_what_writes_into_a_given_result_takes_one_result() -> None:
    card = replace(A100, l2_bytes=40 * MIB)
    product = replace(UPSAMPLER, kind="gemm", shape=(1, 64, 64, 64), launcher="tried")
    assert scratch_bytes(product, card) == (2 * PLANE + WEIGHT, 2 * PLANE, 40 * MIB)
    pointwise = replace(UPSAMPLER, shape=(*UPSAMPLER.shape[:-2], 1, 1), launcher="tried")
    assert scratch_bytes(pointwise, card) == (2 * PLANE, WEIGHT, 2 * PLANE, 40 * MIB)


def test_three_dimensions_are_tried_as_they_lie() -> None:
    card = replace(A100, l2_bytes=40 * MIB)
    shape = (1, 256, 256, 1, 0, 1, 1024, 1024, 1, 1024, 1024, 3, 3, 3)
    video = replace(UPSAMPLER, shape=shape, launcher="tried")
    expected = (2 * PLANE, WEIGHT, *[2 * PLANE] * 3, 40 * MIB, 4 * PLANE + WEIGHT)
    assert scratch_bytes(video, card) == expected


def test_what_inductor_writes_is_timed_beside_all_that_is_alive() -> None:
    card = replace(A100, l2_bytes=40 * MIB)
    fused = Kernel(kind="elementwise", name="fused", dtype="bfloat16", read_bytes=1, write_bytes=1)
    assert scratch_bytes(fused, card) == ()
    assert scratch_bytes(replace(fused, launcher="traced"), card) == ()
    for launcher in ("compiled", "captured"):
        assert scratch_bytes(replace(fused, launcher=launcher), card) == (40 * MIB,)
        apple = replace(card, architecture="apple", compute_capability=None)
        assert workspace_bytes(replace(fused, launcher=launcher), apple) == 0
    # A library's kernel that is not tried is not timed either.
    library = replace(UPSAMPLER, launcher="compiled")
    assert scratch_bytes(library, card) == scratch_bytes(UPSAMPLER, card)


DEPTHWISE = replace(UPSAMPLER, shape=(1, 256, 256, 256, 0, 1024, 1024, 1024, 1024, 3, 3))


def test_depthwise_convolutions_are_torchs_own_except_where_cudnn_may_take_them() -> None:
    assert workspace_bytes(DEPTHWISE, H100) == 0
    assert workspace_bytes(replace(DEPTHWISE, dtype="float32"), H100) == 0
    assert workspace_bytes(replace(DEPTHWISE, dtype="float16"), H100) == 4 * PLANE + WEIGHT
    few = replace(DEPTHWISE, dtype="float16", shape=(1, 16, 16, 16, 0, 64, 64, 64, 64, 3, 3))
    assert workspace_bytes(few, H100) == 0


def test_grouped_and_transposed_convolutions_are_charged_in_full() -> None:
    grouped = replace(UPSAMPLER, shape=(1, 256, 256, 32, 0, 1024, 1024, 1024, 1024, 3, 3))
    assert workspace_bytes(grouped, H100) == 4 * PLANE + WEIGHT
    transposed = replace(UPSAMPLER, shape=(1, 256, 256, 1, 1, 1024, 1024, 1024, 1024, 3, 3))
    for dtype, card in (("bfloat16", H100), ("float32", H100), ("float16", T4)):
        assert workspace_bytes(replace(transposed, dtype=dtype), card) == 4 * PLANE + WEIGHT
    own_group = replace(transposed, shape=(1, 256, 256, 256, 1, 64, 64, 128, 128, 3, 3))
    assert workspace_bytes(own_group, H100) == 4 * PLANE + WEIGHT


def test_fp32_in_channels_last_converts_where_there_are_no_tensor_cores_for_it() -> None:
    last = replace(UPSAMPLER, dtype="float32", channels_last=True, weight_channels_last=True)
    assert workspace_bytes(last, A100) == 0
    assert workspace_bytes(last, T4) == 2 * PLANE + WEIGHT


def test_bfloat16_before_ampere_unfolds_one_image() -> None:
    """cuDNN has no such kernel there; torch writes out the nine neighbours of each position."""
    assert workspace_bytes(UPSAMPLER, T4) == 256 * 9 * 1024 * 1024 * 2
    four = replace(UPSAMPLER, shape=(4, *UPSAMPLER.shape[1:]), input_bytes=8 * PLANE)
    assert workspace_bytes(four, T4) == workspace_bytes(UPSAMPLER, T4)
    pointwise = replace(UPSAMPLER, shape=(1, 256, 256, 1, 0, 1024, 1024, 1024, 1024, 1, 1))
    assert workspace_bytes(pointwise, T4) == 0
    causal_3d = replace(UPSAMPLER, shape=(1, 96, 96, 1, 0, 3, 64, 64, 1, 64, 64, 3, 3, 3))
    assert workspace_bytes(causal_3d, T4) == 96 * 27 * 64 * 64 * 2
    grouped = replace(UPSAMPLER, shape=(1, 256, 256, 4, 0, 1024, 1024, 1024, 1024, 3, 3))
    assert scratch_bytes(grouped, T4) == (PLANE // 2, 2 * PLANE, 64 * 9 * 1024 * 1024 * 2)


FUSED = Kernel(
    kind="attention",
    name="aten._scaled_dot_product_flash_attention",
    dtype="float16",
    read_bytes=1,
    write_bytes=1,
    shape=(1, 24, 4608, 4608, 128, 128),
)


def test_fused_attention_needs_none() -> None:
    assert workspace_bytes(FUSED, H100) == 0
    efficient = replace(FUSED, name="aten._scaled_dot_product_efficient_attention")
    assert workspace_bytes(efficient, T4) == 0


def test_the_efficient_kernel_keeps_fp32_sums_of_wide_heads_in_memory() -> None:
    """The mid block of AutoencoderKL at 1024²: one head of 512."""
    wide = replace(
        FUSED,
        name="aten._scaled_dot_product_efficient_attention",
        shape=(1, 1, 16384, 16384, 512, 512),
    )
    assert workspace_bytes(wide, A100) == workspace_bytes(wide, T4) == 16384 * 512 * 4
    assert workspace_bytes(replace(wide, dtype="float32"), A100) == 0


def test_bfloat16_attention_falls_back_to_math_before_ampere() -> None:
    kernel = replace(FUSED, dtype="bfloat16")
    scores = 24 * 4608 * 4608
    widened = 5 * 24 * 4608 * 128
    assert workspace_bytes(kernel, T4) == 9 * scores + 4 * widened
    assert workspace_bytes(kernel, A100) == 0


def test_a_softmax_that_minds_masked_rows_writes_a_byte_a_score() -> None:
    softmax = replace(FUSED, kind="reduce", name="aten._safe_softmax", shape=(1, 48, 64, 64))
    assert workspace_bytes(softmax, H100) == 48 * 64 * 64


def test_upsampling_copies_an_input_that_is_dense_in_no_layout() -> None:
    upsample = replace(UPSAMPLER, kind="copy", name="aten.upsample_nearest2d", shape=(1,))
    assert workspace_bytes(upsample, H100) == 0
    assert workspace_bytes(replace(upsample, contiguous_input=False), H100) == 2 * PLANE


def test_other_kernels_and_the_cpu_need_none() -> None:
    assert workspace_bytes(replace(UPSAMPLER, kind="norm"), H100) == 0
    assert workspace_bytes(UPSAMPLER, gpu(None, "cpu")) == 0
    assert cublas_bytes(gpu(None, "cpu")) == 0


def test_cublas_takes_more_from_hopper_on() -> None:
    assert cublas_bytes(A100) == cublas_bytes(T4) == 8_519_680
    assert cublas_bytes(H100) == cublas_bytes(gpu(None)) == 32 * MIB


def test_older_versions_of_torch_give_blackwell_what_ampere_has() -> None:
    blackwell = gpu((12, 0), "blackwell")
    assert cublas_bytes(blackwell) == cublas_bytes(blackwell, "2.13.0+cu130") == 32 * MIB
    assert cublas_bytes(blackwell, "2.9.1+cu130") == 8_519_680
    assert cublas_bytes(H100, "2.5.0.dev20240901") == 32 * MIB
    assert cublas_bytes(A100, "2.13.0") == 8_519_680
