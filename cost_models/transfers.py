"""How long weights take between host and GPU, before any of it is measured on the machine.

What a published row says about a link is mixed with what the hooks around it cost, so every
constant here names the rows it was read from. A rate that the machine description holds wins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.placement import GroupOffload
from pipefit.errors import InvalidRequest

PCIE_LANE_BYTES_PER_S = {
    1: 0.25e9,
    2: 0.5e9,
    3: 0.985e9,
    4: 1.969e9,
    5: 3.938e9,
    6: 7.563e9,
}
"""Theoretical rate of one lane and direction by generation, after line coding.
https://en.wikipedia.org/wiki/PCI_Express#Comparison_table"""

PINNED_SHARE = 0.8
"""Share of the theoretical link that one large copy from page-locked memory reaches: 0.76 to 0.84
on PCIe 4, eight RTX 4090 by nvbandwidth (https://github.com/NVIDIA/nvbandwidth/issues/15), and 0.77
on NVLink-C2C (https://github.com/NVIDIA/nvbandwidth/issues/23)."""

PINNED_SHARE_PCIE_5 = 0.88
"""The same from PCIe 5 on. By nvbandwidth 55.3 GB/s on H800, 55.6 in NVIDIA's own example of H100
(https://developer.nvidia.com/blog/nvidia-nvbandwidth-your-essential-tool-for-measuring-gpu-interconnect-and-memory-performance/)
and 56.3 on eight RTX 5090 (https://github.com/tinygrad/open-gpu-kernel-modules/issues/29), of 63.0.
"""

STREAM_SHARE = 0.63
"""Share of the pinned rate that streamed offloading keeps, where every layer is a copy of its own
and the next one starts only when the last has arrived. Published rates on PCIe 4 x16 lie between 10
(record hfbench-ltx097-groupleaf) and 22 GB/s (pr11081-flux-groupleaf-recordstreamF, PCIe generation
presumed) under a pinned rate of 25: this is the geometric mean of 10 and 25."""

PAGEABLE_BYTES_PER_S = 14.1e9
"""Copy between pageable memory and the GPU, either direction, never above the pinned rate. Solved
together with :data:`SEQUENTIAL_TENSOR_S` from two rows of sequential offload: FLUX.1-dev, 28 steps,
61.8 s more than resident (https://github.com/huggingface/diffusers/pull/11682), and SDXL on an
A100, 50 steps, 55.6 s more (record sdxlopt-a100-bs4-sequential)."""

SEQUENTIAL_TENSOR_S = 0.44e-3
"""Extra time of each tensor that sequential offload loads: it empties the allocator's cache every
time (accelerate/utils/modeling.py, ``set_module_tensor_to_device(clear_cache=True)``). From the two
rows named at :data:`PAGEABLE_BYTES_PER_S`."""

FRESH_HOST_BYTES_PER_S = 3.3e9
"""How fast a whole component that comes back finds new host pages, beside the copy itself.
FLUX.1-dev with model offload takes 15.1 s more than resident for 33.7 GB in and out
(https://github.com/huggingface/diffusers/pull/11682); an RTX 4090 13.3 to 19 s (records
lorafast-flux-4090-modeloffload)."""

PIN_BLOCK_BYTES_PER_S = 4.2e9
"""``low_cpu_mem_usage=True`` at block level: the rate at which a block's tensors are page-locked on
the critical path. Five FLUX forwards 38.07 instead of 9.75 s
(https://github.com/huggingface/diffusers/pull/11106)."""

PIN_LEAF_BYTES_PER_S = 28.0e9
"""The same at leaf level, where the allocator's cached pinned blocks are found again and only the
host copy remains: 13.72 instead of 9.48 s (https://github.com/huggingface/diffusers/pull/11106)."""

GROUP_SYNC_S = 46e-6
"""What a streamed group without ``record_stream`` costs beyond its copy: the host waits for the
compute stream. FLUX.1-dev, 30 steps, 502 leaf layers, 32.521 against 31.825 s
(https://github.com/huggingface/diffusers/pull/11081)."""

BLOCK_HOOK_S = 13e-6
"""Host time of a streamed block's hooks, without what CUDA does in them.

Measured: 200 blocks of 12 parameters, pipefit's own engine on the CPU with copies that do nothing,
on a 2.5 GHz server core.
"""

COPY_LATENCY_S = 10e-6
"""Fixed time of one blocking copy, host call included: small pageable copies in
https://forums.developer.nvidia.com/t/56270 take 7 to 10 microseconds up to 16 KB."""

TRANSFER_SPREAD = 1.6
"""Factor by which a real transfer may be faster or slower than these constants say: 10 and 25 GB/s
around the 15.8 of :data:`STREAM_SHARE`; the pageable rows spread alike."""


def pin_bytes_per_s(placement: GroupOffload) -> float:
    """Return the rate at which streamed weights are page-locked before each copy.

    Infinite where that was done when the hooks were attached.
    """
    if placement.is_pinned_ahead:
        return math.inf
    is_leaf = placement.offload_type == "leaf_level"
    return PIN_LEAF_BYTES_PER_S if is_leaf else PIN_BLOCK_BYTES_PER_S


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkRates:
    """Rates between host memory and one GPU; infinite where host memory *is* device memory."""

    h2d_pinned_bytes_per_s: float
    h2d_pageable_bytes_per_s: float
    d2h_pageable_bytes_per_s: float

    @property
    def h2d_streamed_bytes_per_s(self) -> float:
        """Rate of many layer-sized copies from pinned memory on a stream of their own."""
        return self.h2d_pinned_bytes_per_s * STREAM_SHARE

    def round_trip_s(self, num_bytes: float, num_copies: float = 0) -> float:
        """Pageable memory to the GPU and back, each tensor a blocking copy both ways."""
        one_way = 1 / self.h2d_pageable_bytes_per_s + 1 / self.d2h_pageable_bytes_per_s
        return num_bytes * one_way + 2 * num_copies * COPY_LATENCY_S


def pcie_bytes_per_s(generation: int, lanes: int) -> float:
    """Return the theoretical rate of a PCIe link in one direction.

    >>> pcie_bytes_per_s(4, 16) / 1e9
    31.504

    Raises:
        InvalidRequest: if there is no such link.
    """
    if generation not in PCIE_LANE_BYTES_PER_S or lanes < 1:
        raise InvalidRequest(
            f"There is no PCIe link of generation {generation} with {lanes} lanes: write for"
            " example 4x16, generation 1 to 6 and at least one lane."
        )
    return PCIE_LANE_BYTES_PER_S[generation] * lanes


def link_rates(gpu: Gpu) -> LinkRates:
    """Return the rates between host and *gpu*: its own figures, else what its PCIe link implies.

    Raises:
        InvalidRequest: if neither a rate nor the link is known.
    """
    if gpu.architecture == "cpu":  # moving to where one is already: torch returns the same tensor
        return LinkRates(
            h2d_pinned_bytes_per_s=math.inf,
            h2d_pageable_bytes_per_s=math.inf,
            d2h_pageable_bytes_per_s=math.inf,
        )
    pinned = gpu.h2d_pinned_bytes_per_s or _nominal_pinned_bytes_per_s(gpu)
    pageable = min(PAGEABLE_BYTES_PER_S, pinned)
    return LinkRates(
        h2d_pinned_bytes_per_s=pinned,
        h2d_pageable_bytes_per_s=gpu.h2d_pageable_bytes_per_s or pageable,
        d2h_pageable_bytes_per_s=gpu.d2h_pageable_bytes_per_s or pageable,
    )


def _nominal_pinned_bytes_per_s(gpu: Gpu) -> float:
    if gpu.unified_memory and gpu.memory_bytes_per_s:
        return gpu.memory_bytes_per_s / 2  # a copy inside one memory reads it and writes it
    if gpu.pcie_generation is None or gpu.pcie_lanes is None:
        raise InvalidRequest(
            f"How fast weights reach the {gpu.name} is unknown: neither a host-to-device rate nor"
            " its PCIe generation and lanes were found; state the link, for example --pcie 4x16."
        )
    share = PINNED_SHARE if gpu.pcie_generation < 5 else PINNED_SHARE_PCIE_5
    return share * pcie_bytes_per_s(gpu.pcie_generation, gpu.pcie_lanes)
