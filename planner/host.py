"""The computer around the GPUs: RAM, cores, and the cgroup that may allow less than there is.

psutil reads the machine's figures, also inside a container, where the control group is what kills
the process. A group's limit can sit on any level above it, so every level is read and the smallest
wins. Its file cache counts as available, because the kernel drops it before it refuses memory:
after weights were read through mmap, nearly all that the group "uses" is that cache (51 GiB
inactive and 16 GiB active of 70, kekzl/imp#2070).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

from pipefit.cost_models.machine import Host

HALF_PINNABLE_SHARE = 0.5
"""Share of RAM that a driver page-locks under Windows and WSL, and for AMD and Intel GPUs on Linux.

Windows: TotalSystemMemoryAvailableForGraphics is half of the memory,
https://learn.microsoft.com/windows-hardware/drivers/display/calculating-graphics-memory.
AMD and Intel: ``ttm_global_init`` in drivers/gpu/drm/ttm/ttm_device.c of Linux.
"""

WHOLE_PINNABLE_SHARE = 1.0
"""The same for NVIDIA GPUs on Linux, where no limit is documented: what is available can be locked.

The driver locks pages in the kernel, so raising RLIMIT_MEMLOCK changes nothing (cupy/cupy#4775).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Interface:
    """The file names of one cgroup version; the unlimited value is text in v2, 2⁶³ in v1."""

    limits: tuple[str, ...]
    usage: str
    reclaimable: tuple[str, ...]
    quota: str


_V2 = _Interface(
    # above memory.high a process is not killed but throttled to a standstill
    limits=("memory.max", "memory.high"),
    usage="memory.current",
    reclaimable=("inactive_file", "active_file"),
    quota="cpu.max",
)
_V1 = _Interface(
    limits=("memory.limit_in_bytes",),
    usage="memory.usage_in_bytes",
    reclaimable=("total_inactive_file", "total_active_file"),
    quota="cpu.cfs_quota_us",
)


def read_host(root: Path = Path("/"), *, pinnable_share: float = WHOLE_PINNABLE_SHARE) -> Host:
    """Return the host with what its control group leaves of it.

    *pinnable_share* is the share of RAM that the GPU's driver page-locks, and *root* is where
    ``proc`` and ``sys`` lie.
    """
    memory = psutil.virtual_memory()
    limit_bytes, left_bytes = cgroup_memory_bytes(root)
    total_bytes = min(memory.total, limit_bytes)
    available_bytes = min(memory.available, left_bytes)
    return Host(
        total_bytes=int(total_bytes),
        available_bytes=int(available_bytes),
        pinnable_bytes=int(min(available_bytes, memory.total * pinnable_share)),
        num_cores=math.ceil(min(_num_cores_of_process(), cgroup_cores(root))),
        provenance={
            "total_bytes": "driver",
            "available_bytes": "driver",
            "pinnable_bytes": "assumed",
            "num_cores": "driver",
            "disk_bytes_per_s": "assumed",
        },
    )


def cgroup_memory_bytes(root: Path = Path("/")) -> tuple[float, float]:
    """Return the smallest memory limit above this process, and the least that any level leaves.

    Both are infinite where nothing is limited. The level with the smallest limit need not be the
    one that leaves least: its parent may be nearly full of others.
    """
    limit_bytes = left_bytes = math.inf
    for level, interface in _levels(root, "memory"):
        limits = [_number(level / name) for name in interface.limits]
        level_bytes = min((limit for limit in limits if limit is not None), default=math.inf)
        used_bytes = _number(level / interface.usage) or 0
        used_bytes -= _statistics_sum(level / "memory.stat", interface.reclaimable)
        limit_bytes = min(limit_bytes, level_bytes)
        left_bytes = min(left_bytes, max(0, level_bytes - max(0, used_bytes)))
    return limit_bytes, left_bytes


def cgroup_cores(root: Path = Path("/")) -> float:
    """Return how many cores the control group's quota is worth; infinite without one."""
    cores = math.inf
    for level, interface in _levels(root, "cpu"):
        if interface is _V2:
            quota, _, period = _text(level / interface.quota).partition(" ")
        else:
            quota, period = _text(level / interface.quota), _text(level / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period) > 0:  # "max" and -1: unlimited
            cores = min(cores, int(quota) / int(period))
    return cores


def _levels(root: Path, controller: str) -> list[tuple[Path, _Interface]]:
    """Every group above this process that may hold the controller's files, of both versions."""
    mounts = root / "sys/fs/cgroup"
    levels = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0":  # beside v1 hierarchies, v2 is mounted at "unified"
            levels += [(level, _V2) for level in _chain(mounts, path)]
            levels += [(level, _V2) for level in _chain(mounts / "unified", path)]
        elif controller in controllers.split(","):
            for name in {controllers, controller}:
                levels += [(level, _V1) for level in _chain(mounts / name, path)]
    return levels


def _chain(mount: Path, path: str) -> list[Path]:
    """The group and its parents below *mount*.

    A container without a cgroup namespace sees the host's path, which its mount does not hold, and
    one that was moved sees "..": what is left then is the mount itself.
    """
    parts = [part for part in PurePosixPath(path).parts if part != "/"]
    if ".." in parts:
        parts = []
    chain = [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return [level for level in chain if level.is_dir()]


def _num_cores_of_process() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return psutil.cpu_count() or 1


def _text(path: Path) -> str:
    """The file's text; empty where there is none or it may not be read, which means no limit."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdigit() else None


def _statistics_sum(path: Path, names: tuple[str, ...]) -> int:
    pairs = (line.split() for line in _text(path).splitlines())
    return sum(int(value) for name, value in pairs if name in names)
