"""From operators on a virtual GPU to the facts that the cost models read, and what they imply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.units import GIB
from pipefit.cost_models.workload import Kernel
from pipefit.cost_models.workspace import workspace_bytes
from pipefit.planner.kernels import kernel_of
from pipefit.planner.virtual import Buffer, Launch, Observer, VirtualDevice, VirtualMachine

F = torch.nn.functional
GPU = torch.device("cuda", 0)
ADA, HOPPER, TURING = (8, 9), (9, 0), (7, 5)


class Recorder(Observer):
    """Keeps the kernels, and the most that was allocated with the scratch of each."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.gpu = Gpu(name="any", total_bytes=GIB, free_bytes=GIB, compute_capability=capability)
        self.kernels: list[Kernel] = []
        self.live = self.peak = 0

    def allocated(self, buffer: Buffer) -> None:
        self.live += buffer.num_bytes
        self.peak = max(self.peak, self.live)

    def freed(self, buffer: Buffer) -> None:
        self.live -= buffer.num_bytes

    def launched(
        self, launch: Launch, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any
    ) -> None:
        kernel = kernel_of(func, args, kwargs, out)
        if kernel is not None:
            self.kernels.append(kernel)
            self.peak = max(self.peak, self.live + workspace_bytes(kernel, self.gpu))


class Run:
    """A machine of one capability, open, with what it recorded."""

    def __init__(self, capability: tuple[int, int] = ADA) -> None:
        self.recorder = Recorder(capability)
        self.machine = VirtualMachine(self.recorder, devices=[VirtualDevice(capability)])

    def __enter__(self) -> Run:
        self.machine.__enter__()
        self._grad = torch.no_grad()
        self._grad.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._grad.__exit__(*exc)
        self.machine.__exit__(*exc)

    def last(self) -> Kernel:
        return self.recorder.kernels[-1]

    def added_bytes(self, function: Any, *args: Any, **kwargs: Any) -> tuple[int, Any]:
        """Return the most that a call adds to what is allocated, and its result."""
        before = self.recorder.peak = self.recorder.live
        out = function(*args, **kwargs)
        return self.recorder.peak - before, out


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=GPU)


# -- convolutions


def test_a_convolution_says_what_cudnn_sees() -> None:
    with Run() as run:
        F.conv2d(on_gpu(2, 16, 32, 32), on_gpu(8, 16, 3, 3), padding=1)
        kernel = run.last()
    assert (kernel.kind, kernel.dtype) == ("conv", "bfloat16")
    assert kernel.shape == (2, 16, 8, 1, 0, 32, 32, 32, 32, 3, 3)
    assert kernel.input_bytes == 2 * 16 * 32 * 32 * 2
    assert kernel.weight_bytes == 8 * 16 * 9 * 2
    assert kernel.output_bytes == 2 * 8 * 32 * 32 * 2
    assert not kernel.channels_last
    assert kernel.contiguous_input


@pytest.mark.parametrize(("dims", "layout"), [(2, "channels_last"), (3, "channels_last_3d")])
@pytest.mark.parametrize("which", ["input", "weight", "both"])
def test_either_operand_decides_for_channels_last(dims: int, layout: str, which: str) -> None:
    memory_format = getattr(torch, layout)
    convolve = (F.conv2d, F.conv3d)[dims - 2]
    with Run() as run:
        x, weight = on_gpu(2, 16, *[8] * dims), on_gpu(8, 16, *[3] * dims)
        if which != "weight":
            x = x.to(memory_format=memory_format)
        if which != "input":
            weight = weight.to(memory_format=memory_format)
        out = convolve(x, weight)
        kernel = run.last()
    assert kernel.channels_last
    assert kernel.weight_channels_last == (which != "input")
    assert kernel.contiguous_input == (which != "weight")
    assert out.is_contiguous(memory_format=memory_format)


def test_float64_never_runs_in_channels_last() -> None:
    with Run() as run:
        x = on_gpu(2, 16, 8, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
        out = F.conv2d(x, on_gpu(8, 16, 3, 3, dtype=torch.float64))
        kernel = run.last()
    assert not kernel.channels_last
    assert not kernel.contiguous_input
    assert out.is_contiguous()


def test_a_convolution_in_one_dimension_makes_its_input_contiguous() -> None:
    """(N, L, C) seen as (N, C, L) would be channels_last once viewed as a picture of one row."""
    with Run() as run:
        out = F.conv1d(on_gpu(2, 32, 16).transpose(1, 2), on_gpu(8, 16, 3))
        kernel = run.last()
    assert not kernel.channels_last
    assert not kernel.contiguous_input
    assert out.is_contiguous()


def test_a_transposed_convolution_says_so() -> None:
    with Run() as run:
        F.conv_transpose1d(on_gpu(1, 16, 10), on_gpu(16, 8, 4), stride=2)
        kernel = run.last()
    assert kernel.shape == (1, 16, 8, 1, 1, 10, 22, 4)
    assert workspace_bytes(kernel, run.recorder.gpu) == (
        kernel.input_bytes + kernel.weight_bytes + kernel.output_bytes
    )


def test_the_view_of_one_image_that_attention_returns_is_copied_for_a_convolution() -> None:
    """The stride of a batch of one decides: (1, HW, C) as a picture is not channels_last to C++."""
    with Run() as run:
        for images, is_last in ((1, False), (4, True)):
            rows = on_gpu(images, 8 * 8, 16)
            x = rows.transpose(1, 2).reshape(images, 16, 8, 8)
            F.conv2d(x, on_gpu(8, 16, 1, 1))
            kernel = run.last()
            assert kernel.channels_last == is_last
            assert kernel.contiguous_input == is_last


def test_upsampling_of_that_view_makes_it_contiguous_first() -> None:
    with Run() as run:
        for images, is_dense in ((1, False), (4, True)):
            x = on_gpu(images, 8 * 8, 16).transpose(1, 2).reshape(images, 16, 8, 8)
            F.interpolate(x, scale_factor=2.0, mode="nearest")
            assert run.last().contiguous_input == is_dense


# -- attention


def heads(
    batch: int, num_heads: int, rows: int, dim: int, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """A query as projections make it: (batch, rows, heads, dim) seen with heads first."""
    return on_gpu(batch, rows, num_heads, dim, dtype=dtype).transpose(1, 2)


def chosen(run: Run, *shape: int, dtype: torch.dtype = torch.bfloat16, **arguments: Any) -> str:
    query = heads(*shape, dtype=dtype)
    run.recorder.kernels.clear()
    F.scaled_dot_product_attention(query, query, query, **arguments)
    return next(
        (k.name.split("_")[-2] for k in run.recorder.kernels if k.kind == "attention"), "math"
    )


@pytest.mark.parametrize(
    ("capability", "dim", "dtype", "masked", "backend"),
    [
        (ADA, 64, torch.bfloat16, False, "flash"),
        (ADA, 40, torch.float16, False, "flash"),
        (ADA, 44, torch.float16, False, "flash"),
        (ADA, 256, torch.float16, False, "flash"),
        (ADA, 512, torch.float16, False, "efficient"),
        (ADA, 64, torch.float32, False, "efficient"),
        (ADA, 64, torch.bfloat16, True, "efficient"),
        (ADA, 44, torch.bfloat16, True, "math"),
        (ADA, 64, torch.float64, False, "math"),
        ((12, 0), 128, torch.bfloat16, False, "flash"),
        (HOPPER, 128, torch.bfloat16, False, "cudnn"),
        (HOPPER, 128, torch.bfloat16, True, "cudnn"),
        (HOPPER, 192, torch.bfloat16, False, "flash"),
        (HOPPER, 64, torch.float32, False, "efficient"),
        (TURING, 64, torch.float16, False, "efficient"),
        (TURING, 44, torch.float16, False, "math"),
        (TURING, 64, torch.bfloat16, False, "math"),
        (TURING, 44, torch.float32, False, "efficient"),
    ],
)
def test_torchs_order_of_attention_kernels(
    capability: tuple[int, int], dim: int, dtype: torch.dtype, masked: bool, backend: str
) -> None:
    with Run(capability) as run:
        mask = on_gpu(1, 1, 32, 32, dtype=torch.bool) if masked else None
        assert chosen(run, 1, 4, 32, dim, dtype=dtype, attn_mask=mask) == backend


def test_three_dimensions_and_a_strided_head_go_to_math() -> None:
    with Run() as run:
        flat = on_gpu(4, 32, 64)
        F.scaled_dot_product_attention(flat, flat, flat)
        odd = on_gpu(1, 4, 64, 32).transpose(2, 3)
        F.scaled_dot_product_attention(odd, odd, odd)
        assert not [k for k in run.recorder.kernels if k.kind == "attention"]


def test_a_switched_off_kernel_is_passed_over() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with Run() as run:
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            assert chosen(run, 1, 4, 32, 64) == "efficient"
        with sdpa_kernel(SDPBackend.MATH):
            assert chosen(run, 1, 4, 32, 64) == "math"
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            assert chosen(run, 1, 4, 32, 64) == "cudnn"
        assert chosen(run, 1, 4, 32, 64) == "flash"


def test_flash_allocates_its_result_and_a_number_a_row() -> None:
    with Run() as run:
        query = heads(2, 8, 64, 40)
        added, out = run.added_bytes(F.scaled_dot_product_attention, query, query, query)
        assert out.shape == query.shape
        assert added == out.numel() * 2 + 2 * 8 * 64 * 4


def test_flash_pads_heads_that_are_no_multiple_of_eight() -> None:
    with Run() as run:
        query = heads(1, 8, 64, 44)
        added, out = run.added_bytes(F.scaled_dot_product_attention, query, query, query)
        assert out.shape == query.shape
        assert added == 4 * 8 * 64 * 48 * 2 + 8 * 64 * 4


@pytest.mark.parametrize(
    ("capability", "dim", "follows"),
    [(ADA, 64, True), (HOPPER, 64, True), (ADA, 320, False)],
)
def test_the_result_lies_as_the_query_except_from_the_efficient_kernel(
    capability: tuple[int, int], dim: int, follows: bool
) -> None:
    """What ``cat`` joined lies heads first; the copy before the next projection depends on it."""
    with Run(capability):
        query = torch.cat([heads(1, 4, 16, dim), heads(1, 4, 16, dim)], dim=2)
        assert query.is_contiguous()
        out = F.scaled_dot_product_attention(query, query, query)
        assert out.is_contiguous() == follows
        assert out.transpose(1, 2).is_contiguous() != follows
        projected = heads(1, 4, 32, dim)
        out = F.scaled_dot_product_attention(projected, projected, projected)
        assert out.transpose(1, 2).is_contiguous()


def test_a_boolean_mask_becomes_a_bias_of_the_querys_dtype() -> None:
    with Run() as run:
        query, mask = heads(1, 4, 64, 64), on_gpu(1, 1, 64, 64, dtype=torch.bool)
        added, out = run.added_bytes(
            F.scaled_dot_product_attention, query, query, query, attn_mask=mask
        )
        assert added == out.numel() * 2 + 64 * 64 * 2


def test_a_bias_of_odd_length_is_padded_for_the_efficient_kernel() -> None:
    with Run() as run:
        query, key = heads(1, 4, 64, 64), heads(1, 4, 77, 64)
        bias = on_gpu(1, 1, 64, 77)
        added, out = run.added_bytes(
            F.scaled_dot_product_attention, query, key, key, attn_mask=bias
        )
        assert added == out.numel() * 2 + 64 * 80 * 2
        broadcast = on_gpu(77).expand(1, 1, 64, 77)
        added, out = run.added_bytes(
            F.scaled_dot_product_attention, query, key, key, attn_mask=broadcast
        )
        assert added == out.numel() * 2


class TestKrea2:
    """One attention call of Krea-2 at 1024²: 4096 + 512 tokens, 48 query and 12 key heads of 128.

    The four figures are published in huggingface/diffusers#14523 (.ai/references/models.md); none
    was used to make the rules. Configuration: Krea2Transformer2DModel, diffusers 0.42.1.
    """

    @staticmethod
    def attend(run: Run, masked: bool, enable_gqa: bool) -> float:
        query, key, value = (heads(1, n, 4608, 128) for n in (48, 12, 12))
        mask = on_gpu(1, 1, 1, 4608, dtype=torch.bool) if masked else None

        def call() -> torch.Tensor:
            k, v = key, value
            if not enable_gqa:
                k, v = (
                    t.transpose(1, 2).repeat_interleave(4, dim=2).transpose(1, 2) for t in (k, v)
                )
            return F.scaled_dot_product_attention(
                query, k, v, attn_mask=mask, enable_gqa=enable_gqa
            )

        return run.added_bytes(call)[0] / GIB

    def test_a_mask_with_grouped_queries_writes_out_the_scores(self) -> None:
        with Run() as run:
            assert self.attend(run, masked=True, enable_gqa=True) == pytest.approx(9.02, abs=0.005)

    def test_repeated_heads_take_a_fused_kernel(self) -> None:
        with Run() as run:
            assert self.attend(run, masked=True, enable_gqa=False) == pytest.approx(0.16, abs=0.005)

    def test_without_a_mask_grouping_saves_the_repetition(self) -> None:
        with Run() as run:
            repeated = self.attend(run, masked=False, enable_gqa=False)
            grouped = self.attend(run, masked=False, enable_gqa=True)
            assert repeated - grouped == pytest.approx(0.11, abs=0.005)

    def test_cudnn_takes_both_on_hopper(self) -> None:
        with Run(HOPPER) as run:
            assert self.attend(run, masked=True, enable_gqa=True) < 0.1


def test_the_row_mask_of_softmax_is_what_torch_allocates() -> None:
    """The same composite kernel on the CPU: a result, and a byte for each score."""
    from torch.profiler import ProfilerActivity, profile

    scores = torch.randn(64, 256, 256)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        torch.ops.aten._safe_softmax(scores, -1)
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert peak == pytest.approx(scores.nbytes + scores.numel(), rel=0.01)
    with Run() as run:
        x = on_gpu(64, 256, 256, dtype=torch.float32)
        added, _ = run.added_bytes(torch.ops.aten._safe_softmax, x, -1)
    assert added == scores.nbytes + scores.numel()
