"""A GPU without a GPU: operators on virtual tensors take microseconds and are counted to the byte.

The tensors are those of :mod:`pipefit.planner.virtual_tensors`. Nothing is registered in the
process: a dispatch mode sees every operator, and a set of replaced ``torch.cuda`` functions
(:mod:`pipefit.planner.virtual_cuda`) answers in the thread that opened the machine.

What a reader would get wrong: to C++ the tensors are meta tensors, but no operator is left to C++'s
choice of device. Shapes come from the meta kernels except where CUDA lays results out differently
(:mod:`pipefit.planner.virtual_layouts`); attention and RMS norm, which are composites with a branch
for each device, are replaced at function level.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipefit.planner.virtual_cuda import Stream, replaced
from pipefit.planner.virtual_disk import VirtualDisk
from pipefit.planner.virtual_layouts import empty_like, output_shapes, suggests_channels_last
from pipefit.planner.virtual_tensors import (
    CPU,
    KNOWN_VALUE_LIMIT_ELEMENTS,
    META,
    Buffer,
    Copy,
    Launch,
    Observer,
    VirtualTensor,
    buffer_of,
    keep_value,
    known_value,
    owns_storage,
    uniform_element,
    value_signature,
    values,
)

__all__ = [
    "CPU",
    "KNOWN_VALUE_LIMIT_ELEMENTS",
    "META",
    "Buffer",
    "Copy",
    "Launch",
    "Observer",
    "VirtualDevice",
    "VirtualMachine",
    "VirtualTensor",
    "buffer_of",
    "keep_value",
    "known_value",
    "suggests_channels_last",
    "value_signature",
]

aten = torch.ops.aten


class VirtualDevice(NamedTuple):
    """What code may ask of a virtual GPU."""

    compute_capability: tuple[int, int] = (8, 9)
    total_bytes: int = 1 << 42


class VirtualMachine:
    """One process's view of virtual GPUs. Open it with ``with machine:`` and run real code inside.

    *observer* hears of each allocation, free and kernel. Only the thread that opened the machine
    sees virtual devices.
    """

    def __init__(
        self,
        observer: Observer,
        *,
        devices: Sequence[VirtualDevice] = (VirtualDevice(),),
    ) -> None:
        self.observer = observer
        self.devices = tuple(devices)
        self.in_kernel = False
        """While set, virtual tensors say ``meta``: torch's own kernels are looking at them."""
        self.current_device = 0
        """Where ``cuda`` without an index is."""
        self.num_streams = 0
        self.default_streams = [Stream(self, index) for index in range(len(self.devices))]
        self.streams = list(self.default_streams)
        """For each GPU the stream that allocates and computes now."""
        self.disk = VirtualDisk(self)
        self._mode = _Mode(self)
        self._operators: dict[int, _Operator] = {}
        self._stack: contextlib.ExitStack | None = None

    @property
    def stream(self) -> Stream:
        """The current stream of the current GPU."""
        return self.streams[self.current_device]

    def __enter__(self) -> VirtualMachine:
        with contextlib.ExitStack() as stack:
            stack.enter_context(replaced(self))
            stack.enter_context(self._mode)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: Any) -> None:
        assert self._stack is not None
        self._stack.close()
        self._stack = None

    # -- making tensors

    def wrap(self, meta: torch.Tensor, device: torch.device | None) -> VirtualTensor:
        """Make *meta* a virtual tensor on *device*; aliases keep their storage's state."""
        storage = meta.untyped_storage()
        if "buffer" not in storage.__dict__:
            storage.__dict__["buffer"] = Buffer(self, device, storage.nbytes())
        # As _make_subclass, but without the dispatcher's copy of the tensor: half the time.
        meta.__class__ = VirtualTensor
        return meta  # type: ignore[return-value]

    def empty(
        self,
        size: Sequence[int],
        stride: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | None,
    ) -> VirtualTensor:
        """Return a new virtual tensor of that geometry."""
        with torch._C._DisableTorchDispatch():
            return self.wrap(torch.empty_strided(size, stride, dtype=dtype, device=META), device)

    def parameter(self, tensor: torch.Tensor, device: torch.device) -> VirtualTensor:
        """Return a weightless twin of a real, meta or virtual parameter or buffer."""
        twin = self.empty(tensor.size(), tensor.stride(), tensor.dtype, device)
        buffer_of(twin).is_kept = True
        if isinstance(tensor, torch.nn.Parameter):
            twin._is_param = True  # type: ignore[attr-defined]
            twin.requires_grad_(tensor.requires_grad)
        elif tensor.device == CPU:
            with torch._C._DisableTorchDispatch():
                keep_value(twin, tensor.detach())
        return twin

    def belonging(self, tensor: torch.Tensor) -> VirtualTensor:
        """Return *tensor* as one that a module keeps: virtual wherever it lies."""
        if not isinstance(tensor, VirtualTensor):
            with torch._C._DisableTorchDispatch():
                tensor = self._upload(tensor, tensor.device)
        buffer_of(tensor).is_kept = True
        return tensor

    def pinned(self, tensor: torch.Tensor) -> VirtualTensor:
        """Return a copy of *tensor* in page-locked host memory."""
        with torch._C._DisableTorchDispatch():
            meta = self.on_meta(empty_like, tensor, tensor.dtype, torch.preserve_format)
            storage = meta.untyped_storage()
            buffer = Buffer(self, CPU, storage.nbytes(), is_pinned=True)
            buffer.is_kept = buffer_of(tensor).is_kept
            storage.__dict__["buffer"] = buffer
            copy = self.wrap(meta, CPU)
            value = known_value(tensor)
            if value is not None:
                keep_value(copy, value)
        return copy

    # -- moving tensors

    def normalise(self, device: torch.device | str | int | None) -> torch.device | None:
        """Return *device* with its index; None stays None."""
        if device is None:
            return None
        device = torch.device(f"cuda:{device}" if isinstance(device, int) else device)
        if device.type == "cuda" and device.index is None:
            return torch.device("cuda", self.current_device)
        return device

    def move(
        self,
        tensor: torch.Tensor,
        device: Any,
        dtype: torch.dtype | None,
        copy: bool = False,
        memory_format: Any = None,
        non_blocking: bool = False,
    ) -> torch.Tensor:
        """``tensor.to(...)``: the tensor itself where nothing changes."""
        device = self.normalise(device) or tensor.device
        if device.type == "meta" and not tensor.is_meta:
            return self._dropped(tensor, dtype or tensor.dtype)
        dtype = dtype or tensor.dtype
        if memory_format is not None and memory_format != torch.preserve_format:
            # As to_impl in aten/src/ATen/native/TensorConversions.cpp: by the strides of every
            # dimension, so that a 1x1 weight that is dense in both layouts is copied.
            copy = copy or torch._prims_common.suggest_memory_format(tensor) != memory_format
        if tensor.device == device and tensor.dtype == dtype and not copy:
            return tensor
        kwargs: dict[str, Any] = {"dtype": dtype, "device": device}
        if non_blocking:
            kwargs["non_blocking"] = True
        if memory_format is not None:
            kwargs["memory_format"] = memory_format
        return aten._to_copy.default(tensor, **kwargs)

    def _dropped(self, tensor: torch.Tensor, dtype: torch.dtype) -> VirtualTensor:
        """``tensor.to("meta")``: its geometry, nowhere; what accelerate leaves of a weight."""
        with torch._C._DisableTorchDispatch():
            made = self.on_meta(empty_like, tensor, dtype, torch.preserve_format)
        out = self.wrap(made, META)
        buffer_of(out).is_kept = buffer_of(tensor).is_kept
        return out

    # -- dispatch. All below runs inside the mode's handler, where operators reach C++ directly.

    def dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Execute one operator on tensors of which any may be virtual."""
        operator = self._operators.get(id(func))
        if operator is None:
            operator = self._operators[id(func)] = _Operator(func)
        if operator.returns_view and type(args[0]) is VirtualTensor:
            return self._view(func, args, kwargs)
        given: list[torch.Tensor] = []
        key: list[Any] = []
        virtual = _scan(args, given, key)
        asked = None
        if kwargs:
            virtual = _scan_named(kwargs, given, key) or virtual
            asked = self.normalise(kwargs.get("device"))
        if not virtual and (asked is None or asked.type == "cpu"):
            if operator.reads_value and given:
                self.observer.value_read(True, func)
            return func(*args, **kwargs)
        if operator.special is not None:
            return operator.special(self, operator, args, kwargs)
        if operator.reads_value or (operator.indexes and _has_mask(args[1])):
            return self._data_dependent(operator, args, kwargs, given)
        if operator.composite:
            with self._mode:
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        home, buffers = self._home(operator, given)
        if asked is not None and asked.type != "meta":
            home = asked
        launch = operator.launches.get(tuple(key))
        if launch is None:
            launch = Launch() if operator.written else self._new_launch(func, args, kwargs)
            operator.launches[tuple(key)] = launch
        if operator.written:
            return self._in_place(operator, launch, args, kwargs, given, buffers)
        out = self._materialise(launch.outputs, home, is_written=not operator.is_uninitialised)
        if home is not None and home.type == "cuda":
            self.observer.launched(launch, func, args, kwargs, out)
        elif home == CPU:
            self.observer.computed_on_host(launch, func, args, kwargs, out)
        if operator.fill is not None:
            self._fill(out, operator.fill(args, kwargs))
        elif operator.has_values and all(b.value is not None for b in buffers):
            self._derive_values(operator, args, kwargs, given, out)
        return out

    def _home(
        self, operator: _Operator, given: Iterable[torch.Tensor]
    ) -> tuple[torch.device | None, list[Buffer]]:
        """Return the common device and the buffers; raise torch's own message on two devices."""
        home: torch.device | None = None
        scalar_home: torch.device | None = None
        buffers = []
        real = homeless = False
        for t in given:
            if type(t) is not VirtualTensor:
                real = real or t.dim() > 0
                continue
            buffer = t.untyped_storage().__dict__["buffer"]
            buffers.append(buffer)
            device = buffer.device
            if device is None:
                homeless = True
            elif device is home:
                continue
            elif not t.dim():
                # As in torch, a 0-dim CPU tensor goes anywhere.
                if scalar_home is None or scalar_home.type == "cpu":
                    scalar_home = device
            elif home is None:
                home = device
            elif home != device and not operator.indexes:
                raise _two_devices(home, device, operator)
        home = home or scalar_home
        if home is not None and home.type == "cuda" and real and not operator.indexes:
            raise _two_devices(home, CPU, operator)
        if homeless and home is not None:
            for buffer in buffers:
                if buffer.device is None:
                    self._settle(buffer, home)
        return home, buffers

    def _settle(self, buffer: Buffer, home: torch.device) -> None:
        """What a C++ composite made, meta as its arguments are there, belongs with the others."""
        buffer.device = home
        if home.type == "cuda":
            self.observer.allocated(buffer)
        elif buffer.is_written:
            self.observer.host_allocated(buffer)

    def on_meta(self, function: Any, *args: Any) -> Any:
        """Call *function* while virtual tensors are meta tensors in Python, too."""
        self.in_kernel = True
        try:
            return function(*args)
        finally:
            self.in_kernel = False

    def _new_launch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Launch:
        named = {k: _NOWHERE.get(k, v) for k, v in kwargs.items()}
        return Launch(_spec(self.on_meta(output_shapes, func, args, named)))

    def _view(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        self.in_kernel = True
        try:
            out = func(*args, **kwargs)
        finally:
            self.in_kernel = False
        if isinstance(out, (list, tuple)):
            for o in out:
                o.__class__ = VirtualTensor
            return out
        if out is not args[0]:
            out.__class__ = VirtualTensor
        return out

    def _materialise(
        self, spec: Any, device: torch.device | None, *, is_written: bool = True
    ) -> Any:
        if type(spec) is _TensorSpec:
            meta = torch.empty_strided(spec.size, spec.stride, dtype=spec.dtype, device=META)
            state = meta.untyped_storage().__dict__
            state["buffer"] = Buffer(self, device, spec.num_bytes, is_written=is_written)
            meta.__class__ = VirtualTensor
            return meta
        if isinstance(spec, tuple):
            return tuple(self._materialise(s, device) for s in spec)
        return spec

    def _in_place(
        self,
        operator: _Operator,
        launch: Launch,
        args: Any,
        kwargs: dict[str, Any],
        given: list[torch.Tensor],
        buffers: list[Buffer],
    ) -> Any:
        targets = [
            args[i] if i < len(args) else kwargs.get(operator.argument_names[i])
            for i in operator.written
        ]
        known = operator.has_values and all(b.value is not None for b in buffers)
        if operator.fill is not None and owns_storage(targets[0]):
            self._fill(targets[0], operator.fill(args, kwargs))
        elif not (known and self._write_values(operator, args, kwargs, given, targets)):
            for t in _flat(targets):
                if type(t) is VirtualTensor:
                    buffer_of(t).value = None
        on_gpu = False
        for t in _flat(targets):
            if type(t) is VirtualTensor:
                buffer_of(t).write()
                on_gpu = on_gpu or t.is_cuda
        if on_gpu:
            self.observer.launched(launch, operator.func, args, kwargs, targets[0])
        num_returns = len(operator.func._schema.returns)
        if not num_returns:
            return None
        return targets[0] if num_returns == 1 else tuple(targets)

    # -- values

    def _fill(self, out: torch.Tensor, number: Any) -> None:
        keep_value(out, torch.full((), number, dtype=out.dtype).expand(out.size()))

    def _derive_values(
        self, operator: _Operator, args: Any, kwargs: Any, given: list[torch.Tensor], out: Any
    ) -> None:
        """Compute the values of *out* from inputs whose values are all known."""
        outs = out if isinstance(out, tuple) else (out,)
        if _all_small(given) and _all_small(outs):
            results = _computed(operator.func, args, kwargs, known_value)
        else:
            results = _computed_uniformly(operator, args, kwargs)
            if results is None:
                return
        for o, r in zip(outs, results, strict=True):
            if type(o) is VirtualTensor:
                keep_value(o, r if r.size() == o.size() else r.expand(o.size()))

    def _write_values(
        self,
        operator: _Operator,
        args: Any,
        kwargs: Any,
        given: list[torch.Tensor],
        targets: Sequence[Any],
    ) -> bool:
        """Do an in-place operator on known values too; False where they are not known after it."""
        if _all_small(given) and all(_has_own_values(t) for t in _flat(targets)):
            # The known values of an argument alias those of its buffer, so this writes them.
            _computed(operator.func, args, kwargs, known_value)
            return True
        target = targets[0]
        if not (len(targets) == 1 and isinstance(target, VirtualTensor) and owns_storage(target)):
            return False
        results = _computed_uniformly(operator, args, kwargs)
        if results is None:
            return False
        keep_value(target, results[0].expand(target.size()))
        return buffer_of(target).value is not None

    def _data_dependent(
        self, operator: _Operator, args: Any, kwargs: dict[str, Any], given: list[torch.Tensor]
    ) -> Any:
        """An operator whose result or shape depends on values: known ones, else zeros."""
        func = operator.func
        device, buffers = self._home(operator, given)
        if device is not None and device.type == "cuda":
            self.observer.synchronised(device.index)
        if operator.indexes:
            masks = [i for i in args[1] if _is_mask(i)]
            self.observer.value_read(all(known_value(m) is not None for m in masks), func)
            # As CUDA does: a mask becomes indices, and indexing goes on with those.
            expanded: list[Any] = []
            for i in args[1]:
                if _is_mask(i):
                    indices = values(i).nonzero(as_tuple=True)
                    expanded += [self._upload(n, device) for n in indices]
                else:
                    expanded.append(i)
            return self.dispatch(func, (args[0], expanded, *args[2:]), kwargs)
        self.observer.value_read(all(b.value is not None for b in buffers), func)
        kwargs = {k: v for k, v in kwargs.items() if k != "device"}
        result = func(*_replaced_tensors(args, values), **_replaced_tensors(kwargs, values))
        if isinstance(result, tuple):
            return tuple(self._upload(r, device) for r in result)
        return self._upload(result, device) if isinstance(result, torch.Tensor) else result

    def _upload(self, value: torch.Tensor, device: torch.device | None) -> torch.Tensor:
        """Return a real CPU tensor as a virtual one on *device*, values kept where small."""
        if device is None:
            return value
        out = self.empty(value.size(), value.stride(), value.dtype, device)
        keep_value(out, value)
        return out


class _Mode(TorchDispatchMode):
    # With this key on the stack, C++ does not initialise CUDA for `device="cuda"` factories.
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


class _Operator:
    """What the machine needs to know of an operator, found out once."""

    __slots__ = (
        "argument_names", "composite", "fill", "func", "has_values", "indexes", "is_uninitialised",
        "launches", "name", "reads_value", "returns_view", "special", "uniform", "written",
    )  # fmt: skip

    def __init__(self, func: Any) -> None:
        schema = func._schema
        self.func = func
        self.name = schema.name.removeprefix("aten::")
        self.argument_names = [a.name for a in schema.arguments]
        self.composite = torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), "CompositeImplicitAutograd"
        )
        aliases = any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
        changes_geometry = torch.Tag.inplace_view in func.tags
        self.special = _SPECIAL.get(func)
        self.returns_view = (
            (aliases or changes_geometry or func in _UNMARKED_VIEWS)
            and not self.composite
            and self.special is None
        )
        self.written = tuple(
            i for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write
        )
        self.reads_value = func in _DATA_DEPENDENT
        self.indexes = func in _INDEXING
        self.is_uninitialised = self.name in _UNINITIALISED
        self.has_values = (
            torch.Tag.nondeterministic_seeded not in func.tags and not self.is_uninitialised
        )
        self.fill = None if schema.overload_name == "Tensor" else _FILLS.get(self.name)
        self.uniform = (
            torch.Tag.pointwise in func.tags or self.name in _ARRANGING or self.name in _REDUCING
        )
        self.launches: dict[Any, Launch] = {}


_DATA_DEPENDENT = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
}
_INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}

_UNMARKED_VIEWS = {aten._unsafe_view.default}
"""What shares its argument's storage although its schema does not say so: a product of matrices
ends with it (``_unsafe_view`` in aten/src/ATen/native/TensorShape.cpp, torch 2.13)."""

_UNINITIALISED = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "empty_permuted",
}

_FILLS = {
    "zeros": lambda args, kwargs: 0,
    "zeros_like": lambda args, kwargs: 0,
    "new_zeros": lambda args, kwargs: 0,
    "zero_": lambda args, kwargs: 0,
    "ones": lambda args, kwargs: 1,
    "ones_like": lambda args, kwargs: 1,
    "new_ones": lambda args, kwargs: 1,
    "fill_": lambda args, kwargs: args[1],
    "full": lambda args, kwargs: args[1],
    "full_like": lambda args, kwargs: args[1],
    "new_full": lambda args, kwargs: args[2],
}
"""Operators that write one number everywhere, whatever their inputs are."""

_ARRANGING = {"clone", "repeat", "cat"}
"""Operators that only move elements."""

_REDUCING = {"all", "any", "amax", "amin", "max", "min", "mean"}
"""Operators that say of a uniform tensor what they say of one element; as do pointwise ones."""

_NOWHERE = {"device": META, "generator": None, "pin_memory": False}
"""Arguments without influence on a result's geometry, as a meta kernel takes them."""


def _scan(args: Iterable[Any], given: list[torch.Tensor], key: list[Any]) -> bool:
    """Collect the tensors among *args* and their geometry; return whether one is virtual."""
    virtual = False
    for a in args:
        kind = type(a)
        if kind is VirtualTensor:
            virtual = True
            given.append(a)
            key += (a.size(), a.stride(), a.dtype)
        elif kind is int or kind is float or kind is bool:
            # 1, 1.0 and True are equal as dictionary keys but promote types differently.
            key += (kind, a)
        elif isinstance(a, torch.Tensor):
            given.append(a)
            key += (a.size(), a.stride(), a.dtype)
        elif kind is list or kind is tuple:
            key.append(len(a))
            virtual = _scan(a, given, key) or virtual
        else:
            key.append(a)
    return virtual


def _scan_named(kwargs: dict[str, Any], given: list[torch.Tensor], key: list[Any]) -> bool:
    virtual = False
    for name, value in kwargs.items():
        if name not in _NOWHERE:
            key.append(name)
            virtual = _scan((value,), given, key) or virtual
    return virtual


def _flat(targets: Iterable[Any]) -> Iterable[torch.Tensor]:
    for t in targets:
        if isinstance(t, torch.Tensor):
            yield t
        elif isinstance(t, (list, tuple)):
            yield from _flat(t)


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def _has_mask(indices: Sequence[Any]) -> bool:
    return any(_is_mask(i) for i in indices)


def _two_devices(one: torch.device, other: torch.device, operator: _Operator) -> RuntimeError:
    return RuntimeError(
        "Expected all tensors to be on the same device, but found at least two "
        f"devices, {one} and {other}! (in {operator.func})"
    )


def _all_small(tensors: Iterable[Any]) -> bool:
    return all(
        t.numel() <= KNOWN_VALUE_LIMIT_ELEMENTS for t in tensors if isinstance(t, torch.Tensor)
    )


def _has_own_values(tensor: torch.Tensor) -> bool:
    """Whether each element of *tensor* has a known value of its own, to be written to."""
    if not isinstance(tensor, VirtualTensor):
        return True
    return isinstance(buffer_of(tensor).value, torch.UntypedStorage)


def _replaced_tensors(value: Any, replace: Any) -> Any:
    """Return an operator's arguments with every tensor replaced."""
    if isinstance(value, torch.Tensor):
        return replace(value)
    if isinstance(value, (list, tuple)):
        return [_replaced_tensors(v, replace) for v in value]
    if isinstance(value, dict):
        return {k: _replaced_tensors(v, replace) for k, v in value.items()}
    return value


def _computed(func: Any, args: Any, kwargs: Any, value_of: Any) -> Sequence[Any]:
    """Run *func* for real on the CPU; return its results as a sequence."""
    named = _replaced_tensors(kwargs, value_of)
    if named.get("device") is not None:
        named["device"] = CPU
    result = func(*_replaced_tensors(args, value_of), **named)
    return result if isinstance(result, (list, tuple)) else (result,)


class _NotUniform(Exception):
    """A value that differs between elements."""


def _computed_uniformly(operator: _Operator, args: Any, kwargs: Any) -> Sequence[Any] | None:
    """Run an operator on one element of each input; None where that does not say all of them."""
    if not operator.uniform:
        return None
    numbers = set()

    def element(tensor: torch.Tensor) -> torch.Tensor:
        value = known_value(tensor)
        one = None if value is None else uniform_element(value)
        if one is None:
            raise _NotUniform
        numbers.add(one.item())
        return one.clone()

    try:
        if operator.name in _ARRANGING:
            ones = [element(t) for t in _flat(args)]
            return (ones[0].reshape(()),) if len(numbers) == 1 else None
        return _computed(operator.func, args, kwargs, element)
    except _NotUniform:
        return None


class _TensorSpec:
    __slots__ = ("dtype", "num_bytes", "size", "stride")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.size = tuple(tensor.size())
        self.stride = tuple(tensor.stride())
        self.dtype = tensor.dtype
        self.num_bytes = tensor.untyped_storage().nbytes()


def _spec(made: Any) -> Any:
    if isinstance(made, torch.Tensor):
        return _TensorSpec(made)
    if isinstance(made, (list, tuple)):
        return tuple(_spec(m) for m in made)
    return made


# -- operators that the general rules do not cover


def _copy_in(machine: VirtualMachine, operator: _Operator, args: Any, kwargs: Any) -> Any:
    """``target.copy_(source)``: between places as well."""
    target, source = args[0], args[1]
    if not isinstance(target, VirtualTensor):
        raise RuntimeError(
            "A tensor with values cannot take a copy of one without; "
            f"copy_ from {source.device} to a real {target.device} tensor."
        )
    buffer = buffer_of(target)
    if buffer.device is None and not source.is_meta:
        machine._settle(buffer, source.device)
    buffer.write()
    non_blocking = (len(args) > 2 and args[2]) or bool(kwargs.get("non_blocking"))
    value = known_value(source)
    if value is not None and _has_own_values(target) and _all_small((source, target)):
        known_value(target).copy_(value)
    elif value is not None and owns_storage(target):
        keep_value(target, value.expand(target.size()))
    else:
        buffer.value = None
    if target.is_cuda:
        launch = _launch(machine, operator, args, target.dtype, None)
        machine.observer.launched(launch, operator.func, args, kwargs, target)
    _cross(machine, source, target, non_blocking)
    return target


def _to_copy(machine: VirtualMachine, operator: _Operator, args: Any, kwargs: Any) -> Any:
    """``x.to(...)`` that copies: the layout is kept, values cross with the data."""
    source = args[0]
    home = machine.normalise(kwargs.get("device")) or source.device
    dtype = kwargs.get("dtype") or source.dtype
    value = known_value(source)
    non_blocking = bool(kwargs.get("non_blocking"))
    is_kept = isinstance(source, VirtualTensor) and buffer_of(source).is_kept
    if home.type == "cpu" and value is not None and not is_kept and _all_small((source,)):
        known = value.to(dtype, copy=True)
        _cross(machine, source, known, non_blocking)
        return known
    if home.type == "meta" and isinstance(source, VirtualTensor):
        home = buffer_of(source).device
    layout = kwargs.get("memory_format") or torch.preserve_format
    launch = _launch(machine, operator, args, dtype, layout)
    out = machine._materialise(launch.outputs, home)
    if home is not None and home.type == "cuda":
        machine.observer.launched(launch, operator.func, args, kwargs, out)
    _cross(machine, source, out, non_blocking)
    if value is not None:
        keep_value(out, value)
    if is_kept:
        buffer_of(out).is_kept = True
    return out


def _cross(
    machine: VirtualMachine, source: torch.Tensor, target: torch.Tensor, non_blocking: bool
) -> None:
    """Tell of a copy between two places. One with the host ends with a wait for the stream unless
    it is *non_blocking* (``copy_kernel_cuda`` in aten/src/ATen/native/cuda/Copy.cu, torch 2.13)."""
    if source.device == target.device or not (
        source.numel() and (source.is_cuda or target.is_cuda)
    ):
        return
    hosts = [t for t in (source, target) if not t.is_cuda]
    virtual = [buffer_of(t) for t in hosts if isinstance(t, VirtualTensor)]
    machine.observer.copied(
        Copy(
            num_bytes=source.numel() * source.element_size(),
            source=source.device.index if source.is_cuda else None,
            target=target.device.index if target.is_cuda else None,
            is_pinned=len(virtual) == len(hosts) and all(b.is_pinned for b in virtual),
            is_blocking=bool(hosts) and not non_blocking,
            host=virtual[0] if virtual else None,
        )
    )


def _launch(
    machine: VirtualMachine,
    operator: _Operator,
    tensors: Sequence[torch.Tensor],
    dtype: torch.dtype,
    layout: torch.memory_format | None,
) -> Launch:
    """Return the launch of a copy; with a *layout*, of one that makes its own output."""
    key = (*((t.size(), t.stride(), t.dtype) for t in tensors[:2]), dtype, layout)
    launch = operator.launches.get(key)
    if launch is None:
        launch = operator.launches[key] = Launch()
        if layout is not None:
            launch.outputs = _spec(machine.on_meta(empty_like, tensors[0], dtype, layout))
    return launch


def _set_data(machine: VirtualMachine, operator: _Operator, args: Any, kwargs: Any) -> Any:
    return operator.func(*args, **kwargs)


_SPECIAL = {
    aten.copy_.default: _copy_in,
    aten._to_copy.default: _to_copy,
    aten.set_.source_Tensor: _set_data,
    aten.set_.source_Storage_storage_offset: _set_data,
}
