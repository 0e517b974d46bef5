"""Symbolic execution of the user's own call: what happens, without weights, in seconds.

The pipeline's real ``__call__`` runs on a :class:`~pipefit.planner.virtual.VirtualMachine`. Every
module call is a subroutine of the trace. One that was seen before (same module structure, same input
signature, nothing read from values, no state left behind) is not executed again: its outputs are made
from the remembered ones, so fifty steps, sixty equal blocks or two hundred tiles cost one.

A call is remembered only if that is safe: it did not change its module's attributes, did not read a
known value, freed nothing of its caller's, mutated no container, and everything alive at its end was
returned.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pipefit.cost_models.workload import (
    Component,
    Kernel,
    ModuleInfo,
    Phase,
    Routine,
    TensorInfo,
    Workload,
    variant_key,
)
from pipefit.errors import PipefitError, TraceError
from pipefit.planner.kernels import kernel_of
from pipefit.planner.virtual import (
    CPU,
    KNOWN_VALUE_LIMIT_ELEMENTS,
    Buffer,
    Observer,
    VirtualMachine,
    VirtualTensor,
    buffer_of,
    known_value,
)

GPU = torch.device("cuda", 0)

ENTRY_METHODS = ("encode", "decode", "generate", "get_text_features", "get_image_features")
"""Methods besides ``forward`` by which pipelines enter a component."""

TILE_METHODS = ("blend_v", "blend_h", "blend_t")
"""Methods of tiled autoencoders that loop over rows of a seam; remembered like module calls.

They are 85 % of the operators of a tiled video decode and their temporaries are one row each.
"""

LEAF_LAYERS = (
    torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.ConvTranspose1d,
    torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d, torch.nn.Linear, torch.nn.Embedding,
)  # fmt: skip
"""What leaf-level group offloading groups on.

Source: ``_GO_LC_SUPPORTED_PYTORCH_LAYERS`` in diffusers/hooks/_common.py, diffusers 0.42.1.
"""

VariantParts = Mapping[str, Mapping[str, Any]]
"""Compute strategies on one component: strategy -> parameters."""
Variants = Mapping[str, Sequence[VariantParts]]
"""Component -> the variants of it to trace."""


class _Unkeyable(Exception):
    """A value whose identity a signature cannot express."""


class _Frame:
    """One module call while it runs."""

    __slots__ = (
        "alloc_events", "entry", "events", "live", "module", "next", "outside", "path",
        "remember", "value_read", "written",
    )  # fmt: skip

    def __init__(self, module: Any, path: str, entry: str) -> None:
        self.module = module
        self.path = path
        self.entry = entry
        self.events: list[Any] = []
        self.live: dict[int, weakref.ref[Buffer]] = {}
        self.alloc_events: dict[int, int] = {}
        self.next = 0
        self.outside: list[tuple[_Frame, int]] = []
        self.written: set[int] = set()
        self.value_read = False
        self.remember = True


@dataclass
class _Memory:
    """A remembered call: its routine, and how to make its output again."""

    routine: int
    output: Any
    returned_bytes: tuple[int, ...]
    written: tuple[int, ...]
    value_read: bool


@dataclass(frozen=True)
class _OutTensor:
    kind: str  # "new": index into the routine's returns; "in": index of an input storage
    index: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass(frozen=True)
class _OutKept:
    tensor: torch.Tensor  # a weight, or a view of one


@dataclass(frozen=True)
class _ArgTensor:
    """An argument's geometry, kept so that a component call can be repeated under a variant."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    value: torch.Tensor | None


@dataclass
class _Entry:
    """One distinct component call of the pipeline, repeatable."""

    component: str
    entry: str
    args: Any
    kwargs: Any
    routine: int


class _Recorder(Observer):
    """Writes the routines of a trace while the pipeline runs."""

    def __init__(self, machine_of: Callable[[Observer], VirtualMachine]) -> None:
        self.machine = machine_of(self)
        self.root = _Frame(None, "", "__call__")
        self.stack: list[_Frame] = []
        self.kernels: dict[Kernel, int] = {}
        self.kernel_by_geometry: dict[Any, int | None] = {}
        self.routines: dict[Routine, int] = {}
        self.routine_list: list[Routine] = []
        self.paths: dict[int, str] = {}
        self.structures: dict[int, int] = {}
        self.structure_numbers: dict[Any, int] = {}
        self.memories: dict[Any, _Memory] = {}
        self.value_dependent: set[Any] = set()
        self.entries: dict[int, _Entry] = {}
        self.component_modules: dict[str, torch.nn.Module] = {}
        self.changed_components: set[str] = set()
        self.unknown_reads: dict[str, int] = {}
        self.muted = False
        self.remembering = True
        self.thread = threading.get_ident()

    # -- what the machine reports

    def allocated(self, buffer: Buffer) -> None:
        if self.muted or not self.stack:
            return
        frame = self.stack[-1]
        self._own(frame, buffer)
        frame.alloc_events[buffer.number] = len(frame.events)
        frame.events.append(("a", buffer.number, buffer.num_bytes))

    def _own(self, frame: _Frame, buffer: Buffer) -> int:
        number = frame.next
        frame.next += 1
        buffer.owner = frame
        buffer.number = number
        frame.live[number] = weakref.ref(buffer)
        return number

    def freed(self, buffer: Buffer) -> None:
        owner = buffer.owner
        if owner is None or not self.stack:
            return
        frame = self.stack[-1]
        if isinstance(owner, str):
            frame.events.append(("w", owner, -buffer.num_bytes))
            frame.remember = False
            self.changed_components.add(owner)
        elif owner is frame:
            frame.events.append(("f", buffer.number))
            del frame.live[buffer.number]
        else:
            frame.events.append(("x", len(frame.outside)))
            frame.outside.append((owner, buffer.number))

    def launched(
        self, func: Any, geometry: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any
    ) -> None:
        if not self.stack or self.muted:
            return
        try:
            number = self.kernel_by_geometry[geometry]
        except (KeyError, TypeError):
            kernel = kernel_of(func, args, kwargs, out)
            number = None
            if kernel is not None:
                number = self.kernels.setdefault(kernel, len(self.kernels))
            if geometry is not None:
                with contextlib.suppress(TypeError):
                    self.kernel_by_geometry[geometry] = number
        if number is not None:
            self.stack[-1].events.append(("k", number))

    def value_read(self, known: bool, func: Any) -> None:
        if not self.stack:
            return
        if known:
            self.stack[-1].value_read = True
        else:
            where = self.stack[-1].path or "the pipeline"
            self.unknown_reads[where] = self.unknown_reads.get(where, 0) + 1

    def written(self, buffer: Buffer) -> None:
        if self.stack:
            self.stack[-1].written.add(id(buffer))

    # -- calls

    def call(
        self, module: Any, entry: str, function: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Run or replay one call of *module*, as a subroutine of the caller's frame."""
        path = self.paths.get(id(module))
        if path is None or not self.stack or self.muted or threading.get_ident() != self.thread:
            return function(*args, **kwargs)
        caller = self.stack[-1]
        if self.changed_components and caller is self.root:
            self._notice_changed_weights(path.split(".")[0])
        inputs: dict[int, torch.Tensor] = {}
        by_value = False
        key = None
        if self.remembering:
            structure = (self._structure(module), entry)
            by_value = structure in self.value_dependent
            with contextlib.suppress(_Unkeyable):
                key = (
                    structure,
                    _argument_key(args, inputs, by_value),
                    _argument_key(kwargs, inputs, by_value),
                )
        if key in self.memories:
            return self._replay(self.memories[key], caller, path, list(inputs.values()))
        repeatable = (_kept_argument(args), _kept_argument(kwargs)) if caller is self.root else None
        frame = _Frame(module, path, entry)
        state = _attributes(module)
        containers = _container_contents(args, kwargs)
        self.stack.append(frame)
        try:
            output = function(*args, **kwargs)
        except BaseException:
            self.stack.pop()
            self._close(frame, caller)
            raise
        self.stack.pop()
        if not _same_attributes(_attributes(module), state):
            frame.remember = False
        made = {id(b): i for i, b in enumerate(r() for r in frame.live.values()) if b is not None}
        sizes = tuple(b.num_bytes for b in (r() for r in frame.live.values()) if b is not None)
        routine = self._close(frame, caller)
        if caller is self.root and routine not in self.entries:
            component, _, below = path.partition(".")
            if not below:
                self.entries[routine] = _Entry(component, entry, *repeatable, routine)
        if frame.value_read and key is not None:
            self.value_dependent.add(key[0])
        if (
            key is None
            or not frame.remember
            or frame.outside
            or (frame.value_read and not by_value)
            or _container_contents(args, kwargs) != containers
        ):
            return output
        numbers = {b: i for i, b in enumerate(inputs)}
        used: set[int] = set()
        with contextlib.suppress(_Unkeyable):
            spec = _output_spec(output, made, numbers, used)
            if len(used) == len(sizes):  # else something is alive that was not returned
                written = tuple(i for b, i in numbers.items() if b in frame.written)
                self.memories[key] = _Memory(routine, spec, sizes, written, frame.value_read)
        return output

    def _close(self, frame: _Frame, caller: _Frame) -> int:
        """Write *frame* down as a routine and its call into *caller*; hand over what is alive."""
        returned, returns = [], []
        for number, ref in frame.live.items():
            buffer = ref()
            if buffer is not None:
                returns.append(number)
                returned.append(self._own(caller, buffer))
        outside = []
        for owner, number in frame.outside:
            if owner is caller:
                outside.append(number)
                del caller.live[number]
            else:
                outside.append(-1 - len(caller.outside))
                caller.outside.append((owner, number))
        caller.written |= frame.written
        caller.value_read |= frame.value_read
        caller.remember &= frame.remember
        routine = Routine(
            module_class=type(frame.module).__name__,
            entry=frame.entry,
            events=tuple(frame.events),
            returns=tuple(returns),
            num_outside=len(outside),
        )
        number = self.routines.setdefault(routine, len(self.routines))
        if number == len(self.routine_list):
            self.routine_list.append(routine)
        relative = self._relative(frame.path, caller)
        if frame.events or returned:
            caller.events.append(("c", number, relative, tuple(returned), tuple(outside)))
        return number

    def _relative(self, path: str, caller: _Frame) -> str:
        if path == caller.path:
            return ""
        if caller.path and path.startswith(caller.path + "."):
            return path[len(caller.path) + 1 :]
        if caller is not self.root:
            caller.remember = False  # the path is absolute: another block's routine differs
        return "/" + path

    def _replay(
        self, memory: _Memory, caller: _Frame, path: str, inputs: list[torch.Tensor]
    ) -> Any:
        """Write the remembered call down and make its outputs, without executing it."""
        new: list[torch.Tensor] = []
        self.muted = True
        try:
            with torch._C._DisableTorchDispatch():
                for num_bytes in memory.returned_bytes:
                    meta = torch.empty(num_bytes, dtype=torch.uint8, device="meta")
                    new.append(self.machine.wrap(meta, GPU))
        finally:
            self.muted = False
        returned = tuple(self._own(caller, buffer_of(b)) for b in new)
        relative = self._relative(path, caller)
        if returned or self.routine_list[memory.routine].events:
            caller.events.append(("c", memory.routine, relative, returned, ()))
        caller.value_read |= memory.value_read
        for index in memory.written:
            buffer = buffer_of(inputs[index])
            buffer.value = None
            caller.written.add(id(buffer))
        return _output(memory.output, new, inputs)

    # -- signatures

    def _structure(self, module: torch.nn.Module) -> int:
        """Number the structure of *module*: equal numbers compute alike on equal inputs."""
        number = self.structures.get(id(module))
        if number is None:
            parts: list[Any] = [type(module)]
            for name, value in module.__dict__.items():
                if name in ("_parameters", "_buffers"):
                    parts.append((name, tuple((n, _weight_key(t)) for n, t in value.items())))
                elif name == "_modules":
                    parts.append(tuple((n, self._structure(m)) for n, m in value.items() if m is not None))
                else:
                    parts.append((name, _attribute_key(value)))
            number = self.structure_numbers.setdefault(tuple(parts), len(self.structure_numbers))
            self.structures[id(module)] = number
        return number

    def _notice_changed_weights(self, component: str) -> None:
        """Tell weights that the pipeline replaced (an upcast in ``__call__``) from its own tensors."""
        if component not in self.changed_components:
            return
        self.changed_components.discard(component)
        module = self.component_modules[component]
        for tensor in (*module.parameters(), *module.buffers()):
            buffer = buffer_of(tensor) if isinstance(tensor, VirtualTensor) else None
            if buffer is not None and buffer.owner is self.root:
                place = self.root.alloc_events.pop(buffer.number)
                del self.root.live[buffer.number]
                self.root.events[place] = ("w", component, buffer.num_bytes)
                buffer.owner = component
        for part in module.modules():
            self.structures.pop(id(part), None)

    # -- the whole

    def adopt(self, name: str, module: torch.nn.Module) -> None:
        """Make *module* a component: its paths are known, its weights belong to it."""
        self.component_modules[name] = module
        for path, part in module.named_modules():
            self.paths.setdefault(id(part), f"{name}.{path}" if path else name)
        for tensor in (*module.parameters(), *module.buffers()):
            if isinstance(tensor, VirtualTensor):
                buffer_of(tensor).owner = name

    @contextlib.contextmanager
    def intercepting(self) -> Iterator[None]:
        """Route every module call and component entry method through :meth:`call`."""
        original = torch.nn.Module.__call__

        def call_module(module: Any, *args: Any, **kwargs: Any) -> Any:
            return self.call(module, "forward", functools.partial(original, module), args, kwargs)

        torch.nn.Module.__call__ = call_module  # type: ignore[method-assign]
        wrapped: list[tuple[Any, str]] = []
        try:
            for component in self.component_modules.values():
                for name in (*ENTRY_METHODS, *TILE_METHODS):
                    method = getattr(component, name, None)
                    if callable(method) and name not in component.__dict__:
                        # Not setattr: the module's own attributes are part of its signature.
                        object.__setattr__(component, name, _Method(self, component, name, method))
                        wrapped.append((component, name))
            yield
        finally:
            torch.nn.Module.__call__ = original  # type: ignore[method-assign]
            for component, name in wrapped:
                component.__dict__.pop(name, None)


class _Method:
    """A component's method, routed through the recorder."""

    def __init__(self, recorder: _Recorder, module: Any, name: str, method: Any) -> None:
        self.recorder, self.module, self.name, self.method = recorder, module, name, method
        self.__wrapped__ = method  # what inspect.signature follows

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.recorder.call(self.module, self.name, self.method, args, kwargs)


@dataclass(frozen=True)
class _Rebuilt:
    """A container in an output specification."""

    cls: type
    names: tuple[str, ...] | None
    items: tuple[Any, ...]


def _output_spec(
    value: Any, made: Mapping[int, int], inputs: Mapping[int, int], used: set[int]
) -> Any:
    """Describe a call's output so that it can be made again from new buffers and other inputs."""
    if isinstance(value, VirtualTensor):
        buffer = buffer_of(value)
        if buffer.value is not None and id(buffer) in made:
            raise _Unkeyable  # its values would be lost
        geometry = (tuple(value.size()), tuple(value.stride()), value.storage_offset(), value.dtype)
        if id(buffer) in made:
            used.add(made[id(buffer)])
            return _OutTensor("new", made[id(buffer)], *geometry)
        if id(buffer) in inputs:
            return _OutTensor("in", inputs[id(buffer)], *geometry)
        if isinstance(buffer.owner, str):
            return _OutKept(value)
        raise _Unkeyable
    if isinstance(value, torch.Tensor):
        raise _Unkeyable
    if isinstance(value, Mapping):
        parts = tuple(_output_spec(v, made, inputs, used) for v in value.values())
        return _Rebuilt(type(value), tuple(value), parts)
    if isinstance(value, (list, tuple)):
        return _Rebuilt(
            type(value), None, tuple(_output_spec(v, made, inputs, used) for v in value)
        )
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise _Unkeyable


def _output(spec: Any, new: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Any:
    if isinstance(spec, _OutTensor):
        base = new[spec.index] if spec.kind == "new" else inputs[spec.index]
        with torch._C._DisableTorchDispatch():
            view = torch.empty(0, dtype=spec.dtype, device="meta")
            view.set_(base.untyped_storage(), spec.offset, spec.size, spec.stride)
        return torch.Tensor._make_subclass(VirtualTensor, view, False)
    if isinstance(spec, _OutKept):
        return spec.tensor
    if isinstance(spec, _Rebuilt):
        parts = [_output(i, new, inputs) for i in spec.items]
        if spec.names is not None:
            named = dict(zip(spec.names, parts, strict=True))
            return named if spec.cls is dict else spec.cls(**named)
        return spec.cls(*parts) if hasattr(spec.cls, "_fields") else spec.cls(parts)
    return spec


def _attributes(module: Any) -> dict[str, Any]:
    return {k: v for k, v in module.__dict__.items() if k not in ("_parameters", "_buffers")}


def _same_attributes(now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether a call left its module's own attributes as they were; small ones by value."""
    return now.keys() == before.keys() and all(
        value is before[name]
        or (isinstance(value, (bool, int, float, str)) and value == before[name])
        for name, value in now.items()
    )


def _argument_key(value: Any, inputs: dict[int, torch.Tensor], by_value: bool) -> Any:
    """Express an argument by geometry; collect the virtual storages among them, in order."""
    if isinstance(value, VirtualTensor):
        buffer = buffer_of(value)
        inputs.setdefault(id(buffer), value)
        number = list(inputs).index(id(buffer))
        key = (number, value.size(), value.stride(), value.storage_offset(), value.dtype, buffer.device)
        return (key, _value_key(value)) if by_value else key
    if isinstance(value, torch.Tensor):
        key = ("real", value.size(), value.stride(), value.dtype)
        return (key, _value_key(value)) if by_value else key
    if value is None or isinstance(value, (bool, int, float, str)):
        return (type(value), value)
    if isinstance(value, (list, tuple)):
        return (type(value), *(_argument_key(v, inputs, by_value) for v in value))
    if isinstance(value, Mapping):
        return (type(value), *((k, _argument_key(v, inputs, by_value)) for k, v in value.items()))
    if isinstance(value, (torch.dtype, torch.device, torch.memory_format, torch.Size, slice)):
        return (type(value), str(value))
    if isinstance(value, torch.nn.Module) or type(value).__name__ in ("function", "method", "type"):
        return id(value)
    raise _Unkeyable


def _value_key(tensor: torch.Tensor) -> Any:
    if tensor.numel() > KNOWN_VALUE_LIMIT_ELEMENTS:
        return None
    value = known_value(tensor)
    return None if value is None else repr(value.tolist())


def _weight_key(tensor: torch.Tensor | None) -> Any:
    if tensor is None:
        return None
    return (tensor.size(), tensor.stride(), tensor.dtype, str(tensor.device))


def _attribute_key(value: Any, depth: int = 0) -> Any:
    """Express a module's attribute: by value where it is plain, else by identity."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return (type(value), value)
    if isinstance(value, type) or type(value).__name__ in ("function", "builtin_function_or_method"):
        return value
    if depth < 3:
        if isinstance(value, (list, tuple)):
            return (type(value), *(_attribute_key(v, depth + 1) for v in value))
        if isinstance(value, (set, frozenset)):
            return (type(value), *sorted(map(str, value)))
        if isinstance(value, Mapping):
            return (
                type(value), *((str(k), _attribute_key(v, depth + 1)) for k, v in value.items())
            )  # fmt: skip
        if type(value).__name__.endswith("Processor") and hasattr(value, "__dict__"):
            # Attention processors: one object a layer, all alike.
            return (type(value), _attribute_key(vars(value), depth + 1))
    return ("object", id(value))


def _container_contents(*values: Any) -> list[Any]:
    """What the mutable containers among the arguments hold, by identity."""
    found: list[Any] = []

    def visit(value: Any) -> None:
        if isinstance(value, (list, tuple)):
            if isinstance(value, list):
                found.append([id(v) for v in value])
            for v in value:
                visit(v)
        elif isinstance(value, Mapping):
            found.append([(k, id(v)) for k, v in value.items()])
            for v in value.values():
                visit(v)

    for value in values:
        visit(value)
    return found


def _kept_argument(value: Any) -> Any:
    """Return *value* with its tensors replaced by their geometry, so that it keeps nothing alive."""
    if isinstance(value, torch.Tensor):
        known = known_value(value) if value.numel() <= KNOWN_VALUE_LIMIT_ELEMENTS else None
        return _ArgTensor(
            tuple(value.size()), tuple(value.stride()), value.dtype, value.device,
            None if known is None else known.clone(),
        )  # fmt: skip
    if isinstance(value, dict):
        return {k: _kept_argument(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_kept_argument(v) for v in value)
    return value


def _given_again(value: Any, machine: VirtualMachine) -> Any:
    if isinstance(value, _ArgTensor):
        if value.device.type != "cuda":
            return torch.zeros(value.size, dtype=value.dtype) if value.value is None else value.value
        tensor = machine.empty(value.size, value.stride, value.dtype, GPU)
        if value.value is not None:
            machine._remember(tensor, value.value)
        return tensor
    if isinstance(value, dict):
        return {k: _given_again(v, machine) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_given_again(v, machine) for v in value)
    return value


# -- the weightless pipeline


def weightless(pipe: Any, machine: VirtualMachine, *, in_place: bool = False) -> Any:
    """Return a twin of *pipe* whose weights are virtual and on the GPU; *pipe* stays as it is.

    With *in_place* the pipeline's own modules are converted (for one that pipefit built itself).
    """
    twin = object.__new__(type(pipe))
    twin.__dict__.update(pipe.__dict__)
    memo: dict[int, Any] = {}
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            for tensor in (*part.parameters(), *part.buffers()):
                if id(tensor) not in memo:
                    memo[id(tensor)] = machine.parameter(tensor, GPU)
            if not in_place:
                part = copy.deepcopy(part, memo)
            else:
                _convert(part, memo)
            _convert_plain_meta(part, machine)
            twin.__dict__[name] = part
        elif hasattr(part, "step") or hasattr(part, "set_timesteps"):
            twin.__dict__[name] = copy.deepcopy(part)
    twin.__dict__["_progress_bar_config"] = {"disable": True}
    return twin


def _convert(module: torch.nn.Module, memo: Mapping[int, Any]) -> None:
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = memo.get(id(tensor), tensor)


def _convert_plain_meta(module: torch.nn.Module, machine: VirtualMachine) -> None:
    """Tensors that a module keeps as plain attributes are on the CPU after a real load."""
    for part in module.modules():
        for name, value in part.__dict__.items():
            if isinstance(value, torch.Tensor) and value.device.type == "meta" and not isinstance(
                value, VirtualTensor
            ):
                part.__dict__[name] = machine.parameter(value, CPU)


def describe_component(name: str, module: torch.nn.Module, traits: Mapping[str, Any]) -> Component:
    """Return what cost models and strategies need to know of a component."""
    tensors: list[TensorInfo] = []
    first_path: dict[int, str] = {}
    for owner_path, part in module.named_modules(remove_duplicate=True):
        prefix = f"{owner_path}." if owner_path else ""
        for is_buffer, table in ((False, part._parameters), (True, part._buffers)):
            for key, tensor in table.items():
                if tensor is None:
                    continue
                path = prefix + key
                storage = _storage_key(tensor)
                tied = first_path.get(storage)
                first_path.setdefault(storage, path)
                tensors.append(
                    TensorInfo(
                        path=path,
                        num_bytes=tensor.numel() * tensor.element_size(),
                        dtype=str(tensor.dtype).removeprefix("torch."),
                        shape=tuple(tensor.shape),
                        is_buffer=is_buffer,
                        persistent=not (is_buffer and key in part._non_persistent_buffers_set),
                        tied_to=tied,
                    )
                )
    modules = tuple(
        ModuleInfo(
            path=path,
            class_name=type(part).__name__,
            is_leaf_layer=isinstance(part, LEAF_LAYERS),
            is_block_list=isinstance(part, (torch.nn.ModuleList, torch.nn.Sequential)),
        )
        for path, part in module.named_modules()
    )
    return Component(
        name=name,
        class_name=type(module).__name__,
        library=type(module).__module__.split(".")[0],
        tensors=tuple(tensors),
        modules=modules,
        traits=dict(traits),
    )


def _storage_key(tensor: torch.Tensor) -> int:
    if isinstance(tensor, VirtualTensor):
        return id(buffer_of(tensor))
    if tensor.device.type == "meta":
        return id(tensor)
    return tensor.untyped_storage().data_ptr() or id(tensor)


# -- the trace itself


def trace(
    pipe: Any,
    call: Mapping[str, Any],
    *,
    name: str | None = None,
    traits: Callable[[torch.nn.Module], Mapping[str, Any]] = lambda module: {},
    variants: Callable[[Workload], Variants] = lambda workload: {},
    apply_variant: Callable[[Any, str, VariantParts], Callable[[], None]] | None = None,
    compute_capability: tuple[int, int] = (8, 9),
    prepare: Callable[[Any], Any] = lambda twin: None,
    in_place: bool = False,
    remember: bool = True,
) -> Workload:
    """Execute ``pipe(**call)`` symbolically and return what happened.

    *pipe* may have its weights on the CPU, on a GPU or on the meta device and is left as it is unless
    *in_place*. *variants* is asked, once the plain call is traced, which components to trace again
    under which compute strategies; *apply_variant* puts those in force on the twin and returns how
    to take them back. *prepare* may change the twin before anything is recorded (a cast, as a load with
    another dtype would have made it). With *remember* off every call is executed (slow; for tests).

    Raises:
        TraceError: if the pipeline's own call fails.
    """
    recorder = _Recorder(
        lambda observer: VirtualMachine(observer, compute_capability=compute_capability)
    )
    recorder.remembering = remember
    machine = recorder.machine
    with machine, torch.no_grad():
        twin = weightless(pipe, machine, in_place=in_place)
        prepare(twin)
        modules = {n: m for n, m in twin.components.items() if isinstance(m, torch.nn.Module)}
        components = tuple(describe_component(n, m, traits(m)) for n, m in modules.items())
        for component, module in modules.items():
            recorder.adopt(component, module)
        with recorder.intercepting():
            recorder.stack.append(recorder.root)
            try:
                output = twin(**call)
            except PipefitError:
                raise
            except Exception as error:  # whatever the pipeline raises, in its own words
                raise TraceError(
                    f"{type(pipe).__name__} failed while its call was executed without data "
                    f"({type(error).__name__}: {error}); check the call's arguments."
                ) from error
            del output
            workload = _workload(recorder, pipe, name, call, components)
            recorder.stack.clear()
            plain = replace(
                workload,
                kernels=tuple(recorder.kernels),
                routines=tuple(recorder.routine_list),
            )
            wanted = variants(plain)
            replaced = {
                variant_key(component, parts): _trace_variant(
                    recorder, twin, component, parts, apply_variant
                )
                for component, choices in wanted.items()
                for parts in choices
            }
        recorder.stack.clear()
    return replace(
        workload,
        kernels=tuple(recorder.kernels),
        routines=tuple(recorder.routine_list),
        variants=replaced,
    )


def _trace_variant(
    recorder: _Recorder,
    twin: Any,
    component: str,
    parts: VariantParts,
    apply_variant: Callable[[Any, str, VariantParts], Callable[[], None]] | None,
) -> dict[int, int]:
    """Call *component* again as the pipeline did, under *parts*; {plain routine: its replacement}."""
    assert apply_variant is not None, "variants need a way to apply them"
    module = recorder.component_modules[component]
    undo = apply_variant(twin, component, parts)
    recorder.structures.clear()
    replaced = {}
    try:
        for plain, entry in list(recorder.entries.items()):
            if entry.component != component:
                continue
            args = _given_again(entry.args, recorder.machine)
            kwargs = _given_again(entry.kwargs, recorder.machine)
            scratch = _Frame(None, "", "variant")
            recorder.stack.append(scratch)
            try:
                method = module if entry.entry == "forward" else getattr(module, entry.entry)
                output = method(*args, **kwargs)
                calls = [e for e in scratch.events if e[0] == "c"]
                del output
            finally:
                recorder.stack.clear()
            replaced[plain] = calls[-1][1]
    finally:
        undo()
        recorder.structures.clear()
    return replaced


def _workload(
    recorder: _Recorder,
    pipe: Any,
    name: str | None,
    call: Mapping[str, Any],
    components: tuple[Component, ...],
) -> Workload:
    by_name = {c.name: c for c in components}
    calls = [e for e in recorder.root.events if e[0] == "c"]
    grouped: dict[tuple[str, str], list[int]] = {}
    for ordinal, event in enumerate(calls):
        component = event[2][1:].split(".")[0]
        entry = recorder.routine_list[event[1]].entry
        grouped.setdefault((component, entry), []).append(ordinal)
    phases = tuple(
        Phase(
            name=_phase_name(by_name[component], recorder.component_modules[component], entry),
            component=component,
            entry=entry,
            calls=tuple(ordinals),
        )
        for (component, entry), ordinals in grouped.items()
    )
    assumptions = tuple(
        f"{where} reads {count} value{'s' if count > 1 else ''} that only real weights give; zero was taken."
        for where, count in sorted(recorder.unknown_reads.items())
    )
    return Workload(
        pipeline=name or type(pipe).__name__,
        pipeline_class=type(pipe).__name__,
        call={k: _in_words(v) for k, v in call.items()},
        components=components,
        kernels=(),
        routines=(),
        root=tuple(recorder.root.events),
        phases=phases,
        offload_sequence=tuple(
            n for n in (getattr(pipe, "model_cpu_offload_seq", None) or "").split("->") if n
        ),
        offload_excluded=tuple(getattr(pipe, "_exclude_from_cpu_offload", ())),
        assumptions=assumptions,
        fingerprint=fingerprint(type(pipe).__name__, components),
    )


def _phase_name(component: Component, module: Any, entry: str) -> str:
    """Name a phase by what the component is given, not by what it is called."""
    if entry == "decode":
        return "decode"
    main_input = getattr(module, "main_input_name", "")
    if entry in ("encode", "get_image_features") or main_input == "pixel_values":
        return "encode_image"
    if component.library == "transformers":
        return "encode_prompt" if main_input == "input_ids" else component.name
    has_text = any(p in component.name for p in ("transformer", "unet", "controlnet", "prior", "decoder"))
    return "denoise" if has_text else component.name


def _in_words(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)) and len(value) <= 16:
        return [_in_words(v) for v in value]
    size = getattr(value, "size", None)
    if isinstance(value, torch.Tensor):
        return f"tensor {tuple(value.shape)} {value.dtype}"
    return f"{type(value).__name__}{f' {size}' if isinstance(size, tuple) else ''}"


def fingerprint(pipeline_class: str, components: Sequence[Component]) -> str:
    """Return a short hash of what a plan depends on: classes, tensor shapes and dtypes."""
    digest = hashlib.sha256(pipeline_class.encode())
    for component in sorted(components, key=lambda c: c.name):
        digest.update(f"{component.name}:{component.class_name}".encode())
        for t in component.tensors:
            digest.update(f"{t.path}{t.shape}{t.dtype}{t.tied_to}".encode())
    return digest.hexdigest()[:16]
