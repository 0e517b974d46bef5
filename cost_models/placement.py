"""Where a component's weights are while the pipeline runs: what a placement strategy means.

Strategies translate their options into these values; the cost models know only these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipefit.cost_models.units import MIB


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


@dataclass(frozen=True, slots=True, kw_only=True)
class OnHost:
    """All weights stay in host memory, and the CPU computes with them."""


MAX_BLOCK_BYTES = 256 * MIB
"""Largest block that is streamed whole; our choice: a copy of half that reaches the link's full
rate, and two slots of it are small beside the activations of a picture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Streaming:
    """Some blocks stay, the others take turns in a ring of slots on the GPU; pipefit's own."""

    resident_blocks: int
    """How many of the component's blocks stay, spread evenly; see ``cost_models/blocks.py``."""
    num_slots: int = 2
    look_ahead: int = 2
    """How many blocks that come next are copied ahead, at most one a slot."""
    when_idle: Literal["stay", "leave"] = "stay"
    """Whether what is on the GPU stays there while other components are called."""
    load_with: str | None = None
    """What left is copied back in as soon as this component is called; None: the own call."""
    host_memory: Literal["pinned", "pageable", "disk"] = "pinned"
    """Where streamed blocks wait: page-locked, in ordinary memory, or in files that are mapped."""
    max_block_bytes: int = MAX_BLOCK_BYTES
    uncalled_modules: tuple[str, ...] = ()
    """What the planned call does not enter: stays on the host unless a call does all the same."""
    call_order: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """``workload.call_order``: where modules call others in another order than they list them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A component's blocks lie on several GPUs: accelerate's ``dispatch_model``."""

    blocks: tuple[tuple[int, int], ...] = ()
    """(index of a GPU, how many of the blocks lie there), in the order in which the blocks are
    called; a GPU may come again; what is no block lies on the first. See
    ``cost_models/devices.py``."""
    places: tuple[tuple[str, int], ...] = ()
    """Instead of ``blocks``: (path of a module or tensor, index of the GPU of all below it)."""
    resident_blocks: tuple[tuple[int, int], ...] = ()
    """(index of a GPU, how many of the blocks into which streaming cuts its part stay there); the
    others wait on the host, page-locked, and take turns in slots of that GPU. Those that are not
    named hold their part."""
    max_block_bytes: int = MAX_BLOCK_BYTES


Placement = Resident | ModelOffload | SequentialOffload | GroupOffload | OnHost | Streaming | Split
