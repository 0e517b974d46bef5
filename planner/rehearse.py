"""A plan executed without hardware: the real hooks, on a GPU whose memory is counted to the byte.

The options are applied to a weightless twin of the pipeline as :mod:`pipefit.planner.apply` does
it, and the pipeline's own call runs under the hooks of diffusers and accelerate. Allocations,
frees, streams, library workspaces and ``empty_cache`` drive the allocator model while it happens,
so that nothing of how hooks move weights is assumed; a prediction assumes it.

There is no clock yet. Blocks that another stream was recorded to use (``record_stream``) are free
again when the host next waits for that stream; on a GPU that keeps pace it is sooner, so reserved
memory with ``record_stream`` is an upper bound here. Nothing is remembered between equal calls:
60 us an operator, and tiled decoders have very many.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from pipefit.cost_models.allocator import Block, CachingAllocator, OutOfCapacity
from pipefit.cost_models.context import context_bytes
from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.units import GIB, MIB
from pipefit.cost_models.workspace import cublas_bytes, scratch_bytes
from pipefit.planner.apply import apply_options
from pipefit.planner.kernels import kernel_of
from pipefit.planner.plan import Copies, Rehearsal, RehearsedPhase
from pipefit.planner.recorder import intercepting
from pipefit.planner.rehearsals import REHEARSED_STEPS
from pipefit.planner.shims import shimmed
from pipefit.planner.signatures import GPU
from pipefit.planner.trace import describe_component, phase_name, run_call, weightless
from pipefit.planner.virtual import VirtualMachine
from pipefit.planner.virtual_tensors import CPU, UNSEEN, Buffer, Launch, Observer
from pipefit.strategies.live import module_components
from pipefit.strategies.strategy import Option


class Stage(Observer):
    """A virtual GPU with the memory of a real one, and a weightless pipeline on its host.

    Made by :func:`on_stage`. Only device 0 is counted.
    """

    allocator: CachingAllocator  # here always there

    def __init__(
        self, gpu: Gpu, budget_bytes: int | None = None, *, is_strict: bool = True
    ) -> None:
        self.gpu = gpu
        self.context_bytes = context_bytes(gpu)
        if budget_bytes is None:
            budget_bytes = gpu.total_bytes - gpu.other_bytes
        self.allocator = CachingAllocator(
            budget_bytes - self.context_bytes,
            expandable=gpu.expandable_segments,
            is_strict=is_strict,
        )
        self.machine = VirtualMachine(
            self,
            compute_capability=gpu.compute_capability or (8, 9),
            total_bytes=gpu.total_bytes,
        )
        self.pipe: Any = None
        self.placing = Copies()
        self.host_bytes = self.peak_host_bytes = 0
        self.pinned_bytes = self.peak_pinned_bytes = 0
        self.unknown_reads: dict[str, int] = {}
        self._phases: dict[tuple[str, str], RehearsedPhase] = {}
        self._before = self._phase = RehearsedPhase("", "", "")
        self._next: RehearsedPhase | None = None
        self._copies = self.placing
        self._component_of: dict[int, str] = {}
        self._names: dict[tuple[str, str], str] = {}
        self._depth = 0
        self._cublas_streams: set[int] = set()
        self._recorded: dict[Block, set[int]] = {}
        self._waiting: deque[set[int]] = deque()

    # -- what the machine reports

    def allocated(self, buffer: Buffer) -> None:
        buffer.owner = self._take(buffer.num_bytes)
        buffer.number = self.machine.stream.number

    def freed(self, buffer: Buffer) -> None:
        block = buffer.owner
        if block is None:  # there was no room for it
            return
        streams = self._recorded.pop(block, None)
        if not streams:
            self.allocator.free(block)
        elif block.num_bytes:
            self.allocator.free_when_unused(block)
            self._waiting.append(streams)

    def recorded(self, buffer: Buffer, stream: Any) -> None:
        if buffer.owner is not None and stream.number != buffer.number:
            self._recorded.setdefault(buffer.owner, set()).add(stream.number)

    def synchronised(self) -> None:
        self.waited(self.machine.stream)

    def waited(self, stream: Any) -> None:
        waiting = self._waiting
        while len(waiting) > self.allocator.num_deferred:  # an emptied cache waited for them
            waiting.popleft()
        for streams in waiting:
            if stream is None:
                streams.clear()
            else:
                streams.discard(stream.number)
        num_done = 0
        while waiting and not waiting[0]:
            waiting.popleft()
            num_done += 1
        self.allocator.complete_deferred_frees(num_done)

    def launched(
        self, launch: Launch, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any
    ) -> None:
        needs = launch.kernel
        if needs is UNSEEN:
            kernel = kernel_of(func, args, kwargs, out)
            needs = launch.kernel = kernel and (
                scratch_bytes(kernel, self.gpu),
                kernel.kind == "gemm",
            )
        if needs is None:
            return
        scratch, is_gemm = needs
        if is_gemm and self.machine.stream.number not in self._cublas_streams:
            self._cublas_streams.add(self.machine.stream.number)
            self._take(cublas_bytes(self.gpu, torch.__version__))
        if scratch:
            for block in [self._take(num_bytes) for num_bytes in scratch]:
                self.allocator.free(block)

    def copied(self, num_bytes: int, *, to_gpu: bool, is_pinned: bool) -> None:
        copies = self._copies
        if to_gpu:
            copies.to_gpu_bytes += num_bytes
            copies.to_gpu_pinned_bytes += is_pinned * num_bytes
        else:
            copies.to_host_bytes += num_bytes
            copies.to_host_pinned_bytes += is_pinned * num_bytes

    def host_allocated(self, buffer: Buffer) -> None:
        self._count_host(buffer, 1)
        self.peak_host_bytes = max(self.peak_host_bytes, self.host_bytes)
        self.peak_pinned_bytes = max(self.peak_pinned_bytes, self.pinned_bytes)

    def host_freed(self, buffer: Buffer) -> None:
        self._count_host(buffer, -1)

    def _count_host(self, buffer: Buffer, sign: int) -> None:
        if buffer.is_pinned:
            # CachingHostAllocator rounds up (aten/src/ATen/core/CachingHostAllocator.h, torch 2.13)
            self.pinned_bytes += sign * (1 << max(0, buffer.num_bytes - 1).bit_length())
        elif buffer.device == CPU:
            self.host_bytes += sign * buffer.num_bytes

    def value_read(self, known: bool, func: Any) -> None:
        if not known:
            where = self._phase.component or "the pipeline"
            self.unknown_reads[where] = self.unknown_reads.get(where, 0) + 1

    # -- memory

    def _take(self, num_bytes: int) -> Block:
        """Allocate on the current stream and note the peaks.

        Raises:
            torch.OutOfMemoryError: in torch's words, if it does not fit.
        """
        if self._next is not None:
            self._turn()
        allocator, phase = self.allocator, self._phase
        try:
            block = allocator.allocate(num_bytes, self.machine.stream.number)
        except OutOfCapacity as full:
            raise torch.OutOfMemoryError(self._no_room(full.num_bytes)) from None
        if allocator.allocated_bytes > phase.allocated_bytes:
            phase.allocated_bytes = allocator.allocated_bytes
        if allocator.reserved_bytes > phase.reserved_bytes:
            phase.reserved_bytes = allocator.reserved_bytes
        return block

    def _no_room(self, num_bytes: int) -> str:
        """As ``DeviceCachingAllocator::malloc``, c10/cuda/CUDACachingAllocator.cpp, torch 2.13."""
        allocator = self.allocator
        used_bytes = allocator.reserved_bytes + self.context_bytes
        free_bytes = max(0, self.gpu.total_bytes - self.gpu.other_bytes - used_bytes)
        return (
            f"CUDA out of memory. Tried to allocate {_size(num_bytes)}. GPU 0 has a total capacity "
            f"of {_size(self.gpu.total_bytes)} of which {_size(free_bytes)} is free. Including "
            f"non-PyTorch memory, this process has {_size(used_bytes)} memory in use. "
            f"{_size(max(0, allocator.capacity_bytes or 0))} allowed; Of the allocated memory "
            f"{_size(allocator.allocated_bytes)} is allocated by PyTorch, and "
            f"{_size(allocator.reserved_bytes - allocator.allocated_bytes)} is reserved by PyTorch "
            "but unallocated."
        )

    # -- phases

    def _turn(self) -> None:
        """Begin the next phase: with its first allocation, so that what is evicted for it still
        belongs to the phase before, as in the replay."""
        assert self._next is not None
        phase, self._phase, self._next = self._phase, self._next, None
        if phase is self._before:  # placing the weights belongs to the first phase
            self._phase.allocated_bytes = phase.allocated_bytes
            self._phase.reserved_bytes = phase.reserved_bytes
        now = self.allocator
        self._phase.allocated_bytes = max(self._phase.allocated_bytes, now.allocated_bytes)
        self._phase.reserved_bytes = max(self._phase.reserved_bytes, now.reserved_bytes)
        self._copies = self._phase.copies

    def _call(
        self, module: Any, entry: str, function: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        component = self._component_of.get(id(module))
        if component is None:
            return function(*args, **kwargs)
        if not self._depth:
            self._enter(component, entry)
        self._depth += 1
        try:
            return function(*args, **kwargs)
        finally:
            self._depth -= 1

    def _enter(self, component: str, entry: str) -> None:
        phase = self._phases.get((component, entry))
        if phase is None:
            module = getattr(self.pipe, component)
            name = phase_name(describe_component(component, module, {}), module, entry)
            phase = self._phases[component, entry] = RehearsedPhase(name, component, entry)
        phase.calls += 1
        self._next = None if phase is self._phase else phase

    # -- the call

    def adopt(self, pipe: Any) -> None:
        """Make *pipe*, which is virtual, the one that is called."""
        self.pipe = pipe
        for name, module in module_components(pipe).items():
            for part in module.modules():
                self._component_of.setdefault(id(part), name)

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Cut what is called meanwhile into phases."""
        gc.collect()  # hooks and modules refer to each other
        self._copies = self._phase.copies
        with intercepting(module_components(self.pipe).values(), self._call):
            yield

    def rehearsal(self, call: Mapping[str, Any]) -> Rehearsal:
        """Return what was counted so far."""
        return Rehearsal(
            phases=tuple(self._phases.values()),
            placing=self.placing,
            host_bytes=self.peak_host_bytes,
            pinned_bytes=self.peak_pinned_bytes,
            context_bytes=self.context_bytes,
            call=dict(call),
            unknown_reads=dict(self.unknown_reads),
        )


@contextlib.contextmanager
def on_stage(
    pipe: Any,
    gpu: Gpu,
    *,
    budget_bytes: int | None = None,
    is_strict: bool = True,
    in_place: bool = False,
) -> Iterator[Stage]:
    """Open a virtual *gpu* with a weightless twin of *pipe*, its weights on the CPU.

    *budget_bytes* bounds the process, context included, as
    :func:`pipefit.planner.guard.hold_to_budget` does; by default what other processes leave. If
    not *is_strict*, cached memory is given back at that bound, but it may be exceeded. With
    *in_place* the pipeline's own modules are converted.
    """
    stage = Stage(gpu, budget_bytes, is_strict=is_strict)
    with stage.machine, shimmed(), torch.no_grad():
        stage.adopt(weightless(pipe, stage.machine, device=CPU, in_place=in_place))
        yield stage


def rehearse(
    pipe: Any,
    options: Sequence[Option],
    call: Mapping[str, Any],
    gpu: Gpu,
    *,
    budget_bytes: int | None = None,
    is_strict: bool = True,
    in_place: bool = False,
) -> Rehearsal:
    """Execute ``pipe(**call)`` under *options* on a virtual *gpu*, without weights.

    The call is cut to :data:`REHEARSED_STEPS` denoising steps. *pipe* stays as it is unless
    *in_place*. No clock runs: memory and bytes, not seconds.

    Raises:
        torch.OutOfMemoryError: the call does not fit into *budget_bytes* (context included); not
            raised unless *is_strict*, and the peaks say what is missing.
        ApplyFailed: applying does not, or fails otherwise. InvalidRequest, UnsupportedPipeline: as
            :func:`pipefit.planner.apply.apply_options`. TraceError: the call itself fails.
    """
    shortened = shortened_call(pipe, call)
    with (
        on_stage(
            pipe, gpu, budget_bytes=budget_bytes, is_strict=is_strict, in_place=in_place
        ) as stage,
        apply_options(stage.pipe, options, GPU),
    ):
        with stage.counting():
            run_call(stage.pipe, shortened)
        return stage.rehearsal(shortened)


def shortened_call(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """Return *call* with :data:`REHEARSED_STEPS` denoising steps, where it has more.

    Steps that the call lists one by one (``timesteps``, ``sigmas``) stay; with a ``strength`` there
    are as many as leave that number to execute.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    steps = parameters.get("num_inference_steps")
    if steps is None or call.get("timesteps") is not None or call.get("sigmas") is not None:
        return dict(call)
    asked = call.get("num_inference_steps", steps.default)
    strength = parameters.get("strength")
    share = call.get("strength", strength.default if strength else 1.0)
    enough = REHEARSED_STEPS
    if isinstance(share, (int, float)) and 0 < share < 1:
        enough = math.ceil(REHEARSED_STEPS / share)
    if not isinstance(asked, int) or asked <= enough:
        return dict(call)
    return {**call, "num_inference_steps": enough}


def _size(num_bytes: int) -> str:
    """As ``format_size`` in the same file."""
    if num_bytes <= 1024:
        return f"{num_bytes} bytes"
    if num_bytes <= MIB:
        return f"{num_bytes / 1024:.2f} KiB"
    return f"{num_bytes / MIB:.2f} MiB" if num_bytes <= GIB else f"{num_bytes / GIB:.2f} GiB"
