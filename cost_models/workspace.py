"""Scratch that libraries ask torch's allocator for while one kernel runs; no trace sees it.

Tensor-core convolutions compute in NHWC. Given NCHW tensors, cuDNN converts input and weight into
scratch and, unless its kernel can write NCHW itself, converts the result back from scratch as well.
One is easy to forget: the scratch is allocated after the output and freed when the call returns
(``run_conv_plan`` in torch's ``aten/src/ATen/native/cudnn/Conv_v8.cpp``), so it adds to everything
alive at that moment.

The rules by layout, dtype and hardware are established by published peaks of the FLUX.1, SDXL,
Stable Diffusion 1.x, AnimateDiff and Qwen-Image autoencoders, from T4 to RTX 5090; where hardware
is unknown, the larger of the known rules holds.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.units import KIB, MIB
from pipefit.cost_models.workload import Kernel

CUBLAS_BYTES = 2 * 4 * MIB + 8 * 16 * KIB
"""cuBLAS workspace of a process, taken at its first GEMM and kept: ":4096:2:16:8".

Source: ``parseChosenWorkspaceSize`` in torch's ``aten/src/ATen/cuda/CublasHandlePool.cpp``.
"""

CUBLAS_LARGE_BYTES = 32 * MIB
"""The same from compute capability 9.0 on (same source)."""

INT32_INDEXED_ELEMENTS = 1 << 31
"""Above this many elements a 16-bit convolution runs in an engine without conversions.

Source: peaks of FLUX.1-dev, 1024², at batch 8 (exactly this many: scratch) and 16 (none) on an
H100, https://github.com/sayakpaul/diffusers-torchao at 9b9f2383.
"""

DTYPE_BYTES: Mapping[str, int] = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}
"""Bytes of one element of the dtypes that convolutions and attention compute in."""

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
    if kernel.kind == "conv":
        return tuple(n for n in _conv_scratch(kernel, _capability(gpu)) if n)
    if kernel.kind == "attention" and _materialises_scores(kernel, _capability(gpu)):
        return _math_attention_scratch(kernel)
    return ()


def cublas_bytes(gpu: Gpu) -> int:
    """Return the workspace that the first GEMM takes for the rest of the process."""
    if gpu.architecture == "cpu":
        return 0
    capability = _capability(gpu)
    return CUBLAS_LARGE_BYTES if capability is None or capability >= (9, 0) else CUBLAS_BYTES


def _capability(gpu: Gpu) -> tuple[int, int] | None:
    return gpu.compute_capability or _FIRST_CAPABILITY.get(gpu.architecture)


def _conv_scratch(kernel: Kernel, capability: tuple[int, int] | None) -> tuple[int, ...]:
    input_copy = 0 if kernel.contiguous_input else kernel.input_bytes
    if kernel.channels_last:
        weight_copy = 0 if kernel.weight_channels_last else kernel.weight_bytes
        return input_copy, weight_copy
    in_channels, groups = kernel.shape[1], kernel.shape[3]
    if groups > 1 and groups == in_channels:
        # Depthwise convolutions are torch's own kernels; no conversion was ever seen around them.
        return (input_copy,)
    is_16_bit = DTYPE_BYTES.get(kernel.dtype) == 2
    if is_16_bit and max(kernel.input_bytes, kernel.output_bytes) > 2 * INT32_INDEXED_ELEMENTS:
        return (input_copy,)
    converted = kernel.input_bytes + kernel.weight_bytes
    if is_16_bit and (capability is None or capability >= _TENSOR_CORE_CAPABILITY):
        converted += kernel.output_bytes
    return input_copy, converted


def _materialises_scores(kernel: Kernel, capability: tuple[int, int] | None) -> bool:
    """Fused kernels take bfloat16 only from sm80 on (``sdp_utils.cpp``), and never float64."""
    if "math" in kernel.name or kernel.dtype == "float64":
        return True
    return (
        kernel.dtype == "bfloat16"
        and capability is not None
        and capability < _TENSOR_CORE_CAPABILITY
    )


def _math_attention_scratch(kernel: Kernel) -> tuple[int, ...]:
    """Scores and their softmax are alive together; 16-bit inputs are computed in fp32.

    Source: ``_scaled_dot_product_attention_math`` in torch's
    ``aten/src/ATen/native/transformers/attention.cpp``, whose default forbids 16-bit reductions.
    """
    batch, heads, num_queries, num_keys, query_dim, value_dim = kernel.shape
    element_bytes = max(4, DTYPE_BYTES.get(kernel.dtype, 4))
    scores = batch * heads * num_queries * num_keys * element_bytes
    if DTYPE_BYTES.get(kernel.dtype, 4) >= 4:
        return scores, scores
    casts = num_queries * query_dim + num_keys * (query_dim + value_dim)
    return batch * heads * casts * element_bytes, scores, scores
