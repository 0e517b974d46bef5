"""torch's CUDA caching allocator as arithmetic, because reserved memory is what a budget meets.

Replaying allocations and frees gives what ``torch.cuda.memory_stats`` would say: *requested*
bytes, *allocated* bytes (blocks, with the rests too small to split off) and *reserved* bytes
(segments taken from the driver). Two things are easy to get wrong: a freed block goes back to its
own stream's pool only, and :meth:`CachingAllocator.empty_cache` returns only segments of which no
block is in use.

Model of the native backend with default settings; ``cudaMallocAsync``, ``expandable_segments`` and
the other knobs of ``PYTORCH_ALLOC_CONF`` are not covered. Source of every rule and constant:
``c10/cuda/CUDACachingAllocator.cpp`` and ``c10/core/AllocatorConfig.h`` of torch 2.13.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

from pipefit.cost_models.units import MIB

BLOCK_STEP_BYTES = 512
"""Sizes are rounded up to a multiple of this: ``kMinBlockSize``."""

SMALL_REQUEST_BYTES = 1 * MIB
"""Largest rounded request that the small pool serves: ``kSmallSize``."""

SMALL_SEGMENT_BYTES = 2 * MIB
"""Segment of the small pool: ``kSmallBuffer``."""

LARGE_SEGMENT_BYTES = 20 * MIB
"""Segment for requests between the small pool and ``LARGE_REQUEST_BYTES``: ``kLargeBuffer``."""

LARGE_REQUEST_BYTES = 10 * MIB
"""From here on a request gets a segment of its own: ``kMinLargeAlloc``."""

LARGE_SEGMENT_STEP_BYTES = 2 * MIB
"""Own segments are rounded up to a multiple of this: ``kRoundLarge``."""


def block_bytes(num_bytes: int) -> int:
    """Return the smallest block that holds *num_bytes*; nothing is allocated for nothing.

    >>> block_bytes(0), block_bytes(1), block_bytes(512), block_bytes(513)
    (0, 512, 512, 1024)
    """
    return -(-num_bytes // BLOCK_STEP_BYTES) * BLOCK_STEP_BYTES


class Block:
    """A piece of a segment, in use or free; neighbours of the same segment are linked."""

    __slots__ = ("address", "is_free", "next", "num_bytes", "pool", "previous", "requested_bytes")

    def __init__(self, address: int, num_bytes: int, pool: _Pool) -> None:
        self.address = address
        self.num_bytes = num_bytes
        self.pool = pool
        self.requested_bytes = 0
        self.is_free = False
        self.previous: Block | None = None
        self.next: Block | None = None


class _Pool:
    """The free blocks of one stream and size class, sorted by size, then address."""

    __slots__ = ("free", "smallest_rest_bytes")

    def __init__(self, *, is_small: bool) -> None:
        self.free: list[tuple[int, int, Block]] = []
        self.smallest_rest_bytes = (
            BLOCK_STEP_BYTES if is_small else SMALL_REQUEST_BYTES + BLOCK_STEP_BYTES
        )

    def add(self, block: Block) -> None:
        block.is_free = True
        insort(self.free, (block.num_bytes, block.address, block))

    def remove(self, block: Block) -> None:
        del self.free[bisect_left(self.free, (block.num_bytes, block.address))]


class CachingAllocator:
    """Replays allocations; every counter is what torch calls by the same name.

    >>> allocator = CachingAllocator()
    >>> block = allocator.allocate(3 * MIB)
    >>> allocator.allocated_bytes // MIB, allocator.reserved_bytes // MIB
    (3, 20)
    >>> allocator.free(block); allocator.empty_cache()
    >>> allocator.reserved_bytes, allocator.peak_reserved_bytes // MIB
    (0, 20)
    """

    def __init__(self, capacity_bytes: int | None = None) -> None:
        """Start empty.

        Before more than *capacity_bytes* would be reserved, all cached segments are given back.
        What still does not fit is reserved above it; there, torch raises ``OutOfMemoryError``.
        """
        self.capacity_bytes = capacity_bytes
        self.allocated_bytes = 0
        self.requested_bytes = 0
        self.reserved_bytes = 0
        self.peak_allocated_bytes = 0
        self.peak_requested_bytes = 0
        self.peak_reserved_bytes = 0
        self._pools: dict[tuple[int, bool], _Pool] = {}
        self._next_address = 0

    def allocate(self, num_bytes: int, stream: int = 0) -> Block:
        """Return a block of at least *num_bytes* from the pool of *stream*."""
        needed = -(-num_bytes // BLOCK_STEP_BYTES) * BLOCK_STEP_BYTES
        is_small = needed <= SMALL_REQUEST_BYTES
        pool = self._pools.get((stream, is_small))
        if pool is None:
            pool = self._pools[stream, is_small] = _Pool(is_small=is_small)
        if needed == 0:
            return Block(-1, 0, pool)
        free = pool.free
        place = bisect_left(free, (needed,))
        block = free.pop(place)[2] if place < len(free) else self._new_segment(needed, pool)
        block.is_free = False
        rest = block.num_bytes - needed
        if rest >= pool.smallest_rest_bytes:
            remainder = Block(block.address + needed, rest, pool)
            remainder.previous, remainder.next = block, block.next
            if block.next is not None:
                block.next.previous = remainder
            block.next = remainder
            block.num_bytes = needed
            remainder.is_free = True
            insort(free, (rest, remainder.address, remainder))
        block.requested_bytes = num_bytes
        self.requested_bytes += num_bytes
        self.allocated_bytes += block.num_bytes
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = self.allocated_bytes
        if self.requested_bytes > self.peak_requested_bytes:
            self.peak_requested_bytes = self.requested_bytes
        return block

    def free(self, block: Block) -> None:
        """Give *block* back to its pool, merged with free neighbours."""
        if block.num_bytes == 0:
            return
        if block.is_free:
            raise ValueError(f"The block at {block.address} was freed twice.")
        self.allocated_bytes -= block.num_bytes
        self.requested_bytes -= block.requested_bytes
        pool = block.pool
        before, after = block.previous, block.next
        if before is not None and before.is_free:
            pool.remove(before)
            block.address = before.address
            block.num_bytes += before.num_bytes
            block.previous = before.previous
            if before.previous is not None:
                before.previous.next = block
        if after is not None and after.is_free:
            pool.remove(after)
            block.num_bytes += after.num_bytes
            block.next = after.next
            if after.next is not None:
                after.next.previous = block
        pool.add(block)

    def empty_cache(self) -> None:
        """Give every segment without a block in use back to the driver."""
        for pool in self._pools.values():
            kept = []
            for entry in pool.free:
                if entry[2].previous is None and entry[2].next is None:
                    self.reserved_bytes -= entry[0]
                else:
                    kept.append(entry)
            # In place: an allocation that had to flush goes on with the same list.
            pool.free[:] = kept

    def reset_peak(self) -> None:
        """Start the three peaks anew from what is held now."""
        self.peak_allocated_bytes = self.allocated_bytes
        self.peak_requested_bytes = self.requested_bytes
        self.peak_reserved_bytes = self.reserved_bytes

    def _new_segment(self, needed: int, pool: _Pool) -> Block:
        if needed <= SMALL_REQUEST_BYTES:
            segment_bytes = SMALL_SEGMENT_BYTES
        elif needed < LARGE_REQUEST_BYTES:
            segment_bytes = LARGE_SEGMENT_BYTES
        else:
            segment_bytes = -(-needed // LARGE_SEGMENT_STEP_BYTES) * LARGE_SEGMENT_STEP_BYTES
        capacity_bytes = self.capacity_bytes
        if capacity_bytes is not None and self.reserved_bytes + segment_bytes > capacity_bytes:
            self.empty_cache()
        self.reserved_bytes += segment_bytes
        if self.reserved_bytes > self.peak_reserved_bytes:
            self.peak_reserved_bytes = self.reserved_bytes
        block = Block(self._next_address, segment_bytes, pool)
        self._next_address += segment_bytes
        return block


def allocated_bytes(tensor_bytes: Iterable[int]) -> int:
    """Return what tensors take when they are allocated in this order in a fresh pool.

    More than their sum: a tensor that leaves up to 1 MiB of its block keeps that rest.

    >>> allocated_bytes([1, 19 * MIB + MIB // 2]) - (19 * MIB + MIB // 2)
    524800
    """
    allocator = CachingAllocator()
    for num_bytes in tensor_bytes:
        allocator.allocate(num_bytes)
    return allocator.allocated_bytes
