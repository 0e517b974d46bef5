"""A GPU without a GPU: tensors that say ``cuda:0``, hold no data, and are counted to the byte.

One stateless tensor subclass over plain meta tensors. Everything a tensor is besides its geometry
(device, bytes, known values) hangs on its *storage*, so that views, ``param.data = x`` and
``swap_tensors`` are right without any imitation. Nothing is registered in the process: a dispatch
mode and a set of replaced ``torch.cuda`` functions, the originals of which answer in other threads.

What a reader would get wrong: to C++ these are meta tensors. Wherever a C++ composite asks for the
device it takes the meta branch, which is CUDA's for layouts (group norm, convolutions) but not for
attention and RMS norm; those two are replaced at function level (:func:`_attention`, :func:`_rms_norm`).

Small tensors keep their values (a real CPU storage beside the virtual one), so ``.item()``, masks,
lengths and timesteps work. A value that is needed and unknown reads as zero and is reported.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

KNOWN_VALUE_LIMIT_ELEMENTS = 16_384
"""Tensors up to this many elements keep values: token ids, masks, timesteps, position ids; not latents."""

META = torch.device("meta")
CPU = torch.device("cpu")

aten = torch.ops.aten


class Buffer:
    """The state of one storage: where it is, how large, and its values where they are known."""

    __slots__ = ("__weakref__", "device", "machine", "num_bytes", "number", "owner", "value")

    def __init__(self, machine: VirtualMachine, device: torch.device | None, num_bytes: int) -> None:
        self.machine = machine
        self.device = device
        self.num_bytes = num_bytes
        self.value: torch.UntypedStorage | None = None
        self.owner: Any = None  # the recorder's frame that counts it, or a weight's component
        self.number = -1
        if device is not None and device.type == "cuda":
            machine.observer.allocated(self)

    def __del__(self) -> None:
        if self.device is not None and self.device.type == "cuda":
            self.machine.observer.freed(self)


class Observer:
    """Hears of every allocation, free and kernel; the base class ignores them."""

    def allocated(self, buffer: Buffer) -> None: ...

    def freed(self, buffer: Buffer) -> None: ...

    def launched(
        self, func: Any, geometry: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any
    ) -> None: ...

    def value_read(self, known: bool, func: Any) -> None: ...

    def written(self, buffer: Buffer) -> None: ...


class VirtualTensor(torch.Tensor):
    """A meta tensor that says it lies elsewhere; all state is on the storage."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Reached only when no mode is active, that is outside an open machine.
        buffers = [buffer_of(t) for t in _tensors(args) if isinstance(t, VirtualTensor)]
        return buffers[0].machine.dispatch(func, args, kwargs or {})

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
            args, kwargs = (), {"device": other.device, "dtype": other.dtype, **kwargs}
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        return buffer_of(self).machine.move(self, device, dtype, copy, memory_format)

    def cuda(self, device: Any = None, non_blocking: bool = False, **_: Any) -> torch.Tensor:
        return self.to(torch.device("cuda" if device is None else device))

    def cpu(self, **_: Any) -> torch.Tensor:
        return self.to(CPU)

    def type_as(self, other: torch.Tensor) -> torch.Tensor:
        return self.to(other.device, other.dtype)

    def numpy(self, *, force: bool = False) -> Any:
        if self.device.type == "cuda" and not force:
            raise TypeError(
                f"can't convert {self.device} device type tensor to numpy. "
                "Use Tensor.cpu() to copy the tensor to host memory first."
            )
        return _zeros_array(self)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.numpy() if dtype is None else self.numpy().astype(dtype)

    def tolist(self) -> Any:
        machine = buffer_of(self).machine
        machine.observer.value_read(known_value(self) is not None, "tolist")
        return machine.values(self).tolist()

    def __getitem__(self, index: Any) -> torch.Tensor:
        return super().__getitem__(_index_of_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_index_of_tensors(index), value)

    def pin_memory(self, device: Any = None) -> torch.Tensor:
        return self

    def is_pinned(self, device: Any = None) -> bool:
        return False

    def record_stream(self, stream: Any) -> None: ...

    def data_ptr(self) -> int:
        return id(buffer_of(self)) + self.storage_offset() * self.element_size()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            memo[id(self)] = self.clone()
        return memo[id(self)]

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"VirtualTensor({tuple(self.shape)}, {self.dtype}, {self.device})"


def _index_of_tensors(index: Any) -> Any:
    """Lists in an index become CPU tensors here; C++ would make them on meta and lose their values."""
    if isinstance(index, (list, range, np.ndarray)) and len(index):
        return torch.as_tensor(_plain(list(index)))
    if isinstance(index, tuple):
        return tuple(_index_of_tensors(i) for i in index)
    return index


def buffer_of(tensor: torch.Tensor) -> Buffer:
    """Return the state behind *tensor*; it must be virtual."""
    return tensor.untyped_storage().__dict__["buffer"]


def known_value(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the real CPU tensor that *tensor* stands for, or None where its values are unknown."""
    if not isinstance(tensor, VirtualTensor):
        return tensor if tensor.device.type == "cpu" else None
    value = buffer_of(tensor).value
    if value is None:
        return None
    with torch._C._DisableTorchDispatch():
        out = torch.empty(0, dtype=tensor.dtype)
        return out.set_(value, tensor.storage_offset(), tensor.size(), tensor.stride())


class _ZeroArray(np.ndarray):
    """A stride-0 array of zeros: postprocessing of a large video stays free of real memory."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        views = [np.asarray(i) for i in inputs]
        if method == "__call__" and "out" not in kwargs and len(views) <= 2:
            shape = np.broadcast_shapes(*(v.shape for v in views))
            lone = [v if v.ndim == 0 else v[(0,) * v.ndim] for v in views if v.size]
            uniform = all(not any(v.strides) or v.ndim == 0 for v in views)
            if uniform and len(lone) == len(views):
                result = ufunc(*lone, **kwargs)
                return np.broadcast_to(np.asarray(result), shape).view(_ZeroArray)
        return getattr(ufunc, method)(*views, **kwargs)

    def round(self, decimals: int = 0, out: Any = None) -> Any:
        return self

    def astype(self, dtype: Any, **_: Any) -> Any:
        return np.broadcast_to(np.zeros((), dtype), self.shape).view(_ZeroArray)


def _zeros_array(tensor: torch.Tensor) -> Any:
    value = known_value(tensor)
    if value is not None:
        return value.numpy()
    dtype = torch.empty(0, dtype=tensor.dtype).numpy().dtype
    return np.broadcast_to(np.zeros((), dtype), tuple(tensor.shape)).view(_ZeroArray)


def _tensors(args: Any) -> Iterator[torch.Tensor]:
    for a in args:
        if isinstance(a, torch.Tensor):
            yield a
        elif isinstance(a, (list, tuple)):
            yield from _tensors(a)


def _key(value: Any) -> Any:
    """Geometry of an operator's argument, hashable."""
    if isinstance(value, torch.Tensor):
        return (value.size(), value.stride(), value.dtype)
    if isinstance(value, (list, tuple)):
        return (len(value), *map(_key, value))
    # 1, 1.0 and True are equal as dictionary keys but promote types differently.
    return (type(value), value) if isinstance(value, (int, float)) else value


@functools.cache
def _facts(func: Any) -> tuple[bool, bool, bool, tuple[int, ...]]:
    """(returns views, changes geometry in place, composite, positions of arguments written)."""
    schema = func._schema
    returns_view = any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
    written = tuple(
        i for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write
    )
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), "CompositeImplicitAutograd"
    )
    return returns_view, torch.Tag.inplace_view in func.tags, composite, written


_VALUE_READS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
}
_DATA_SHAPED = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
}
_INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}


class VirtualMachine:
    """One process's view of virtual GPUs. Open it with ``with machine:`` and run real code inside.

    *observer* hears of each allocation, free and kernel. Only the thread that opened the machine
    sees virtual devices.
    """

    def __init__(
        self,
        observer: Observer,
        *,
        compute_capability: tuple[int, int] = (8, 9),
        total_bytes: int = 1 << 42,
        num_devices: int = 1,
    ) -> None:
        self.observer = observer
        self.compute_capability = compute_capability
        self.total_bytes = total_bytes
        self.num_devices = num_devices
        self.in_kernel = False
        self._mode = _Mode(self)
        self._results: dict[Any, Any] = {}
        self._stack: contextlib.ExitStack | None = None

    def __enter__(self) -> VirtualMachine:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_replaced(self))
            stack.enter_context(self._mode)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: Any) -> None:
        assert self._stack is not None
        self._stack.close()
        self._stack = None

    # -- making tensors

    def wrap(
        self, meta: torch.Tensor, device: torch.device | None, requires_grad: bool = False
    ) -> VirtualTensor:
        """Return *meta* as a virtual tensor on *device*; aliases keep their storage's state."""
        if isinstance(meta, VirtualTensor):
            return meta
        state = meta.untyped_storage().__dict__
        if "buffer" not in state:
            state["buffer"] = Buffer(self, device, meta.untyped_storage().nbytes())
        return torch.Tensor._make_subclass(VirtualTensor, meta, requires_grad)

    def empty(
        self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> VirtualTensor:
        """Return a new virtual tensor of that geometry."""
        with torch._C._DisableTorchDispatch():
            meta = torch.empty_strided(size, stride, dtype=dtype, device=META)
        return self.wrap(meta, device)

    def parameter(self, tensor: torch.Tensor, device: torch.device) -> VirtualTensor:
        """Return a weightless twin of a real, meta or virtual parameter or buffer."""
        with torch._C._DisableTorchDispatch():
            meta = torch.empty_strided(
                tensor.size(), tensor.stride(), dtype=tensor.dtype, device=META
            )
            twin = self.wrap(meta, device, tensor.requires_grad)
            is_small = tensor.numel() <= KNOWN_VALUE_LIMIT_ELEMENTS
            if not isinstance(tensor, torch.nn.Parameter) and is_small and tensor.device == CPU:
                self._remember(twin, tensor.detach())
        if isinstance(tensor, torch.nn.Parameter):
            twin._is_param = True  # type: ignore[attr-defined]
        return twin

    def _remember(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """Let *tensor*, which owns its whole storage, keep *value*."""
        buffer = buffer_of(tensor)
        if 0 in tensor.stride() and tensor.numel() > 1:
            return
        store = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
        if store.untyped_storage().nbytes() < buffer.num_bytes:
            return
        store.copy_(value)
        buffer.value = store.untyped_storage()

    def values(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return *tensor*'s values, zeros where unknown."""
        value = known_value(tensor)
        return torch.zeros(tensor.size(), dtype=tensor.dtype) if value is None else value

    # -- moving tensors

    def normalise(self, device: torch.device | str | int | None) -> torch.device | None:
        """Return *device* with its index; None stays None."""
        if device is None:
            return None
        device = torch.device(f"cuda:{device}" if isinstance(device, int) else device)
        if device.type == "cuda" and device.index is None:
            return torch.device("cuda", 0)
        return device

    def move(
        self,
        tensor: torch.Tensor,
        device: Any,
        dtype: torch.dtype | None,
        copy: bool = False,
        memory_format: Any = None,
    ) -> torch.Tensor:
        """``tensor.to(...)``: the tensor itself where nothing changes."""
        device = self.normalise(device) or tensor.device
        if device.type == "meta":  # a tensor that a C++ composite made and that has no home yet
            device = tensor.device
        dtype = dtype or tensor.dtype
        if memory_format is not None and memory_format != torch.preserve_format:
            copy = copy or not tensor.is_contiguous(memory_format=memory_format)
        if tensor.device == device and tensor.dtype == dtype and not copy:
            return tensor
        kwargs: dict[str, Any] = {"dtype": dtype, "device": device}
        if memory_format is not None:
            kwargs["memory_format"] = memory_format
        out = aten._to_copy.default(tensor, **kwargs)
        if tensor.requires_grad and not torch.is_grad_enabled():
            out.requires_grad_(False)
        return out

    # -- dispatch

    def dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Execute one operator on tensors of which any may be virtual."""
        given = list(_tensors(args))
        if kwargs:
            given += _tensors(kwargs.values())
        virtual = [t for t in given if isinstance(t, VirtualTensor)]
        asked = kwargs.get("device")
        if asked is not None:
            asked = self.normalise(asked)
        if not virtual:
            if func in _VALUE_READS and given:
                self.observer.value_read(True, func)
            if asked is None or asked.type == "cpu":
                return func(*args, **kwargs)
        returns_view, changes_geometry, composite, written = _facts(func)
        special = _SPECIAL.get(func)
        if special is not None:
            return special(self, func, args, kwargs)
        if func in _VALUE_READS or func in _DATA_SHAPED or _indexes_by_mask(func, args):
            return self._data_dependent(func, args, kwargs, virtual)
        if composite:
            decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        if returns_view or changes_geometry:
            return self._view(func, args, kwargs)
        device = asked if asked is not None and asked.type != "meta" else self._home(func, given, virtual)
        if written:
            return self._in_place(func, args, kwargs, written, given)
        return self._functional(func, args, kwargs, device, given)

    def _home(
        self, func: Any, given: list[torch.Tensor], virtual: list[torch.Tensor]
    ) -> torch.device | None:
        """Return the common device; raise torch's own message where there are two."""
        home: torch.device | None = None
        scalar_home: torch.device | None = None
        for t in virtual:
            device = buffer_of(t).device
            if device is None:
                continue
            if t.dim() == 0:
                # As in torch, a 0-dim CPU tensor goes anywhere.
                if scalar_home is None or scalar_home.type == "cpu":
                    scalar_home = device
            elif home is None:
                home = device
            elif home != device and func not in _INDEXING and func is not aten.copy_.default:
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two "
                    f"devices, {home} and {device}! (in {func})"
                )
        home = home or scalar_home
        if home is not None and home.type == "cuda" and func not in _INDEXING:
            for t in given:
                if not isinstance(t, VirtualTensor) and t.dim() > 0 and func is not aten.copy_.default:
                    raise RuntimeError(
                        "Expected all tensors to be on the same device, but found at least two "
                        f"devices, {home} and {t.device}! (in {func})"
                    )
        if home is not None:
            for t in virtual:
                buffer = buffer_of(t)
                if buffer.device is None:  # made by a C++ composite; it belongs with the others
                    buffer.device = home
                    if home.type == "cuda":
                        self.observer.allocated(buffer)
        return home

    def run_on_meta(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run C++'s or Python's meta kernel; real CPU tensors take part by their geometry."""
        self.in_kernel = True
        try:
            with torch._C._DisableTorchDispatch():
                return func(*_as_meta(args), **{k: _as_meta_value(v) for k, v in kwargs.items()})
        finally:
            self.in_kernel = False

    def _view(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        out = self.run_on_meta(func, args, kwargs)
        if isinstance(out, (list, tuple)):
            return [self.wrap(o, None) for o in out]
        return args[0] if out is args[0] else self.wrap(out, None)

    def _in_place(
        self, func: Any, args: Any, kwargs: dict[str, Any], written: tuple[int, ...], given: Any
    ) -> Any:
        names = [a.name for a in func._schema.arguments]
        targets = [args[i] if i < len(args) else kwargs.get(names[i]) for i in written]
        flat = [t for t in _tensors(targets)]
        geometry = (func, _key(args), tuple((k, _key(v)) for k, v in kwargs.items()))
        known = self._compute_values(func, args, kwargs, given)
        for t in flat:
            if isinstance(t, VirtualTensor):
                buffer = buffer_of(t)
                self.observer.written(buffer)
                if known is None:
                    buffer.value = None
        if any(isinstance(t, VirtualTensor) and t.is_cuda for t in flat):
            self.observer.launched(func, geometry, args, kwargs, targets[0])
        if not func._schema.returns:
            return None
        return targets[0] if len(func._schema.returns) == 1 else tuple(targets)

    def _functional(
        self,
        func: Any,
        args: Any,
        kwargs: dict[str, Any],
        device: torch.device | None,
        given: list[torch.Tensor],
    ) -> Any:
        if "device" in kwargs:
            kwargs = {**kwargs, "device": META}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if kwargs.get("generator") is not None:
            kwargs = {**kwargs, "generator": None}
        geometry = (func, _key(args), tuple((k, _key(v)) for k, v in kwargs.items()))
        try:
            spec = self._results.get(geometry)
        except TypeError:  # an unhashable argument
            spec, geometry = None, None
        if spec is None:
            made = _shapes(self, func, args, kwargs)
            spec = _spec(made)
            if geometry is not None:
                self._results[geometry] = spec
        out = self._materialise(spec, device)
        if device is not None and device.type == "cuda":
            self.observer.launched(func, geometry, args, kwargs, out)
        self._compute_values(func, args, kwargs, given, out)
        return out

    def _materialise(self, spec: Any, device: torch.device | None) -> Any:
        if isinstance(spec, _TensorSpec):
            with torch._C._DisableTorchDispatch():
                meta = torch.empty_strided(spec.size, spec.stride, dtype=spec.dtype, device=META)
            return self.wrap(meta, device)
        if isinstance(spec, tuple):
            return tuple(self._materialise(s, device) for s in spec)
        return spec

    def _compute_values(
        self,
        func: Any,
        args: Any,
        kwargs: dict[str, Any],
        given: list[torch.Tensor],
        out: Any = None,
    ) -> Any:
        """Run the operator for real where every input's values are known; None where they are not."""
        if any(
            t.numel() > KNOWN_VALUE_LIMIT_ELEMENTS
            or (buffer_of(t).value is None if isinstance(t, VirtualTensor) else t.device.type == "meta")
            for t in given
        ):
            return None
        if out is not None:
            outs = [o for o in (out if isinstance(out, tuple) else (out,))]
            if any(
                isinstance(o, torch.Tensor) and o.numel() > KNOWN_VALUE_LIMIT_ELEMENTS for o in outs
            ):
                return None
            if func in _RANDOM:
                return None
        values = tuple(_value_argument(a) for a in args)
        named = {k: _value_argument(v) for k, v in kwargs.items()}
        if named.get("device") is not None:
            named["device"] = CPU
        with torch._C._DisableTorchDispatch():
            result = func(*values, **named)
            if out is not None:
                results = result if isinstance(result, (list, tuple)) else (result,)
                for o, r in zip(outs, results, strict=True):
                    if isinstance(o, VirtualTensor):
                        self._remember(o, r)
        return result

    def _data_dependent(
        self, func: Any, args: Any, kwargs: dict[str, Any], virtual: list[torch.Tensor]
    ) -> Any:
        """An operator whose result or shape depends on values: known ones, else zeros."""
        known = all(buffer_of(t).value is not None for t in virtual)
        device = self._home(func, virtual, virtual)
        if func in _INDEXING:
            indices = [i for i in args[1] if isinstance(i, torch.Tensor)]
            masks = [i for i in indices if i.dtype in (torch.bool, torch.uint8)]
            known = all(known_value(m) is not None for m in masks)
            self.observer.value_read(known, func)
            # As CUDA does: a mask becomes indices, and indexing goes on with those.
            expanded: list[Any] = []
            for i in args[1]:
                if isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8):
                    expanded += [self._upload(n, device) for n in self.values(i).nonzero(as_tuple=True)]
                else:
                    expanded.append(i)
            return self.dispatch(func, (args[0], expanded, *args[2:]), kwargs)
        self.observer.value_read(known, func)
        with torch._C._DisableTorchDispatch():
            result = func(
                *(self._filled(a) for a in args),
                **{k: self._filled(v) for k, v in kwargs.items() if k != "device"},
            )
        if isinstance(result, tuple):
            return tuple(self._upload(r, device) for r in result)
        return self._upload(result, device) if isinstance(result, torch.Tensor) else result

    def _filled(self, value: Any) -> Any:
        return self.values(value) if isinstance(value, VirtualTensor) else value

    def _upload(self, value: torch.Tensor, device: torch.device | None) -> torch.Tensor:
        """Return a real CPU tensor as a virtual one on *device*, values kept where small."""
        if device is None:
            return value
        with torch._C._DisableTorchDispatch():
            meta = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=META)
            out = self.wrap(meta, device)
            if value.numel() <= KNOWN_VALUE_LIMIT_ELEMENTS:
                self._remember(out, value)
        return out


class _Mode(TorchDispatchMode):
    # With this key on the stack, torch's C++ does not initialise CUDA for `device="cuda"` factories.
    _mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __init__(self, machine: VirtualMachine) -> None:
        super().__init__()
        self.machine = machine

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else every operator call imports and asks torch._dynamo

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.machine.dispatch(func, args, kwargs or {})


class _TensorSpec:
    __slots__ = ("dtype", "size", "stride")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.size = tuple(tensor.size())
        self.stride = tuple(tensor.stride())
        self.dtype = tensor.dtype


def _spec(made: Any) -> Any:
    if isinstance(made, torch.Tensor):
        return _TensorSpec(made)
    if isinstance(made, (list, tuple)):
        return tuple(_spec(m) for m in made)
    return made


def _as_meta(args: Any) -> tuple[Any, ...]:
    return tuple(_as_meta_value(a) for a in args)


def _as_meta_value(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if isinstance(value, VirtualTensor) or value.device.type == "meta":
            return value
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=META)
    if isinstance(value, (list, tuple)):
        return type(value)(_as_meta_value(v) for v in value)
    if isinstance(value, torch.device):
        return META
    return value


def _value_argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return known_value(value)
    if isinstance(value, (list, tuple)):
        return [_value_argument(v) for v in value]
    return value


def _indexes_by_mask(func: Any, args: Any) -> bool:
    return func in _INDEXING and any(
        isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
    )


_RANDOM = {
    f
    for name in ("rand", "randn", "randint", "rand_like", "randn_like", "bernoulli", "normal", "multinomial")
    if hasattr(aten, name)
    for f in (getattr(getattr(aten, name), o) for o in getattr(aten, name).overloads())
}


# -- operators whose meta kernels do not say what CUDA does


def _shapes(machine: VirtualMachine, func: Any, args: Any, kwargs: Any) -> Any:
    shape_rule = _SHAPE_RULES.get(func)
    if shape_rule is not None:
        with torch._C._DisableTorchDispatch():
            return shape_rule(machine, func, args, kwargs)
    made = machine.run_on_meta(func, args, kwargs)
    if torch.Tag.pointwise in func.tags and func._schema.name not in _UNARY_WITH_NUMBERS:
        return _with_iterator_strides(made, args)
    return made


_UNARY_WITH_NUMBERS = {"aten::pow", "aten::clamp", "aten::clamp_min", "aten::clamp_max"}
"""To TensorIterator these have one operand; their numbers are parameters."""


def _empty_like(source: torch.Tensor, dtype: torch.dtype, layout: torch.memory_format) -> torch.Tensor:
    """``empty_like`` as C++ does it: a dense tensor's strides are kept, size-1 dimensions included."""
    if layout == torch.preserve_format:
        dims = [d for d in range(source.dim()) if source.size(d) != 1]
        step = 1
        for d in sorted(dims, key=lambda d: (source.stride(d), source.size(d))):
            if source.stride(d) != step:
                break
            step *= source.size(d)
        else:
            return torch.empty_strided(source.size(), source.stride(), dtype=dtype, device=META)
    return torch.empty_like(source, dtype=dtype, memory_format=layout, device=META)


def _like_shapes(machine: VirtualMachine, func: Any, args: Any, kwargs: Any) -> Any:
    layout = kwargs.get("memory_format") or torch.preserve_format
    return _empty_like(_as_meta_value(args[0]), kwargs.get("dtype") or args[0].dtype, layout)


def _with_iterator_strides(made: Any, args: Any) -> Any:
    """Give a tensor combined with a scalar the strides that TensorIterator gives it on CUDA.

    The meta kernels normalise the stride of a size-1 dimension there; CUDA keeps it, and that decides
    between channels_last and contiguous for everything downstream at batch size 1. Operators on one
    tensor, or on several of one shape, take TensorIterator's fast path, which meta shares.
    """
    tensors = [t for t in _tensors(args) if t.dim() > 0]
    scalars = [a for a in args[:3] if isinstance(a, (int, float)) or (isinstance(a, torch.Tensor) and a.dim() == 0)]
    if len(args) < 2 or len(tensors) != 1 or not scalars or tensors[0].shape != made.shape:
        return made
    size, stride = made.size(), tensors[0].stride()
    order = sorted(range(made.dim()), key=functools.cmp_to_key(lambda a, b: _iterates_before(a, b, size, stride)))
    result, step = [0] * made.dim(), 1
    for dim in order:
        result[dim] = step
        step *= max(1, size[dim])
    return torch.empty_strided(size, result, dtype=made.dtype, device=META)


def _iterates_before(a: int, b: int, size: Sequence[int], stride: Sequence[int]) -> int:
    """Order of dimensions from fastest to slowest, as ``TensorIteratorBase::reorder_dimensions``."""
    if stride[a] == 0 or stride[b] == 0 or stride[a] == stride[b]:
        if stride[a] == stride[b] and stride[a] != 0 and size[a] != size[b]:
            return -1 if size[a] < size[b] else 1
        return b - a  # ambiguous: the later dimension is the faster one
    return -1 if stride[a] < stride[b] else 1


def _group_norm_shapes(machine: VirtualMachine, func: Any, args: Any, kwargs: Any) -> Any:
    # CUDA's kernel works on contiguous input and returns contiguous output plus two statistics.
    x, groups = args[0], args[6]
    stats = (x.shape[0], groups)
    return (
        torch.empty(x.size(), dtype=x.dtype, device=META),
        torch.empty(stats, dtype=x.dtype, device=META),
        torch.empty(stats, dtype=x.dtype, device=META),
    )


def suggests_channels_last(tensor: torch.Tensor) -> bool:
    """C++'s ``suggest_memory_format``: by the strides, size-1 dimensions included."""
    if tensor.dim() not in (4, 5):
        return False
    wanted = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
    return torch._prims_common.suggest_memory_format(tensor) == wanted


def _convolution_shapes(machine: VirtualMachine, func: Any, args: Any, kwargs: Any) -> Any:
    x, weight = args[0], args[1]
    made = machine.run_on_meta(func, args, kwargs)
    if suggests_channels_last(x) or suggests_channels_last(weight):
        layout = torch.channels_last if made.dim() == 4 else torch.channels_last_3d
    else:
        layout = torch.contiguous_format
    return torch.empty(made.size(), dtype=made.dtype, device=META, memory_format=layout)


_SHAPE_RULES: dict[Any, Callable[..., Any]] = {
    aten.native_group_norm.default: _group_norm_shapes,
    aten.convolution.default: _convolution_shapes,
    aten.empty_like.default: _like_shapes,
    aten.zeros_like.default: _like_shapes,
    aten.ones_like.default: _like_shapes,
}


def _copy_in(machine: VirtualMachine, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """``dst.copy_(src)``: between places as well."""
    target, source = args[0], args[1]
    if not isinstance(target, VirtualTensor):
        raise RuntimeError(
            "A tensor with values cannot take a copy of one without; "
            f"copy_ from {source.device} to a real {target.device} tensor."
        )
    buffer = buffer_of(target)
    machine.observer.written(buffer)
    value = known_value(source) if source.numel() <= KNOWN_VALUE_LIMIT_ELEMENTS else None
    own = known_value(target)
    if own is not None and value is not None:
        own.copy_(value)
    elif value is not None and target.numel() * target.element_size() == buffer.num_bytes:
        machine._remember(target, value.expand(target.size()))
    else:
        buffer.value = None
    if target.is_cuda:
        machine.observer.launched(func, (func, _key(args)), args, kwargs, target)
    return target


def _to_copy(machine: VirtualMachine, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """``x.to(...)`` that copies: the layout is kept, values cross with the data."""
    source = args[0]
    device = machine.normalise(kwargs.get("device")) or source.device
    dtype = kwargs.get("dtype") or source.dtype
    if device.type == "meta" and isinstance(source, VirtualTensor):
        home = buffer_of(source).device
    else:
        home = device
    value = known_value(source) if source.numel() <= KNOWN_VALUE_LIMIT_ELEMENTS else None
    if device.type == "cpu" and value is not None:
        with torch._C._DisableTorchDispatch():
            return value.to(dtype, copy=True)
    layout = kwargs.get("memory_format") or torch.preserve_format
    geometry = (func, _key(source), dtype, layout)
    spec = machine._results.get(geometry)
    if spec is None:
        with torch._C._DisableTorchDispatch():
            machine.in_kernel = True
            try:
                spec = _TensorSpec(_empty_like(_as_meta_value(source), dtype, layout))
            finally:
                machine.in_kernel = False
        machine._results[geometry] = spec
    out = machine._materialise(spec, home)
    if home is not None and home.type == "cuda":
        machine.observer.launched(func, geometry, args, kwargs, out)
    if value is not None:
        with torch._C._DisableTorchDispatch():
            machine._remember(out, value.to(dtype))
    return out


def _set_data(machine: VirtualMachine, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    with torch._C._DisableTorchDispatch():
        return func(*args, **kwargs)


_SPECIAL: dict[Any, Callable[..., Any]] = {
    aten.copy_.default: _copy_in,
    aten._to_copy.default: _to_copy,
    aten.set_.source_Tensor: _set_data,
    aten.set_.source_Storage_storage_offset: _set_data,
}


# -- functions replaced while a machine is open

FLASH_MAX_HEAD_DIM = 256
"""Largest head dimension of torch's flash attention kernel, elements.

Source: ``check_head_dim_size_flash`` in aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, torch 2.13.
"""
EFFICIENT_BIAS_ALIGNMENT_ELEMENTS = 8
"""The memory-efficient kernel copies a bias whose last dimension is not a multiple of this.

Source: ``pad_bias`` in aten/src/ATen/native/transformers/attention.cpp, torch 2.13 (alignment 8 on CUDA).
"""
FLASH_HEAD_DIM_ALIGNMENT_ELEMENTS = 8
"""Flash attention pads head dimensions to a multiple of this.

Source: ``pad_last_dim<8>`` in aten/src/ATen/native/transformers/attention.cpp, torch 2.13.
"""


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What CUDA's scaled_dot_product_attention allocates: flash where it can, else memory-efficient."""
    machine = buffer_of(next(t for t in (query, key, value) if isinstance(t, VirtualTensor))).machine
    half = query.dtype in (torch.float16, torch.bfloat16)
    flash = (
        half
        and attn_mask is None
        and query.shape[-1] <= FLASH_MAX_HEAD_DIM
        and query.shape[-1] == value.shape[-1]
        and machine.compute_capability >= (8, 0)
    )
    if enable_gqa and not flash and key.shape[-3] != query.shape[-3]:
        repeats = query.shape[-3] // key.shape[-3]
        key = key.repeat_interleave(repeats, -3)
        value = value.repeat_interleave(repeats, -3)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, float("-inf")).to(query.dtype)
    if attn_mask is not None and attn_mask.shape[-1] % EFFICIENT_BIAS_ALIGNMENT_ELEMENTS:
        pad = -attn_mask.shape[-1] % EFFICIENT_BIAS_ALIGNMENT_ELEMENTS
        attn_mask = torch.nn.functional.pad(attn_mask, (0, pad))
    head_dim = value.shape[-1]
    if flash and head_dim % FLASH_HEAD_DIM_ALIGNMENT_ELEMENTS:
        pad = -head_dim % FLASH_HEAD_DIM_ALIGNMENT_ELEMENTS
        query, key, value = (torch.nn.functional.pad(t, (0, pad)) for t in (query, key, value))
    return machine.attend(query, key, value, attn_mask, flash)[..., :head_dim]


def _attend(
    machine: VirtualMachine,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    flash: bool,
) -> torch.Tensor:
    lead, (heads, rows) = query.shape[:-3], query.shape[-3:-1] if query.dim() > 3 else (1, query.shape[-2])
    if query.dim() == 3:
        lead, heads = query.shape[:-2], 1
    columns = value.shape[-1]
    device = query.device
    # Both kernels write (batch, rows, heads, columns) and return its transpose.
    batch = math.prod(lead)
    size = (*query.shape[:-1], columns)
    base = machine.empty((batch, rows, heads, columns), (rows * heads * columns, heads * columns, columns, 1), query.dtype, device)
    keep = None
    if flash:
        keep = machine.empty((batch, heads, rows), (heads * rows, rows, 1), torch.float32, device)
    func = aten._scaled_dot_product_flash_attention.default if flash else aten._scaled_dot_product_efficient_attention.default
    args = (query, key, value, mask)
    if device.type == "cuda":
        machine.observer.launched(func, (func, _key(args)), args, {}, base)
    del keep
    out = base.transpose(1, 2)
    return out if tuple(out.shape) == size else out.reshape(size)


VirtualMachine.attend = _attend  # type: ignore[attr-defined]


def _rms_norm(
    original: Any, x: torch.Tensor, normalized_shape: Any, weight: Any = None, eps: Any = None
) -> torch.Tensor:
    """CUDA's fused kernel: the result and one fp32 statistic a row; mixed dtypes fall back to parts."""
    if not isinstance(x, VirtualTensor) or (weight is not None and weight.dtype != x.dtype):
        return original(x, normalized_shape, weight, eps)
    machine = buffer_of(x).machine
    rows = x.numel() // max(1, math.prod(normalized_shape))
    x = x.contiguous()
    out = machine.empty(x.shape, x.stride(), x.dtype, x.device)
    keep = machine.empty((rows,), (1,), torch.float32, x.device)
    func = aten._fused_rms_norm.default
    args = (x, list(normalized_shape), weight, eps)
    if x.is_cuda:
        machine.observer.launched(func, (func, _key(args)), args, {}, out)
    del keep
    return out


class _Stream:
    """A stream or event that orders nothing: the recorder keeps operators in program order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cuda", 0)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc: Any) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True


def _replacements(machine: VirtualMachine) -> list[tuple[Any, str, Any]]:
    """(owner, name, replacement) for everything that asks for or about a GPU."""
    major, minor = machine.compute_capability
    properties = types.SimpleNamespace(
        name="virtual", major=major, minor=minor, total_memory=machine.total_bytes,
        multi_processor_count=128, uuid="virtual",
    )
    cuda = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: machine.num_devices,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: "virtual",
        "get_device_capability": lambda device=None: (major, minor),
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda including_emulation=True: (major, minor) >= (8, 0),
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "mem_get_info": lambda device=None: (machine.total_bytes, machine.total_bytes),
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "current_stream": lambda device=None: _Stream(),
        "default_stream": lambda device=None: _Stream(),
        "Stream": _Stream,
        "Event": _Stream,
        "stream": lambda stream: _Stream(),
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
    }
    table = [(torch.cuda, name, made) for name, made in cuda.items()]
    functional = torch.nn.functional
    sdpa, rms_norm = functional.scaled_dot_product_attention, functional.rms_norm

    def attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(t, VirtualTensor) for t in (query, key, value)):
            return sdpa(query, key, value, *args, **kwargs)
        return _attention(query, key, value, *args, **kwargs)

    table += [
        (functional, "scaled_dot_product_attention", attention),
        (functional, "rms_norm", functools.partial(_rms_norm, rms_norm)),
        (torch, "Generator", _generator_class(torch.Generator)),
        (torch, "tensor", functools.partial(_new_tensor, machine, torch.tensor)),
        (torch, "as_tensor", functools.partial(_new_tensor, machine, torch.as_tensor)),
    ]
    return table


def _generator_class(original: Any) -> Any:
    """A generator for a virtual GPU draws on the CPU; what it draws has no values anyway."""

    class Generator(original):  # type: ignore[misc,valid-type]
        def __new__(cls, device: Any = "cpu") -> Any:
            return original.__new__(cls, "cpu")

    return Generator


def _new_tensor(machine: VirtualMachine, original: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
    """``torch.tensor``: C++ would read virtual elements and initialise CUDA past the dispatcher."""
    device = machine.normalise(kwargs.pop("device", None))
    if isinstance(data, VirtualTensor):
        return data.to(device=device or data.device, dtype=kwargs.get("dtype") or data.dtype)
    made = original(_plain(data), *args, **kwargs)
    return made if device is None or device.type == "cpu" else made.to(device)


def _plain(data: Any) -> Any:
    if isinstance(data, VirtualTensor):
        return data.tolist()
    if isinstance(data, (list, tuple)) and any(isinstance(d, (VirtualTensor, list, tuple)) for d in data):
        return type(data)(_plain(d) for d in data)
    return data


@contextlib.contextmanager
def _replaced(machine: VirtualMachine) -> Iterator[None]:
    """Put the replacements in place for this thread; other threads fall through to the originals."""
    thread = threading.get_ident()
    saved: list[tuple[Any, str, Any]] = []

    def here(made: Any, original: Any) -> Any:
        if isinstance(made, type) or not callable(original):
            return made

        @functools.wraps(original)
        def choose(*args: Any, **kwargs: Any) -> Any:
            return (made if threading.get_ident() == thread else original)(*args, **kwargs)

        return choose

    try:
        for owner, name, made in _replacements(machine):
            original = getattr(owner, name)
            saved.append((owner, name, original))
            setattr(owner, name, here(made, original))
        yield
    finally:
        for owner, name, original in reversed(saved):
            setattr(owner, name, original)
