"""Writes down what a pipeline does on a virtual machine, as routines that call each other.

Every module call is a subroutine of the trace. One that was seen before is not executed again:
its outputs are made from the remembered ones, so fifty steps, sixty equal blocks or two hundred
tiles cost one. *Seen before* means: a module of equal structure, arguments of equal geometry (and
of equal values, if values were read or are known of what it returns). A remembered call may write
into its arguments, fill lists and dictionaries that it was given, and free what was in them: all
that is done again. Not remembered is a call that changed attributes of a module, or that left
something alive which can be reached neither from its result nor from its arguments.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipefit.cost_models.workload import Kernel, Routine
from pipefit.planner.kernels import kernel_of
from pipefit.planner.virtual import VirtualMachine
from pipefit.planner.virtual_tensors import (
    KNOWN_VALUE_LIMIT_ELEMENTS,
    UNSEEN,
    Buffer,
    Launch,
    Observer,
    VirtualTensor,
    buffer_of,
    keep_value,
    known_value,
    value_signature,
)

GPU = torch.device("cuda", 0)

ENTRY_METHODS = ("encode", "decode", "generate", "get_text_features", "get_image_features")
"""Methods besides ``forward`` by which pipelines enter a component."""

TILE_METHODS = ("blend_v", "blend_h", "blend_t")
"""Methods of tiled autoencoders that loop over rows of a seam; remembered like module calls.

They are 85 % of the operators of a tiled video decode and their temporaries are one row each.
"""


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

    def alive(self) -> list[Buffer]:
        """Return the buffers of this call that are still in use, oldest first."""
        return [b for b in (ref() for ref in self.live.values()) if b is not None]


@dataclass(frozen=True)
class _Memory:
    """A remembered call: its routine, and how to make its effects again."""

    routine: int
    output: Any
    containers: tuple[tuple[int, Any], ...]
    """(which mutable container among the arguments, what it holds afterwards)."""
    returned_bytes: tuple[int, ...]
    returned_values: tuple[Any, ...]
    written: tuple[int, ...]
    """Which of the arguments' buffers it writes to."""
    outside: tuple[int, ...]
    """Which of the arguments' buffers it frees, in the order of the routine's "x" events."""
    value_read: bool


@dataclass(frozen=True)
class _OutTensor:
    is_new: bool
    index: int
    """Into what the routine returns, or into the arguments' buffers."""
    offset: int
    """From the start of the buffer, or from the argument's first view of it."""
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _OutKept:
    tensor: torch.Tensor  # a weight, or a view of one


@dataclass(frozen=True)
class _OutContainer:
    cls: type
    names: tuple[Any, ...] | None
    items: tuple[Any, ...]


@dataclass(frozen=True)
class _ArgTensor:
    """An argument's geometry, kept so that a component call can be repeated under a variant."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    value: torch.Tensor | None


def _weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


@dataclass(frozen=True)
class Entry:
    """One distinct component call of the pipeline, repeatable."""

    component: str
    entry: str
    args: Any
    kwargs: Any
    dtypes: tuple[torch.dtype, ...]
    """Of the component's tensors at the time: a pipeline may cast one for a single call."""

    @contextlib.contextmanager
    def weights_as_they_were(self, module: torch.nn.Module) -> Iterator[None]:
        """Give *module*, outside any recording, the dtypes that it had in this call."""
        changed = [
            (tensor, tensor.data, dtype)
            for tensor, dtype in zip(_weights(module), self.dtypes, strict=True)
            if tensor.dtype != dtype
        ]
        for tensor, data, dtype in changed:
            tensor.data = data.to(dtype)
        try:
            yield
        finally:
            for tensor, data, _ in changed:
                tensor.data = data

    def arguments(self, machine: VirtualMachine) -> tuple[Any, Any]:
        """Make the call's arguments again."""
        return _given_again(self.args, machine), _given_again(self.kwargs, machine)


class Recorder(Observer):
    """Writes the routines of a trace while the pipeline runs."""

    def __init__(self, *, compute_capability: tuple[int, int], remember: bool) -> None:
        self.machine = VirtualMachine(self, compute_capability=compute_capability)
        self.remember = remember
        self.root = _Frame(None, "", "__call__")
        self.stack: list[_Frame] = []
        self.kernels: dict[Kernel, int] = {}
        self.routines: list[Routine] = []
        self.entries: dict[int, Entry] = {}
        """Routine -> the component call that it stands for."""
        self.components: dict[str, torch.nn.Module] = {}
        self.unknown_reads: dict[str, int] = {}
        self._routine_numbers: dict[Routine, int] = {}
        self._paths: dict[int, str] = {}
        self._structures: dict[int, int] = {}
        self._structure_numbers: dict[Any, int] = {}
        self._with_hooks_below: set[int] = set()
        """Modules (by id) whose submodules have hooks: called inside a component, these may hand
        things past the arguments and the result, as transformers' hidden states."""
        self._memories: dict[Any, _Memory] = {}
        self._value_dependent: set[Any] = set()
        self._changed_components: set[str] = set()
        self._muted = False
        self._thread = threading.get_ident()

    # -- what the machine reports

    def allocated(self, buffer: Buffer) -> None:
        if self._muted or not self.stack:
            return
        frame = self.stack[-1]
        number = self._own(frame, buffer)
        frame.alloc_events[number] = len(frame.events)
        frame.events.append(("a", number, buffer.num_bytes))

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
            self._changed_components.add(owner)
        elif owner is frame:
            frame.events.append(("f", buffer.number))
            del frame.live[buffer.number]
        else:
            frame.events.append(("x", len(frame.outside)))
            frame.outside.append((owner, buffer.number))

    def launched(
        self, launch: Launch, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any
    ) -> None:
        if not self.stack or self._muted:
            return
        event = launch.kernel
        if event is UNSEEN:
            kernel = kernel_of(func, args, kwargs, out)
            if kernel is not None:
                kernel = ("k", self.kernels.setdefault(kernel, len(self.kernels)))
            event = launch.kernel = kernel
        if event is not None:
            self.stack[-1].events.append(event)

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
        path = self._paths.get(id(module))
        if path is None or not self.stack or threading.get_ident() != self._thread:
            return function(*args, **kwargs)
        caller = self.stack[-1]
        if self._changed_components and caller is self.root:
            self._notice_changed_weights(path.split(".")[0])
        structure = (self._structure(module), entry) if self.remember else None
        given = _Given(structure in self._value_dependent)
        key = None
        if self.remember and (caller is self.root or id(module) not in self._with_hooks_below):
            with contextlib.suppress(_Unkeyable):
                key = (structure, given.key(args), given.key(kwargs))
            memory = self._memories.get(key)
            if memory is not None:
                return self._replay(memory, caller, path, given)
        given.let_go()
        is_entry = caller is self.root and "." not in path
        repeatable = (_kept_argument(args), _kept_argument(kwargs)) if is_entry else None
        frame = _Frame(module, path, entry)
        attributes = module.__dict__.copy()
        self.stack.append(frame)
        try:
            output = function(*args, **kwargs)
        except BaseException:
            self.stack.pop()
            self._close(frame, caller)
            raise
        self.stack.pop()
        if not _same_attributes(module.__dict__, attributes):
            frame.remember = False
            self._forget_structure(module)
        alive = frame.alive()
        routine = self._close(frame, caller)
        if repeatable is not None and routine not in self.entries:
            dtypes = tuple(tensor.dtype for tensor in _weights(module))
            self.entries[routine] = Entry(path, entry, *repeatable, dtypes)
        if frame.value_read:
            self._value_dependent.add(structure)
        if key is not None and frame.remember and (given.by_value or not frame.value_read):
            self._store(key, routine, frame, alive, given, output)
        return output

    def _store(
        self, key: Any, routine: int, frame: _Frame, alive: list[Buffer], given: _Given, output: Any
    ) -> None:
        """Remember a call, if all it did can be done again."""
        values = tuple(b.value for b in alive)
        if not given.by_value and any(v is not None for v in values):
            self._value_dependent.add(key[0])  # remembered the next time, with its values
            return
        outside = [given.number_of(owner, number) for owner, number in frame.outside]
        if None in outside:
            return
        made = {id(b): i for i, b in enumerate(alive)}
        used: set[int] = set()
        try:
            spec = _output_spec(output, made, given, used)
            containers = tuple(
                (i, _output_spec(container, made, given, used))
                for i, container in given.changed_containers()
            )
        except _Unkeyable:
            return
        if len(used) < len(made):  # something is alive that neither result nor arguments hold
            return
        self._memories[key] = _Memory(
            routine=routine,
            output=spec,
            containers=containers,
            returned_bytes=tuple(b.num_bytes for b in alive),
            returned_values=tuple(None if v is None else v.clone() for v in values),
            written=tuple(i for b, i in given.numbers.items() if b in frame.written),
            outside=tuple(outside),
            value_read=frame.value_read,
        )

    def _close(self, frame: _Frame, caller: _Frame) -> int:
        """Write *frame* down as a routine and its call into *caller*; hand over what is alive."""
        returned, returns = [], []
        for number, ref in frame.live.items():
            buffer = ref()
            if buffer is not None:
                returns.append(number)
                returned.append(self._own(caller, buffer))
        outside = tuple(self._outside_number(caller, *freed) for freed in frame.outside)
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
        number = self._routine_numbers.setdefault(routine, len(self.routines))
        if number == len(self.routines):
            self.routines.append(routine)
        self._note_call(caller, number, frame.path, tuple(returned), outside)
        return number

    def _outside_number(self, caller: _Frame, owner: _Frame, number: int) -> int:
        """Say in *caller*'s terms which buffer a callee freed."""
        if owner is caller:
            del caller.live[number]
            return number
        caller.outside.append((owner, number))
        return -len(caller.outside)

    def _note_call(
        self,
        caller: _Frame,
        routine: int,
        path: str,
        returned: tuple[int, ...],
        outside: tuple[int, ...],
    ) -> None:
        if path == caller.path:
            relative = ""
        elif caller.path and path.startswith(caller.path + "."):
            relative = path[len(caller.path) + 1 :]
        else:
            relative = "/" + path
            if caller is not self.root:
                caller.remember = False  # the path is absolute: another block's routine differs
        if returned or self.routines[routine].events:
            caller.events.append(("c", routine, relative, returned, outside))

    def _replay(self, memory: _Memory, caller: _Frame, path: str, given: _Given) -> Any:
        """Write the remembered call down and do its effects, without executing it."""
        new: list[torch.Tensor] = []
        self._muted = True
        for num_bytes in memory.returned_bytes:
            new.append(self.machine.empty((num_bytes,), (1,), torch.uint8, GPU))
        self._muted = False
        inputs = [buffer_of(t) for t in given.tensors]
        returned = []
        for tensor, value in zip(new, memory.returned_values, strict=True):
            returned.append(self._own(caller, buffer_of(tensor)))
            buffer_of(tensor).value = None if value is None else value.clone()
        outside, freed = [], []
        for index in memory.outside:
            buffer = inputs[index]
            outside.append(self._outside_number(caller, buffer.owner, buffer.number))
            buffer.owner = None  # its free is written down already
            freed.append(weakref.ref(buffer))
        self._note_call(caller, memory.routine, path, tuple(returned), tuple(outside))
        caller.value_read |= memory.value_read
        for index in memory.written:
            inputs[index].value = None
            caller.written.add(id(inputs[index]))
        output = _output(memory.output, new, given.tensors)
        for index, spec in memory.containers:
            _refill(given.containers[index], _output(spec, new, given.tensors))
        del new, inputs
        buffer = None
        given.let_go()
        for ref in freed:
            # Somebody else holds what the remembered call freed: it stays allocated.
            buffer = ref()
            if buffer is not None:
                caller.events.append(("a", self._own(caller, buffer), buffer.num_bytes))
        return output

    # -- signatures

    def _structure(self, module: torch.nn.Module) -> int:
        """Number the structure of *module*: equal numbers compute alike on equal inputs."""
        number = self._structures.get(id(module))
        if number is None:
            parts: list[Any] = [type(module)]
            for name, value in module.__dict__.items():
                if name in ("_parameters", "_buffers"):
                    parts.append((name, tuple((n, _weight_key(t)) for n, t in value.items())))
                elif name == "_modules":
                    children = ((n, self._structure(m)) for n, m in value.items() if m is not None)
                    parts.append(tuple(children))
                    if any(self._has_hooks(m) for m in value.values()):
                        self._with_hooks_below.add(id(module))
                elif name in _HOOKS or isinstance(value, _Method):
                    pass  # hooks run around every call, remembered or not
                elif name not in _EVERY_MODULE or value:
                    parts.append((name, _attribute_key(value)))
            number = self._structure_numbers.setdefault(tuple(parts), len(self._structure_numbers))
            self._structures[id(module)] = number
        return number

    def forget_structures(self) -> None:
        """Look at all modules again before the next call: somebody has changed some."""
        self._structures.clear()
        self._with_hooks_below.clear()

    def _forget_structure(self, module: torch.nn.Module) -> None:
        """Look at *module*, what is below it and what is calling it again before the next call."""
        for part in (*module.modules(), *(frame.module for frame in self.stack)):
            self._structures.pop(id(part), None)
            self._with_hooks_below.discard(id(part))

    def _has_hooks(self, module: torch.nn.Module | None) -> bool:
        return module is not None and (
            id(module) in self._with_hooks_below
            or any(module.__dict__.get(name) for name in _HOOKS)
        )

    def _notice_changed_weights(self, component: str) -> None:
        """Tell weights that the pipeline replaced (an upcast inside) from its own tensors."""
        if component not in self._changed_components:
            return
        self._changed_components.discard(component)
        module = self.components[component]
        for tensor in (*module.parameters(), *module.buffers()):
            buffer = buffer_of(tensor) if isinstance(tensor, VirtualTensor) else None
            if buffer is not None and buffer.owner is self.root:
                place = self.root.alloc_events.pop(buffer.number)
                del self.root.live[buffer.number]
                self.root.events[place] = ("w", component, buffer.num_bytes)
                buffer.owner = component
        self._forget_structure(module)

    # -- the whole

    def adopt(self, name: str, module: torch.nn.Module) -> None:
        """Make *module* a component: its paths are known, its weights belong to it."""
        self.components[name] = module
        for path, part in module.named_modules():
            self._paths.setdefault(id(part), f"{name}.{path}" if path else name)
        for tensor in (*module.parameters(), *module.buffers()):
            if isinstance(tensor, VirtualTensor):
                buffer_of(tensor).owner = name

    @contextlib.contextmanager
    def recording(self, frame: _Frame) -> Iterator[_Frame]:
        """Write into *frame* what happens meanwhile."""
        self.stack.append(frame)
        try:
            yield frame
        finally:
            self.stack.clear()

    @contextlib.contextmanager
    def intercepting(self) -> Iterator[None]:
        """Route every module call and component entry method through :meth:`call`."""
        original = torch.nn.Module.__call__

        def call_module(module: Any, *args: Any, **kwargs: Any) -> Any:
            attributes = module.__dict__
            if not (attributes["_forward_hooks"] or attributes["_forward_pre_hooks"]):
                run = functools.partial(original, module)
                return self.call(module, "forward", run, args, kwargs)
            if isinstance(attributes.get("forward"), _Method):  # a call within its own call
                return original(module, *args, **kwargs)
            forward = _Method(self, module, "forward", module.forward)
            own = attributes.get("forward")
            attributes["forward"] = forward
            try:
                return original(module, *args, **kwargs)
            finally:
                if own is None:
                    del attributes["forward"]
                else:
                    attributes["forward"] = own

        torch.nn.Module.__call__ = call_module  # type: ignore[method-assign]
        wrapped: list[tuple[Any, str]] = []
        try:
            for component in self.components.values():
                for name in (*ENTRY_METHODS, *TILE_METHODS):
                    method = getattr(component, name, None)
                    if callable(method) and name not in component.__dict__:
                        # Not setattr: a module's setattr looks for parameters first.
                        component.__dict__[name] = _Method(self, component, name, method)
                        wrapped.append((component, name))
            yield
        finally:
            torch.nn.Module.__call__ = original  # type: ignore[method-assign]
            for component, name in wrapped:
                component.__dict__.pop(name, None)


def new_frame(entry: str) -> _Frame:
    """Return a frame that is no module's call, for :meth:`Recorder.recording`."""
    return _Frame(None, "", entry)


class _Method:
    """A component's method, routed through the recorder."""

    def __init__(self, recorder: Recorder, module: Any, name: str, method: Any) -> None:
        self.recorder, self.module, self.name, self.method = recorder, module, name, method
        self.__wrapped__ = method  # what inspect.signature follows

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.recorder.call(self.module, self.name, self.method, args, kwargs)


# -- what a call is given, and its signature


class _Given:
    """The arguments of a call: their signature, and the buffers and containers among them."""

    __slots__ = ("_before", "_owners", "by_value", "containers", "numbers", "offsets", "tensors")

    def __init__(self, by_value: bool) -> None:
        self.by_value = by_value
        self.numbers: dict[int, int] = {}
        """id of a buffer -> its number among the arguments' buffers."""
        self.tensors: list[torch.Tensor] = []
        self.offsets: list[int] = []
        """Of the first view of each buffer."""
        self.containers: list[Any] = []
        self._owners: dict[tuple[int, int], int] = {}
        self._before: list[list[Any]] = []

    def key(self, value: Any) -> Any:
        """Express an argument by geometry; collect the buffers and containers in it, in order."""
        kind = type(value)
        if kind is VirtualTensor:
            buffer = buffer_of(value)
            number = self.numbers.get(id(buffer))
            if number is None:
                number = self.numbers[id(buffer)] = len(self.tensors)
                self.tensors.append(value)
                self.offsets.append(value.storage_offset())
            # Offsets count from the buffer's first view: timesteps[1] is like timesteps[0].
            offset = value.storage_offset() - self.offsets[number]
            key = (number, value.size(), value.stride(), offset, value.dtype, buffer.device)
            return (key, value_signature(value)) if self.by_value else key
        if value is None or kind is bool or kind is int or kind is float or kind is str:
            return (kind, value)
        if isinstance(value, torch.Tensor):
            key = ("real", value.size(), value.stride(), value.dtype)
            return (key, value_signature(value)) if self.by_value else key
        if isinstance(value, (list, tuple)):
            if isinstance(value, list):
                self.containers.append(value)
            return (kind, *(self.key(v) for v in value))
        if isinstance(value, Mapping):
            if isinstance(value, dict):
                self.containers.append(value)
            return (kind, *((k, self.key(v)) for k, v in value.items()))
        if isinstance(value, (torch.dtype, torch.device, torch.memory_format, torch.Size, slice)):
            return (kind, str(value))
        if isinstance(value, torch.nn.Module) or kind.__name__ in ("function", "method", "type"):
            return id(value)
        raise _Unkeyable

    def let_go(self) -> None:
        """Hold no tensor any more: a call that runs may free what its containers hold."""
        for tensor in self.tensors:
            buffer = buffer_of(tensor)
            if isinstance(buffer.owner, _Frame):
                self._owners[id(buffer.owner), buffer.number] = self.numbers[id(buffer)]
        self.tensors = []
        self._before = [_contents(c) for c in self.containers]

    def number_of(self, owner: _Frame, number: int) -> int | None:
        """Return which of the arguments' buffers was *owner*'s buffer *number* before the call."""
        return self._owners.get((id(owner), number))

    def changed_containers(self) -> Iterator[tuple[int, Any]]:
        """Yield the containers that hold other things than before the call."""
        pairs = zip(self.containers, self._before, strict=True)
        for i, (container, before) in enumerate(pairs):
            now = list(container.values()) if isinstance(container, dict) else container
            names = list(container) if isinstance(container, dict) else None
            if (
                names != before[0]
                or len(now) != len(before) - 1
                or any(_held(b) is not n for b, n in zip(before[1:], now, strict=True))
            ):
                yield i, container


def _contents(container: Any) -> list[Any]:
    """What a container holds, tensors weakly: the names of a dictionary, then the entries."""
    is_dict = isinstance(container, dict)
    entries = container.values() if is_dict else container
    return [
        list(container) if is_dict else None,
        *(weakref.ref(v) if isinstance(v, torch.Tensor) else v for v in entries),
    ]


def _held(entry: Any) -> Any:
    return entry() if type(entry) is weakref.ref else entry


def _refill(container: Any, contents: Any) -> None:
    if isinstance(container, dict):
        container.clear()
        container.update(contents)
    else:
        container[:] = contents


def _weight_key(tensor: torch.Tensor | None) -> Any:
    if tensor is None:
        return None
    return (tensor.size(), tensor.stride(), tensor.dtype, tensor.device)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks")

_EVERY_MODULE = frozenset(torch.nn.Module().__dict__)
"""Attributes that every module has; of interest where they are not empty."""


def _attribute_key(value: Any, depth: int = 0) -> Any:
    """Express a module's attribute: by value where it is plain, else by identity."""
    kind = type(value)
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return (kind, value)
    if isinstance(value, type) or kind.__name__ in ("function", "builtin_function_or_method"):
        return value
    if depth < 3:
        if isinstance(value, (list, tuple)):
            return (kind, *(_attribute_key(v, depth + 1) for v in value))
        if isinstance(value, (set, frozenset)):
            return (kind, *sorted(map(str, value)))
        if isinstance(value, Mapping):
            items = ((str(k), _attribute_key(v, depth + 1)) for k, v in value.items())
            return (kind, *items)
        if kind.__name__.endswith("Processor") and hasattr(value, "__dict__"):
            # Attention processors: one object a layer, all alike.
            return (kind, _attribute_key(vars(value), depth + 1))
    return ("object", id(value))


def _same_attributes(now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether a call left its module's own attributes as they were; small ones by value."""
    if len(now) != len(before):
        return False
    for name, value in now.items():
        old = before.get(name, UNSEEN)
        if old is not value and not (
            isinstance(value, (bool, int, float, str)) and type(value) is type(old) and value == old
        ):
            return False
    return True


# -- what a call leaves


def _output_spec(value: Any, made: Mapping[int, int], given: _Given, used: set[int]) -> Any:
    """Describe a call's output so that it can be made again from new buffers and other inputs."""
    if isinstance(value, VirtualTensor):
        buffer = buffer_of(value)
        geometry = (tuple(value.size()), tuple(value.stride()), value.dtype)
        if id(buffer) in made:
            used.add(made[id(buffer)])
            return _OutTensor(True, made[id(buffer)], value.storage_offset(), *geometry)
        if id(buffer) in given.numbers:
            number = given.numbers[id(buffer)]
            offset = value.storage_offset() - given.offsets[number]
            return _OutTensor(False, number, offset, *geometry)
        if isinstance(buffer.owner, str):
            return _OutKept(value)
        raise _Unkeyable
    if isinstance(value, torch.Tensor):
        raise _Unkeyable
    if isinstance(value, Mapping):
        parts = tuple(_output_spec(v, made, given, used) for v in value.values())
        return _OutContainer(type(value), tuple(value), parts)
    if isinstance(value, (list, tuple)):
        parts = tuple(_output_spec(v, made, given, used) for v in value)
        return _OutContainer(type(value), None, parts)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise _Unkeyable


def _output(spec: Any, new: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Any:
    if isinstance(spec, _OutTensor):
        base = new[spec.index] if spec.is_new else inputs[spec.index]
        offset = base.storage_offset() + spec.offset
        with torch._C._DisableTorchDispatch():
            view = torch.empty(0, dtype=spec.dtype, device="meta")
            view.set_(base.untyped_storage(), offset, spec.size, spec.stride)
        view.__class__ = VirtualTensor
        return view
    if isinstance(spec, _OutKept):
        return spec.tensor
    if isinstance(spec, _OutContainer):
        parts = [_output(i, new, inputs) for i in spec.items]
        if spec.names is not None:
            named = dict(zip(spec.names, parts, strict=True))
            return named if spec.cls is dict else spec.cls(**named)
        return spec.cls(*parts) if hasattr(spec.cls, "_fields") else spec.cls(parts)
    return spec


# -- component calls to repeat under a variant


def _kept_argument(value: Any) -> Any:
    """Return *value* with its tensors replaced by geometry, so that it keeps nothing alive."""
    if isinstance(value, torch.Tensor):
        known = known_value(value)
        return _ArgTensor(
            tuple(value.size()), tuple(value.stride()), value.dtype, value.device,
            # A large tensor's value is one element, expanded; it is never written to.
            known if known is None or known.numel() > KNOWN_VALUE_LIMIT_ELEMENTS else known.clone(),
        )  # fmt: skip
    if isinstance(value, dict):
        return {k: _kept_argument(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_kept_argument(v) for v in value)
    return value


def _given_again(value: Any, machine: VirtualMachine) -> Any:
    if isinstance(value, _ArgTensor):
        if value.device.type != "cuda":
            zeros = torch.zeros((), dtype=value.dtype).expand(value.size)
            return zeros if value.value is None else value.value
        tensor = machine.empty(value.size, value.stride, value.dtype, GPU)
        if value.value is not None:
            with torch._C._DisableTorchDispatch():
                keep_value(tensor, value.value)
        return tensor
    if isinstance(value, dict):
        return {k: _given_again(v, machine) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_given_again(v, machine) for v in value)
    return value
