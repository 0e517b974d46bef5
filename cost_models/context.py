"""Device memory of a process outside torch's allocator: what a budget pays before any tensor.

The driver's context, the code of loaded kernels and the handles of cuDNN and cuBLAS. The largest
part is local memory, which the driver reserves for every thread that could be resident: threads of
a multiprocessor times multiprocessors times bytes of a thread
(https://forums.developer.nvidia.com/t/local-memory-management/289339/9). So the figure grows with
the GPU and hardly with the model. Kernels are loaded when first launched (CUDA 11.7 on,
pytorch/pytorch#107667), so it also grows during the first call; what counts for a peak is its value
after one.

The two constants are a least-squares line through seven GPUs, from out-of-memory messages of torch
2.1 to 2.8 in inference (what the process uses less allocated and reserved memory, MiB):

====================  ===========  ============  ===========  ===========================
GPU                   max threads  published     this rule    without this GPU
====================  ===========  ============  ===========  ===========================
T4                    40 Ki        135, 140      133          133
RTX 2080 Ti           68 Ki        197           195          194
RTX 3090              123 Ki       304           312          314
RTX 4090              192 Ki       461-504       459          455
L40                   213 Ki       507           504          503
A100                  216 Ki       409-522       511          520
RTX 5090              255 Ki       595, 619      594          586
====================  ===========  ============  ===========  ===========================

Sources, by row: Zheng-Chong/CatVTON#133, FoundationVision/GenerateU#10; lllyasviel/FramePack#369;
bytedance/X-Portrait#7; 3DTopia/Phidias-Diffusion#8, pinokiofactory/flux-webui#11,
ZiYang-xie/WorldGen#25; QwenLM/Qwen3-VL#2097; HiDream-ai/VAREdit#6, TianheWu/CoSeR#10,
Tencent-Hunyuan/HunyuanImage-3.0#82; Wan-Video/Wan2.1#465, TrajectoryCrafter/TrajectoryCrafter#20
(GitHub issues). Not used for the fit: 604 to 645 MiB on an RTX 5090 with CUDA 13, as the driver's
figure minus replayed reserved memory in three Z-Image-Turbo runs (asomoza/diffusers-recipes,
models/z-image/benchmark_results.csv at 46df7a9). The messages are rounded to about 10 MiB, and one
GPU's differ by up to 110: take 10 % and 50 MiB of uncertainty. Before its first kernel a process
takes about 23 MiB and 1.88 KiB a thread (T4 100, A10 224, RTX A6000 262, RTX 6000 Ada 426, L40S
420).
"""

from __future__ import annotations

from collections.abc import Mapping

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.units import MIB

BASE_BYTES = 50 * MIB
"""What a context takes whatever the GPU, code of kernels included (table above)."""

BYTES_PER_THREAD = 2_184
"""What it takes for each thread that can be resident on the GPU (table above)."""

BARE_BASE_BYTES = 23 * MIB
"""The same as :data:`BASE_BYTES` before the first kernel is launched (docstring)."""

BARE_BYTES_PER_THREAD = 1_925
"""The same as :data:`BYTES_PER_THREAD` before the first kernel is launched (docstring)."""

DEFAULT_CONTEXT_BYTES = BASE_BYTES + BYTES_PER_THREAD * 148 * 2048
"""Charged where the GPU's size is not known: what the rule gives the largest GPU of the catalogue,
a B200 with 148 multiprocessors of 2048 threads (681 MiB)."""

THREADS_PER_SM: Mapping[tuple[int, int], int] = {
    (6, 0): 2048,
    (6, 1): 2048,
    (7, 0): 2048,
    (7, 5): 1024,
    (8, 0): 2048,
    (8, 6): 1536,
    (8, 7): 1536,
    (8, 9): 1536,
    (9, 0): 2048,
    (10, 0): 2048,
    (10, 3): 2048,
    (11, 0): 1536,
    (12, 0): 1536,
    (12, 1): 1536,
}
"""Most resident threads of a multiprocessor by compute capability.

Source: CUDA C++ Programming Guide, "Compute Capabilities", table of technical specifications.
"""


def context_bytes(gpu: Gpu) -> int:
    """Return what this process holds on *gpu* outside torch's allocator after a pipeline call.

    A measured ``gpu.context_bytes`` wins over the rule; the CPU standing for a GPU has none.

    >>> from pipefit.cost_models.machine import Gpu
    >>> context_bytes(Gpu(name="cpu", architecture="cpu", total_bytes=1, free_bytes=1))
    0
    """
    if gpu.context_bytes is not None:
        return gpu.context_bytes
    if gpu.architecture == "cpu":
        return 0
    threads = _num_threads(gpu)
    return BASE_BYTES + BYTES_PER_THREAD * threads if threads else DEFAULT_CONTEXT_BYTES


def bare_context_bytes(gpu: Gpu) -> int:
    """Return what a process holds on *gpu* before it launches a kernel; nothing if that is unknown.

    Some measurements subtract it as what was in use before.
    """
    threads = _num_threads(gpu)
    return BARE_BASE_BYTES + BARE_BYTES_PER_THREAD * threads if threads else 0


def _num_threads(gpu: Gpu) -> int:
    """Return how many threads can be resident on *gpu*; 0 where that is not known."""
    return THREADS_PER_SM.get(gpu.compute_capability or (0, 0), 0) * (gpu.num_sms or 0)
