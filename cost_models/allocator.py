"""torch's CUDA caching allocator as arithmetic, because reserved memory is what a budget meets.

Replaying allocations and frees gives what ``torch.cuda.memory_stats`` would say: *requested*
bytes, *allocated* bytes (blocks, with the rests too small to split off) and *reserved* bytes
(taken from the driver). Two things are easy to get wrong: a freed block goes back to its own
stream's pool only, and :meth:`CachingAllocator.empty_cache` returns only segments of which no
block is in use.

Two ways of taking memory from the driver are covered. By default each segment is a ``cudaMalloc``
of its own and never grows. With ``PYTORCH_ALLOC_CONF=expandable_segments:True`` each pool is one
range of addresses that grows by whole pages, so that large tensors fit where several smaller ones
were; there a block keeps no rest at all, and ``empty_cache`` returns every page that is unused.

Source of every rule: ``c10/cuda/CUDACachingAllocator.cpp`` of torch 2.13 (``malloc``,
``get_free_block``, ``should_split``, ``try_allocate_expandable_block``, ``release_blocks``);
constants: ``c10/core/AllocatorConfig.h``, there. Not covered, and said in a plan where the process
has them set: ``max_split_size_mb``, ``garbage_collection_threshold``, ``roundup_power2_divisions``,
``large_segment_size_mb``, and the backend ``cudaMallocAsync``. How that one grows is decided in
NVIDIA's closed driver: its documentation promises that cached memory is reused and remapped, not
in which steps it is taken. The one published figure (an SDXL decode in float32, +5.44 GiB reserved,
https://github.com/invoke-ai/InvokeAI/pull/7674) lies between that decode's allocated peak, 3.75,
and what this model reserves for it, 6.94.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable

from pipefit.cost_models.units import MIB

BLOCK_STEP_BYTES = 512
"""Sizes are rounded up to a multiple of this: ``kMinBlockSize``."""

SMALL_REQUEST_BYTES = 1 * MIB
"""Largest rounded request that the small pool serves: ``kSmallSize``."""

SMALL_SEGMENT_BYTES = 2 * MIB
"""Segment of the small pool, or the page in which it grows: ``kSmallBuffer``."""

LARGE_SEGMENT_BYTES = 20 * MIB
"""Segment for requests between the small pool and ``LARGE_REQUEST_BYTES``; with expandable segments
the page in which the large pool grows: ``large_segment_size_``."""

LARGE_REQUEST_BYTES = 10 * MIB
"""From here on a request gets a segment of its own: ``kMinLargeAlloc``."""

LARGE_SEGMENT_STEP_BYTES = 2 * MIB
"""Own segments are rounded up to a multiple of this: ``kRoundLarge``."""

GRAPH_POOL = -1
"""Stream that stands for the pool of CUDA graphs, which only they use and which stays with them.

inductor's graphs of a device share one, from the run before the capture on
(``CUDAGraphTreeManager`` in torch/_inductor/cudagraph_trees.py, 2.13); ``empty_cache`` leaves a
pool whose graphs live alone (``release_cached_blocks`` in c10/cuda/CUDACachingAllocator.cpp).
"""

ADDRESS_RANGE_BYTES = 1 << 50
"""Room that an expandable segment may grow into.

torch reserves 9/8 of the GPU's memory; it never runs out of it before the GPU does, so that any
size beyond every GPU will do here.
"""


def block_bytes(num_bytes: int) -> int:
    """Return the smallest block that holds *num_bytes*; nothing is allocated for nothing.

    >>> block_bytes(0), block_bytes(1), block_bytes(512), block_bytes(513)
    (0, 512, 512, 1024)
    """
    return -(-num_bytes // BLOCK_STEP_BYTES) * BLOCK_STEP_BYTES


class Block:
    """A piece of a segment, in use, free or without memory; neighbours in a segment are linked."""

    __slots__ = (
        "address",
        "is_free",
        "is_mapped",
        "next",
        "num_bytes",
        "pool",
        "previous",
        "requested_bytes",
    )

    def __init__(self, address: int, num_bytes: int, pool: _Pool) -> None:
        self.address = address
        self.num_bytes = num_bytes
        self.pool = pool
        self.requested_bytes = 0
        self.is_free = False
        """In the pool, and backed by memory."""
        self.is_mapped = True
        """Backed by memory; addresses of an expandable segment may not be."""
        self.previous: Block | None = None
        self.next: Block | None = None

    def split(self, num_bytes: int) -> Block:
        """Keep the first *num_bytes*; return the rest, linked behind."""
        rest = Block(self.address + num_bytes, self.num_bytes - num_bytes, self.pool)
        rest.is_mapped = self.is_mapped
        rest.previous, rest.next = self, self.next
        if self.next is not None:
            self.next.previous = rest
        self.next = rest
        self.num_bytes = num_bytes
        return rest

    def absorb(self, neighbour: Block) -> None:
        """Become one with the block before or after this one."""
        self.num_bytes += neighbour.num_bytes
        if neighbour is self.previous:
            self.address = neighbour.address
            self.previous = neighbour.previous
            if self.previous is not None:
                self.previous.next = self
        else:
            self.next = neighbour.next
            if self.next is not None:
                self.next.previous = self


class _Pool:
    """The blocks of one stream and size class that can be had, sorted by size, then address."""

    __slots__ = ("free", "page_bytes", "smallest_rest_bytes", "unmapped")

    def __init__(self, *, is_small: bool, expandable: bool) -> None:
        self.free: list[tuple[int, int, Block]] = []
        self.unmapped: list[tuple[int, Block]] = []
        """Addresses without memory, in ascending order; the last reaches to the end of the range.
        Empty where segments cannot grow."""
        self.page_bytes = SMALL_SEGMENT_BYTES if is_small else LARGE_SEGMENT_BYTES
        self.smallest_rest_bytes = (
            BLOCK_STEP_BYTES if is_small or expandable else SMALL_REQUEST_BYTES + BLOCK_STEP_BYTES
        )

    def add(self, block: Block) -> None:
        """Take in *block*, merged with its free neighbours."""
        for neighbour in (block.previous, block.next):
            if neighbour is not None and neighbour.is_free:
                self.remove(neighbour)
                block.absorb(neighbour)
        block.is_free = True
        insort(self.free, (block.num_bytes, block.address, block))

    def remove(self, block: Block) -> None:
        del self.free[bisect_left(self.free, (block.num_bytes, block.address))]

    def take_best(self, needed: int) -> Block | None:
        """Return the smallest free block that holds *needed* bytes; None if there is none.

        A block that can grow counts with all that it can grow to, so that it is taken last.
        """
        free = self.free
        place = bisect_left(free, (needed,))
        if place == len(free):
            return None
        if self.unmapped:
            while place + 1 < len(free) and _reach(free[place + 1][2]) < _reach(free[place][2]):
                place += 1
        return free.pop(place)[2]

    def map_block(self, needed: int) -> tuple[Block, int]:
        """Return a block with memory for *needed* bytes and how much new memory that took.

        The lowest addresses that are free or without memory, in a row, and long enough.
        """
        start = next(
            begin
            for _, block in self.unmapped
            if _has_room(begin := _with_free_before(block), needed)
        )
        new_bytes = 0
        while not start.is_mapped or start.num_bytes < needed:
            block = start if not start.is_mapped else start.next
            assert block is not None
            missing = needed if block is start else needed - start.num_bytes
            pages = -(-min(missing, block.num_bytes) // self.page_bytes)
            place = bisect_left(self.unmapped, (block.address,))
            if pages * self.page_bytes < block.num_bytes:
                rest = block.split(pages * self.page_bytes)
                self.unmapped[place] = rest.address, rest
            else:
                del self.unmapped[place]
            new_bytes += block.num_bytes
            block.is_mapped = True
            self.add(block)
            start = block
        self.remove(start)
        return start, new_bytes

    def release(self) -> int:
        """Give up all memory that nothing in use shares a segment or page with; return how much."""
        if not self.unmapped:
            whole = [e for e in self.free if e[2].previous is None and e[2].next is None]
            # In place: an allocation that had to flush goes on with the same list.
            self.free[:] = [e for e in self.free if e[2].previous or e[2].next]
            return sum(num_bytes for num_bytes, _, _ in whole)
        return sum(self._unmap(block) for _, _, block in list(self.free))

    def _unmap(self, block: Block) -> int:
        base = block.address // ADDRESS_RANGE_BYTES * ADDRESS_RANGE_BYTES
        page_bytes, offset = self.page_bytes, block.address - base
        begin = -(-offset // page_bytes) * page_bytes
        end = (offset + block.num_bytes) // page_bytes * page_bytes
        if begin >= end:
            return 0
        self.remove(block)
        block.is_free = False
        if begin > offset:
            before, block = block, block.split(begin - offset)
            before.is_free = True
            insort(self.free, (before.num_bytes, before.address, before))
        if end - begin < block.num_bytes:
            after = block.split(end - begin)
            after.is_free = True
            insort(self.free, (after.num_bytes, after.address, after))
        block.is_mapped = False
        for neighbour in (block.previous, block.next):
            if neighbour is not None and not neighbour.is_mapped:
                del self.unmapped[bisect_left(self.unmapped, (neighbour.address,))]
                block.absorb(neighbour)
        insort(self.unmapped, (block.address, block))
        return end - begin


def _reach(block: Block) -> int:
    after = block.next
    return block.num_bytes + (after.num_bytes if after is not None and not after.is_mapped else 0)


def _with_free_before(block: Block) -> Block:
    before = block.previous
    return before if before is not None and before.is_free else block


def _has_room(block: Block | None, needed: int) -> bool:
    while needed > 0 and block is not None and (block.is_free or not block.is_mapped):
        needed -= block.num_bytes
        block = block.next
    return needed <= 0


class OutOfCapacity(MemoryError):
    """An allocation does not fit, though all cached memory was given back."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        super().__init__(f"{num_bytes} bytes do not fit.")


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

    def __init__(
        self,
        capacity_bytes: int | None = None,
        *,
        expandable: bool = False,
        is_strict: bool = False,
    ) -> None:
        """Start empty, with segments that can grow if *expandable*.

        Before more than *capacity_bytes* would be reserved, all cached memory is given back, which
        waits for deferred frees. What still does not fit is reserved above it, so that a peak can
        be told; if *is_strict*, :class:`OutOfCapacity` is raised, where torch raises
        ``OutOfMemoryError``.
        """
        self.capacity_bytes = capacity_bytes
        self.is_strict = is_strict
        self.expandable = expandable
        self.allocated_bytes = 0
        self.requested_bytes = 0
        self.reserved_bytes = 0
        self.peak_allocated_bytes = 0
        self.peak_requested_bytes = 0
        self.peak_reserved_bytes = 0
        self.grown_reserved_bytes = 0
        """The most that was reserved right after memory was taken; reset by whoever asks."""
        self.num_alloc_retries = 0
        """How often all cached memory was given back because the capacity was reached."""
        self._pools: dict[tuple[int, bool], _Pool] = {}
        self._deferred: deque[tuple[float, Block]] = deque()
        self._next_address = 0

    def allocate(self, num_bytes: int, stream: int = 0) -> Block:
        """Return a block of at least *num_bytes* from the pool of *stream*."""
        needed = -(-num_bytes // BLOCK_STEP_BYTES) * BLOCK_STEP_BYTES
        is_small = needed <= SMALL_REQUEST_BYTES
        pool = self._pools.get((stream, is_small))
        if pool is None:
            pool = self._pools[stream, is_small] = self._new_pool(is_small=is_small)
        if needed == 0:
            return Block(-1, 0, pool)
        block = pool.take_best(needed) or self._reserve(needed, pool)
        block.is_free = False
        if block.num_bytes - needed >= pool.smallest_rest_bytes:
            rest = block.split(needed)
            rest.is_free = True
            insort(pool.free, (rest.num_bytes, rest.address, rest))
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
        self._uncount(block)
        block.pool.add(block)

    def free_when_unused(self, block: Block, unused_at_s: float = math.inf) -> None:
        """Free *block*, which other streams still use (``record_stream``) until *unused_at_s*.

        It counts as allocated no longer, and cannot be had again before
        :meth:`complete_deferred_frees`.
        """
        if block.num_bytes == 0:
            return
        self._uncount(block)
        self._deferred.append((unused_at_s, block))

    @property
    def num_deferred(self) -> int:
        """How many freed blocks still wait for other streams."""
        return len(self._deferred)

    def complete_deferred_frees(self, now_s: float = math.inf) -> None:
        """Return blocks that other streams used until *now_s* to their pools, or all.

        First in, first out: ``process_events`` stops at the first event that is not reached.
        """
        deferred = self._deferred
        while deferred and deferred[0][0] <= now_s:
            block = deferred.popleft()[1]
            block.pool.add(block)

    def empty_cache(self) -> None:
        """Give memory that nothing uses back to the driver, after waiting for all streams.

        What is in :data:`GRAPH_POOL` stays.
        """
        self.complete_deferred_frees()
        for (stream, _), pool in self._pools.items():
            if stream != GRAPH_POOL:
                self.reserved_bytes -= pool.release()

    def reset_peak(self) -> None:
        """Start the three peaks anew from what is held now."""
        self.peak_allocated_bytes = self.allocated_bytes
        self.peak_requested_bytes = self.requested_bytes
        self.peak_reserved_bytes = self.reserved_bytes

    def _uncount(self, block: Block) -> None:
        if block.requested_bytes == 0:
            raise ValueError(f"The block at {block.address} was freed twice.")
        self.allocated_bytes -= block.num_bytes
        self.requested_bytes -= block.requested_bytes
        block.requested_bytes = 0

    def _new_pool(self, *, is_small: bool) -> _Pool:
        pool = _Pool(is_small=is_small, expandable=self.expandable)
        if self.expandable:
            segment = Block(self._next_address, ADDRESS_RANGE_BYTES, pool)
            segment.is_mapped = False
            pool.unmapped.append((segment.address, segment))
            self._next_address += ADDRESS_RANGE_BYTES
        return pool

    def _reserve(self, needed: int, pool: _Pool) -> Block:
        """Take memory from the driver, after flushing where the capacity would be exceeded."""
        if needed <= SMALL_REQUEST_BYTES:
            segment_bytes = SMALL_SEGMENT_BYTES
        elif needed < LARGE_REQUEST_BYTES:
            segment_bytes = LARGE_SEGMENT_BYTES
        else:
            segment_bytes = -(-needed // LARGE_SEGMENT_STEP_BYTES) * LARGE_SEGMENT_STEP_BYTES
        # torch compares the whole segment even where it then maps a page or two
        capacity_bytes = self.capacity_bytes
        if capacity_bytes is not None and self.reserved_bytes + segment_bytes > capacity_bytes:
            self.empty_cache()
            self.num_alloc_retries += 1
            if self.is_strict and self.reserved_bytes + segment_bytes > capacity_bytes:
                raise OutOfCapacity(needed)
        if self.expandable:
            block, segment_bytes = pool.map_block(needed)
        else:
            block = Block(self._next_address, segment_bytes, pool)
            self._next_address += segment_bytes
        self.reserved_bytes += segment_bytes
        if self.reserved_bytes > self.grown_reserved_bytes:
            self.grown_reserved_bytes = self.reserved_bytes
        if self.reserved_bytes > self.peak_reserved_bytes:
            self.peak_reserved_bytes = self.reserved_bytes
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
