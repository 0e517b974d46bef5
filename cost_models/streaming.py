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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pipefit.cost_models.allocator import allocated_bytes
from pipefit.cost_models.blocks import Blocks, blocks_of, modules_above
from pipefit.cost_models.clock import Issue, Step
from pipefit.cost_models.placement import Streaming
from pipefit.cost_models.residency import ByIdentity
from pipefit.cost_models.transfers import BLOCK_HOOK_S, COPY_LATENCY_S
from pipefit.cost_models.workload import Component, Event, Workload

NUM_PASSES = 3
"""Calls in a row after which the last one repeats: the first begins with an empty or a filled ring,
the second with what the first left, and later ones as the second."""


NUM_REMEMBERED = 1024
"""Placements whose bytes are kept; our choice, above what one search offers for a component."""


class Window(NamedTuple):
    """A part of a call: in one block, or between two."""

    block: int | None
    """Which of the component's blocks, by its number in :class:`Blocks`."""
    steps: tuple[Step, ...]


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
    return _streamed_bytes(ByIdentity(component), placement)


@functools.lru_cache(maxsize=NUM_REMEMBERED)
def _streamed_bytes(of: ByIdentity, placement: Streaming) -> StreamedBytes:
    component = of.component
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
    rest_bytes = cut.rest_bytes
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


def parts_of(
    workload: Workload, routine: int, cut: Blocks
) -> Iterator[tuple[int | None, Sequence[Event]]]:
    """Cut one call of *routine* at the blocks of its component: yield each block with its call, and
    what lies between them."""
    number = {block.path: i for i, block in enumerate(cut.blocks)}
    above = {prefix for path in number for prefix in modules_above(path)}
    between: list[Event] = []

    def walk(index: int, path: str) -> Iterator[tuple[int | None, Sequence[Event]]]:
        nonlocal between
        for event in workload.routines[index].events:
            if event[0] == "k":
                between.append(event)
            elif event[0] == "c":
                relative = event[2]
                below = "/" if relative[:1] == "/" else ".".join(filter(None, (path, relative)))
                if below in number and relative:
                    if between:
                        yield None, between
                        between = []
                    yield number[below], [event]
                elif below in above:
                    yield from walk(event[1], below)
                else:
                    between.append(event)

    yield from walk(routine, "")
    if between:
        yield None, between


class Course:
    """Host, GPU and link on the way through the calls of one component."""

    def __init__(
        self,
        cut: Blocks,
        placement: Streaming,
        bytes_per_s: float,
        *,
        holds_host: bool,
        issue: Issue | None = None,
    ) -> None:
        """*issue* is what courses of the same call on other GPUs go on with, if there are any."""
        self._placement = placement
        self._streamed = set(cut.streamed(placement.resident_blocks))
        self._copy_s = [block.num_bytes / bytes_per_s for block in cut.blocks]
        self._rest_s = cut.rest_bytes / bytes_per_s
        self._holds_host = holds_host
        self._order: list[int] = list(cut.called)
        self._twice = self._order * 2
        self.issue = Issue() if issue is None else issue
        self.copying_s = 0.0
        """For how long the link has copied."""
        self._link_s = 0.0
        self._resting_s: float | None = None
        self._ready_s: dict[int, float] = {}
        self._free: deque[float] = deque([0.0] * (placement.num_slots if self._streamed else 0))
        self._kept_ready_s: dict[int, float] = {}
        self._is_loaded = placement.when_idle == "stay"

    def load(self, ahead_s: float, order: Sequence[int]) -> None:
        """Copy what left back in, begun *ahead_s* before now."""
        self._order = list(order)
        self._twice = self._order * 2
        begin_s = self.issue.host_s - ahead_s
        self.issue.gpu_s = max(self.issue.gpu_s, self._copied(self._rest_s, begin_s, 0.0))
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
        self.begin(order)
        issue, streamed = self.issue, self._streamed
        for block, steps, place in self._parts(windows):
            if block is None:
                issue.go(steps)
            elif block not in streamed:
                issue.gpu_s = max(issue.gpu_s, self._kept_ready_s.get(block, 0.0))
                issue.go(steps)
            else:
                self.run(block, steps, place)
        self._is_loaded = True

    def begin(self, order: Sequence[int]) -> None:
        """Begin a call in which the blocks come in that *order*."""
        self._order = list(order)
        self._twice = self._order * 2

    def run(self, block: int, steps: Sequence[Step], place: int) -> None:
        """Go through a streamed block; *place* says which of the order come after it."""
        issue = self.issue
        issue.host_s += BLOCK_HOOK_S
        issue.gpu_s = max(issue.gpu_s, self._arrival(block))
        issue.go(steps)
        self._ready_s.pop(block, None)
        self._give_up(issue.gpu_s)
        self._fill_from(place, issue.host_s)

    def _parts(self, windows: Sequence[Window]) -> list[tuple[int | None, Sequence[Step], int]]:
        """Return the block, the steps, and the blocks so far, of each part of a call.

        Once all that stays has arrived, what lies between two streamed blocks is one part.
        """
        found: list[tuple[int | None, Sequence[Step], int]] = []
        between: list[Step] = []
        place = 0
        for block, steps in windows:
            place += block is not None
            if not self._is_loaded:
                found.append((block, steps, place))
            elif block in self._streamed:
                found.append((None, between, place))
                found.append((block, steps, place))
                between = []
            else:
                between.extend(steps)
        return [*found, (None, between, place)]

    def _give_up(self, done_s: float) -> None:
        """As the engine's: out of ordinary memory, a slot rests until the next block is issued."""
        if self._holds_host:
            before_s, self._resting_s = self._resting_s, done_s
            if before_s is None:
                return
            done_s = before_s
        self._free.append(done_s)

    def _arrival(self, block: int) -> float:
        if block not in self._ready_s:
            if not self._free and self._resting_s is not None:
                self._free.append(self._resting_s)
                self._resting_s = None
            if not self._free:  # what was foreseen wrongly gives its slot up
                self._ready_s.popitem()
                self._free.append(self.issue.host_s)
            self._copy(block, self.issue.host_s)
        return self._ready_s[block]

    def _fill_from(self, place: int, now_s: float) -> None:
        if self._is_loaded and not self._free:
            return
        twice, num_ahead, num_blocks = self._twice, 0, len(self._order)
        streamed, ready_s, most = self._streamed, self._ready_s, self._placement.look_ahead
        place %= num_blocks
        for i in range(place, place + num_blocks):
            block = twice[i]
            if block in streamed:
                if num_ahead == most:
                    return
                num_ahead += 1
                if block not in ready_s:
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
        self.issue.host_s += COPY_LATENCY_S

    def _copied(self, seconds: float, now_s: float, free_s: float) -> float:
        """Return when a copy has arrived that may begin at *now_s*, once its slot is free."""
        self.copying_s += seconds
        if self._holds_host:
            # The driver stages ordinary memory and may wait for the stream first ("API
            # synchronization behavior" of the CUDA runtime), as it must for more than it can stage.
            self.issue.host_s = max(self.issue.host_s, now_s, free_s) + seconds
            return self.issue.host_s
        self._link_s = max(self._link_s, now_s, free_s) + seconds
        return self._link_s


class CallTimes:
    """A call that finds nothing on the GPU, and one that follows others of the same component.

    The former's copies begin *ahead_s* before it.
    """

    def __init__(
        self,
        windows: Sequence[Window],
        cut: Blocks,
        placement: Streaming,
        bytes_per_s: float,
        *,
        ahead_s: float = 0.0,
    ) -> None:
        self._windows = windows
        self._order = [w.block for w in windows if w.block is not None]
        holds_host = placement.host_memory != "pinned"
        self._course = Course(cut, placement, bytes_per_s, holds_host=holds_host)
        if placement.when_idle == "leave":
            self._course.load(ahead_s, self._order)
        self._end_s = 0.0
        self.cold_s = self._goes_on()

    @functools.cached_property
    def later_s(self) -> float:
        """The time of a later call; components that are called once a turn are not asked it."""
        for _ in range(NUM_PASSES - 1):
            host_before_s, copying_before_s = self._course.issue.host_s, self._course.copying_s
            found_s = self._goes_on()
        # A host that a cold call left ahead falls behind again later, where it is the slower one;
        # so does a link that was ahead of it.
        return max(
            found_s,
            self._course.issue.host_s - host_before_s,
            self._course.copying_s - copying_before_s,
        )

    def _goes_on(self) -> float:
        """Return the time of one more call."""
        self._course.call(self._windows, self._order)
        before_s, self._end_s = self._end_s, self._course.issue.done_s
        return self._end_s - before_s


def split_call_seconds(
    parts: Sequence[tuple[int, int | None, Sequence[Step]]],
    streamed: Mapping[int, tuple[Blocks, Streaming]],
    bytes_per_s: Mapping[int, float],
) -> float:
    """Return the time of a later call over several GPUs, some of which stream blocks of theirs.

    One GPU computes at a time, but while it does, the links of all of them copy. *parts* are those
    of one call in order: the GPU, which of its blocks in *streamed* it waits for, and the steps.
    Copies between GPUs are left out.
    """
    issue = Issue()
    courses = {
        device: Course(cut, how, bytes_per_s[device], holds_host=False, issue=issue)
        for device, (cut, how) in streamed.items()
    }
    orders: dict[int, list[int]] = {device: [] for device in courses}
    for device, block, _ in parts:
        if block is not None:
            orders[device].append(block)
    begin_s = host_before_s = 0.0
    copying_before_s: dict[int, float] = {}
    for _ in range(NUM_PASSES):
        begin_s, host_before_s = issue.done_s, issue.host_s
        copying_before_s = {device: course.copying_s for device, course in courses.items()}
        places = dict.fromkeys(courses, 0)
        for device, course in courses.items():
            course.begin(orders[device])
        for device, block, steps in parts:
            if block is None:
                issue.go(steps)
            else:
                places[device] += 1
                courses[device].run(block, steps, places[device])
    copying_s = (course.copying_s - copying_before_s[i] for i, course in courses.items())
    return max(issue.done_s - begin_s, issue.host_s - host_before_s, *copying_s)
