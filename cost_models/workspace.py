"""Scratch that libraries ask torch's allocator for while one kernel runs; no trace sees it.

Tensor-core convolutions compute in NHWC. Given NCHW tensors, cuDNN converts input and weight into
scratch and, unless its kernel can write NCHW itself, converts the result back from scratch as well.
One is easy to forget: the scratch is allocated after the output and freed when the call returns
(``run_conv_plan`` in torch's ``aten/src/ATen/native/cudnn/Conv_v8.cpp``), so it adds to everything
alive at that moment.

====================================  =========================  ===================================
convolution                           scratch                    evidence
====================================  =========================  ===================================
NCHW, 16 bits, sm80 on                input + weight + result    FLUX.1, SDXL, SD 1.5, AnimateDiff,
                                                                 Qwen-Image on A10G to RTX 5090
NCHW, 16 bits, above 2**31 elements   none                       FLUX.1 batch 16
NCHW, fp32                            input + weight             SDXL in fp32, A100 and A10G
NCHW, fp16, before sm80               input + weight             SD 1.4 and 1.5, T4 or V100
channels_last                         what is NCHW of input and  NVIDIA's guide, [1]; torch's
                                      weight, copied by torch    cudnn/ConvShared.cpp; FLUX.1
                                                                 batch 4 and 8, AnimateDiff, SD 1.4
channels_last, fp32, before sm80      input + weight             none: the larger rule
transposed, NCHW                      input + weight + result    none: the larger rule
depthwise                             none: torch's own kernel   ``use_cudnn_depthwise`` in
                                                                 native/Convolution.cpp
depthwise, NCHW, fp16, 32 channels    as dense                   none: cuDNN may take it
bfloat16 before sm80                  columns of one image       native/cuda/ConvolutionMM2d.cu:
                                                                 cuDNN has no such kernel
====================================  =========================  ===================================

[1] Tensor cores convolve in NHWC; NCHW costs automatic transposes. "Tensor layouts in memory" in
https://docs.nvidia.com/deeplearning/performance/dl-performance-convolutional/index.html, for Volta
https://developer.nvidia.com/blog/tensor-core-ai-performance-milestones/.

One and three dimensions follow the same rules as two (torch makes a 1D input contiguous and views
it as 2D). Unknown hardware counts as sm80 or later. Grouped convolutions and those of few channels
are charged like dense ones, which is the larger of what is possible: what Qwen-Image's encoder
reserves fits without any for its first, of 3 channels, at seven of eight sizes. Not modelled:
torch 2.9 with cuDNN 9.8 to 9.14, where 16-bit convolutions in three dimensions are computed from
columns (pytorch/pytorch#166643); what ``cudnn.benchmark`` tries out; FFT plans.

Under ``torch.compile`` the first call times kernels, each with the GPU's L2 cache overwritten in
between, for which a buffer of that size is allocated. What inductor writes itself is timed where it
runs, beside all that is alive there, if it has more than one way to launch it (taken to be so:
``CachingAutotuner`` in torch/_inductor/runtime/triton_heuristics.py, 2.13). Convolutions and
products are tried before the graph runs (``max-autotune``), on tensors made for that. The surprise
is a convolution, whose library kernel cannot be given its result: three results are alive, the one
made to be given, the one of a first run that is copied into it, and that of the run being timed
(``ExternKernelBenchmarkRequest.benchmark`` in torch/_inductor/autotune_process.py, 2.13). Not
modelled: copies of what a timed kernel overwrites in place.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.units import DTYPE_BYTES, KIB, MIB
from pipefit.cost_models.workload import LIBRARY_KINDS, Kernel

CUBLAS_BYTES = 2 * 4 * MIB + 8 * 16 * KIB
"""cuBLAS workspace of a stream, taken at its first GEMM and kept: ":4096:2:16:8".

Products with a bias go through cuBLASLt, which shares it (torch 2.13; 1 MiB of its own before). A
stream on which only copies run has none. Source: ``parseChosenWorkspaceSize`` and
``getCUDABlasLtWorkspace`` in torch's ``aten/src/ATen/cuda/CublasHandlePool.cpp``.
"""

CUBLAS_LARGE_BYTES = 32 * MIB
"""The same from compute capability 9.0 on (same source)."""

FIRST_LARGE_ON_BLACKWELL = (2, 11)
"""torch before this takes :data:`CUBLAS_LARGE_BYTES` on compute capability 9.0 only.

Source: pytorch/pytorch#175344, opened and merged in February 2026.
"""

INT32_INDEXED_ELEMENTS = 1 << 31
"""Above this many elements a 16-bit convolution runs in an engine without conversions.

Source: peaks of FLUX.1-dev, 1024², at batch 8 (exactly this many: scratch) and 16 (none) on an
H100, https://github.com/sayakpaul/diffusers-torchao at 9b9f2383.
"""

CUDNN_DEPTHWISE_CHANNELS = 32
"""From this many channels on cuDNN may compute fp16 depthwise convolutions in NCHW.

Source: ``use_cudnn_depthwise`` in torch's ``aten/src/ATen/native/Convolution.cpp``.
"""

EFFICIENT_REGISTER_HEAD_DIM = 128
"""Above this head size the memory-efficient kernel keeps its fp32 sums in device memory.

Source: ``kNeedsOutputAccumulatorBuffer`` in kernel_forward.h and the list in kernels/cutlassF.h,
aten/src/ATen/native/transformers/cuda/mem_eff_attention, torch 2.13.
"""

UNKNOWN_L2_BYTES = 256 * MIB
"""What inductor overwrites between two runs where it finds no size of an L2 cache.

Source: ``InductorBenchmarker.get_device_cache_size`` in torch/_inductor/runtime/benchmarking.py,
torch 2.13.
"""

LEAST_SMS_TO_TRY = 68
"""On NVIDIA GPUs of fewer multiprocessors ``max-autotune`` leaves products and convolutions to
libraries.

Source: ``is_big_gpu`` in torch/_inductor/utils.py, torch 2.13.
"""

_TENSOR_CORE_CAPABILITY = (8, 0)
_FIRST_CAPABILITY = {
    "volta": (7, 0),
    "turing": (7, 5),
    "ampere": (8, 0),
    "ada": (8, 9),
    "hopper": (9, 0),
    "blackwell": (10, 0),
}


def workspace_bytes(kernel: Kernel, gpu: Gpu) -> int:
    """Return the scratch that *kernel* holds on *gpu* while it runs.

    Counts library workspace and the copies torch makes to suit the library; tensors that the trace
    shows (inputs, outputs, saved statistics) and the cuBLAS workspace are not part of it.
    """
    return sum(scratch_bytes(kernel, gpu))


def scratch_bytes(kernel: Kernel, gpu: Gpu) -> tuple[int, ...]:
    """Return the allocations behind :func:`workspace_bytes`, in their order."""
    if gpu.architecture == "cpu":
        return ()
    if kernel.launcher == "tried":
        return _trial_bytes(kernel, gpu)
    if kernel.launcher in ("compiled", "captured") and kernel.kind not in LIBRARY_KINDS:
        return (flush_bytes(gpu),)
    if kernel.kind == "conv":
        return tuple(n for n in _conv_scratch(kernel, _capability(gpu)) if n)
    if kernel.kind == "attention":
        return _attention_scratch(kernel, _capability(gpu))
    if kernel.name == "aten._safe_softmax":
        # One byte a score, to find rows that are masked as a whole (_safe_softmax in
        # aten/src/ATen/native/transformers/attention.cpp, seen in the profiler on the CPU, 2.13).
        return (math.prod(kernel.shape),)
    if not kernel.contiguous_input:
        return (kernel.input_bytes,)
    return ()


def cublas_bytes(gpu: Gpu, torch_version: str = "") -> int:
    """Return the workspace that the first GEMM takes for the rest of the process.

    *torch_version* is torch's own word, ``2.13.0+cu130``; empty: one that pipefit is made for.

    >>> from pipefit.cost_models.machine import Gpu
    >>> card = Gpu(name="any", compute_capability=(12, 0), total_bytes=1, free_bytes=1)
    >>> cublas_bytes(card) // MIB, cublas_bytes(card, "2.9.1+cu130") // MIB
    (32, 8)
    """
    if gpu.architecture == "cpu":
        return 0
    capability = _capability(gpu)
    if capability is None or capability == (9, 0):
        return CUBLAS_LARGE_BYTES
    number = re.match(r"(\d+)\.(\d+)", torch_version)
    is_old = number is not None and tuple(map(int, number.groups())) < FIRST_LARGE_ON_BLACKWELL
    return CUBLAS_BYTES if capability < (9, 0) or is_old else CUBLAS_LARGE_BYTES


def flush_bytes(gpu: Gpu) -> int:
    """Return the buffer by which inductor empties the L2 cache before it times a kernel.

    Apple's kernels are not timed (torch/_inductor/codegen/mps.py, 2.13).
    """
    return 0 if gpu.architecture == "apple" else gpu.l2_bytes or UNKNOWN_L2_BYTES


def _trial_bytes(kernel: Kernel, gpu: Gpu) -> tuple[int, ...]:
    """What trying a product or a convolution takes: its tensors again, and the cache emptied.

    Nothing where the library's kernel is the only choice (``convolution`` in
    torch/_inductor/kernel/conv.py, 2.13): transposed convolutions, and those of one dimension that
    are neither a product nor depthwise. Convolutions of two dimensions are taken to lie in
    channels_last, as they do in graphs that are mostly convolutions (``decide_layout_opt``).
    """
    if gpu.architecture == "apple":
        return ()
    if gpu.compute_capability is not None and 0 < gpu.num_sms < LEAST_SMS_TO_TRY:
        return ()
    if kernel.kind == "gemm":
        return kernel.read_bytes, kernel.write_bytes, flush_bytes(gpu)
    _, in_channels, out_channels, groups, is_transposed, *sizes = kernel.shape
    dims = len(sizes) // 3
    inputs, outputs, kernel_size = sizes[:dims], sizes[dims : 2 * dims], sizes[2 * dims :]
    is_product = groups == 1 and math.prod(kernel_size) == 1 and inputs == outputs
    is_depthwise = groups == in_channels == out_channels > 1
    if is_transposed or (dims == 1 and not (is_product or is_depthwise)):
        return ()
    num_results = 3
    if dims == 2:
        kernel = replace(
            kernel, channels_last=True, weight_channels_last=True, contiguous_input=True
        )
        if is_product:
            num_results = 1  # of a product, which can be given its result
    results = (kernel.output_bytes,) * num_results
    scratch = (n for n in _conv_scratch(kernel, _capability(gpu)) if n)
    return kernel.input_bytes, kernel.weight_bytes, *results, flush_bytes(gpu), *scratch


def _capability(gpu: Gpu) -> tuple[int, int] | None:
    return gpu.compute_capability or _FIRST_CAPABILITY.get(gpu.architecture)


def _conv_scratch(kernel: Kernel, capability: tuple[int, int] | None) -> tuple[int, ...]:
    _, in_channels, _, groups, is_transposed, *sizes = kernel.shape
    input_copy = 0 if kernel.contiguous_input else kernel.input_bytes
    needs_weight = kernel.channels_last and not kernel.weight_channels_last
    weight_copy = kernel.weight_bytes if needs_weight else 0
    has_tensor_cores = capability is None or capability >= _TENSOR_CORE_CAPABILITY
    is_depthwise = groups == in_channels > 1 and not is_transposed
    if is_depthwise and not (
        kernel.dtype == "float16"
        and in_channels >= CUDNN_DEPTHWISE_CHANNELS
        and len(sizes) <= 3 * 2
        and not kernel.channels_last
    ):
        return input_copy, weight_copy
    if kernel.dtype == "bfloat16" and not has_tensor_cores:
        return input_copy, *_column_scratch(kernel)
    is_16_bit = DTYPE_BYTES.get(kernel.dtype) == 2
    if kernel.channels_last and (is_16_bit or has_tensor_cores):
        return input_copy, weight_copy
    if is_16_bit and max(kernel.input_bytes, kernel.output_bytes) > 2 * INT32_INDEXED_ELEMENTS:
        return (input_copy,)
    converted = kernel.input_bytes + kernel.weight_bytes
    if is_transposed or (is_16_bit and has_tensor_cores):
        converted += kernel.output_bytes
    return input_copy, converted


def _column_scratch(kernel: Kernel) -> tuple[int, ...]:
    """torch's own convolution: the patches of one image as a matrix; groups one after the other.

    Source: ``slow_conv2d_forward`` in native/cuda/ConvolutionMM2d.cu, ``slow_conv_dilated_all_cuda_
    template`` in native/cuda/NaiveDilatedConvolution.cu, ``slow_conv_transpose2d`` in
    native/cuda/NaiveConvolutionTranspose2d.cu, ``_convolution`` in native/Convolution.cpp.
    """
    _, in_channels, out_channels, groups, is_transposed, *sizes = kernel.shape
    dims = len(sizes) // 3
    inputs, outputs, kernel_size = sizes[:dims], sizes[dims : 2 * dims], sizes[2 * dims :]
    channels, positions = (out_channels, inputs) if is_transposed else (in_channels, outputs)
    columns = channels // groups * math.prod(kernel_size) * math.prod(positions)
    if math.prod(kernel_size) == 1 and inputs == outputs:
        columns = 0
    split = (kernel.input_bytes // groups, kernel.output_bytes) if groups > 1 else ()
    return *split, columns * DTYPE_BYTES[kernel.dtype]


def _attention_scratch(kernel: Kernel, capability: tuple[int, int] | None) -> tuple[int, ...]:
    """What a fused kernel needs besides the tensors of the trace.

    A trace for another GPU may show a fused kernel for bfloat16, which torch has from sm80 on only
    (``sdp_utils.cpp``); then scores and softmax are alive together in fp32, with the mask of rows
    and the widened inputs (``_scaled_dot_product_attention_math`` in
    aten/src/ATen/native/transformers/attention.cpp).
    """
    batch, heads, num_queries, num_keys, query_dim, value_dim = kernel.shape
    if (
        kernel.dtype == "bfloat16"
        and capability is not None
        and capability < _TENSOR_CORE_CAPABILITY
    ):
        scores = batch * heads * num_queries * num_keys
        widened = 2 * (num_queries + num_keys) * query_dim + num_keys * value_dim
        return 4 * batch * heads * widened, 4 * scores, 4 * scores, scores
    if (
        "efficient" in kernel.name
        and DTYPE_BYTES.get(kernel.dtype) == 2
        and max(query_dim, value_dim) > EFFICIENT_REGISTER_HEAD_DIM
    ):
        return (4 * batch * heads * num_queries * value_dim,)
    return ()
