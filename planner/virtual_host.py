"""Host memory of a rehearsal: ordinary tensors, and page-locked ones as torch's allocator has them.

torch gives page-locked blocks out in powers of two and takes none back: a freed one waits for the
next request of its size, and until then for the copies that read it. Source:
``CachingHostAllocatorImpl`` in aten/src/ATen/core/CachingHostAllocator.h, torch 2.13.
"""

from __future__ import annotations

from collections import Counter

from pipefit.cost_models.host_memory import pinned_bytes
from pipefit.planner.virtual_tensors import CPU, Buffer


class HostMemory:
    """Counts what tensors take of the host's memory; told of each, and of the time."""

    def __init__(self) -> None:
        self.pageable_bytes = self.peak_pageable_bytes = 0
        self.pinned_bytes = 0
        """In use."""
        self.held_pinned_bytes = 0
        """With what the allocator keeps for later, which is a peak: none is given back."""
        self._kept: Counter[int] = Counter()
        self._read_by_copies: list[tuple[float, int]] = []
        self._used_until_s: dict[int, float] = {}
        self._locked: set[int] = set()

    def lock(self, buffer: Buffer) -> None:
        """Note that ordinary memory is page-locked where it is: exactly, and not kept for later."""
        if buffer.is_written:
            self.pageable_bytes -= buffer.num_bytes
        self.pinned_bytes += buffer.num_bytes
        self.held_pinned_bytes += buffer.num_bytes
        self._locked.add(id(buffer))

    def unlock(self, buffer: Buffer) -> None:
        """Note that it is ordinary memory again."""
        self._locked.remove(id(buffer))
        self.pinned_bytes -= buffer.num_bytes
        self.held_pinned_bytes -= buffer.num_bytes
        self.pageable_bytes += buffer.num_bytes
        self.peak_pageable_bytes = max(self.peak_pageable_bytes, self.pageable_bytes)

    def allocate(self, buffer: Buffer, now_s: float) -> None:
        """Note that *buffer* exists."""
        if not buffer.is_pinned:
            if buffer.device == CPU:
                self.pageable_bytes += buffer.num_bytes
                self.peak_pageable_bytes = max(self.peak_pageable_bytes, self.pageable_bytes)
            return
        block_bytes = pinned_bytes(buffer.num_bytes)
        self.pinned_bytes += block_bytes
        self._keep_what_is_read(now_s)
        if self._kept[block_bytes]:
            self._kept[block_bytes] -= 1
        else:
            self.held_pinned_bytes += block_bytes

    def free(self, buffer: Buffer, now_s: float) -> None:
        """Note that *buffer* is gone."""
        if id(buffer) in self._locked:
            self._locked.remove(id(buffer))
            self.pinned_bytes -= buffer.num_bytes
            self.held_pinned_bytes -= buffer.num_bytes
            return
        if not buffer.is_pinned:
            if buffer.device == CPU:
                self.pageable_bytes -= buffer.num_bytes
            return
        block_bytes = pinned_bytes(buffer.num_bytes)
        self.pinned_bytes -= block_bytes
        until_s = self._used_until_s.pop(id(buffer), 0.0)
        if until_s > now_s:
            self._read_by_copies.append((until_s, block_bytes))
        else:
            self._kept[block_bytes] += 1

    def used(self, buffer: Buffer, until_s: float) -> None:
        """Note that a copy, for which nobody waits, reads or writes pinned *buffer*."""
        key = id(buffer)
        self._used_until_s[key] = max(until_s, self._used_until_s.get(key, 0.0))

    def forget_peak(self) -> None:
        """Begin the pageable peak anew."""
        self.peak_pageable_bytes = self.pageable_bytes

    def _keep_what_is_read(self, now_s: float) -> None:
        waiting = self._read_by_copies
        self._read_by_copies = [one for one in waiting if one[0] > now_s]
        self._kept.update(num_bytes for until_s, num_bytes in waiting if until_s <= now_s)
