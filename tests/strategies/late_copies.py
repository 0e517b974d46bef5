"""A copy stream on the CPU that is as late as a GPU's may be, and notices what a GPU would forgive.

A copy is carried out when the computing side waits for an event recorded behind it, and not before.
Every buffer begins as bytes 0xFF, which are NaN in any float, and so does a slot that its block has
left. Besides, each kernel and each copy is compared with what the events promise: a kernel must not
read memory into which a copy is still queued, nor may such memory be given back; a copy must wait
for the last kernel that read its target, and for all kernels from before the target was allocated,
because the allocator may have taken it from one of them.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipefit.strategies import streamer

POISON = 0xFF


class WrongOrder(AssertionError):
    """Something was not waited for."""


class _Event:
    def __init__(self) -> None:
        self.num_copies = 0
        """Copies queued before it was recorded."""
        self.num_kernels = 0
        """Kernels queued before it was recorded."""


class _Memory:
    """A buffer on the GPU's side, which this does not keep."""

    def __init__(self, storage: Any, born: int) -> None:
        self.storage = weakref.ref(storage)
        self.last_read = born
        """When it was read last, as a number of kernels; at first, when it was allocated."""


class Timeline(TorchDispatchMode):
    """Counts kernels, and knows of each buffer who read it last and what is queued for it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_kernels = 0
        self.num_copies = 0
        self.copied_bytes = 0
        self.memories: dict[int, _Memory] = {}
        self.pending: list[tuple[int, _Memory, int, Any]] = []
        """Copies that are queued: their number, target, where in it, and source."""
        self.is_watching = True
        self.is_early = False
        """Whether memory was given back while a copy into it was queued."""

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        before, self.is_watching = self.is_watching, False
        try:
            yield
        finally:
            self.is_watching = before

    def allocated(self, buffer: Any) -> None:
        with self.unwatched():
            buffer.fill_(POISON)
        storage = buffer.untyped_storage()
        memory = self.memories[storage._cdata] = _Memory(storage, self.num_kernels)
        weakref.finalize(storage, self._given_back, storage._cdata, memory)

    def _given_back(self, key: int, memory: _Memory) -> None:
        self.memories.pop(key, None)
        # An error in a finalizer would be lost.
        self.is_early |= any(target is memory for _, target, _, _ in self.pending)

    def check(self) -> None:
        """Raise what could not be raised when it happened."""
        if self.is_early:
            raise WrongOrder("Memory was given back while a copy into it was queued.")

    def memory_of(self, tensor: Any) -> _Memory | None:
        return self.memories.get(tensor.untyped_storage()._cdata)

    def run_pending(self, until: int) -> None:
        with self.unwatched():
            while self.pending and self.pending[0][0] <= until:
                _, memory, begin, source = self.pending.pop(0)
                storage = memory.storage()
                if storage is not None:
                    target = torch.empty(0, dtype=torch.uint8)
                    target.set_(storage, begin, source.shape).copy_(source)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.is_watching and not _only_views(func):
            self.num_kernels += 1
            for tensor in _tensors((args, kwargs)):
                memory = self.memory_of(tensor)
                if memory is not None:
                    self._read(memory)
        return func(*args, **kwargs)

    def _read(self, memory: _Memory) -> None:
        if any(target is memory for _, target, _, _ in self.pending):
            raise WrongOrder("A kernel reads memory into which a copy is still queued.")
        memory.last_read = self.num_kernels


def _only_views(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(
        one.alias_info is not None and not one.alias_info.is_write for one in returns
    )


def _tensors(value: Any) -> Iterator[Any]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


class LateCopies(streamer.CopyStream):
    """Copies as late as events allow; a *skipped* (method, caller) is the defect of a test."""

    timeline: Timeline
    skipped: tuple[str, str] | None = None

    def __init__(self, device: Any) -> None:
        super().__init__(device)
        self.num_kernels_seen = 0

    def _is_skipped(self) -> bool:
        here, caller = sys._getframe(1).f_code.co_name, sys._getframe(2).f_code.co_name
        return self.skipped == (here, caller)

    def event(self) -> Any:
        return _Event()

    def copy(self, target: Any, source: Any) -> None:
        memory = self.timeline.memory_of(target)
        assert memory is not None
        if memory.last_read > self.num_kernels_seen:
            raise WrongOrder("A copy does not wait for the kernel that read its target last.")
        self.timeline.num_copies += 1
        self.timeline.copied_bytes += source.numel()
        begin = target.storage_offset()
        self.timeline.pending.append((self.timeline.num_copies, memory, begin, source))

    def record(self, event: Any) -> None:
        if not self._is_skipped():
            event.num_copies = self.timeline.num_copies

    def wait(self, event: Any) -> None:
        if not self._is_skipped():
            self.num_kernels_seen = max(self.num_kernels_seen, event.num_kernels)

    def record_compute(self, event: Any) -> None:
        if not self._is_skipped():
            event.num_kernels = self.timeline.num_kernels

    def let_compute_wait(self, event: Any) -> None:
        if not self._is_skipped():
            self.timeline.run_pending(event.num_copies)

    def synchronize(self) -> None:
        if not self._is_skipped():
            self.timeline.run_pending(self.timeline.num_copies)


class PoisonedStreamer(streamer.Streamer):
    """A streamer whose memory is NaN wherever no block is."""

    def _empty(self, num_bytes: int) -> Any:
        buffer = super()._empty(num_bytes)
        buffer.fill_(POISON)
        return buffer

    def _end(self, block: Any) -> None:
        slot = block.slot if block.is_streamed else None
        super()._end(block)
        if slot is not None and slot.block is None:
            slot.buffer.fill_(POISON)


class LateStreamer(PoisonedStreamer):
    """The same, whose memory is on the timeline."""

    def _empty(self, num_bytes: int) -> Any:
        with LateCopies.timeline.unwatched():
            buffer = super()._empty(num_bytes)
        LateCopies.timeline.allocated(buffer)
        return buffer

    def _end(self, block: Any) -> None:
        # Poisoning is no kernel; what the streamer does itself are views and no kernels either.
        with LateCopies.timeline.unwatched():
            super()._end(block)


@contextmanager
def late_copies(skipped: tuple[str, str] | None = None) -> Iterator[Timeline]:
    """Have everything that is streamed meanwhile copied late; *skipped* is left out for a test."""
    timeline = Timeline()
    with pytest.MonkeyPatch.context() as patch, timeline:
        patch.setattr(LateCopies, "timeline", timeline, raising=False)
        patch.setattr(LateCopies, "skipped", skipped)
        patch.setattr(streamer, "CopyStream", LateCopies)
        patch.setattr(streamer, "Streamer", LateStreamer)
        yield timeline
        timeline.check()


@contextmanager
def poisoned_slots() -> Iterator[None]:
    """Have memory of slots NaN wherever no block is, for everything that is streamed meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamer, "Streamer", PoisonedStreamer)
        yield
