"""The engine of ``streaming``: blocks of a component take turns in slots on the GPU.

Each streamed block lies packed in one host buffer. Before its forward it is copied, as one
transfer on a stream of its own, into a slot of a small ring; its parameters become views of that
slot, and of the host buffer again afterwards, so that nothing is ever copied back. A slot that
became free is filled at once with the block that comes next, by the order that the last forward
showed: after the last block of a step comes the first of the next. Streams wait for each other by
events; the host waits for nothing, as long as all of it is page-locked.

What is easily got wrong: the copy into a slot must wait until the kernels that read its last block
are done, and memory that is new to the copy stream may still be read by kernels queued before.
"""

from __future__ import annotations

import itertools
import os
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from pipefit.cost_models.blocks import Blocks, aligned
from pipefit.cost_models.placement import Streaming
from pipefit.strategies import page_locked
from pipefit.strategies.live import LAYERWISE_CASTING_HOOK, diffusers_hook


class Packed:
    """Parameters one behind the other in a host buffer, and in copies of it elsewhere."""

    def __init__(
        self, parameters: Sequence[Any], device: Any, *, is_locked: bool, file: str | None = None
    ) -> None:
        """Move *parameters* into a buffer of their own; in *file*, if it is given.

        It is page-locked for copies to *device* if *is_locked*, unless the driver refuses.
        """
        self.parameters = list(parameters)
        self._places = [one.device for one in parameters]
        self._layout = []
        end = 0
        for one in parameters:
            self._layout.append((end, one.dtype, one.shape, one.stride()))
            end += aligned(one.numel() * one.element_size())
        self.num_bytes = end
        self.host = parameters[0].new_empty(end, dtype=torch.uint8, device="cpu")
        self._unlock = None
        unlock = page_locked.page_lock(self.host, device) if is_locked else None
        if unlock is not None:
            # Also where nobody undoes anything: memory that is freed locked stays locked for good.
            self._unlock = weakref.finalize(self, unlock)
            self._unlock.atexit = False
        self.host_views = self.views_in(self.host)
        num_moved = 0
        try:
            for one, view in zip(parameters, self.host_views, strict=True):
                view.copy_(one.data)
                one.data = view
                num_moved += 1
            if file is not None:
                self.host = _mapped(self.host, file)
                self.host_views = self.views_in(self.host)
                self.point_to(self.host_views)
        except BaseException:
            self._unpack(num_moved)
            raise
        self.views = self.host_views
        """What the parameters are now."""

    def views_in(self, buffer: Any) -> list[Any]:
        """Return what the parameters are in *buffer*, which holds a copy of the host's."""
        return [
            buffer[begin : begin + shape.numel() * dtype.itemsize]
            .view(dtype)
            .as_strided(shape, stride)
            for begin, dtype, shape, stride in self._layout
        ]

    def point_to(self, views: list[Any]) -> None:
        """Let the parameters be *views*."""
        self.views = views
        for one, view in zip(self.parameters, views, strict=True):
            one.data = view

    def unpack(self) -> None:
        """Give each parameter memory of its own again, where it was before."""
        self._unpack(len(self.parameters))

    def _unpack(self, count: int) -> None:
        packed = zip(self.parameters, self.host_views, self._places, strict=True)
        try:
            for one, view, place in itertools.islice(packed, count):
                one.data = view.clone() if place.type == "cpu" else view.to(place)
        finally:
            if self._unlock is not None:
                self._unlock()

    @property
    def is_locked(self) -> bool:
        """Whether copies of the host buffer run beside the host."""
        return self._unlock is not None


def _mapped(buffer: Any, file: str) -> Any:
    """Write *buffer* to *file* and return it as mapped from there: pages come when they are read
    and go when RAM is short."""
    from safetensors import torch as safetensors

    safetensors.save_file({"block": buffer}, file)
    return safetensors.load_file(file)["block"]


class CopyStream:
    """Copies beside the stream that computes; on the CPU they are done at once."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self._backend = None if device.type == "cpu" else getattr(torch, device.type)
        self._stream = None if self._backend is None else self._backend.Stream(device)

    def event(self) -> Any:
        """Return an event, not recorded yet; None where there are no streams."""
        return None if self._backend is None else self._backend.Event()

    def copy(self, target: Any, source: Any) -> None:
        """Queue a copy of *source*, which lies on the host."""
        if self._backend is None:
            target.copy_(source)
            return
        with self._backend.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def record(self, event: Any) -> None:
        """Record *event* behind all copies queued so far."""
        if event is not None:
            event.record(self._stream)

    def wait(self, event: Any) -> None:
        """Let later copies wait for *event*."""
        if event is not None:
            self._stream.wait_event(event)

    def record_compute(self, event: Any) -> None:
        """Record *event* behind all kernels queued so far."""
        if event is not None:
            event.record(self._backend.current_stream(self.device))

    def let_compute_wait(self, event: Any) -> None:
        """Let later kernels wait for *event*."""
        if event is not None:
            self._backend.current_stream(self.device).wait_event(event)

    def synchronize(self) -> None:
        """Let the host wait for all copies."""
        if self._stream is not None:
            self._stream.synchronize()


class _Slot:
    """A buffer on the GPU and what is in it."""

    __slots__ = ("block", "buffer", "drained", "filled", "is_awaited", "was_used")

    def __init__(self, buffer: Any, stream: CopyStream) -> None:
        self.buffer = buffer
        self.block: _Block | None = None
        self.filled, self.drained = stream.event(), stream.event()
        self.is_awaited = self.was_used = False


class _Block:
    """A module whose parameters are packed, and where they are now."""

    def __init__(self, module: Any, packed: Packed, *, is_streamed: bool) -> None:
        self.module = module
        self.packed = packed
        self.is_streamed = is_streamed
        self.is_running = False
        self.home: _Slot | None = None
        """The memory of a block that stays while the component is loaded."""
        self.slot: _Slot | None = None
        """Where it is, or is being copied to."""
        self._views: dict[int, list[Any]] = {}

    def views(self) -> list[Any]:
        """Return the parameters in the slot that the block is in."""
        slot = self.slot
        assert slot is not None
        found = self._views.get(id(slot))
        if found is None:
            found = self._views[id(slot)] = self.packed.views_in(slot.buffer)
        return found

    def forget_views(self) -> None:
        """Let go of the slots' memory."""
        self._views.clear()


class Streamer:
    """Streams one component on one device, from the construction until :meth:`close`."""

    def __init__(
        self,
        module: Any,
        cut: Blocks,
        how: Streaming,
        device: Any,
        *,
        disk_path: str | None = None,
        is_part: bool = False,
    ) -> None:
        """Take the blocks of *cut*, and move the rest to *device* unless it *is_part* of a module
        that lies on several."""
        self._device = device
        self._is_part = is_part
        self._how = how
        self._stream = CopyStream(device)
        self._blocks: list[_Block] = []
        self._foreseen: list[_Block] = []
        """Those that the plan expects to run, in that order until it has been seen."""
        self._slot_bytes = 0
        self._rest: Packed | None = None
        self._rest_filled = self._stream.event()
        self._handles: list[Any] = []
        self._ring: list[_Slot] = []
        self._free: deque[_Slot] = deque()
        self._resting: _Slot | None = None
        """Out of ordinary memory: the slot of the block that ran last, see :meth:`_give_up`."""
        self._is_locking = how.host_memory == "pinned" and device.type == "cuda"
        self._holds_host = False
        """Whether the host waits for copies, because some are out of ordinary memory."""
        self._next: dict[_Block, _Block] = {}
        self._last: _Block | None = None
        self._is_loaded = self._is_awaited = False
        self.before_load: Sequence[Callable[[], None]] = ()
        """Called before the component comes back for a call of its own."""
        with ExitStack() as undo:
            undo.callback(self.close)
            self._pack(module, cut, disk_path)
            if how.when_idle == "stay":
                self.load()
            undo.pop_all()

    # -- weights

    def _pack(self, module: Any, cut: Blocks, disk_path: str | None) -> None:
        """Move what may leave the GPU into host buffers, and everything else to the GPU."""
        how, device = self._how, self._device
        leaves = how.when_idle == "leave"
        parameters = dict(module.named_parameters(remove_duplicate=False))
        streamed = {
            *cut.streamed(how.resident_blocks),
            *(number for number, block in enumerate(cut.blocks) if not block.is_called),
        }
        self._slot_bytes = cut.slot_bytes(how.resident_blocks)
        for number, block in enumerate(cut.blocks):
            if number not in streamed and not leaves:
                continue
            packed = self._packed([parameters[t.path] for t in block.tensors], disk_path, number)
            part = module.get_submodule(block.path)
            self._blocks.append(_Block(part, packed, is_streamed=number in streamed))
            if block.is_called:
                self._foreseen.append(self._blocks[-1])
        if leaves and cut.rest:
            rest = [parameters[tensor.path] for tensor in cut.rest]
            self._rest = self._packed(rest, disk_path, "rest")
        moved = {id(one) for block in self._blocks for one in block.packed.parameters}
        if self._rest is not None:
            moved |= {id(one) for one in self._rest.parameters}
        for tensor in () if self._is_part else (*module.parameters(), *module.buffers()):
            if id(tensor) not in moved:
                tensor.data = tensor.data.to(device)
        for block in self._blocks:
            self._watch(block)
        if self._rest is not None:
            self._keep_packed(module, self._rest)
        owners = {tensor.path.rpartition(".")[0] for tensor in cut.rest} if leaves else ()
        for path in owners:
            part = module.get_submodule(path)
            self._handles.append(
                part.register_forward_pre_hook(lambda *_: self.begin_call(), prepend=True)
            )

    def _packed(self, parameters: Sequence[Any], disk_path: str | None, name: object) -> Packed:
        """Pack *parameters*; once the driver has refused to page-lock, it is not asked again."""
        file = None if disk_path is None else os.path.join(disk_path, f"{name}.safetensors")
        packed = Packed(parameters, self._device, is_locked=self._is_locking, file=file)
        if self._is_locking and not packed.is_locked:
            self._is_locking = False
            warnings.warn(
                "Host memory could not be page-locked, so weights are copied from ordinary memory, "
                "which takes longer than planned: raise `ulimit -l`, or plan with less RAM.",
                stacklevel=2,
            )
        self._holds_host |= self._device.type != "cpu" and not packed.is_locked
        return packed

    def _watch(self, block: _Block) -> None:
        module = block.module
        self._keep_packed(module, block.packed)
        self._handles += [
            module.register_forward_pre_hook(lambda *_: self._begin(block), prepend=True),
            module.register_forward_hook(lambda *_: self._end(block), always_call=True),
        ]

    def _keep_packed(self, module: Any, packed: Packed) -> None:
        """Let layers that are cast point at the buffer again after their forward.

        diffusers casts a layer's parameters up before it and down after it, into new memory. It is
        put back before its block ends, which may be the layer itself.
        """
        places = {id(one): place for place, one in enumerate(packed.parameters)}
        for part in module.modules():
            own = [one for one in part._parameters.values() if id(one) in places]
            if own and diffusers_hook(part, LAYERWISE_CASTING_HOOK) is not None:
                put_back = _putting_back(packed, [(one, places[id(one)]) for one in own])
                self._handles.append(part.register_forward_hook(put_back))

    def load_ahead(self) -> None:
        """Load while another component computes: what stays comes in whole before the own call."""
        if self._is_loaded:
            return
        self.load()
        for block in self._foreseen:
            if block.home is not None and block.slot is None:
                self._fill_home(block)

    def load(self) -> None:
        """Take the memory that the component needs on the GPU, and begin to fill it."""
        if self._is_loaded:
            return
        stream = self._stream
        # What is allocated now may have been freed with kernels queued that still read it.
        before = stream.event()
        stream.record_compute(before)
        stream.wait(before)
        if self._rest is not None:
            buffer = self._empty(self._rest.num_bytes)
            stream.copy(buffer, self._rest.host)
            stream.record(self._rest_filled)
            self._rest.point_to(self._rest.views_in(buffer))
        if self._slot_bytes:
            count = self._how.num_slots
            self._ring = [_Slot(self._empty(self._slot_bytes), stream) for _ in range(count)]
        self._free, self._resting = deque(self._ring), None
        for block in self._blocks:
            if not block.is_streamed:
                block.home = _Slot(self._empty(block.packed.num_bytes), stream)
        self._is_loaded, self._is_awaited = True, False
        if self._foreseen:
            last = self._last
            self._fill_from(self._foreseen[0] if last is None else self._after(last))

    @contextmanager
    def as_if_there(self) -> Iterator[None]:
        """Let what is streamed lie on the GPU, whatever is in it: hooks then leave it there."""
        packed = [block.packed for block in self._blocks if block.is_streamed]
        for one in packed:
            one.point_to(one.views_in(self._ring[0].buffer))
        try:
            yield
        finally:
            for one in packed:
                one.point_to(one.host_views)

    def leave(self) -> None:
        """Give back all memory on the GPU but that of buffers."""
        if not self._is_loaded or self._how.when_idle == "stay":
            return
        self._let_go()

    def _let_go(self) -> None:
        stream = self._stream
        done = stream.event()
        stream.record(done)
        stream.let_compute_wait(done)  # the memory belongs to the computing stream
        for block in self._blocks:
            block.packed.point_to(block.packed.host_views)
            block.home = block.slot = None
            block.is_running = False
            block.forget_views()
        if self._rest is not None:
            self._rest.point_to(self._rest.host_views)
        self._ring, self._free, self._resting = [], deque(), None
        self._is_loaded = False

    def close(self) -> None:
        """Take the hooks off and give every packed parameter memory of its own again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._let_go()
        self._stream.synchronize()
        with ExitStack() as unpacking:  # all of them, even if one fails for want of memory
            for packed in (*(block.packed for block in self._blocks), self._rest):
                if packed is not None:
                    unpacking.callback(packed.unpack)
        self._blocks, self._rest = [], None

    def _empty(self, num_bytes: int) -> Any:
        # A later call may be made outside of inference mode, where such memory cannot be written.
        with torch.inference_mode(False):
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    # -- calls

    def enter(self) -> None:
        """Begin a call of the component, whatever became of the last one."""
        for block in self._blocks:
            # torch calls no hook when a forward is interrupted (KeyboardInterrupt).
            if block.is_running:
                self._end(block)
        self.begin_call()

    def begin_call(self) -> None:
        """Have the rest of the component on the GPU before anything runs.

        Some pipelines enter a component past its own methods, so that no hook of its has told
        others to leave.
        """
        if not self._is_loaded:
            for leave in self.before_load:
                leave()
            self.load()
        if not self._is_awaited:
            self._is_awaited = True
            if self._rest is not None:
                self._stream.let_compute_wait(self._rest_filled)

    def _begin(self, block: _Block) -> None:
        self.begin_call()
        if self._last is not None:
            self._next[self._last] = block
        self._last = block
        slot = block.slot or self._fill_now(block)
        if not slot.is_awaited:
            self._stream.let_compute_wait(slot.filled)
            slot.is_awaited = True
        block.is_running = True
        if block.is_streamed:
            block.packed.point_to(block.views())

    def _end(self, block: _Block) -> None:
        block.is_running = False
        slot = block.slot
        if not block.is_streamed or slot is None:
            return
        block.packed.point_to(block.packed.host_views)
        self._stream.record_compute(slot.drained)
        slot.was_used = True
        slot.block = block.slot = None
        if slot in self._ring:
            self._give_up(slot)
        else:
            block.forget_views()
        if self._foreseen:
            self._fill_from(self._after(block))

    # -- copies

    def _after(self, block: _Block) -> _Block:
        """Return the block that came after *block* last time; before that, as the plan has it."""
        found = self._next.get(block)
        if found is None:
            order = self._foreseen
            place = order.index(block) + 1 if block in order else 0
            found = order[place % len(order)]
        return found

    def _fill_from(self, block: _Block) -> None:
        """Copy what comes next, from *block* on, as far ahead as slots and look-ahead allow."""
        num_ahead = 0
        for _ in range(len(self._blocks)):
            if block.is_streamed:
                if num_ahead == self._how.look_ahead or block.packed.num_bytes > self._slot_bytes:
                    return
                num_ahead += 1
                if block.slot is None:
                    if not self._free:
                        return
                    self._fill(block, self._free.popleft())
            elif block.slot is None:
                self._fill_home(block)
            block = self._after(block)

    def _give_up(self, slot: _Slot) -> None:
        """Let others have *slot*: at once, or when the next block has been issued.

        A copy out of ordinary memory holds the host until the slot is free. That must not be before
        the next block is queued, or the GPU would have nothing to do meanwhile.
        """
        if self._holds_host:
            slot_before, self._resting = self._resting, slot
            if slot_before is None:
                return
            slot = slot_before
        self._free.append(slot)

    def _fill_now(self, block: _Block) -> _Slot:
        """Copy *block*, which nobody foresaw, in place of what is least soon needed."""
        if not block.is_streamed:
            return self._fill_home(block)
        if block.packed.num_bytes > self._slot_bytes:
            slot = _Slot(self._empty(block.packed.num_bytes), self._stream)
            self._stream.record_compute(slot.drained)  # of whoever had that memory before
            slot.was_used = True
            self._fill(block, slot)
            return slot
        if not self._free:
            resting, self._resting = self._resting, None
            self._free.append(resting or self._least_soon(block))
        slot = self._free.popleft()
        self._fill(block, slot)
        return slot

    def _least_soon(self, block: _Block) -> _Slot:
        """Take a slot from the block that will be needed last once *block* has run."""
        idle = {s.block: s for s in self._ring if s.block is not None and not s.block.is_running}
        if not idle:
            raise RuntimeError(
                "A streamed block calls another one while it runs, and all slots are taken: plan "
                f"with num_slots above {len(self._ring)}."
            )
        following = block
        for _ in self._blocks:
            if len(idle) == 1:
                break
            following = self._after(following)
            idle.pop(following, None)
        taken, slot = idle.popitem()
        taken.slot = slot.block = None
        return slot

    def _fill_home(self, block: _Block) -> _Slot:
        slot = block.home
        assert slot is not None
        self._fill(block, slot)
        block.packed.point_to(block.views())
        return slot

    def _fill(self, block: _Block, slot: _Slot) -> None:
        stream = self._stream
        if slot.was_used:
            stream.wait(slot.drained)
        stream.copy(slot.buffer[: block.packed.num_bytes], block.packed.host)
        stream.record(slot.filled)
        slot.is_awaited = False
        slot.block, block.slot = block, slot


def _putting_back(packed: Packed, own: Sequence[tuple[Any, int]]) -> Callable[..., None]:
    """Return a forward hook that makes parameters the views again that they last were."""

    def put_back(*_: Any) -> None:
        for one, place in own:
            one.data = packed.views[place]

    return put_back
