"""Host, GPU and copy engine side by side: how far ahead the host is when it gives weights back.

Only ``record_stream`` asks. Without it the host waits for the GPU before it drops weights; with it,
weights are dropped while kernels that read them are still queued, and torch's allocator gives their
bytes out again only when those kernels are done (``insert_events`` and ``process_events`` in
``c10/cuda/CUDACachingAllocator.cpp``, torch 2.13). Four things hold the host back: its own pace,
the copies, each of which must have arrived before the next group is asked for, a full queue of
launches, and whatever reads a value back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from pipefit.cost_models.latency import kernel_seconds, launch_seconds, num_launches
from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.placement import GroupOffload
from pipefit.cost_models.transfers import COPY_LATENCY_S, link_rates, pin_bytes_per_s
from pipefit.cost_models.workload import SYNCHRONISE, Kernel

LAUNCH_QUEUE = 1024
"""Launches and events that may wait in a stream; a further one blocks the host until the first has
begun.

Seen as "about 1000" at https://forums.developer.nvidia.com/t/68937.
"""

GROUP_HOOK_S = 26e-6
"""Host time of a streamed group's hooks, without what CUDA does in them.

Measured: 200 leaves of diffusers 0.42.1 with a stream that does nothing, on a 2.5 GHz server core.
"""


class Clock:
    """The moments at which the host and the GPU will have done all they were given so far."""

    def __init__(self, kernels: Sequence[Kernel], gpu: Gpu) -> None:
        self.host_s = 0.0
        self.gpu_s = 0.0
        self._copied_s = 0.0
        self._kernels = kernels
        self._gpu = gpu
        self._launch_s = launch_seconds(gpu)
        self._h2d_bytes_per_s = link_rates(gpu).h2d_pinned_bytes_per_s
        self._costs: dict[int, tuple[int, float]] = {}
        self._begun_s = deque([0.0] * LAUNCH_QUEUE)

    def launch(self, kernel: int) -> None:
        """Queue the kernel of that number."""
        if self._kernels[kernel] == SYNCHRONISE:
            self.wait_for_gpu()
            return
        cost = self._costs.get(kernel)
        if cost is None:
            launches = num_launches(self._kernels[kernel], self._gpu)
            each_s = kernel_seconds(self._kernels[kernel], self._gpu) / launches
            cost = self._costs[kernel] = launches, each_s
        launches, each_s = cost
        for _ in range(launches):
            self._enqueue(self._launch_s, each_s)

    def record_event(self) -> float:
        """Queue an event, as freeing recorded weights does; return when the GPU comes to it.

        Events fill the same queue as launches, as reported at
        https://forums.developer.nvidia.com/t/220629; the microsecond of the call is not counted.
        """
        self._enqueue(0.0, 0.0)
        return self.gpu_s

    def _enqueue(self, host_s: float, gpu_s: float) -> None:
        self.host_s = max(self.host_s + host_s, self._begun_s.popleft())
        begin_s = max(self.host_s, self.gpu_s)
        self._begun_s.append(begin_s)
        self.gpu_s = begin_s + gpu_s

    def wait_for_gpu(self) -> None:
        """A value is read, or the compute stream synchronised."""
        self.host_s = max(self.host_s, self.gpu_s)

    def begin_group(self) -> None:
        """A hook asks for a group: the copies before it must have arrived."""
        self.host_s = max(self.host_s, self._copied_s) + GROUP_HOOK_S

    def copy(self, num_bytes: int, placement: GroupOffload, *, is_blocking: bool) -> None:
        """Queue the copy of a tensor, page-locked first where *placement* keeps it pageable."""
        self.host_s += COPY_LATENCY_S + num_bytes / pin_bytes_per_s(placement)
        self._copied_s = max(self._copied_s, self.host_s) + num_bytes / self._h2d_bytes_per_s
        if is_blocking:
            self.host_s = self._copied_s

    def since(self, begin_s: float) -> tuple[float, float]:
        """Return how far the host came since *begin_s*, and how far it is ahead of the GPU."""
        return self.host_s - begin_s, self.gpu_s - self.host_s

    def skip(self, host_s: float, ahead_s: float) -> None:
        """Advance as a call did of which :meth:`since` said that."""
        self.host_s += host_s
        self.gpu_s = self.host_s + ahead_s
