"""How long a call takes whose blocks are streamed: what the windows of compute do not hide.

A call is cut at its blocks into windows, each with the time that the GPU computes and the host
issues. Host, GPU and link then go through them as the engine does (``strategies/streamer.py``): a
block begins when it has arrived, its slot is free when it ends, and the copy of a later block
begins when there is a slot and the link is idle. That is a few additions and maxima a block, so
that the search may ask for every level of residency; a rehearsal does the same kernel by kernel.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pipefit.cost_models.allocator import allocated_bytes
from pipefit.cost_models.blocks import Blocks, aligned, blocks_of, modules_above
from pipefit.cost_models.placement import Streaming
from pipefit.cost_models.transfers import BLOCK_HOOK_S, COPY_LATENCY_S
from pipefit.cost_models.workload import Component, Event, Workload

NUM_PASSES = 3
"""Calls in a row after which the last one repeats: the first begins with an empty or a filled ring,
the second with what the first left, and later ones as the second."""


class Window(NamedTuple):
    """A part of a call: in one block, or between two."""

    block: int | None
    """Which of the component's blocks, by its number in :class:`Blocks`."""
    gpu_s: float
    host_s: float


class CallTimes(NamedTuple):
    """A call that follows one of the same component, and one that finds nothing on the GPU."""

    later_s: float
    cold_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedBytes:
    """What a streamed component keeps where."""

    loaded: tuple[int, ...]
    """On the GPU while it is loaded, in the order of allocation, its buffers first."""
    idle: tuple[int, ...]
    """On the GPU while other components are called."""
    host: int
    """In host memory, packed, while it is applied."""

    loaded_bytes: int = field(init=False)
    """The first as the allocator counts it, each of the large ones in a segment of its own."""
    idle_bytes: int = field(init=False)
    """The second, likewise."""

    def __post_init__(self) -> None:
        """Add up once what a search asks for thousands of times."""
        object.__setattr__(self, "loaded_bytes", sum(map(_allocated_bytes, self.loaded)))
        object.__setattr__(self, "idle_bytes", sum(map(_allocated_bytes, self.idle)))


@functools.cache
def _allocated_bytes(num_bytes: int) -> int:
    return allocated_bytes((num_bytes,))


def cut_of(component: Component, placement: Streaming) -> Blocks:
    """Return the blocks that *placement* divides *component* into."""
    return blocks_of(
        component, placement.max_block_bytes, placement.uncalled_modules, placement.call_order
    )


def streamed_bytes(component: Component, placement: Streaming) -> StreamedBytes:
    """Return what *component* takes on the GPU and on the host."""
    cut = cut_of(component, placement)
    streamed = set(cut.streamed(placement.resident_blocks))
    slot_bytes = cut.slot_bytes(placement.resident_blocks)
    slots = (slot_bytes,) * placement.num_slots if slot_bytes else ()
    kept = [cut.blocks[i] for i in cut.called if i not in streamed]
    buffers = tuple(tensor.num_bytes for tensor in cut.buffers)
    if placement.when_idle == "stay":
        own = {tensor.path for block in kept for tensor in block.tensors}
        own |= {tensor.path for tensor in cut.rest}
        single = tuple(t.num_bytes for t in component.tensors if t.path in own)
        loaded = (*single, *buffers, *slots)
        packed = [b for i, b in enumerate(cut.blocks) if i in streamed or not b.is_called]
        return StreamedBytes(
            loaded=loaded, idle=loaded, host=sum(block.num_bytes for block in packed)
        )
    rest_bytes = sum(aligned(tensor.num_bytes) for tensor in cut.rest)
    loaded = (*buffers, *((rest_bytes,) if rest_bytes else ()), *slots)
    loaded += tuple(block.num_bytes for block in kept)
    return StreamedBytes(
        loaded=loaded,
        idle=buffers,
        host=rest_bytes + sum(block.num_bytes for block in cut.blocks),
    )


def turns(order: Sequence[str], name: str, load_with: str | None) -> tuple[bool, ...]:
    """Return, for each call in *order*, whether what leaves when idle is on the GPU meanwhile.

    >>> turns(("text", "net", "net", "vae"), "net", "text")
    (True, True, True, False)
    """
    return tuple(called in (name, load_with) for called in order)


def windows_of(
    workload: Workload,
    routine: int,
    cut: Blocks,
    seconds_of: Callable[[Event], tuple[float, float]],
) -> tuple[Window, ...]:
    """Cut one call of *routine* at the blocks of its component.

    *seconds_of* says how long GPU and host take for a kernel or a whole call, given its event.
    """
    number = {block.path: i for i, block in enumerate(cut.blocks)}
    above = {prefix for path in number for prefix in modules_above(path)}
    found: list[Window] = []

    def add(block: int | None, gpu_s: float, host_s: float) -> None:
        if block is None and found and found[-1].block is None:
            last = found.pop()
            gpu_s, host_s = gpu_s + last.gpu_s, host_s + last.host_s
        found.append(Window(block, gpu_s, host_s))

    def walk(index: int, path: str) -> None:
        for event in workload.routines[index].events:
            if event[0] == "k":
                add(None, *seconds_of(event))
            elif event[0] == "c":
                relative = event[2]
                below = "/" if relative[:1] == "/" else ".".join(filter(None, (path, relative)))
                if below in number and relative:
                    add(number[below], *seconds_of(event))
                elif below in above:
                    walk(event[1], below)
                else:
                    add(None, *seconds_of(event))

    walk(routine, "")
    return tuple(found)


class Course:
    """Host, GPU and link on the way through the calls of one component."""

    def __init__(
        self, cut: Blocks, placement: Streaming, bytes_per_s: float, *, holds_host: bool
    ) -> None:
        self._placement = placement
        self._streamed = set(cut.streamed(placement.resident_blocks))
        self._copy_s = [block.num_bytes / bytes_per_s for block in cut.blocks]
        self._rest_s = sum(aligned(t.num_bytes) for t in cut.rest) / bytes_per_s
        self._holds_host = holds_host
        self._order: list[int] = list(cut.called)
        self.host_s = self.gpu_s = self._link_s = 0.0
        self._ready_s: dict[int, float] = {}
        self._free: deque[float] = deque([0.0] * (placement.num_slots if self._streamed else 0))
        self._kept_ready_s: dict[int, float] = {}
        self._is_loaded = placement.when_idle == "stay"

    def load(self, ahead_s: float, order: Sequence[int]) -> None:
        """Copy what left back in, begun *ahead_s* before now."""
        self._order = list(order)
        begin_s = self.host_s - ahead_s
        self.gpu_s = max(self.gpu_s, self._copied(self._rest_s, begin_s, 0.0))
        self._free = deque([begin_s] * len(self._free))
        self._ready_s = {}
        self._kept_ready_s = {}
        self._is_loaded = False
        if order:
            self._fill_from(0, begin_s)
        for block in order if ahead_s else ():
            self._keep(block, begin_s)

    def call(self, windows: Sequence[Window], order: Sequence[int]) -> None:
        """Go through one call; *order* are the blocks of it, of which some may come again."""
        self._order = list(order)
        place = 0
        for window in windows:
            ready_s = 0.0
            block = window.block
            if block is not None:
                self.host_s += BLOCK_HOOK_S * (block in self._streamed)
                ready_s = self._arrival(block)
            begin_s = max(self.gpu_s, self.host_s, ready_s)
            self.host_s += window.host_s
            self.gpu_s = max(begin_s + window.gpu_s, self.host_s)
            if block is not None:
                place += 1
                if block in self._streamed:
                    self._ready_s.pop(block, None)
                    self._free.append(self.gpu_s)
                    self._fill_from(place, self.host_s)
        self._is_loaded = True

    def _arrival(self, block: int) -> float:
        if block not in self._streamed:
            return self._kept_ready_s.get(block, 0.0)
        if block not in self._ready_s:
            if not self._free:  # what was foreseen wrongly gives its slot up
                self._ready_s.popitem()
                self._free.append(self.host_s)
            self._copy(block, self.host_s)
        return self._ready_s[block]

    def _fill_from(self, place: int, now_s: float) -> None:
        order, num_ahead = self._order, 0
        for i in range(len(order)):
            block = order[(place + i) % len(order)]
            if block in self._streamed:
                if num_ahead == self._placement.look_ahead:
                    return
                num_ahead += 1
                if block not in self._ready_s:
                    if not self._free:
                        return
                    self._copy(block, now_s)
            elif not self._is_loaded:
                self._keep(block, now_s)

    def _keep(self, block: int, now_s: float) -> None:
        if block not in self._streamed and block not in self._kept_ready_s:
            self._kept_ready_s[block] = self._copied(self._copy_s[block], now_s, 0.0)

    def _copy(self, block: int, now_s: float) -> None:
        self._ready_s[block] = self._copied(self._copy_s[block], now_s, self._free.popleft())
        self.host_s += COPY_LATENCY_S

    def _copied(self, seconds: float, now_s: float, free_s: float) -> float:
        """Return when a copy has arrived that may begin at *now_s*, once its slot is free."""
        if self._holds_host:
            # Ordinary memory is staged by the host at once: "API synchronization behavior" of the
            # CUDA runtime. The rate is that of the staging; the rest of the way is quicker.
            self.host_s = max(self.host_s, now_s) + seconds
            return max(self.host_s, free_s)
        self._link_s = max(self._link_s, now_s, free_s) + seconds
        return self._link_s


def call_times(
    windows: Sequence[Window],
    cut: Blocks,
    placement: Streaming,
    bytes_per_s: float,
    *,
    ahead_s: float = 0.0,
) -> CallTimes:
    """Return the time of a later and of a cold call; the latter's copies begin *ahead_s* before."""
    order = [w.block for w in windows if w.block is not None]
    course = Course(cut, placement, bytes_per_s, holds_host=placement.host_memory != "pinned")
    if placement.when_idle == "leave":
        course.load(ahead_s, order)
    ends = [0.0]
    for _ in range(NUM_PASSES):
        course.call(windows, order)
        ends.append(max(course.host_s, course.gpu_s))
        # The host is far ahead of the GPU between calls too: only the GPU's time counts.
    return CallTimes(later_s=ends[-1] - ends[-2], cold_s=ends[1])
