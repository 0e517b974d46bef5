"""Where a component's weights are while the pipeline runs: what a placement strategy means.

Strategies translate their options into these values; the cost models know only these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """All weights stay on the GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOffload:
    """Whole components take turns, by accelerate's chain rules (levers.md 4.2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequentialOffload:
    """Every module loads its own tensors before its forward and drops them after."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupOffload:
    """diffusers' group offloading (levers.md 4.4); fields are that call's arguments."""

    offload_type: Literal["block_level", "leaf_level"]
    num_blocks_per_group: int | None = None
    use_stream: bool = False
    record_stream: bool = False
    non_blocking: bool = False
    low_cpu_mem_usage: bool = False
    offload_to_disk_path: str | None = None
    block_modules: tuple[str, ...] = ()

    @property
    def is_pinned_ahead(self) -> bool:
        """Whether weights lie in page-locked memory all the time, not only while they are copied.

        From disk each tensor is pinned after it is read, whatever ``low_cpu_mem_usage`` says
        (``ModuleGroup._onload_from_disk`` in hooks/group_offloading.py, diffusers 0.42.1).
        """
        return self.use_stream and not self.low_cpu_mem_usage and self.offload_to_disk_path is None


Placement = Resident | ModelOffload | SequentialOffload | GroupOffload
