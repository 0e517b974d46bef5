"""Host, streams and engines side by side: when each will have done all it was given so far.

Both a replay and a rehearsal run on this clock. The host queues kernels, copies and events in
streams and goes on; a stream does them in order; kernels share one engine of a GPU, copies another
one for each direction. What holds the host back: its own pace, a full queue of launches, copies and
streams that it waits for, and whatever reads a value back.

What is easily got wrong: with ``record_stream`` the host drops weights while kernels that read them
are still queued, and torch's allocator gives their bytes out again only when those kernels are done
(``insert_events`` and ``process_events`` in ``c10/cuda/CUDACachingAllocator.cpp``, torch 2.13). So
memory depends on how far ahead the host is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from typing import NamedTuple

LAUNCH_QUEUE = 1024
"""Launches and events that may wait in a stream; a further one blocks the host until the first has
begun.

Seen as "about 1000" at https://forums.developer.nvidia.com/t/68937.
"""

GROUP_HOOK_S = 26e-6
"""Host time of a streamed group's hooks, without what CUDA does in them.

Measured: 200 leaves of diffusers 0.42.1 with a stream that does nothing, on a 2.5 GHz server core.
"""

COMPUTE = "compute"
TO_GPU = "to_gpu"
TO_HOST = "to_host"
"""Engines of a GPU; those of a further GPU have other names."""


class Span(NamedTuple):
    """When something that was queued begins and ends."""

    begin_s: float
    end_s: float


class _Engine:
    """Does one thing at a time, whatever is ready first: a stream that waits holds up no other.

    Invariant: the busy spans are in order and apart from each other.
    """

    __slots__ = ("_busy",)

    def __init__(self) -> None:
        self._busy: list[list[float]] = []

    def book(self, ready_s: float, seconds: float, now_s: float) -> float:
        """Take the first free *seconds* from *ready_s* on; return when they begin.

        Nothing will be booked before *now_s* any more.
        """
        busy = self._busy
        if not seconds:
            return ready_s
        if busy and ready_s >= busy[-1][0]:  # behind or within the last span: the usual case
            last = busy[-1]
            if ready_s <= last[1]:
                begin_s = last[1]
                last[1] += seconds
                return begin_s
        else:
            while busy and busy[0][1] <= now_s:
                del busy[0]
            for place, (begin_s, end_s) in enumerate(busy):
                if ready_s + seconds <= begin_s:
                    busy.insert(place, [ready_s, ready_s + seconds])
                    return ready_s
                ready_s = max(ready_s, end_s)
        if len(busy) > 1 and busy[0][1] <= now_s:
            busy[:] = [span for span in busy if span[1] > now_s]
        busy.append([ready_s, ready_s + seconds])
        return ready_s


class Clock:
    """The moments at which the host and every stream will have done all they were given so far.

    Streams are numbered, 0 is the default stream of the first GPU. An engine does one thing at a
    time, for whichever stream is ready first.

    >>> clock = Clock()
    >>> clock.launch(1, host_s=1.0, gpu_s=5.0)
    Span(begin_s=1.0, end_s=6.0)
    >>> clock.copy(3.0, stream=1, engine=TO_GPU)
    Span(begin_s=1.0, end_s=4.0)
    >>> clock.host_s
    1.0
    >>> clock.synchronise(); clock.host_s
    6.0
    """

    def __init__(self) -> None:
        self.host_s = 0.0
        self._stream_s: dict[int, float] = {0: 0.0}
        self._engines: dict[Hashable, _Engine] = {}
        self._begun_s: dict[int, deque[float]] = {}

    def work(self, host_s: float) -> None:
        """The host is busy for that long by itself."""
        self.host_s += host_s

    def launch(
        self,
        num_launches: int,
        *,
        host_s: float,
        gpu_s: float,
        stream: int = 0,
        engine: Hashable = COMPUTE,
    ) -> Span:
        """Queue *num_launches* kernels, each of which takes *host_s* to issue, *gpu_s* to run."""
        queue, worker = self._queue(stream), self._engine(engine)
        begin_s = None
        end_s = self._stream_s.get(stream, 0.0)
        now_s = self.host_s
        for _ in range(num_launches):
            now_s = max(now_s + host_s, queue.popleft())
            start_s = worker.book(max(now_s, end_s), gpu_s, now_s)
            queue.append(start_s)
            end_s = start_s + gpu_s
            if begin_s is None:
                begin_s = start_s
        self.host_s = now_s
        self._stream_s[stream] = end_s
        return Span(end_s if begin_s is None else begin_s, end_s)

    def copy(
        self, seconds: float, *, stream: int, engine: Hashable, is_blocking: bool = False
    ) -> Span:
        """Queue a copy that takes *seconds*; the host goes on unless *is_blocking*."""
        ready_s = max(self.host_s, self._stream_s.get(stream, 0.0))
        begin_s = self._engine(engine).book(ready_s, seconds, self.host_s)
        end_s = begin_s + seconds
        self._stream_s[stream] = end_s
        if is_blocking:
            self.host_s = end_s
        return Span(begin_s, end_s)

    def record_event(self, stream: int = 0) -> float:
        """Queue an event, as freeing recorded weights does; return when *stream* comes to it.

        Events fill the same queue as launches, as reported at
        https://forums.developer.nvidia.com/t/220629; the microsecond of the call is not counted.
        """
        queue = self._queue(stream)
        self.host_s = max(self.host_s, queue.popleft())
        reached_s = max(self.host_s, self._stream_s.get(stream, 0.0))
        queue.append(reached_s)
        self._stream_s[stream] = reached_s
        return reached_s

    def wait(self, stream: int, until_s: float) -> None:
        """Let *stream* do nothing further before *until_s*: ``cudaStreamWaitEvent``."""
        self._stream_s[stream] = max(self._stream_s.get(stream, 0.0), until_s)

    def synchronise(self, stream: int | None = None) -> None:
        """Let the host wait for *stream*, or for all of them."""
        self.host_s = max(self.host_s, self.done_s(stream))

    def wait_until(self, moment_s: float) -> None:
        """Let the host wait for a moment that an event was recorded at."""
        self.host_s = max(self.host_s, moment_s)

    def done_s(self, stream: int | None = None) -> float:
        """Return when *stream* has done all, or when all streams and the host have."""
        if stream is not None:
            return self._stream_s.get(stream, 0.0)
        return max(self.host_s, *self._stream_s.values())

    def since(self, begin_s: float) -> tuple[float, float]:
        """Return how far the host came since *begin_s*, and how far it is ahead of stream 0."""
        return self.host_s - begin_s, self._stream_s[0] - self.host_s

    def skip(self, host_s: float, ahead_s: float) -> None:
        """Advance as a call did of which :meth:`since` said that."""
        self.host_s += host_s
        self._stream_s[0] = self.host_s + ahead_s

    def _engine(self, name: Hashable) -> _Engine:
        engine = self._engines.get(name)
        if engine is None:
            engine = self._engines[name] = _Engine()
        return engine

    def _queue(self, stream: int) -> deque[float]:
        queue = self._begun_s.get(stream)
        if queue is None:
            queue = self._begun_s[stream] = deque([0.0] * LAUNCH_QUEUE)
        return queue


Run = tuple[float, float] | None
"""Launches in a row that are alike, and the seconds that they take together; None: the host waits
until the GPU has done all it was given."""

Step = tuple[float, float, float, float] | None
"""Launches in a row; the seconds that the host takes for them, and the GPU; and when the GPU has
done them at the earliest, counted from where the host was before. None as for runs."""

MAX_STEP_LAUNCHES = 64
"""Launches up to which runs become one step, and a call is not looked into: far below the queue of
launches, so that the host cannot be held up within it."""


def steps_of(runs: Iterable[Run], launch_s: float, *, gpu_factor: float = 1.0) -> tuple[Step, ...]:
    """Return *runs* as steps: for a host that takes *launch_s*, on a GPU slower by *gpu_factor*.

    Short runs one after the other are one step: whatever host and GPU have done before, it ends
    when they would.
    """
    found: list[Step] = []
    for run in runs:
        if run is None:
            found.append(None)
            continue
        num_launches, run_s = run
        if not num_launches:
            continue
        host_s, gpu_s = num_launches * launch_s, run_s * gpu_factor
        reach_s = max(launch_s + gpu_s, host_s + gpu_s / max(1, num_launches))
        last = found[-1] if found else None
        if last is not None and last[0] + num_launches <= MAX_STEP_LAUNCHES:
            before, before_host_s, before_gpu_s, before_reach_s = last
            num_launches += before
            reach_s = max(before_reach_s + gpu_s, before_host_s + reach_s)
            host_s += before_host_s
            gpu_s += before_gpu_s
            found.pop()
        found.append((num_launches, host_s, gpu_s, reach_s))
    return tuple(found)


class Issue:
    """Host and GPU on the way through a call, one step after the other.

    A coarse :class:`Clock`, for whole decoders in milliseconds.
    """

    def __init__(self) -> None:
        self.host_s = self.gpu_s = 0.0
        self._queued: deque[tuple[float, float]] = deque()
        """Launches of a step, and when the GPU will have done it."""
        self._num_queued = 0.0

    @property
    def done_s(self) -> float:
        """When both have done all."""
        return max(self.host_s, self.gpu_s)

    def go(self, steps: Iterable[Step]) -> None:
        """Issue the launches of *steps*, and let the host wait for the GPU where they say so."""
        # A search comes here millions of times: no attributes and no calls in the loop.
        host_s, gpu_s = self.host_s, self.gpu_s
        queued, num_queued = self._queued, self._num_queued
        for step in steps:
            if step is None:
                if gpu_s > host_s:
                    host_s = gpu_s
                queued.clear()
                num_queued = 0.0
                continue
            num_launches, step_host_s, step_gpu_s, reach_s = step
            while num_queued > LAUNCH_QUEUE:
                count, done_s = queued.popleft()
                num_queued -= count
                if done_s > host_s:
                    host_s = done_s
            gpu_s += step_gpu_s
            if host_s + reach_s > gpu_s:
                gpu_s = host_s + reach_s
            host_s += step_host_s
            queued.append((num_launches, gpu_s))
            num_queued += num_launches
        self.host_s, self.gpu_s, self._num_queued = host_s, gpu_s, num_queued
