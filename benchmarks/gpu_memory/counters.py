"""What memory is counted with: torch's own counters on a GPU, the tensors themselves on a CPU.

Both give what ``torch.cuda.memory_stats`` calls allocated, reserved and requested. On the CPU every
new storage is counted and goes through pipefit's model of the allocator, so that all of the
instrument runs where there is no GPU, on real tensors; there is no context there, no workspace and
no copy of weights, so those figures say nothing about a GPU.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import pynvml
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipefit.cost_models.allocator import Block, CachingAllocator
from pipefit.planner.guard import hold_to_budget

HISTORY_ENTRIES = 2_000_000
"""Allocations and frees that torch keeps at the most; a video decode has a tenth of that."""


class Reading(NamedTuple):
    """Bytes now, and their peaks since the last reset."""

    allocated: int
    reserved: int
    requested: int
    peak_allocated: int
    peak_reserved: int
    peak_requested: int


Event = tuple[str, int, int, int]
""""a" or "f", a number that names the block, its bytes as asked for, its stream."""


class Counter(Protocol):
    """How the memory of one device is read and bounded."""

    device: torch.device

    @property
    def process_source(self) -> str:
        """How :meth:`process_bytes` knows."""
        ...

    def read(self) -> Reading:
        """Return the counters as they are."""
        ...

    def reset_peak(self) -> None:
        """Start the peaks anew from what is held now."""
        ...

    def release(self) -> None:
        """Give back what no tensor uses: cached segments and cuBLAS's workspace."""
        ...

    def process_bytes(self) -> int:
        """Return what the driver says the process holds now."""
        ...

    def held_to(self, reserved_bytes: int | None) -> contextlib.AbstractContextManager[None]:
        """Bound what may be reserved; beyond, ``torch.OutOfMemoryError``."""
        ...

    def history(self) -> contextlib.AbstractContextManager[list[Event]]:
        """Write down every allocation and free; the list is filled when the block ends."""
        ...


class CudaCounter:
    """torch's counters of one GPU, and the driver's figure for the process.

    Make it before CUDA starts: where the driver does not list this process (containers), its memory
    is what the device has in use more than then, which is right while nobody else uses it.
    """

    def __init__(self, index: int = 0) -> None:
        self.device = torch.device("cuda", index)
        pynvml.nvmlInit()
        self._handle: Any = pynvml.nvmlDeviceGetHandleByIndex(index)
        self._before_bytes = self._used_bytes()
        torch.cuda.init()
        uuid = f"GPU-{torch.cuda.get_device_properties(self.device).uuid}".replace("GPU-GPU", "GPU")
        if pynvml.nvmlDeviceGetUUID(self._handle) != uuid:
            # torch counts visible devices, NVML all of them; an MIG slice has no handle this way.
            with contextlib.suppress(pynvml.NVMLError):
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
                self._before_bytes = self._used_bytes()
        torch.cuda.set_device(self.device)  # makes the context, from CUDA 12 on

    def read(self) -> Reading:
        stats = torch.cuda.memory_stats(self.device)
        return Reading(
            *(
                int(stats[f"{name}_bytes.all.{when}"])
                for when in ("current", "peak")
                for name in ("allocated", "reserved", "requested")
            )
        )

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def release(self) -> None:
        torch.cuda.synchronize(self.device)
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()

    def process_bytes(self) -> int:
        own = self._listed_bytes()
        return self._used_bytes() - self._before_bytes if own is None else own

    @property
    def process_source(self) -> str:
        return "driver, by device" if self._listed_bytes() is None else "driver, by process"

    def _listed_bytes(self) -> int | None:
        with contextlib.suppress(pynvml.NVMLError):
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle):
                if process.pid == os.getpid() and process.usedGpuMemory:
                    return int(process.usedGpuMemory)
        return None

    def _used_bytes(self) -> int:
        return int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    @contextlib.contextmanager
    def held_to(self, reserved_bytes: int | None) -> Iterator[None]:
        if reserved_bytes is None:
            yield
            return
        lift = hold_to_budget(self.device, budget_bytes=reserved_bytes, context_bytes=0)
        try:
            yield
        finally:
            lift()

    @contextlib.contextmanager
    def history(self) -> Iterator[list[Event]]:
        events: list[Event] = []
        memory = torch.cuda.memory
        memory._record_memory_history(
            "all", context=None, stacks="python", max_entries=HISTORY_ENTRIES
        )
        try:
            yield events
        finally:
            traces = memory._snapshot(self.device)["device_traces"]
            memory._record_memory_history(None)
            index = self.device.index or 0
            events += numbered(traces[index] if index < len(traces) else [])


def numbered(trace: list[dict[str, Any]]) -> list[Event]:
    """Return torch's trace entries as events, with numbers in the place of addresses.

    >>> numbered([{"action": "alloc", "addr": 7, "size": 5, "stream": 0},
    ...           {"action": "free_completed", "addr": 7, "size": 5, "stream": 0}])
    [('a', 0, 5, 0), ('f', 0, 5, 0)]
    """
    events: list[Event] = []
    living: dict[int, int] = {}
    streams: dict[int, int] = {}
    count = 0
    for entry in trace:
        stream = streams.setdefault(entry.get("stream", 0), len(streams))
        if entry["action"] == "alloc":
            living[entry["addr"]] = count
            events.append(("a", count, entry["size"], stream))
            count += 1
        elif entry["action"] == "free_completed" and entry["addr"] in living:
            events.append(("f", living.pop(entry["addr"]), entry["size"], stream))
    return events


class TensorCounter(TorchDispatchMode):
    """Counts every storage that is made on the CPU while it is open (``with counter:``)."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cpu")
        self._allocator = CachingAllocator()
        self._limit_bytes: int | None = None
        self._known: dict[int, Block] = {}
        self._numbers: dict[int, int] = {}
        self._events: list[Event] | None = None
        self._count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {_storage_key(t) for t in tree_leaves((args, kwargs)) if _has_bytes(t)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if _has_bytes(tensor) and _storage_key(tensor) not in given:
                self._count_storage(tensor)
        return out

    def _count_storage(self, tensor: torch.Tensor) -> None:
        storage, key = tensor.untyped_storage(), _storage_key(tensor)
        if key in self._known or not storage.nbytes():
            return
        before = self.read()
        block = self._allocator.allocate(storage.nbytes())
        if self._limit_bytes is not None and self._allocator.reserved_bytes > self._limit_bytes:
            self._allocator.free(block)
            self._allocator.empty_cache()
            # What was refused was never allocated.
            self._allocator.peak_allocated_bytes = before.peak_allocated
            self._allocator.peak_reserved_bytes = before.peak_reserved
            self._allocator.peak_requested_bytes = before.peak_requested
            raise torch.OutOfMemoryError(
                f"{storage.nbytes()} bytes more are not to be had below {self._limit_bytes}."
            )
        self._known[key] = block
        self._note("a", self._count, block)
        weakref.finalize(storage, self._forget, key, self._count, block)
        self._count += 1

    def _forget(self, key: int, number: int, block: Block) -> None:
        del self._known[key]
        self._note("f", number, block)
        self._allocator.free(block)

    def _note(self, action: str, number: int, block: Block) -> None:
        if self._events is not None:
            self._events.append((action, number, block.requested_bytes, 0))

    def read(self) -> Reading:
        one = self._allocator
        return Reading(
            one.allocated_bytes,
            one.reserved_bytes,
            one.requested_bytes,
            one.peak_allocated_bytes,
            one.peak_reserved_bytes,
            one.peak_requested_bytes,
        )

    def reset_peak(self) -> None:
        self._allocator.reset_peak()

    def release(self) -> None:
        self._allocator.empty_cache()

    def process_bytes(self) -> int:
        return self._allocator.reserved_bytes

    @property
    def process_source(self) -> str:
        return "none: the CPU has no context"

    @contextlib.contextmanager
    def held_to(self, reserved_bytes: int | None) -> Iterator[None]:
        if reserved_bytes is not None:
            self.release()
        self._limit_bytes = self._allocator.capacity_bytes = reserved_bytes
        try:
            yield
        finally:
            self._limit_bytes = self._allocator.capacity_bytes = None

    @contextlib.contextmanager
    def history(self) -> Iterator[list[Event]]:
        self._events = []
        try:
            yield self._events
        finally:
            self._events = None


def _has_bytes(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cpu"


def _storage_key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextlib.contextmanager
def counter_of(device: str) -> Iterator[CudaCounter | TensorCounter]:
    """Count on *device*: ``"cpu"``, or ``"cuda"`` with an index or without."""
    place = torch.device(device)
    if place.type == "cpu":
        with TensorCounter() as counter:
            yield counter
    else:
        yield CudaCounter(place.index or 0)
