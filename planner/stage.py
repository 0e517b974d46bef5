"""Virtual GPUs with the memory and the pace of real ones, on which a rehearsal runs.

A stage hears of everything that real code does on a virtual machine. Allocations, frees, streams,
library workspaces and ``empty_cache`` drive the allocator model while they happen; kernels take on
the clock what the latency model says, copies what the link gives, and the host what it needs to
issue them. What a reader would get wrong: time decides about memory too, because a block that
another stream was recorded to use stays reserved until that stream has passed.

A call of a module without hooks at or below it is remembered as in a trace, and done again by doing
what it did to the GPU, event by event. Hooks are always executed.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from pipefit.cost_models.allocator import Block, CachingAllocator, OutOfCapacity
from pipefit.cost_models.clock import COMPUTE, GROUP_HOOK_S, TO_GPU, TO_HOST, Clock, Span
from pipefit.cost_models.context import context_bytes
from pipefit.cost_models.latency import launch_seconds
from pipefit.cost_models.machine import Gpu, Link
from pipefit.cost_models.placement import GroupOffload, ModelOffload, Placement, Split, Streaming
from pipefit.cost_models.roofline import host_kernel_seconds, kernel_seconds, num_launches
from pipefit.cost_models.transfers import (
    BLOCK_HOOK_S,
    COPY_LATENCY_S,
    FRESH_HOST_BYTES_PER_S,
    GROUP_SYNC_S,
    SEQUENTIAL_TENSOR_S,
    link_rates,
    pin_bytes_per_s,
)
from pipefit.cost_models.units import GIB, MIB
from pipefit.cost_models.workload import Launcher
from pipefit.cost_models.workspace import cublas_bytes, scratch_bytes
from pipefit.planner.kernels import kernel_of
from pipefit.planner.plan import Copies, Rehearsal, RehearsedPhase
from pipefit.planner.recorder import TILE_METHODS, Recorder, has_own_forward, intercepting
from pipefit.planner.timeline import HOST, Timeline
from pipefit.planner.trace import phase_name
from pipefit.planner.virtual import VirtualDevice
from pipefit.planner.virtual_host import HostMemory
from pipefit.planner.virtual_tensors import (
    UNSEEN,
    Buffer,
    Copy,
    Launch,
    VirtualTensor,
    buffer_of,
)
from pipefit.strategies.describe import describe_component
from pipefit.strategies.live import module_components

CROSSING = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
"""Operators that launch no kernel where they take their input from another place."""


class _Needs(NamedTuple):
    """What a launch asks of a GPU."""

    scratch_bytes: tuple[int, ...]
    is_gemm: bool
    num_launches: int
    each_s: float
    name: str


class StageGpu:
    """One GPU of a stage: its allocator, what libraries took of it, and its rates."""

    def __init__(
        self, place: int, gpu: Gpu, budget_bytes: int | None, *, is_strict: bool = True
    ) -> None:
        self.place = place
        """Its number on the virtual machine; ``gpu.index`` is that of the machine planned for."""
        self.gpu = gpu
        self.context_bytes = context_bytes(gpu)
        if budget_bytes is None:
            budget_bytes = gpu.total_bytes - gpu.other_bytes
        self.allocator = CachingAllocator(
            budget_bytes - self.context_bytes,
            expandable=gpu.expandable_segments,
            is_strict=is_strict,
        )
        self.link = link_rates(gpu)
        self.launch_s = launch_seconds(gpu)
        self.cublas_streams: set[int] = set()

    def needs(self, func: Any, args: Any, kwargs: Any, out: Any) -> _Needs | None:
        """Return what an operator asks of this GPU; None where it launches nothing."""
        kernel = kernel_of(func, args, kwargs, out)
        if kernel is None:
            return None
        launches = num_launches(kernel, self.gpu)
        return _Needs(
            scratch_bytes=scratch_bytes(kernel, self.gpu),
            is_gemm=kernel.kind == "gemm",
            num_launches=launches,
            each_s=kernel_seconds(kernel, self.gpu) / launches,
            name=kernel.name,
        )

    def copy_s(self, copy: Copy, *, finds_new_pages: bool) -> float:
        """Return how long the link takes for a copy from or to the host."""
        link, num_bytes = self.link, copy.num_bytes
        if copy.target is not None:
            rate = link.h2d_pinned_bytes_per_s if copy.is_pinned else link.h2d_pageable_bytes_per_s
            return num_bytes / rate
        if copy.is_pinned:
            return num_bytes / link.h2d_pinned_bytes_per_s  # a link is as fast both ways
        seconds = num_bytes / link.d2h_pageable_bytes_per_s
        if finds_new_pages and math.isfinite(link.d2h_pageable_bytes_per_s):
            seconds += num_bytes / FRESH_HOST_BYTES_PER_S
        return seconds

    def no_room(self, num_bytes: int) -> str:
        """As ``DeviceCachingAllocator::malloc``, c10/cuda/CUDACachingAllocator.cpp, torch 2.13."""
        allocator, card = self.allocator, self.gpu
        used_bytes = allocator.reserved_bytes + self.context_bytes
        free_bytes = max(0, card.total_bytes - card.other_bytes - used_bytes)
        return (
            f"CUDA out of memory. Tried to allocate {_size(num_bytes)}. GPU {self.place} has a "
            f"total capacity of {_size(card.total_bytes)} of which {_size(free_bytes)} is free. "
            f"Including non-PyTorch memory, this process has {_size(used_bytes)} memory in use. "
            f"{_size(max(0, allocator.capacity_bytes or 0))} allowed; Of the allocated memory "
            f"{_size(allocator.allocated_bytes)} is allocated by PyTorch, and "
            f"{_size(allocator.reserved_bytes - allocator.allocated_bytes)} is reserved by PyTorch "
            "but unallocated."
        )


class Stage(Recorder):
    """Virtual GPUs and a weightless pipeline on their host.

    Made by :func:`pipefit.planner.rehearse.on_stage`. Budgets and rows of phases go by the index of
    the GPU that is planned for; buffers, streams and copies by its place on the virtual machine.
    """

    def __init__(
        self,
        gpus: Sequence[Gpu],
        budget_bytes: Mapping[int, int],
        *,
        links: Sequence[Link] = (),
        timeline: Timeline | None = None,
        is_strict: bool = True,
        remember: bool = True,
        num_cores: int = 1,
    ) -> None:
        super().__init__(
            [VirtualDevice(gpu.compute_capability or (8, 9), gpu.total_bytes) for gpu in gpus],
            remember=remember and len(gpus) == 1,  # events do not say which GPU
        )
        self.root.events = deque(maxlen=0)  # nobody reads what is outside of remembered calls
        self.gpus = [
            StageGpu(place, gpu, budget_bytes.get(gpu.index), is_strict=is_strict)
            for place, gpu in enumerate(gpus)
        ]
        self.links = {frozenset((link.first, link.second)): link for link in links}
        self.clock = Clock()
        self.timeline = timeline
        self._num_cores = num_cores
        self.pipe: Any = None
        self.placements: Mapping[str, Placement] = {}
        """By component, where known: how weights are page-locked, and what they come back to."""
        self.placing = Copies()
        self.host = HostMemory()
        self.placing_host_bytes = 0
        """Peak of pageable memory before the call."""
        self.disk_bytes = 0
        self._has_link = math.isfinite(self.gpus[0].link.h2d_pinned_bytes_per_s)
        self._phases: dict[tuple[str, str], list[RehearsedPhase]] = {}
        self._before = self._phase = self._rows("", "", "")
        self._next: list[RehearsedPhase] | None = None
        self._timed: list[RehearsedPhase] | None = None
        self._marked_s = 0.0
        self._depth = 0
        self._parts: dict[int, list[torch.nn.Module]] = {}
        self._recorded: dict[Block, set[int]] = {}

    @property
    def allocator(self) -> CachingAllocator:
        """That of the first GPU."""
        return self.gpus[0].allocator

    @property
    def context_bytes(self) -> int:
        """That of the first GPU."""
        return self.gpus[0].context_bytes

    # -- memory of the GPUs

    def allocator_of(self, index: int) -> CachingAllocator:
        return self.gpus[index].allocator

    def allocated(self, buffer: Buffer) -> None:
        if self._muted:
            return
        place = _place(buffer)
        buffer.block = self._take(place, buffer.num_bytes)
        buffer.stream = self.machine.streams[place].number
        super().allocated(buffer)

    def freed(self, buffer: Buffer) -> None:
        if buffer.block is None:  # there was no room for it, or a remembered call freed it
            return
        if buffer.owner is None:  # older than all frames
            self._is_unlike()
        super().freed(buffer)
        self._give(_place(buffer), buffer.block)

    def _give(self, place: int, block: Block) -> None:
        """Free *block*, once the streams that were recorded to use it have passed."""
        allocator = self.gpus[place].allocator
        streams = self._recorded.pop(block, None)
        if not streams:
            allocator.free(block)
        elif block.num_bytes:
            # insert_events in c10/cuda/CUDACachingAllocator.cpp: one in each stream that uses it
            allocator.free_when_unused(block, max(self.clock.record_event(s) for s in streams))
        self._note_memory(place)

    def recorded(self, buffer: Buffer, stream: Any) -> None:
        self._is_unlike()
        if buffer.block is not None and stream.number != buffer.stream:
            self._recorded.setdefault(buffer.block, set()).add(stream.number)

    def emptied_cache(self) -> None:
        self._is_unlike()
        for gpu in self.gpus:
            held_bytes, num_deferred = gpu.allocator.reserved_bytes, gpu.allocator.num_deferred
            gpu.allocator.empty_cache()
            if num_deferred or gpu.allocator.reserved_bytes < held_bytes:
                self.clock.synchronise()  # cudaFree waits for the GPU, as do recorded blocks
                self._note_memory(gpu.place)
        if self._has_link:
            self.clock.work(SEQUENTIAL_TENSOR_S)

    def _take(self, place: int, num_bytes: int) -> Block:
        """Allocate on the current stream of a GPU and note the peaks.

        Raises:
            torch.OutOfMemoryError: in torch's words, if it does not fit.
        """
        if self._next is not None:
            self._turn()
        allocator, row = self.gpus[place].allocator, self._phase[place]
        if allocator.num_deferred:
            allocator.complete_deferred_frees(self.clock.host_s)
        num_deferred = allocator.num_deferred
        try:
            block = allocator.allocate(num_bytes, self.machine.streams[place].number)
        except OutOfCapacity as full:
            raise torch.OutOfMemoryError(self.gpus[place].no_room(full.num_bytes)) from None
        if allocator.num_deferred < num_deferred:  # it waited for them, to give memory back
            self.clock.synchronise()
        if allocator.allocated_bytes > row.allocated_bytes:
            row.allocated_bytes = allocator.allocated_bytes
        if allocator.reserved_bytes > row.reserved_bytes:
            row.reserved_bytes = allocator.reserved_bytes
        self._note_memory(place)
        return block

    def _note_memory(self, place: int) -> None:
        if self.timeline is not None:
            held = self.gpus[place].allocator
            self.timeline.memory(
                place, self.clock.host_s, held.allocated_bytes, held.reserved_bytes
            )

    # -- kernels and copies

    def _launcher_of(self, module: torch.nn.Module) -> Launcher:
        return "eager"  # operators are executed here, whatever a compiler would make of them

    def launched(
        self, launch: Launch, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any
    ) -> None:
        made = out if isinstance(out, torch.Tensor) else None
        if made is None:  # several results, or none: a check of its arguments
            made = next(t for t in (*(out or ()), *args) if isinstance(t, torch.Tensor))
        place = made.device
        if func in CROSSING and place != (args[1] if func is CROSSING[0] else args[0]).device:
            return
        gpu = self.gpus[place.index]
        by_place = launch.kernel
        if by_place is UNSEEN:
            by_place = launch.kernel = {}
        if gpu.place not in by_place:
            by_place[gpu.place] = gpu.needs(func, args, kwargs, out)
        needs = by_place[gpu.place]
        if needs is not None:
            self._note(("k", needs))
            self._launch(gpu, needs)

    def _launch(self, gpu: StageGpu, needs: _Needs) -> None:
        stream = self.machine.streams[gpu.place].number
        if needs.is_gemm and stream not in gpu.cublas_streams:
            gpu.cublas_streams.add(stream)
            self._take(gpu.place, cublas_bytes(gpu.gpu, torch.__version__))
        if needs.scratch_bytes:
            for block in [self._take(gpu.place, n) for n in needs.scratch_bytes]:
                gpu.allocator.free(block)
        span = self.clock.launch(
            needs.num_launches,
            host_s=gpu.launch_s,
            gpu_s=needs.each_s,
            stream=stream,
            engine=(gpu.place, COMPUTE),
        )
        if self.timeline is not None:
            self.timeline.span(gpu.place, stream, needs.name, span)

    def computed_on_host(
        self, launch: Launch, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any
    ) -> None:
        self._is_unlike()
        by_place = launch.kernel
        if by_place is UNSEEN:
            by_place = launch.kernel = {}
        if HOST not in by_place:
            kernel = kernel_of(func, args, kwargs, out)
            seconds = 0.0 if kernel is None else host_kernel_seconds(kernel, self._num_cores)
            by_place[HOST] = seconds
        self.clock.work(by_place[HOST])

    def copied(self, copy: Copy) -> None:
        self._note(("t", copy))
        if self._has_link:
            self.clock.work(COPY_LATENCY_S)
            placement = self.placements.get(self._phase[0].component)
            if isinstance(placement, Streaming) or (
                isinstance(placement, Split) and placement.resident_blocks and copy.source is None
            ):
                self.clock.work(BLOCK_HOOK_S)  # of the block that the copy is for
        if copy.source is not None and copy.target is not None:
            self._copy_between(copy.source, copy.target, copy.num_bytes)
            return
        is_in = copy.target is not None
        place = copy.target if copy.target is not None else copy.source or 0
        copies = self._copies(place)
        if is_in:
            copies.to_gpu_bytes += copy.num_bytes
            copies.to_gpu_pinned_bytes += copy.is_pinned * copy.num_bytes
        else:
            copies.to_host_bytes += copy.num_bytes
            copies.to_host_pinned_bytes += copy.is_pinned * copy.num_bytes
        stream = self.machine.streams[place].number
        seconds = self.gpus[place].copy_s(copy, finds_new_pages=self._finds_new_pages)
        is_blocking = copy.is_blocking
        if not (copy.is_pinned or is_blocking):
            # "API synchronization behavior" of the CUDA runtime: what is pageable is staged by the
            # host on its way in, which may wait for the stream first, and must for more than can
            # be staged; on its way out the host waits.
            if is_in:
                self.clock.synchronise(stream)
                self.clock.work(seconds)
                seconds = 0.0
            is_blocking = not is_in
        span = self.clock.copy(
            seconds,
            stream=stream,
            engine=(place, TO_GPU if is_in else TO_HOST),
            is_blocking=is_blocking,
        )
        if copy.host is not None and copy.is_pinned and not copy.is_blocking:
            self.host.used(copy.host, span.end_s)
        if self.timeline is not None:
            name = "copy to GPU" if is_in else "copy to host"
            self.timeline.span(place, stream, name, span, copy.num_bytes)

    def _copy_between(self, source: int, target: int, num_bytes: int) -> None:
        """A copy between GPUs runs in a stream of the source, with which one of the target keeps
        step before and after (``copy_device_to_device`` in aten/src/ATen/native/cuda/Copy.cu)."""
        one, other = self.gpus[source], self.gpus[target]
        link = self.links.get(frozenset((one.gpu.index, other.gpu.index)))
        if link is not None:
            seconds = num_bytes / link.bytes_per_s
        else:  # through the host, one half after the other
            rates = (one.link.h2d_pinned_bytes_per_s, other.link.h2d_pinned_bytes_per_s)
            seconds = sum(num_bytes / rate for rate in rates)
        here, there = (self.machine.streams[place].number for place in (source, target))
        self.clock.wait(here, self.clock.done_s(there))
        span = self.clock.copy(seconds, stream=here, engine=(source, TO_HOST))
        self.clock.wait(there, span.end_s)
        self._copies(source).to_other_gpus_bytes += num_bytes
        if self.timeline is not None:
            self.timeline.span(source, here, f"copy to GPU {target}", span, num_bytes)

    def _copies(self, place: int) -> Copies:
        return self.placing if self._phase is self._before else self._phase[place].copies

    @property
    def _finds_new_pages(self) -> bool:
        return any(isinstance(p, ModelOffload) for p in self.placements.values())

    # -- waiting

    def synchronised(self, index: int) -> None:
        self._note(("s", index))
        self.clock.synchronise(self.machine.streams[index].number)

    def waited(self, stream: Any) -> None:
        self._is_unlike()
        if stream is None:
            self.clock.synchronise()
            return
        self.clock.synchronise(stream.number)
        if self._has_link:
            is_default = stream.number < len(self.gpus)
            self.clock.work(GROUP_SYNC_S if is_default else GROUP_HOOK_S)

    def marked(self, stream: Any) -> float:
        self._is_unlike()
        return self.clock.record_event(stream.number)

    def ordered(self, stream: Any, moment_s: float) -> None:
        self._is_unlike()
        self.clock.wait(stream.number, moment_s)

    def reached(self, moment_s: float) -> None:
        self._is_unlike()
        self.clock.wait_until(moment_s)

    def has_done(self, stream: Any) -> bool:
        self._is_unlike()
        return self.clock.done_s(stream.number) <= self.clock.host_s

    def now_s(self) -> float:
        self._is_unlike()
        return self.clock.host_s

    # -- memory of the host

    def host_allocated(self, buffer: Buffer) -> None:
        self._is_unlike()
        self.host.allocate(buffer, self.clock.host_s)
        if buffer.is_pinned and self._has_link:
            placement = self.placements.get(self._phase[0].component)
            if isinstance(placement, GroupOffload):
                self.clock.work(buffer.num_bytes / pin_bytes_per_s(placement))

    def host_freed(self, buffer: Buffer) -> None:
        self._is_unlike()
        self.host.free(buffer, self.clock.host_s)

    def page_locked(self, buffer: Buffer) -> None:
        self._is_unlike()
        self.host.lock(buffer)

    def page_unlocked(self, buffer: Buffer) -> None:
        self._is_unlike()
        self.host.unlock(buffer)

    def wrote_file(self, num_bytes: int) -> None:
        self._is_unlike()
        self.disk_bytes += num_bytes

    def value_read(self, known: bool, func: Any) -> None:
        if known:
            super().value_read(known, func)
        else:
            self._note(("u",))
            where = self._phase[0].component or "the pipeline"
            self.unknown_reads[where] = self.unknown_reads.get(where, 0) + 1

    # -- remembered calls

    def _note(self, event: tuple[Any, ...]) -> None:
        if self.stack and not self._muted:
            self.stack[-1].events.append(event)

    def _is_unlike(self) -> None:
        """The running call does what its events cannot say: it is not remembered."""
        if self.stack:
            self.stack[-1].remember = False

    def call(
        self, module: Any, entry: str, function: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        if not self.remember:
            return function(*args, **kwargs)
        if entry not in TILE_METHODS and self._has_hooks_within(module):
            self._is_unlike()
            return function(*args, **kwargs)
        return super().call(module, entry, function, args, kwargs)

    def _is_hooked(self, module: torch.nn.Module) -> bool:
        return has_own_forward(module)

    def _kind(self, module: torch.nn.Module, entry: str) -> Any:
        """Return what makes calls alike, with where the weights are now: hooks move them."""
        if entry in TILE_METHODS:
            return super()._kind(module, entry)
        parts = self._parts.get(id(module))
        if parts is None:
            parts = self._parts[id(module)] = list(module.modules())
        weights = tuple(
            (tensor.dtype, buffer_of(tensor).device)
            for part in parts
            for table in (part._parameters, part._buffers)
            for tensor in table.values()
            if type(tensor) is VirtualTensor
        )
        return *super()._kind(module, entry), weights

    def _perform(self, routine: int, freed: Sequence[Buffer], made: Sequence[Buffer]) -> None:
        self._muted = True
        try:
            blocks = self._play(routine, [buffer.block for buffer in freed])
        finally:
            self._muted = False
        for buffer in freed:
            buffer.block = None
        for buffer, block in zip(made, blocks, strict=True):
            buffer.block, buffer.stream = block, self.machine.streams[0].number

    def _play(self, routine: int, outside: Sequence[Block]) -> list[Block]:
        """Do the events of a routine; return the blocks of what it returns."""
        blocks: dict[int, Block] = {}
        gpu = self.gpus[0]
        for event in self.routines[routine].events:
            kind = event[0]
            if kind == "a":
                blocks[event[1]] = self._take(0, event[2])
            elif kind == "k":
                self._launch(gpu, event[1])
            elif kind == "f":
                self._give(0, blocks.pop(event[1]))
            elif kind == "c":
                _, callee, _, returned, freed = event
                given = [blocks.pop(n) if n >= 0 else outside[-1 - n] for n in freed]
                blocks.update(zip(returned, self._play(callee, given), strict=True))
            elif kind == "x":
                self._give(0, outside[event[1]])
            elif kind == "t":
                self.copied(event[1])
            elif kind == "s":
                self.synchronised(event[1])
            else:
                self.value_read(False, None)
        return [blocks[n] for n in self.routines[routine].returns]

    # -- phases

    def _rows(self, name: str, component: str, entry: str) -> list[RehearsedPhase]:
        return [RehearsedPhase(name, component, entry, gpu.gpu.index) for gpu in self.gpus]

    def _turn(self) -> None:
        """Begin the next phase: with its first allocation, so that what is evicted for it still
        belongs to the phase before, as in the replay."""
        assert self._next is not None
        before, self._phase, self._next = self._phase, self._next, None
        for gpu, old, row in zip(self.gpus, before, self._phase, strict=True):
            if before is self._before:  # placing the weights belongs to the first phase
                row.allocated_bytes, row.reserved_bytes = old.allocated_bytes, old.reserved_bytes
            row.allocated_bytes = max(row.allocated_bytes, gpu.allocator.allocated_bytes)
            row.reserved_bytes = max(row.reserved_bytes, gpu.allocator.reserved_bytes)

    def _call(
        self, module: Any, entry: str, function: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        path = self._paths.get(id(module))
        if path is None or self._depth:
            return self.call(module, entry, function, args, kwargs)
        component = path.partition(".")[0]
        self._enter(component, entry)
        begin_s = self.clock.host_s
        self._depth += 1
        try:
            return self.call(module, entry, function, args, kwargs)
        finally:
            self._depth -= 1
            if self.timeline is not None:
                span = Span(begin_s, self.clock.host_s)
                self.timeline.span(HOST, 0, f"{component}.{entry}", span)

    def _enter(self, component: str, entry: str) -> None:
        rows = self._phases.get((component, entry))
        if rows is None:
            module = getattr(self.pipe, component)
            name = phase_name(describe_component(component, module, {}), module, entry)
            rows = self._phases[component, entry] = self._rows(name, component, entry)
        for row in rows:
            row.calls += 1
        self._next = None if rows is self._phase else rows
        if self._timed is not None:  # what comes before the first call is charged to it
            self._stop_watch()
        self._timed = rows

    def _stop_watch(self) -> None:
        """Charge the time since the last call began to its phase, all that is queued included."""
        now_s = self.clock.done_s()
        for row in self._timed or ():
            row.last_call_s = now_s - self._marked_s
            row.seconds += row.last_call_s
        self._marked_s = now_s

    # -- the call

    def adopt_all(self, pipe: Any) -> None:
        """Make *pipe*, which is virtual, the one that is called."""
        self.pipe = pipe
        for name, module in module_components(pipe).items():
            self.adopt(name, module)

    def forget_structures(self) -> None:
        super().forget_structures()
        self._parts.clear()

    def _own_weights(self, name: str, module: torch.nn.Module) -> None:
        """They are no component's: hooks replace them at any time."""

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Cut what is called meanwhile into phases."""
        gc.collect()  # hooks and modules refer to each other
        self.placing_host_bytes = max(self.placing_host_bytes, self.host.peak_pageable_bytes)
        self.host.forget_peak()
        self.clock.synchronise()
        self._marked_s = self.clock.host_s
        self.forget_structures()
        with (
            intercepting(module_components(self.pipe).values(), self._call, with_hooks=True),
            self.recording(self.root),
        ):
            yield
        self._stop_watch()
        self._timed = None

    def empty(self) -> None:
        """Forget the pipeline, which is gone; what is placed next belongs to what follows."""
        self.pipe = None
        for known in (self.components, self._paths, self._structures, self._hooked, self._parts):
            known.clear()
        gc.collect()  # hooks and modules refer to each other
        self.emptied_cache()
        self._phase = self._before = self._rows("", "", "")

    def rehearsal(self, call: Mapping[str, Any]) -> Rehearsal:
        """Return what was counted so far."""
        return Rehearsal(
            phases=tuple(row for rows in self._phases.values() for row in rows),
            placing=self.placing,
            placing_host_bytes=self.placing_host_bytes,
            host_bytes=self.host.peak_pageable_bytes,
            pinned_bytes=self.host.held_pinned_bytes,
            disk_bytes=self.disk_bytes,
            context_bytes=self.context_bytes,
            call=dict(call),
            unknown_reads=dict(self.unknown_reads),
            num_alloc_retries=sum(gpu.allocator.num_alloc_retries for gpu in self.gpus),
        )


def _place(buffer: Buffer) -> int:
    assert buffer.device is not None
    return buffer.device.index


def _size(num_bytes: int) -> str:
    """As ``format_size`` in c10/cuda/CUDACachingAllocator.cpp."""
    if num_bytes <= 1024:
        return f"{num_bytes} bytes"
    if num_bytes <= MIB:
        return f"{num_bytes / 1024:.2f} KiB"
    return f"{num_bytes / MIB:.2f} MiB" if num_bytes <= GIB else f"{num_bytes / GIB:.2f} GiB"
