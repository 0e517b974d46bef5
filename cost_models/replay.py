"""A whole pipeline call through the allocator: weights, hooks and every tensor in call order.

This is what predicts reserved memory: which cached block a tensor finds depends on all that was
allocated before it. A call that was replayed twice with the same effect on reserved memory has
reached a fixed point; from then on only its returned tensors are allocated.

What is easily got wrong: with streams, weights come from the copy stream's own pool, which the
activations of other components cannot use; and model offload empties the cache at each eviction,
group offload never does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipefit.cost_models.allocator import GRAPH_POOL, Block, CachingAllocator
from pipefit.cost_models.clock import GROUP_HOOK_S, TO_GPU, Clock
from pipefit.cost_models.devices import place_of, places_of, split_bytes
from pipefit.cost_models.latency import launch_seconds
from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.placement import (
    GroupOffload,
    ModelOffload,
    OnHost,
    Placement,
    Resident,
    SequentialOffload,
    Split,
    Streaming,
)
from pipefit.cost_models.prediction import Choice
from pipefit.cost_models.residency import (
    GroupHooks,
    OffloadChain,
    load_order,
    offload_groups,
    sequential_groups,
    sequential_resident_bytes,
)
from pipefit.cost_models.roofline import LAUNCHER_SHARE, kernel_seconds, num_launches
from pipefit.cost_models.streaming import streamed_bytes
from pipefit.cost_models.transfers import COPY_LATENCY_S, link_rates, pin_bytes_per_s
from pipefit.cost_models.workload import SYNCHRONISE, Event, Workload, returned_bytes, split_path
from pipefit.cost_models.workspace import cublas_bytes, scratch_bytes

REPLAYS_TO_SETTLE = 2
"""Replays of a call in a row that must find and leave the same reserved memory to count as settled.

Chosen: one is not enough, because the first such replay may still have moved cached blocks about.
Where weights are given back late, the host must be as far ahead of the GPU, too.
"""

SAME_PACE = 1e-3
"""Share by which two times may differ that count as equal; what repeats differs by rounding."""

SMALLEST_SETTLED_EVENTS = 32
"""Calls of fewer events are always replayed: looking them up costs as much."""


class Moment(NamedTuple):
    """What is allocated at one moment, and of what it consists."""

    allocated_bytes: int
    weight_bytes: int
    workspace_bytes: int
    carried_bytes: int


@dataclass(slots=True)
class _Settled:
    """How often in a row a call changed reserved memory alike, and what it did then."""

    state_bytes: int
    """See :meth:`Replay._state_bytes`."""
    loaded: frozenset[int]
    peak: Moment
    """Relative to the state at entry."""
    peak_reserved_bytes: int
    """Above ``state_bytes``."""
    added_bytes: int
    returned_bytes: tuple[int, ...]
    times: tuple[float, float]
    """What the clock, where there is one, had to :meth:`Clock.skip`."""
    num_replays: int

    def agrees(self, added_bytes: int, times: tuple[float, float]) -> bool:
        """Whether one more replay did the same."""
        pairs = zip(self.times, times, strict=True)
        return added_bytes == self.added_bytes and all(
            math.isclose(one, other, rel_tol=SAME_PACE) for one, other in pairs
        )


class Replay:
    """Runs a workload once under some choices; :meth:`run` may be called once.

    ``peaks`` and ``peak_reserved_bytes`` hold, for each phase of the workload, the highest moment
    and the most that was reserved.
    """

    def __init__(
        self,
        workload: Workload,
        choices: Mapping[str, Choice],
        gpu: Gpu,
        *,
        capacity_bytes: int | None = None,
        main: int | None = None,
    ) -> None:
        """Replay on *gpu* alone, or, with *main*, what falls to *gpu* of several.

        *main* is the index of the GPU on which the pipeline computes; components are where their
        choice says, and what is elsewhere takes nothing here but what it returns to the main GPU.
        """
        self.workload = workload
        self.choices = choices
        self._device = gpu.index
        self._main = gpu.index if main is None else main
        self._places = {
            c.name: places_of(c, placement)
            for c in workload.components
            if isinstance(placement := choices[c.name].placement, Split)
        }
        """Of split components: where their parts lie."""
        self._before_block: tuple[bool, int] = (True, 0)
        """Whether the last part of a split component was here, and what it returned."""
        self.allocator = CachingAllocator(capacity_bytes, expandable=gpu.expandable_segments)
        self.peaks = [Moment(0, 0, 0, 0)] * len(workload.phases)
        self.peak_reserved_bytes = [0] * len(workload.phases)
        self.grown_reserved_bytes = [0] * len(workload.phases)
        """The most right after the phase took memory; 0 where what was cached before sufficed."""
        self._scratch = [scratch_bytes(kernel, gpu) for kernel in workload.kernels]
        self._is_gemm = [kernel.kind == "gemm" for kernel in workload.kernels]
        self._cublas_bytes = cublas_bytes(gpu, workload.versions.get("torch", ""))
        self._has_cublas = False
        self._launchers = [kernel.launcher for kernel in workload.kernels]
        self._pools = [self._pool_of(routine.events) for routine in workload.routines]
        self._has_tried = False
        """Whether kernels were tried for a graph that is not captured yet."""
        self._weight_bytes = self._workspace_bytes = self._carried_bytes = 0
        self._peak = Moment(0, 0, 0, 0)
        self._phase_of = {c: i for i, phase in enumerate(workload.phases) for c in phase.calls}
        self._phase = self._phase_of.get(0, 0)
        self._carried: set[Block] = set()
        self._held: set[Block] = set()
        """Blocks that the running component call cannot free: see :meth:`_hooks_hold`."""
        members = [n for n, c in choices.items() if isinstance(c.placement, ModelOffload)]
        self._chain = OffloadChain(workload, members)
        self._tensor_bytes = {c.name: list(load_order(c)) for c in workload.components}
        self._weight_ratio: dict[str, float] = {}
        self._weights: dict[str, list[Block]] = {}
        self._hooks: dict[str, GroupHooks] = {}
        self._streamed = {
            c.name: streamed_bytes(c, placement)
            for c in workload.components
            if isinstance(placement := choices[c.name].placement, Streaming)
            and self._is_here(c.name)
        }
        self._leaving: set[str] = set()
        """Streamed components that leave when idle and are loaded."""
        self._streams = {c.name: i for i, c in enumerate(workload.components, start=1)}
        self._group_blocks: dict[tuple[str, int], list[Block]] = {}
        runs_ahead = any(_records_stream(choice.placement) for choice in choices.values())
        self._clock = Clock() if runs_ahead else None
        self._gpu = gpu
        self._launch_s = launch_seconds(gpu)
        self._h2d_bytes_per_s = link_rates(gpu).h2d_pinned_bytes_per_s if runs_ahead else 0.0
        self._costs: dict[int, tuple[int, float]] = {}
        self._settled: dict[tuple[int, str, str], _Settled] = {}
        self._num_events: dict[int, int] = {}

    def run(self) -> None:
        """Place the weights, then replay the pipeline's own frame."""
        self._place_weights()
        blocks: dict[int, Block] = {}
        num_calls = 0
        for event in self.workload.root:
            kind = event[0]
            if kind == "a":
                num_bytes = event[2] if self._is_main else 0
                self._carry(blocks, event[1], self.allocator.allocate(num_bytes))
            elif kind == "f":
                self._free_if_known(blocks.pop(event[1], None))
            elif kind == "k":
                if self._is_main:
                    self._launch(event[1])
            elif kind == "w":
                self._change_weights(event[1], event[2])
            else:
                self._call_component(event, blocks, self._phase_of[num_calls])
                num_calls += 1
        self._leave_phase()

    def _pool_of(self, events: Iterable[Event]) -> int:
        """Return the stream from whose pool a routine allocates: that of CUDA graphs, or 0."""
        is_graph = any(e[0] == "k" and self._launchers[e[1]] == "captured" for e in events)
        return GRAPH_POOL if is_graph else 0

    def _call_component(self, event: Event, blocks: dict[int, Block], phase: int) -> None:
        """Replay a call that the pipeline makes; a traced variant may stand in for it."""
        _, index, path, returned, freed = event
        component, below = split_path(path, "", "")
        choice = self.choices[component]
        if choice.variant:
            index = self.workload.variants[choice.variant].get(index, index)
        is_loaded = self._evict_for(component)
        self._leave_for(component)
        if phase != self._phase:
            self._leave_phase()
            self._phase = phase
        if is_loaded:
            self._load(component, self._tensor_bytes[component])
        self._arrive_for(component)
        outside = [blocks.pop(n) for n in freed]
        if not self._is_here(component) or (not self._is_main and component not in self._places):
            self._travel(index, component, below, returned, outside, blocks)
            return
        # A variant was traced apart: what the pipeline gave up during the plain call outlives it.
        num_given = self.workload.routines[index].num_outside
        held = outside[:num_given] if self._hooks_hold(component) else []
        self._held.update(held)
        if isinstance(choice.placement, OnHost):
            # Nothing of the call is on the GPU but its results, copied there one by one.
            results = [self.allocator.allocate(n) for n in returned_bytes(self.workload, index)]
            held = outside[:num_given]
        else:
            results = self._call(index, component, below, outside[:num_given], is_entered=True)
        self._held.clear()
        for block in (*held, *outside[num_given:]):
            self._free(block)
        for number, block in zip(returned, results, strict=False):
            self._carry(blocks, number, block)
        for block in results[len(returned) :]:
            self._free(block)

    # Several GPUs.

    @property
    def _is_main(self) -> bool:
        return self._device == self._main

    def _is_here(self, component: str, path: str = "") -> bool:
        """Whether what *component* does at *path* is done on this GPU; "": anything of it."""
        places = self._places.get(component)
        if places is None:
            home = self.choices[component].device
            return self._device == (self._main if home is None else home)
        return self._device in places.values() if not path else self._place(component, path)

    def _is_divided(self, component: str, path: str) -> bool:
        """Whether blocks that are split over GPUs lie below *path*."""
        begin = f"{path}." if path else ""
        places = self._places[component]
        return path not in places and any(place.startswith(begin) for place in places)

    def _place(self, component: str, path: str) -> bool:
        return place_of(self._places[component], path) == self._device

    def _travel(
        self,
        index: int,
        component: str,
        below: str,
        returned: Sequence[int],
        outside: list[Block],
        blocks: dict[int, Block],
    ) -> None:
        """Replay a call for which tensors travel: it is elsewhere, or here and not on the main GPU.

        What the callee is given is copied to it, and its results to the main GPU.
        """
        allocator = self.allocator
        results: list[Block] = []
        if self._is_here(component):
            given = allocator.allocate(self.workload.input_bytes.get(index, 0))
            self._note_peak()
            nothing = [allocator.allocate(0)] * self.workload.routines[index].num_outside
            for block in self._call(index, component, below, nothing, is_entered=True):
                self._free(block)
            self._free(given)
        elif self._is_main:
            results = [allocator.allocate(n) for n in returned_bytes(self.workload, index)]
        for block in outside:
            self._free(block)
        for number, block in zip(returned, results, strict=False):
            self._carry(blocks, number, block)
        for number in returned[len(results) :]:
            self._carry(blocks, number, allocator.allocate(0))

    def _call_part(
        self, index: int, component: str, path: str, outside: list[Block], *, from_here: bool
    ) -> list[Block]:
        """Replay a call below a split component: a block here or elsewhere, or what is between."""
        allocator = self.allocator
        if self._is_divided(component, path):
            return self._replay(index, component, path, outside, None)
        is_here = self._place(component, path)
        was_here, moved_bytes = self._before_block
        sizes = returned_bytes(self.workload, index)
        self._before_block = is_here, sum(sizes)
        if not is_here:
            for block in outside:
                self._free(block)
            return [allocator.allocate(0) for _ in sizes]
        # What the part before returned is where that was, everything else where the caller is.
        others_bytes = max(0, self.workload.input_bytes.get(index, 0) - moved_bytes)
        copied_bytes = (0 if was_here else moved_bytes) + (0 if from_here else others_bytes)
        copied = allocator.allocate(copied_bytes)
        self._note_peak()
        results = self._call(index, component, path, outside, is_entered=True)
        self._free(copied)
        return results

    def _hooks_hold(self, component: str) -> bool:
        """Whether what *component* takes out of lists that it is given lives on until it returns.

        A hook hands a module copies of the lists among its arguments, made by ``send_to_device``
        (``GroupOffloadingHook.pre_forward`` in diffusers 0.42.1, ``CpuOffload`` and
        ``AlignDevicesHook`` in accelerate 1.15), while the caller's frame keeps the lists
        themselves. A UNet with a T2I adapter pops its residuals from one.
        """
        hooks = self._hooks.get(component)
        if hooks is not None and isinstance(self.choices[component].placement, GroupOffload):
            return hooks.leads("")
        return hooks is not None or component in self._chain.members

    # Weights, as the placements move them.

    def _place_weights(self) -> None:
        for component in self.workload.components:
            name = component.name
            placement = self.choices[name].placement
            if isinstance(placement, Split):
                self._load(name, split_bytes(component, placement, self._device))
            elif not self._is_here(name):
                continue
            elif isinstance(placement, Resident) or name in self._chain.excluded:
                self._load(name, self._tensor_bytes[name])
            elif isinstance(placement, Streaming):
                self._load(name, self._streamed[name].idle)
            elif isinstance(placement, SequentialOffload):
                self._load(name, sequential_resident_bytes(component))
                self._hooks[name] = GroupHooks(sequential_groups(component))
            elif isinstance(placement, GroupOffload):
                self._hooks[name] = GroupHooks(offload_groups(component, placement))

    def _evict_for(self, component: str) -> bool:
        """Apply the chain's rule to a call of *component*; return whether it is to be loaded."""
        evicted, is_loaded = self._chain.call(component)
        for name in evicted:
            for block in self._weights.pop(name):
                self._free_weight(block)
            self.allocator.empty_cache()
        return is_loaded

    def _leave_for(self, component: str) -> None:
        """Free what streamed components hold that leave when *component* is called."""
        for name in sorted(self._leaving):
            placement = self.choices[name].placement
            assert isinstance(placement, Streaming)
            if component in (name, placement.load_with):
                continue
            idle = len(self._streamed[name].idle)
            for block in self._weights[name][idle:]:
                self._free_weight(block)
            del self._weights[name][idle:]
            self._leaving.remove(name)

    def _arrive_for(self, component: str) -> None:
        """Load what comes back with the call of *component*, itself first."""
        for name, streamed in sorted(self._streamed.items(), key=lambda pair: pair[0] != component):
            placement = self.choices[name].placement
            assert isinstance(placement, Streaming)
            is_due = component in (name, placement.load_with) and placement.when_idle == "leave"
            if is_due and name not in self._leaving:
                self._weights[name] += [
                    self._allocate_weight(n, 0) for n in streamed.loaded[len(streamed.idle) :]
                ]
                self._leaving.add(name)

    def _load(self, name: str, tensor_bytes: Iterable[int]) -> None:
        self._weights[name] = [self._allocate_weight(n, 0) for n in tensor_bytes]

    def _allocate_weight(self, num_bytes: int, stream: int) -> Block:
        block = self.allocator.allocate(num_bytes, stream)
        self._weight_bytes += block.num_bytes
        self._note_peak()
        return block

    def _free_weight(self, block: Block) -> None:
        self._weight_bytes -= block.num_bytes
        self.allocator.free(block)

    def _change_weights(self, name: str, delta_bytes: int) -> None:
        """One tensor of a component comes or goes, as in ``component.to(dtype)``."""
        sizes = self._tensor_bytes[name]
        traced_bytes = self.workload.component(name).weight_bytes
        self._weight_ratio[name] = (sum(sizes) + delta_bytes) / traced_bytes
        held = None if name in self._hooks else self._weights.get(name)
        if delta_bytes > 0:
            sizes.append(delta_bytes)
            if held is not None:
                held.append(self._allocate_weight(delta_bytes, 0))
        elif -delta_bytes in sizes:
            sizes.remove(-delta_bytes)
            if held is not None:
                block = next(b for b in held if b.requested_bytes == -delta_bytes)
                held.remove(block)
                self._free_weight(block)

    def _onload_groups(self, hooks: GroupHooks, component: str, path: str, entry: str) -> None:
        ratio = self._weight_ratio.get(component, 1.0)
        placement = self.choices[component].placement
        for index in hooks.before(path, entry):
            group = hooks.groups[index]
            sizes = [round(n * ratio) for n in group.tensor_bytes]
            if group.is_streamed:
                blocks = self._stream_in(sizes, component, is_blocking=hooks.is_blocking(index))
            else:
                if self._clock is not None:
                    self._clock.synchronise(0)
                blocks = [self._allocate_weight(n, 0) for n in sizes]
            self._group_blocks[component, index] = blocks
            if isinstance(placement, SequentialOffload):
                self.allocator.empty_cache()

    def _stream_in(self, sizes: Iterable[int], component: str, *, is_blocking: bool) -> list[Block]:
        clock, stream = self._clock, self._streams[component]
        if clock is None:
            return [self._allocate_weight(num_bytes, stream) for num_bytes in sizes]
        placement = self.choices[component].placement
        assert isinstance(placement, GroupOffload)
        blocks = []
        clock.synchronise(stream)  # the copies before must have arrived
        clock.work(GROUP_HOOK_S)
        for num_bytes in sizes:
            # Page-locked first where the placement keeps it pageable.
            clock.work(COPY_LATENCY_S + num_bytes / pin_bytes_per_s(placement))
            clock.copy(
                num_bytes / self._h2d_bytes_per_s,
                stream=stream,
                engine=TO_GPU,
                is_blocking=is_blocking,
            )
            self.allocator.complete_deferred_frees(clock.host_s)
            blocks.append(self._allocate_weight(num_bytes, stream))
        return blocks

    def _offload_groups(self, hooks: GroupHooks, component: str, path: str) -> None:
        placement = self.choices[component].placement
        for index in hooks.after(path):
            blocks = self._group_blocks.pop((component, index))
            if self._clock is None:
                for block in blocks:
                    self._free_weight(block)
            elif _records_stream(placement) and hooks.groups[index].is_streamed:
                for block in blocks:
                    if block.num_bytes:
                        self._weight_bytes -= block.num_bytes
                        self.allocator.free_when_unused(block, self._clock.record_event())
            else:
                self._clock.synchronise(0)
                for block in blocks:
                    self._free_weight(block)

    # Calls below the pipeline's own frame.

    def _call(
        self, index: int, component: str, path: str, outside: list[Block], *, is_entered: bool
    ) -> list[Block]:
        if component in self._places and self._is_divided(component, path):
            return self._replay(index, component, path, outside, None)
        hooks = self._hooks.get(component)
        if hooks is not None and not hooks.concerns(path):
            hooks = None
        # While weights move, only whole calls settle: where a block's results land among the cached
        # weights matters for the next block, and so does when it is done.
        is_part = path and (hooks is not None or self._clock is not None)
        if is_part or self._events_of(index) < SMALLEST_SETTLED_EVENTS:
            return self._replay(index, component, path, outside, hooks if is_entered else None)
        key = (index, component, path) if hooks else (index, "", "")
        loaded = frozenset(hooks.loaded) if hooks else frozenset()
        settled = self._settled.get(key)
        if settled is not None and (
            settled.state_bytes != self._state_bytes(component) or settled.loaded != loaded
        ):
            settled = None
        if settled is not None and settled.num_replays >= REPLAYS_TO_SETTLE:
            return self._repeat(settled, outside, self._pools[index])
        return self._observe(key, index, component, path, outside, hooks, is_entered, settled)

    def _observe(
        self,
        key: tuple[int, str, str],
        index: int,
        component: str,
        path: str,
        outside: list[Block],
        hooks: GroupHooks | None,
        is_entered: bool,
        settled: _Settled | None,
    ) -> list[Block]:
        """Replay a call and note what it did, provided that it left the loaded weights alone."""
        allocator = self.allocator
        before, outer_peak = self._now(), self._peak
        state_bytes, reserved_bytes = self._state_bytes(component), allocator.reserved_bytes
        outer_reserved_bytes = allocator.peak_reserved_bytes
        clock = self._clock
        begin_s = clock.host_s if clock is not None else 0.0
        loaded = frozenset(hooks.loaded) if hooks else frozenset()
        num_recorders = len(hooks.recorders) if hooks else 0
        self._peak = before
        allocator.peak_reserved_bytes = reserved_bytes
        results = self._replay(index, component, path, outside, hooks if is_entered else None)
        peak, peak_reserved_bytes = self._peak, allocator.peak_reserved_bytes
        self._peak = max(outer_peak, peak)
        allocator.peak_reserved_bytes = max(outer_reserved_bytes, peak_reserved_bytes)
        self._settled.pop(key, None)
        added_bytes = self._state_bytes(component) - state_bytes
        times = clock.since(begin_s) if clock is not None else (0.0, 0.0)
        if settled is not None and not settled.agrees(added_bytes, times):
            settled = None
        if (
            self._weight_bytes == before.weight_bytes
            and (hooks is None or loaded == hooks.loaded)
            and (hooks is None or num_recorders == len(hooks.recorders))
        ):
            self._settled[key] = _Settled(
                state_bytes=state_bytes,
                loaded=loaded,
                peak=Moment(*(p - b for p, b in zip(peak, before, strict=True))),
                peak_reserved_bytes=peak_reserved_bytes - state_bytes,
                added_bytes=added_bytes,
                returned_bytes=tuple(block.requested_bytes for block in results),
                times=times,
                num_replays=1 + (settled.num_replays if settled else 0),
            )
        return results

    def _state_bytes(self, component: str) -> int:
        """Return what must be equal for a call of *component* to have the same effect again.

        Reserved memory, because cached blocks decide what needs new segments; under sequential
        offload the cache is emptied at once, so that only what is in use matters.
        """
        if isinstance(self.choices[component].placement, SequentialOffload):
            return self.allocator.requested_bytes
        return self.allocator.reserved_bytes

    def _repeat(self, settled: _Settled, outside: list[Block], pool: int) -> list[Block]:
        """Stand in for a call that has settled: its peaks, its results and what it frees."""
        peak = Moment(*(n + p for n, p in zip(self._now(), settled.peak, strict=True)))
        self._peak = max(self._peak, peak)
        allocator = self.allocator
        allocator.peak_reserved_bytes = max(
            allocator.peak_reserved_bytes, settled.state_bytes + settled.peak_reserved_bytes
        )
        if self._clock is not None:
            self._clock.skip(*settled.times)
        results = [allocator.allocate(num_bytes, pool) for num_bytes in settled.returned_bytes]
        self._note_peak()
        for block in outside:
            self._free(block)
        return results

    def _replay(
        self, index: int, component: str, path: str, outside: list[Block], hooks: GroupHooks | None
    ) -> list[Block]:
        routine = self.workload.routines[index]
        if hooks is not None:
            self._onload_groups(hooks, component, path, routine.entry)
        allocator, pool = self.allocator, self._pools[index]
        blocks: dict[int, Block] = {}
        is_split = component in self._places
        is_here = not is_split or self._place(component, path)
        for event in routine.events:
            kind = event[0]
            if kind == "a":
                blocks[event[1]] = allocator.allocate(event[2] if is_here else 0, pool)
                if allocator.allocated_bytes > self._peak[0]:
                    self._peak = self._now()
            elif kind == "f":
                allocator.free(blocks.pop(event[1]))
            elif kind == "k":
                if is_here:
                    self._launch(event[1])
            elif kind == "c":
                _, callee, relative, returned, freed = event
                where, below = split_path(relative, component, path)
                if where != component and not below and self._evict_for(where):
                    self._load(where, self._tensor_bytes[where])
                given = [blocks.pop(n) if n >= 0 else outside[-1 - n] for n in freed]
                if is_split and below != path and self._is_divided(component, path):
                    results = self._call_part(callee, where, below, given, from_here=is_here)
                else:
                    results = self._call(callee, where, below, given, is_entered=relative != "")
                blocks.update(zip(returned, results, strict=True))
            elif kind == "x":
                self._free(outside[event[1]])
            else:
                self._change_weights(event[1], event[2])
        if hooks is not None:
            self._offload_groups(hooks, component, path)
        return [blocks[n] for n in routine.returns]

    def _launch(self, kernel: int) -> None:
        if self._clock is not None:
            self._tick(self._clock, kernel)
        if self._is_gemm[kernel] and not self._has_cublas:
            self._has_cublas = True
            self._workspace_bytes += self.allocator.allocate(self._cublas_bytes).num_bytes
            self._note_peak()
        if self._has_tried and self._launchers[kernel] == "captured":
            # torch.cuda.graph gives back what is cached before it captures (torch/cuda/graphs.py).
            self.allocator.empty_cache()
            self._has_tried = False
        if not self._scratch[kernel]:
            return
        self._has_tried |= self._launchers[kernel] == "tried"
        pool = GRAPH_POOL if self._launchers[kernel] == "captured" else 0
        blocks = [self.allocator.allocate(num_bytes, pool) for num_bytes in self._scratch[kernel]]
        held_bytes = sum(block.num_bytes for block in blocks)
        self._workspace_bytes += held_bytes
        self._note_peak()
        self._workspace_bytes -= held_bytes
        for block in blocks:
            self.allocator.free(block)

    def _tick(self, clock: Clock, kernel: int) -> None:
        found = self.workload.kernels[kernel]
        if found == SYNCHRONISE:
            clock.synchronise(0)
            return
        cost = self._costs.get(kernel)
        if cost is None:
            launches = num_launches(found, self._gpu)
            each_s = kernel_seconds(found, self._gpu) / max(1, launches)
            cost = self._costs[kernel] = launches, each_s
        host_s = self._launch_s * LAUNCHER_SHARE[found.launcher]
        clock.launch(cost[0], host_s=host_s, gpu_s=cost[1])

    def _events_of(self, index: int) -> int:
        """Return how many events a call of this routine expands to."""
        found = self._num_events.get(index)
        if found is None:
            events = self.workload.routines[index].events
            found = self._num_events[index] = len(events) + sum(
                self._events_of(event[1]) for event in events if event[0] == "c"
            )
        return found

    # Counters.

    def _carry(self, blocks: dict[int, Block], number: int, block: Block) -> None:
        blocks[number] = block
        self._carried.add(block)
        self._carried_bytes += block.num_bytes
        self._note_peak()

    def _free(self, block: Block) -> None:
        if block in self._held:
            return
        if block in self._carried:
            self._carried.discard(block)
            self._carried_bytes -= block.num_bytes
        self.allocator.free(block)

    def _free_if_known(self, block: Block | None) -> None:
        # A variant may return fewer tensors than the call it stands in for.
        if block is not None:
            self._free(block)

    def _now(self) -> Moment:
        return Moment(
            self.allocator.allocated_bytes,
            self._weight_bytes,
            self._workspace_bytes,
            self._carried_bytes,
        )

    def _note_peak(self) -> None:
        if self.allocator.allocated_bytes > self._peak[0]:
            self._peak = self._now()

    def _leave_phase(self) -> None:
        """File the peaks under the current phase and start anew."""
        phase, allocator = self._phase, self.allocator
        if phase < len(self.peaks):
            self.peaks[phase] = max(self.peaks[phase], self._peak)
            self.peak_reserved_bytes[phase] = max(
                self.peak_reserved_bytes[phase], allocator.peak_reserved_bytes
            )
            self.grown_reserved_bytes[phase] = max(
                self.grown_reserved_bytes[phase], allocator.grown_reserved_bytes
            )
            allocator.grown_reserved_bytes = 0
        self._peak = self._now()
        allocator.reset_peak()


def _records_stream(placement: Placement) -> bool:
    return isinstance(placement, GroupOffload) and placement.use_stream and placement.record_stream
