"""Device memory of a process outside torch's allocator: what a budget pays before any tensor.

The driver's context, the code of loaded kernels and the handles of cuDNN and cuBLAS. Since CUDA
11.7 kernels are loaded when first launched (pytorch/pytorch#107667), so the figure grows during the
first call; what counts for a peak is its value after one.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.units import MIB

DEFAULT_CONTEXT_BYTES = 666 * MIB
"""Charged where the generation was not measured: 0.65 GiB, a little above the largest measured.

No published measurement separates the context from reserved memory on other generations with
kernels loaded lazily; a bare context is about 300 MB there (pytorch/pytorch#107667).
"""

CONTEXT_BYTES: Mapping[str, int] = {"blackwell": 645 * MIB, "cpu": 0}
"""Context after a whole pipeline call, by ``Gpu.architecture``.

blackwell: RTX 5090, CUDA 13, torch 2.9: 0.59 to 0.63 GiB, as process memory minus replayed reserved
memory of three Z-Image-Turbo runs in https://github.com/asomoza/diffusers-recipes
(models/z-image/benchmark_results.csv at 46df7a9).
cpu: the CPU standing for a GPU has no context.
"""


def context_bytes(gpu: Gpu) -> int:
    """Return what this process holds on *gpu* outside torch's allocator.

    A measured ``gpu.context_bytes`` wins over the generation's.

    >>> from pipefit.cost_models.machine import Gpu
    >>> context_bytes(Gpu(name="cpu", architecture="cpu", total_bytes=1, free_bytes=1))
    0
    """
    if gpu.context_bytes is not None:
        return gpu.context_bytes
    return CONTEXT_BYTES.get(gpu.architecture, DEFAULT_CONTEXT_BYTES)
