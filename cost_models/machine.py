"""What is known about the hardware: values only, each figure with its provenance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Provenance = Literal["measured", "driver", "catalogue", "assumed"]
"""Where a figure comes from: our own calibration, the driver, the GPU catalogue, or a default."""

DISK_BYTES_PER_S = 1.0e9
"""What a disk reads or writes where nobody measured it; only notes depend on it.

Our choice, between what SATA carries (6 Gbit/s in 8b/10b: 0.6e9) and PCIe 3.0 on the four lanes
of an SSD (8 GT/s a lane in 128b/130b: 3.9e9).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU. Rates are dense; TFLOP figures are stored as plain FLOP/s."""

    name: str
    """Catalogue name such as ``rtx-4060``, or the driver's name where the catalogue has none."""
    index: int = 0
    """Index as torch numbers the visible devices."""
    architecture: str = "unknown"
    """``turing``, ``ampere``, ``ada``, ``hopper``, ``blackwell``, ``rdna3``, ``apple``, ``cpu``"""
    compute_capability: tuple[int, int] | None = None
    total_bytes: int
    """What the driver calls total (``cudaMemGetInfo``), not the marketed size."""
    free_bytes: int
    """What is free now, before this process allocates."""
    other_bytes: int = 0
    """Held by other processes."""
    context_bytes: int | None = None
    """Device memory of this process outside torch's allocator; None: predict it."""
    flops_per_s: Mapping[str, float] = field(default_factory=dict)
    """Dense matrix rate by dtype: keys float16, bfloat16, float32, tf32, float8_e4m3fn, int8."""
    memory_bytes_per_s: float = 0.0
    """Peak device memory bandwidth."""
    l2_bytes: int = 0
    num_sms: int = 0
    clock_hz: float = 0.0
    half_rate_accumulate: bool = False
    """GeForce-like parts whose fp32 accumulation runs at half rate (latency findings, rule 4)."""
    h2d_pinned_bytes_per_s: float = 0.0
    d2h_pinned_bytes_per_s: float = 0.0
    h2d_pageable_bytes_per_s: float = 0.0
    d2h_pageable_bytes_per_s: float = 0.0
    pcie_generation: int | None = None
    pcie_lanes: int | None = None
    tdp_w: float | None = None
    unified_memory: bool = False
    """The GPU allocates from host RAM (Apple, integrated)."""
    expandable_segments: bool = False
    """torch's allocator in the process that will run was told to let its segments grow
    (``PYTORCH_ALLOC_CONF=expandable_segments:True``)."""
    server: bool = False
    """A data-centre part: its hosts launch kernels slower than desktops (latency rule 9)."""
    provenance: Mapping[str, Provenance] = field(default_factory=dict)
    """Field name -> where the figure is from; a field not named was not established."""
    sources: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The computer around the GPUs. Where a cgroup limits RAM, its figures are used."""

    total_bytes: int
    available_bytes: int
    pinnable_bytes: int
    """How much may be page-locked."""
    num_cores: int = 1
    disk_bytes_per_s: float = DISK_BYTES_PER_S
    provenance: Mapping[str, Provenance] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A connection between two GPUs."""

    first: int
    second: int
    bytes_per_s: float
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """GPUs, host and the links between GPUs."""

    gpus: tuple[Gpu, ...]
    host: Host
    links: tuple[Link, ...] = ()
    notes: tuple[str, ...] = ()
    """What could not be found out, one line each: no driver, no permission, a mismatch."""
