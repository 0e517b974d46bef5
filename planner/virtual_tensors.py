"""Tensors that say ``cuda:0``, hold no data, and keep the values that matter.

To C++ a :class:`VirtualTensor` is a meta tensor. Everything it is besides its geometry (device,
bytes, known values) hangs on its *storage*, in a :class:`Buffer`, so that views, ``param.data = x``
and ``swap_tensors`` are right without any imitation.

Values are known of small tensors (token ids, masks, timesteps) and of large ones that are the same
everywhere, as ``zeros`` makes them. What is unknown reads as zero, and the observer is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from pipefit.cost_models.allocator import CachingAllocator

KNOWN_VALUE_LIMIT_ELEMENTS = 16_384
"""Tensors up to this many elements keep values of their own: token ids, masks, timesteps,
position ids; not latents. Larger ones only where one value fills them."""

META = torch.device("meta")
CPU = torch.device("cpu")

aten = torch.ops.aten


class Copy(NamedTuple):
    """Bytes that go from one place to another: the index of a GPU, or None for the host."""

    num_bytes: int
    source: int | None
    target: int | None
    is_pinned: bool
    """The host's side is page-locked, where there is one."""
    is_blocking: bool
    """The host waits until it is done."""
    host: Buffer | None = None
    """The host's side, where that is virtual."""


class Observer:
    """Hears of every allocation, free, copy and kernel, and of every time that somebody waits; the
    base class counts nothing, and its clock stands still."""

    def allocator_of(self, index: int) -> CachingAllocator | None:
        """Return what answers ``torch.cuda.memory_allocated`` and its like for a GPU."""
        return None

    def allocated(self, buffer: Buffer) -> None: ...

    def freed(self, buffer: Buffer) -> None: ...

    def host_allocated(self, buffer: Buffer) -> None: ...

    def host_freed(self, buffer: Buffer) -> None: ...

    def page_locked(self, buffer: Buffer) -> None:
        """Ordinary host memory is registered with the driver."""

    def page_unlocked(self, buffer: Buffer) -> None: ...

    def copied(self, copy: Copy) -> None:
        """A copy was asked for; a blocking one has ended with :meth:`synchronised` in effect."""
        if copy.is_blocking:
            self.synchronised(copy.target if copy.target is not None else copy.source or 0)

    def recorded(self, buffer: Buffer, stream: Any) -> None: ...

    def launched(
        self, launch: Launch, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any
    ) -> None: ...

    def computed_on_host(
        self, launch: Launch, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any
    ) -> None:
        """The CPU computes with virtual tensors that lie in host memory."""

    def value_read(self, known: bool, func: Any) -> None: ...

    def synchronised(self, index: int) -> None:
        """The host reads what the current stream of a GPU computes."""

    def waited(self, stream: Any) -> None:
        """The host waits for *stream*, or for all of them (None), because it was told to."""

    def emptied_cache(self) -> None:
        """``torch.cuda.empty_cache`` was called."""

    def marked(self, stream: Any) -> float:
        """An event is recorded in *stream*: return the moment at which it is reached."""
        return 0.0

    def ordered(self, stream: Any, moment_s: float) -> None:
        """*stream* must not go on before *moment_s*."""

    def reached(self, moment_s: float) -> None:
        """The host waits for an event."""

    def has_done(self, stream: Any) -> bool:
        """Whether *stream* has nothing left to do."""
        return True

    def now_s(self) -> float:
        """Return the host's time."""
        return 0.0

    def written(self, buffer: Buffer) -> None: ...

    def wrote_file(self, num_bytes: int) -> None: ...

    def read_file(self, num_bytes: int) -> None: ...


class Launch:
    """One operator on one geometry: what it returns, and what an observer derives of it."""

    __slots__ = ("kernel", "outputs")

    def __init__(self, outputs: Any = None) -> None:
        self.outputs = outputs
        self.kernel: Any = UNSEEN


UNSEEN = object()
"""``Launch.kernel`` until an observer has said what it is."""


class Machine(Protocol):
    """What a tensor asks of the machine that it lives on."""

    observer: Observer
    in_kernel: bool

    def move(
        self,
        tensor: torch.Tensor,
        device: Any,
        dtype: torch.dtype | None,
        copy: bool = ...,
        memory_format: Any = ...,
        non_blocking: bool = ...,
    ) -> torch.Tensor: ...

    def pinned(self, tensor: torch.Tensor) -> VirtualTensor: ...

    def belonging(self, tensor: torch.Tensor) -> VirtualTensor: ...


class Buffer:
    """The state of one storage: where it is, how large, and its values where they are known."""

    __slots__ = (
        "__weakref__", "block", "device", "is_kept", "is_pinned", "is_written", "machine",
        "num_bytes", "number", "owner", "stream", "value",
    )  # fmt: skip

    def __init__(
        self,
        machine: Machine,
        device: torch.device | None,
        num_bytes: int,
        is_pinned: bool = False,
        is_written: bool = True,
    ) -> None:
        self.machine = machine
        self.device = device
        """None for what a C++ composite made for itself, until a kernel puts it somewhere."""
        self.num_bytes = num_bytes
        self.is_kept = False
        """A module's: stays virtual on the CPU as well, so that it can come back in place."""
        self.is_pinned = is_pinned
        self.is_written = is_written
        """False for host memory that nobody has touched, of which the kernel gives no page yet."""
        self.value: torch.UntypedStorage | torch.Tensor | None = None
        """The same bytes on the CPU, or the 0-dim tensor that fills it, or None: unknown."""
        self.owner: Any = None
        """Set by the observer, as are the following: in whose events this buffer is *number*."""
        self.number = -1
        self.block: Any = None
        """What an allocator gave for it, in *stream*; None: nothing, or it is given back."""
        self.stream = -1
        if device is not None:
            if device.type == "cuda":
                machine.observer.allocated(self)
            elif is_written:
                machine.observer.host_allocated(self)

    def __del__(self) -> None:
        if self.device is not None:
            if self.device.type == "cuda":
                self.machine.observer.freed(self)
            elif self.is_written:
                self.machine.observer.host_freed(self)

    def write(self) -> None:
        """Note that an operator writes to it."""
        if not self.is_written:
            self.is_written = True
            if self.device is not None and self.device.type != "cuda":
                self.machine.observer.host_allocated(self)
        self.machine.observer.written(self)


class VirtualTensor(torch.Tensor):
    """A meta tensor that says it lies elsewhere; all state is on the storage.

    Works only while its machine is open: the machine's dispatch mode sees every operator.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False, **_: Any) -> VirtualTensor:
        # accelerate rebuilds parameters as type(param)(value, requires_grad=...).
        made = torch.Tensor._make_subclass(cls, data, requires_grad)
        made._is_param = True  # type: ignore[attr-defined]  # what isinstance(t, nn.Parameter) asks
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        buffer = self.untyped_storage().__dict__.get("buffer")
        if buffer is None or buffer.machine.in_kernel:
            return META
        return buffer.device or META

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, tensor: torch.Tensor) -> None:
        buffer = buffer_of(self)
        if buffer.is_kept:  # what takes the place of a module's tensor is the module's
            tensor = buffer.machine.belonging(tensor)
        torch.Tensor.data.__set__(self, tensor)

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return self.device.type == "cuda"

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return self.device.type == "cpu"

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return self.device.type == "meta"

    def get_device(self) -> int:
        return self.device.index if self.device.type == "cuda" else -1

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        copy = bool(kwargs.pop("copy", False))
        if args and isinstance(args[0], torch.Tensor):
            other = args[0]
            place = None if _is_homeless(other) else other.device
            args, kwargs = (), {"device": place, "dtype": other.dtype, **kwargs}
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        machine = buffer_of(self).machine
        return machine.move(self, device, dtype, copy, memory_format, non_blocking)

    def cuda(self, device: Any = None, non_blocking: bool = False, **_: Any) -> torch.Tensor:
        place = torch.device("cuda" if device is None else device)
        return self.to(place, non_blocking=non_blocking)

    def cpu(self, **_: Any) -> torch.Tensor:
        return self.to(CPU)

    def type_as(self, other: torch.Tensor) -> torch.Tensor:
        return self.to(other)

    def numpy(self, *, force: bool = False) -> Any:
        if self.device.type == "cuda" and not force:
            raise TypeError(
                f"can't convert {self.device} device type tensor to numpy. "
                "Use Tensor.cpu() to copy the tensor to host memory first."
            )
        return _array(self)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.numpy() if dtype is None else self.numpy().astype(dtype)

    def tolist(self) -> Any:
        observer = buffer_of(self).machine.observer
        observer.value_read(known_value(self) is not None, "tolist")
        if self.is_cuda:
            observer.synchronised(self.device.index)
        return values(self).tolist()

    def __getitem__(self, index: Any) -> torch.Tensor:
        return super().__getitem__(_index_of_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_index_of_tensors(index), value)

    def pin_memory(self, device: Any = None) -> torch.Tensor:
        return self if self.is_pinned() else buffer_of(self).machine.pinned(self)

    def is_pinned(self, device: Any = None) -> bool:
        return buffer_of(self).is_pinned

    def record_stream(self, stream: Any) -> None:
        buffer = buffer_of(self)
        buffer.machine.observer.recorded(buffer, stream)

    def data_ptr(self) -> int:
        if self.is_meta:
            return 0
        return id(buffer_of(self)) + self.storage_offset() * self.element_size()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            memo[id(self)] = self.clone()
        return memo[id(self)]

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"VirtualTensor({tuple(self.shape)}, {self.dtype}, {self.device})"


def _index_of_tensors(index: Any) -> Any:
    """Lists in an index become CPU tensors here; C++ would make them on meta and lose values."""
    if isinstance(index, (list, range, np.ndarray)) and len(index):
        return torch.as_tensor(plain(list(index)))
    if isinstance(index, tuple):
        return tuple(_index_of_tensors(i) for i in index)
    return index


def buffer_of(tensor: torch.Tensor) -> Buffer:
    """Return the state behind *tensor*; it must be virtual."""
    return tensor.untyped_storage().__dict__["buffer"]


def _is_homeless(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, VirtualTensor) and buffer_of(tensor).device is None


def plain(data: Any) -> Any:
    """Return *data* with the virtual tensors in its lists replaced by their numbers."""
    if isinstance(data, VirtualTensor):
        return data.tolist()
    nested = (VirtualTensor, list, tuple)
    if isinstance(data, (list, tuple)) and any(isinstance(d, nested) for d in data):
        return type(data)(plain(d) for d in data)
    return data


# -- values


def known_value(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the real CPU tensor that *tensor* stands for, or None where its values are unknown.

    A large tensor's is expanded from one element.
    """
    if not isinstance(tensor, VirtualTensor):
        return tensor if tensor.device.type == "cpu" else None
    value = buffer_of(tensor).value
    if value is None:
        return None
    with torch._C._DisableTorchDispatch():
        if isinstance(value, torch.Tensor):
            if value.dtype is tensor.dtype:
                return value.expand(tensor.size())
            # Seen as another dtype, only zero is sure to be the same number.
            return torch.zeros((), dtype=tensor.dtype).expand(tensor.size()) if not value else None
        out = torch.empty(0, dtype=tensor.dtype)
        return out.set_(value, tensor.storage_offset(), tensor.size(), tensor.stride())


def values(tensor: torch.Tensor) -> torch.Tensor:
    """Return *tensor*'s values, zeros where unknown."""
    value = known_value(tensor)
    if value is not None:
        return value
    with torch._C._DisableTorchDispatch():
        return torch.zeros((), dtype=tensor.dtype).expand(tensor.size())


def keep_value(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Let *tensor*, which owns its whole storage, have *value* from now on.

    Tensors above the limit keep it only if it is expanded from one element.
    """
    buffer = buffer_of(tensor)
    if tensor.numel() > KNOWN_VALUE_LIMIT_ELEMENTS:
        one = uniform_element(value)
        buffer.value = None if one is None else one.reshape(()).to(tensor.dtype, copy=True)
        return
    if 0 in tensor.stride() and tensor.numel() > 1:
        return
    store = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    if store.untyped_storage().nbytes() < buffer.num_bytes:
        return
    store.copy_(value)
    buffer.value = store.untyped_storage()


def owns_storage(tensor: torch.Tensor) -> bool:
    """Whether *tensor* shows all of its storage."""
    return tensor.numel() * tensor.element_size() == buffer_of(tensor).num_bytes


def uniform_element(value: torch.Tensor) -> torch.Tensor | None:
    """Return one element of *value*, all dimensions kept, if it is the same everywhere."""
    if value.numel() == 0:
        return None
    sizes_strides = zip(value.size(), value.stride(), strict=True)
    if any(size > 1 and stride for size, stride in sizes_strides):
        return None
    return value[(slice(0, 1),) * value.dim()]


def value_signature(tensor: torch.Tensor) -> Any:
    """Return something hashable that is equal for equal known values; None if unknown."""
    value = known_value(tensor)
    if value is None:
        return None
    with torch._C._DisableTorchDispatch():
        # What a broadcast repeats is said once; the rest is within the limit.
        once = value[tuple(slice(None) if s else slice(0, 1) for s in value.stride())]
        flat = once.clone(memory_format=torch.contiguous_format).reshape(-1)
        return flat.view(torch.uint8).numpy().tobytes()


class _UniformArray(np.ndarray):
    """A stride-0 array: postprocessing of a large video stays free of real memory."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        views = [np.asarray(i) for i in inputs]
        if method == "__call__" and "out" not in kwargs and len(views) <= 2:
            shape = np.broadcast_shapes(*(v.shape for v in views))
            lone = [v if v.ndim == 0 else v[(0,) * v.ndim] for v in views if v.size]
            uniform = all(not any(v.strides) or v.ndim == 0 for v in views)
            if uniform and len(lone) == len(views):
                result = ufunc(*lone, **kwargs)
                return np.broadcast_to(np.asarray(result), shape).view(_UniformArray)
        return getattr(ufunc, method)(*views, **kwargs)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func is np.stack and len(args) == 1 and set(kwargs) <= {"axis"}:
            first, *rest = args[0]
            if all(type(a) is _UniformArray and a.shape == first.shape for a in (first, *rest)):
                ones = {a._one().item() for a in (first, *rest)}
                axis = kwargs.get("axis", 0) % (first.ndim + 1)
                if len(ones) == 1:
                    shape = (*first.shape[:axis], len(rest) + 1, *first.shape[axis:])
                    return _as_uniform(first._one(), shape)
        return super().__array_function__(func, types, args, kwargs)

    def round(self, decimals: int = 0, out: Any = None) -> Any:
        return _as_uniform(np.round(self._one(), decimals), self.shape)

    def astype(self, dtype: Any, **_: Any) -> Any:
        return _as_uniform(self._one().astype(dtype), self.shape)

    def _one(self) -> Any:
        first = np.asarray(self)[(slice(0, 1),) * self.ndim].ravel()
        return first[0] if len(first) else self.dtype.type(0)


def _as_uniform(one: Any, shape: tuple[int, ...]) -> Any:
    return np.broadcast_to(np.asarray(one), shape).view(_UniformArray)


def _array(tensor: torch.Tensor) -> Any:
    value = known_value(tensor)
    if value is not None and value.numel() <= KNOWN_VALUE_LIMIT_ELEMENTS:
        return value.numpy()
    one = torch.zeros((), dtype=tensor.dtype) if value is None else uniform_element(value)
    return _as_uniform(one.reshape(()).numpy(), tuple(tensor.shape))
