"""How long one launch takes on a GPU: the larger of its arithmetic and its bytes.

Arithmetic over what its class of kernel reaches, bytes over what memory reaches: the roofline model
(Williams, Waterman and Patterson, https://doi.org/10.1145/1498765.1498785).

The constants were fitted, robustly and on log error, to 71 published timings on 19 NVIDIA GPUs from
Volta to Blackwell. Each names its kind of row; the rows are benchmark tables of these sources:
https://github.com/huggingface/diffusers/blob/v0.14.0/docs/source/en/optimization/fp16.mdx
https://github.com/huggingface/diffusers/blob/v0.30.0/docs/source/en/optimization/torch2.0.md
https://github.com/sayakpaul/diffusers-torchao (FLUX.1, CogVideoX: records torchao-*)
https://github.com/huggingface/diffusers/pull/11605 (Wan 2.1: records pr11605-*)
https://huggingface.co/docs/diffusers/tutorials/fast_diffusion (SDXL: records diffusionfast-*)
They are one fit, with the host times per launch in :mod:`~pipefit.cost_models.latency`: a last
digit is noise, and none may be changed alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.workload import SYNCHRONISE, Kernel, Launcher
from pipefit.errors import InvalidRequest

Attention = Literal["native", "flash", "efficient", "math", "xformers", "cudnn"]
"""Which kernel computes attention; ``native`` is what torch's SDPA picks on the GPU."""

CONV_EFFICIENCY = 0.52
"""Share of the dense 16-bit rate that convolutions reach (autoencoder and SD 1.5 rows)."""
GEMM_EFFICIENCY = 0.78
"""Share that matrix products reach (FLUX.1, Wan 2.1 and CogVideoX rows)."""
FLASH_EFFICIENCY = 0.50
"""Share that flash attention 2 reaches on sm80 to sm89 and sm120 (CogVideoX A100, FLUX L20)."""
FLASH_HOPPER_EFFICIENCY = 0.39
"""The same on Hopper, which that kernel was not written for (CogVideoX, Wan, FLUX H100 rows)."""
EFFICIENT_EFFICIENCY = 0.22
"""Share that memory-efficient kernels reach: xformers, SDPA's before sm80 (SD 1.5 rows)."""
WIDE_HEAD_EFFICIENCY = 0.32
"""Share for heads wider than 256, the autoencoders' middle block (2048 pixels encode rows)."""
FLOAT32_EFFICIENCY = 0.9
"""Share of the fp32 rate without tensor cores; assumed, the one fp32 row comes out 20 % slow."""
HALF_RATE_FACTOR = 1.6
"""Parts that accumulate in fp32 at half rate come closer to that halved peak by this factor."""
HALF_RATE_CEILING = 0.95
"""... but never closer than this."""
POWER_CAP_FACTOR = 0.51
"""Share of the rated arithmetic that a card fed by the slot alone sustains (four T4 rows)."""
POWER_CAP_MAX_W = 75.0
"""Power that a PCIe slot delivers (PCI Express card electromechanical specification)."""
POWER_CAP_MIN_FLOPS_PER_J = 0.8e12
"""The cap is applied above this rated fp16 FLOP/s per watt: a T4 promises 0.93e12; a TITAN RTX of
the same architecture, which is not limited, 0.47e12."""
BANDWIDTH_EFFICIENCY = 0.70
"""Share of the peak memory bandwidth that kernels reach, strided copies included."""
L2_FACTOR = 2.3
"""How much faster than that a launch is whose bytes stay in the L2 cache."""
L2_SHARE = 0.9
"""Share of the L2 cache that a launch may touch to count as staying in it."""
FLOOR_S = 3.2e-6
"""Start and tail of a launch on the GPU."""
LAUNCHER_SHARE: Mapping[Launcher, float] = {
    "eager": 1.0,
    "traced": 0.3,
    "compiled": 0.3,
    "captured": 0.01,
    "tried": 0.0,
}
"""Host time of a launch against one from a module's Python.

Traced: measured, a UNet on tensors of a few elements (torch 2.13 on a 2.5 GHz Xeon) takes 10.3 ms
eagerly and 3.1 traced. Inductor's wrapper is taken to be as quick, for want of a row that the host
bounds. A CUDA graph is launched as one; a hundredth stands for that.
"""
PIPELINE_FILL = 67.0
"""Reduction length that filling a matrix kernel's pipeline costs: work grows by 1 + this / K."""
TILE = 128
"""Rows and columns of the output that one matrix kernel's block computes."""
HEAD_SIZES = (32, 64, 96, 128, 192, 256)
"""Head sizes that attention kernels are compiled for; others are padded up (d = 40 costs 64)."""
EXPONENTIALS_PER_SCORE = 1.1
"""Exponentials that softmax takes per attention score."""
EXPONENTIALS_PER_SM_CLOCK = 16
"""What the special function units of one SM do per clock. CUDA C++ programming guide, "Arithmetic
instructions"."""
CUDNN_TRIAL_GAIN = 0.033
"""Share of a convolution's time that trying cuDNN's algorithms saves over asking its heuristics.

From the only published pair, 9.50 s and 9.37 s (the fp32 rows of the first table above, TITAN RTX):
1.4 % of a call of which convolutions are 41 % here. Taken for every dtype and GPU."""
MATH_ATTENTION_LAUNCHES = 9
"""SDPA's math kernel: three casts, two scalings, product, softmax, product, cast back. ATen
native/transformers/attention.cpp, ``_scaled_dot_product_attention_math``."""

CPU_FLOPS_PER_S_PER_CORE = 12e9
"""fp32 FLOP/s that one core sustains when the CPU stands for a GPU: torch 2.13 products of
1024 x 1024 on a 2.5 GHz Xeon reach 24e9 on two cores, half of that in bfloat16. Crude."""
CPU_BYTES_PER_S = 10e9
"""Memory rate when the CPU stands for a GPU; assumed."""
CPU_HALF_FACTOR = 2.0
"""How much longer a matrix kernel takes on the CPU in 16 bits than in fp32; the row named above. On
an EPYC with AVX512-BF16, torch 2.13, products of 512 x 4096 x 4096 take 3.2 times as long in
float16 and 0.4 in bfloat16: which it is depends on the processor, and this is between."""

_HALF = ("float16", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """Switches of the whole process that decide which kernels a call launches."""

    tf32: bool = False
    """fp32 matrix products in TF32, where the GPU states a rate for it. Convolutions do so without
    being asked, see :func:`_matrix_rate`."""
    cudnn_benchmark: bool = False
    """cuDNN tries its algorithms for each new convolution, and keeps the fastest."""


DEFAULT_FLAGS = Flags()
"""What a process has that nobody switched anything in."""


def kernel_seconds(
    kernel: Kernel, gpu: Gpu, attention: Attention = "native", flags: Flags = DEFAULT_FLAGS
) -> float:
    """Return the time of one operator on *gpu*, all launches of it, without waiting for the host.

    Raises:
        InvalidRequest: if *gpu* lacks a figure that the estimate needs.
    """
    if kernel.launcher == "tried":
        return 0.0
    if gpu.architecture == "cpu":
        rate = gpu.flops_per_s.get("float32", 0.0) or CPU_FLOPS_PER_S_PER_CORE * max(1, gpu.num_sms)
        return max(
            kernel_flops(kernel) / rate,
            _bytes(kernel) / (gpu.memory_bytes_per_s or CPU_BYTES_PER_S),
        )
    if not _has_figures(gpu):
        _require_figures(gpu)
    if kernel.kind == "attention" and attention_kernel(kernel, gpu, attention) == "math":
        return sum(kernel_seconds(part, gpu, flags=flags) for part in _unfused(kernel))
    seconds = max(_arithmetic_s(kernel, gpu, attention, flags), _memory_s(_bytes(kernel), gpu))
    if kernel.kind == "conv" and flags.cudnn_benchmark:
        seconds *= 1 - CUDNN_TRIAL_GAIN
    return seconds + _layout_copies_s(kernel, gpu) + FLOOR_S * num_launches(kernel, gpu, attention)


def host_kernel_seconds(kernel: Kernel, num_cores: int) -> float:
    """Return the time of one operator that the CPU computes beside a GPU."""
    if kernel.launcher == "tried":
        return 0.0
    arithmetic_s = kernel_flops(kernel) / (CPU_FLOPS_PER_S_PER_CORE * max(1, num_cores))
    if kernel.dtype in _HALF:
        arithmetic_s *= CPU_HALF_FACTOR
    return max(arithmetic_s, _bytes(kernel) / CPU_BYTES_PER_S)


def num_launches(kernel: Kernel, gpu: Gpu, attention: Attention = "native") -> int:
    """Return how many launches the host issues for *kernel*; those inside cuDNN cost it nothing."""
    if kernel.launcher == "tried" or is_wait(kernel):
        return 0
    if kernel.kind == "attention" and attention_kernel(kernel, gpu, attention) == "math":
        return MATH_ATTENTION_LAUNCHES + kernel.masked
    return 2 if kernel.kind == "norm" and "group_norm" in kernel.name else 1


def is_wait(kernel: Kernel) -> bool:
    """Whether *kernel* is :data:`SYNCHRONISE`; by name first, because comparing all takes longer
    than anything else that is asked of a kernel."""
    return kernel.name == SYNCHRONISE.name and kernel == SYNCHRONISE


def host_launches(kernel: Kernel, gpu: Gpu, attention: Attention = "native") -> float:
    """Return what issuing *kernel* costs the host, in launches from a module's Python."""
    return num_launches(kernel, gpu, attention) * LAUNCHER_SHARE[kernel.launcher]


def kernel_flops(kernel: Kernel) -> int:
    """Return the operations of a matrix *kernel*, multiply and add counted as two; 0 for others.

    >>> kernel_flops(Kernel(kind="gemm", name="aten.mm", dtype="float16", read_bytes=0,
    ...                     write_bytes=0, shape=(1, 2, 3, 4)))
    48
    """
    if kernel.kind == "attention":
        batch, heads, rows, columns, d_qk, d_v = kernel.shape
        return 2 * batch * heads * rows * columns * (d_qk + d_v)
    if kernel.kind not in ("gemm", "conv"):
        return 0
    batch, m, n, k = _matrix_shape(kernel)
    return 2 * batch * m * n * k


def attention_kernel(
    kernel: Kernel, gpu: Gpu, attention: Attention
) -> Literal["flash", "efficient", "math"]:
    """Return the family of kernels that computes *kernel*; SDPA's own rules where it may choose.

    Flash needs sm80, 16 bits, no mask and one head size up to 256; the memory-efficient kernel
    takes the rest, except bfloat16 before sm80 (ATen native/transformers/cuda/sdp_utils.cpp).
    xformers counts as memory-efficient, which is what its published rows ran; cuDNN's kernel as
    flash, for want of rows.
    """
    if attention == "math":
        return "math"
    if attention in ("efficient", "xformers"):
        return "efficient"
    ampere = gpu.compute_capability is not None and gpu.compute_capability >= (8, 0)
    d_qk, d_v = kernel.shape[4:]
    if ampere and kernel.dtype in _HALF and not kernel.masked and d_qk == d_v <= HEAD_SIZES[-1]:
        return "flash"
    return "math" if kernel.dtype == "bfloat16" and not ampere else "efficient"


def _arithmetic_s(
    kernel: Kernel, gpu: Gpu, attention: Attention, flags: Flags = DEFAULT_FLAGS
) -> float:
    if kernel.kind == "attention":
        return _attention_s(kernel, gpu, attention)
    if kernel.kind not in ("gemm", "conv"):
        return 0.0
    batch, m, n, k = _matrix_shape(kernel)
    tiles = batch * math.ceil(m / TILE) * math.ceil(n / TILE)
    if kernel.kind == "gemm":
        n = 64 * math.ceil(n / 64)
    flops = 2.0 * batch * m * n * k * (1 + PIPELINE_FILL / max(1, k))
    efficiency = CONV_EFFICIENCY if kernel.kind == "conv" else GEMM_EFFICIENCY
    return flops / (_matrix_rate(kernel, gpu, efficiency, flags) * _occupancy(tiles, gpu))


def _attention_s(kernel: Kernel, gpu: Gpu, attention: Attention) -> float:
    batch, heads, rows, columns, d_qk, d_v = kernel.shape
    if columns <= TILE:
        columns = TILE
    scores = float(batch * heads * rows * columns)
    if max(d_qk, d_v) > HEAD_SIZES[-1]:
        efficiency = WIDE_HEAD_EFFICIENCY
    elif attention_kernel(kernel, gpu, attention) == "efficient":
        efficiency = EFFICIENT_EFFICIENCY
    elif gpu.architecture == "hopper":
        efficiency = FLASH_HOPPER_EFFICIENCY
    else:
        efficiency = FLASH_EFFICIENCY
    occupancy = _occupancy(batch * heads * math.ceil(rows / TILE), gpu)
    products = 2 * scores * (_padded_head(d_qk) + _padded_head(d_v))
    exponentials = EXPONENTIALS_PER_SCORE * scores
    return products / (_matrix_rate(kernel, gpu, efficiency) * occupancy) + exponentials / (
        EXPONENTIALS_PER_SM_CLOCK * gpu.num_sms * gpu.clock_hz
    )


def _padded_head(size: int) -> int:
    return next((s for s in HEAD_SIZES if s >= size), size)


def _matrix_shape(kernel: Kernel) -> tuple[int, int, int, int]:
    """(batch, M, N, K) of a product, or of a convolution seen as one product per group."""
    if kernel.kind == "gemm":
        batch, m, n, k = kernel.shape
        return batch, m, n, k
    images, c_in, c_out, groups, transposed, *sizes = kernel.shape
    dims = len(sizes) // 3
    inputs, outputs, taps = (math.prod(sizes[i * dims : (i + 1) * dims]) for i in range(3))
    if transposed:  # each input position is multiplied into every tap of the output
        return groups, images * inputs, c_out // groups * taps, c_in // groups
    return groups, images * outputs, c_out // groups, c_in // groups * taps


def _occupancy(tiles: int, gpu: Gpu) -> float:
    """How well *tiles* fill the SMs; under a root, as a wave that is not full clocks higher."""
    return math.sqrt(tiles / (math.ceil(tiles / gpu.num_sms) * gpu.num_sms))


def _matrix_rate(
    kernel: Kernel, gpu: Gpu, efficiency: float, flags: Flags = DEFAULT_FLAGS
) -> float:
    """FLOP/s that a matrix kernel of *efficiency* reaches in the dtype that it is computed in.

    torch computes fp32 convolutions in TF32 by default, and products not
    (``torch.backends.cudnn.allow_tf32``, ``torch.backends.cuda.matmul.allow_tf32``). A dtype for
    which no GPU states a rate (float64, integers) is counted as fp32: such products are tiny.
    """
    rates = gpu.flops_per_s
    dtype = kernel.dtype
    in_tf32 = kernel.kind == "conv" or (kernel.kind == "gemm" and flags.tf32)
    if dtype == "float32" and in_tf32 and rates.get("tf32"):
        dtype = "tf32"
    if dtype == "float32" or not rates.get(dtype):
        return FLOAT32_EFFICIENCY * rates["float32"]
    if gpu.half_rate_accumulate:
        efficiency = min(HALF_RATE_CEILING, efficiency * HALF_RATE_FACTOR)
    return efficiency * rates[dtype] * (POWER_CAP_FACTOR if _is_power_capped(gpu) else 1.0)


def _is_power_capped(gpu: Gpu) -> bool:
    if gpu.tdp_w is None or gpu.tdp_w > POWER_CAP_MAX_W:
        return False
    return gpu.flops_per_s.get("float16", 0.0) / gpu.tdp_w > POWER_CAP_MIN_FLOPS_PER_J


def _bytes(kernel: Kernel) -> float:
    """Bytes that pass through memory: passes over the data, not only operands."""
    if kernel.kind == "norm" and "group_norm" in kernel.name:
        return 2 * kernel.read_bytes + kernel.write_bytes  # statistics first, then the values again
    if kernel.kind == "index":
        return 2 * kernel.write_bytes  # reads the rows that it writes, not the whole table
    return kernel.read_bytes + kernel.write_bytes


def _memory_s(num_bytes: float, gpu: Gpu) -> float:
    rate = BANDWIDTH_EFFICIENCY * gpu.memory_bytes_per_s
    return num_bytes / (rate * L2_FACTOR if num_bytes < L2_SHARE * gpu.l2_bytes else rate)


def _layout_copies_s(kernel: Kernel, gpu: Gpu) -> float:
    """16-bit convolution kernels are channels-last: cuDNN turns everything around, and back.

    Inductor keeps what it makes itself in channels_last, and turns weights, which it is given
    (``decide_layout_opt`` in torch/_inductor/graph.py, 2.13).
    """
    if kernel.kind != "conv" or kernel.dtype not in _HALF or kernel.channels_last:
        return 0.0
    if gpu.compute_capability is None or gpu.compute_capability < (7, 0):
        return 0.0  # no tensor cores, no channels-last kernels
    sizes: tuple[int, ...] = (kernel.input_bytes, kernel.output_bytes, kernel.weight_bytes)
    if kernel.launcher in ("compiled", "captured"):
        sizes = (kernel.weight_bytes,)
    return sum(_memory_s(2 * size, gpu) for size in sizes)


def _unfused(kernel: Kernel) -> tuple[Kernel, ...]:
    """SDPA's math kernel as the products, passes over the scores and casts that it launches.

    Its 16-bit inputs are widened to fp32 first, unless
    ``torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp`` says otherwise.
    """
    batch, heads, rows, columns, d_qk, d_v = kernel.shape
    groups = batch * heads
    scores = 4 * groups * rows * columns
    query, key = 4 * groups * rows * d_qk, 4 * groups * columns * d_qk
    value, out = 4 * groups * columns * d_v, 4 * groups * rows * d_v

    def step(
        kind: Literal["gemm", "reduce", "elementwise"], read: int, write: int, *shape: int
    ) -> Kernel:
        return Kernel(
            kind=kind,
            name="aten._scaled_dot_product_attention_math",
            dtype="float32",
            read_bytes=read,
            write_bytes=write,
            shape=shape,
        )

    steps = [
        *(step("elementwise", size // 2, size) for size in (query, key, value)),
        *(step("elementwise", size, size) for size in (query, key)),
        step("gemm", query + key, scores, groups, rows, columns, d_qk),
        step("reduce", scores, scores),
        step("gemm", scores + value, out, groups, rows, d_v, columns),
        step("elementwise", out, out // 2),
    ]
    if kernel.masked:
        steps.append(step("elementwise", 2 * scores, scores))
    return tuple(steps)


def _has_figures(gpu: Gpu) -> bool:
    """What :func:`_require_figures` asks, without the words: it is asked for every kernel."""
    return (
        gpu.memory_bytes_per_s > 0
        and gpu.num_sms > 0
        and gpu.clock_hz > 0
        and gpu.flops_per_s.get("float32", 0.0) > 0
    )


def _require_figures(gpu: Gpu) -> None:
    """Refuse instead of inventing: no default is right for both an A100 and a laptop."""
    figures = {
        "fp32 rate": gpu.flops_per_s.get("float32", 0.0),
        "memory bandwidth": gpu.memory_bytes_per_s,
        "number of SMs": gpu.num_sms,
        "clock": gpu.clock_hz,
    }
    missing = [name for name, figure in figures.items() if not figure > 0]
    if missing:
        raise InvalidRequest(
            f"The time on a {gpu.name} cannot be estimated, its {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} unknown: name the closest catalogue GPU,"
            " for example --gpu rtx-4060."
        )
