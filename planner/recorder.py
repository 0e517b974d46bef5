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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipefit.cost_models.fusion import Operator, graph_steps
from pipefit.cost_models.workload import SYNCHRONISE, Kernel, Launcher, Routine
from pipefit.planner.kernels import kernel_of, tensor_bytes, unique_tensors
from pipefit.planner.signatures import (
    GPU,
    Given,
    Unkeyable,
    attribute_key,
    given_again,
    kept_argument,
    make_output,
    output_spec,
    refill,
    same_attributes,
    weight_key,
)
from pipefit.planner.virtual import VirtualDevice, VirtualMachine
from pipefit.planner.virtual_tensors import (
    UNSEEN,
    Buffer,
    Launch,
    Observer,
    VirtualTensor,
    buffer_of,
)
from pipefit.strategies.live import COMPILED, ENTRY_METHODS, launcher_of, tries_kernels

TILE_METHODS = ("blend_v", "blend_h", "blend_t")
"""Methods of tiled autoencoders that loop over rows of a seam; remembered like module calls.

They are 85 % of the operators of a tiled video decode and their temporaries are one row each.
"""


_HOOKS = ("_forward_hooks", "_forward_pre_hooks")

_EVERY_MODULE = frozenset(torch.nn.Module().__dict__)
"""Attributes that every module has; of interest where they are not empty."""


class _Frame:
    """One module call while it runs."""

    __slots__ = (
        "alloc_events", "entry", "events", "launcher", "live", "module", "next", "others",
        "outside", "path", "remember", "value_read", "written",
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
        self.launcher: Launcher = "eager"
        """Anything else: the call is one graph, and launches say what they read and write."""
        self.others: dict[int, int] = {}

    def touched(self, values: Sequence[Any]) -> tuple[tuple[int, int], ...]:
        """Return (buffer, bytes of it) of the GPU's tensors in *values*, as an Operator has it."""
        found = []
        for tensor in unique_tensors(values):
            if tensor.is_cuda:
                buffer = buffer_of(tensor)
                number = buffer.number
                if buffer.owner is not self:
                    number = -1 - self.others.setdefault(id(buffer), len(self.others))
                found.append((number, tensor_bytes(tensor)))
        return tuple(found)

    def let_go(self, number: int) -> None:
        """One of its buffers is freed."""
        del self.live[number]
        self.alloc_events.pop(number, None)

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


def _weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _tensor_bytes(value: Any) -> int:
    """Return the bytes of all GPU tensors in arguments."""
    if type(value) is VirtualTensor:
        return value.numel() * value.element_size() if value.is_cuda else 0
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return 0
    return sum(map(_tensor_bytes, value))


@dataclass(frozen=True)
class Entry:
    """One distinct component call of the pipeline, repeatable."""

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
        return given_again(self.args, machine), given_again(self.kwargs, machine)


class Recorder(Observer):
    """Writes the routines of a trace while the pipeline runs."""

    def __init__(self, devices: Sequence[VirtualDevice], *, remember: bool) -> None:
        self.machine = VirtualMachine(self, devices=devices)
        self.remember = remember
        self.root = _Frame(None, "", "__call__")
        self.stack: list[_Frame] = []
        self.kernels: dict[Kernel, int] = {}
        self.routines: list[Routine] = []
        self.entries: dict[int, Entry] = {}
        """Routine -> the component call that it stands for."""
        self.input_bytes: dict[int, int] = {}
        """Routine -> bytes of the tensors that its calls are given, the most of them."""
        self.components: dict[str, torch.nn.Module] = {}
        self.unknown_reads: dict[str, int] = {}
        self._routine_numbers: dict[Routine, int] = {}
        self._paths: dict[int, str] = {}
        self._structures: dict[int, int] = {}
        self._structure_numbers: dict[Any, int] = {}
        self._with_hooks_below: set[int] = set()
        """Modules (by id) whose submodules have hooks: called inside a component, these may hand
        things past the arguments and the result, as transformers' hidden states."""
        self._hooked: dict[int, bool] = {}
        """Module (by id) -> whether something runs in place of its forward, or of one below it."""
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
            frame.let_go(buffer.number)
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
        if event is None:
            return
        frame = self.stack[-1]
        if frame.launcher == "eager":
            frame.events.append(event)
        else:
            given = (*args, *kwargs.values())
            frame.events.append((*event, frame.touched(given), frame.touched((out,))))

    def value_read(self, known: bool, func: Any) -> None:
        if not self.stack:
            return
        if known:
            self.stack[-1].value_read = True
        else:
            where = self.stack[-1].path or "the pipeline"
            self.unknown_reads[where] = self.unknown_reads.get(where, 0) + 1

    def synchronised(self, index: int) -> None:
        if self.stack and not self._muted:
            kernel = self.kernels.setdefault(SYNCHRONISE, len(self.kernels))
            self.stack[-1].events.append(("k", kernel))

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
        if caller.launcher != "eager":
            return function(*args, **kwargs)  # one graph, in which there are no modules
        if self._changed_components and caller is self.root:
            self._notice_changed_weights(path.split(".")[0])
        # What runs in place of a forward may count its calls, as step caches do.
        is_remembered = self.remember and not self._has_hooks_within(module)
        structure = self._kind(module, entry) if is_remembered else None
        given = Given(structure in self._value_dependent)
        key = None
        if is_remembered and (caller is self.root or id(module) not in self._with_hooks_below):
            with contextlib.suppress(Unkeyable):
                key = (structure, given.key(args), given.key(kwargs))
            memory = self._memories.get(key)
            if memory is not None:
                return self._replay(memory, caller, path, given)
        given.let_go()
        input_bytes = _tensor_bytes((args, kwargs))
        is_entry = caller is self.root and "." not in path
        repeatable = (kept_argument(args), kept_argument(kwargs)) if is_entry else None
        frame = _Frame(module, path, entry)
        if entry == "forward":
            frame.launcher = self._launcher_of(module)
        frame.remember = is_remembered or not self.remember
        attributes = module.__dict__.copy()
        self.stack.append(frame)
        try:
            output = function(*args, **kwargs)
        except BaseException:
            self.stack.pop()
            self._close(frame, caller)
            raise
        self.stack.pop()
        if not same_attributes(module.__dict__, attributes):
            frame.remember = False
            self._forget_structure(module)
        alive = frame.alive()
        routine = self._close(frame, caller)
        self.input_bytes[routine] = max(input_bytes, self.input_bytes.get(routine, 0))
        if repeatable is not None and routine not in self.entries:
            dtypes = tuple(tensor.dtype for tensor in _weights(module))
            self.entries[routine] = Entry(entry, *repeatable, dtypes)
        if frame.value_read and is_remembered:
            self._value_dependent.add(structure)
        if key is not None and frame.remember and (given.by_value or not frame.value_read):
            self._store(key, routine, frame, alive, given, output)
        return output

    def _store(
        self, key: Any, routine: int, frame: _Frame, alive: list[Buffer], given: Given, output: Any
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
            spec = output_spec(output, made, given, used)
            containers = tuple(
                (i, output_spec(container, made, given, used))
                for i, container in given.changed_containers()
            )
        except Unkeyable:
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
        if frame.launcher != "eager":
            frame.events = self._graph_events(frame)
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

    def _launcher_of(self, module: torch.nn.Module) -> Launcher:
        """Return who launches the kernels of *module*."""
        return launcher_of(module)

    def _graph_events(self, frame: _Frame) -> list[Any]:
        """Return what a graph in place of the call of *frame* does."""
        kernels = list(self.kernels)
        recorded = [
            Operator(kernel=kernels[event[1]], reads=event[2], writes=event[3])
            if len(event) == 4 and event[0] == "k"
            else event
            for event in frame.events
        ]
        return [
            ("k", self.kernels.setdefault(step[1], len(self.kernels)))
            if isinstance(step[1], Kernel)
            else step
            for step in graph_steps(
                recorded, frame.live, frame.launcher, is_tried=tries_kernels(frame.module)
            )
        ]

    def _outside_number(self, caller: _Frame, owner: _Frame, number: int) -> int:
        """Say in *caller*'s terms which buffer a callee freed."""
        if owner is caller:
            caller.let_go(number)
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

    def _replay(self, memory: _Memory, caller: _Frame, path: str, given: Given) -> Any:
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
        self._perform(
            memory.routine, [inputs[i] for i in memory.outside], [buffer_of(t) for t in new]
        )
        caller.value_read |= memory.value_read
        for index in memory.written:
            inputs[index].value = None
            caller.written.add(id(inputs[index]))
        output = make_output(memory.output, new, given.tensors)
        for index, spec in memory.containers:
            refill(given.containers[index], make_output(spec, new, given.tensors))
        del new, inputs
        buffer = None
        given.let_go()
        for ref in freed:
            # Somebody else holds what the remembered call freed: it stays allocated.
            buffer = ref()
            if buffer is not None:
                self.allocated(buffer)
        return output

    def _perform(self, routine: int, freed: Sequence[Buffer], made: Sequence[Buffer]) -> None:
        """Do to the GPU what a remembered call does: nothing here, a trace writes it down."""

    # -- signatures

    def _kind(self, module: torch.nn.Module, entry: str) -> Any:
        """Return what two calls must share besides their arguments to be alike."""
        return self._structure(module), entry

    def _structure(self, module: torch.nn.Module) -> int:
        """Number the structure of *module*: equal numbers compute alike on equal inputs."""
        number = self._structures.get(id(module))
        if number is None:
            parts: list[Any] = [type(module)]
            for name, value in module.__dict__.items():
                if name in ("_parameters", "_buffers"):
                    parts.append((name, tuple((n, weight_key(t)) for n, t in value.items())))
                elif name == "_modules":
                    children = ((n, self._structure(m)) for n, m in value.items() if m is not None)
                    parts.append(tuple(children))
                    if any(self._has_hooks(m) for m in value.values()):
                        self._with_hooks_below.add(id(module))
                elif name == COMPILED:
                    parts.append((name, value is not None))  # a function for each module
                elif name in _HOOKS:
                    pass  # hooks run around every call, remembered or not
                elif isinstance(value, _Method):
                    if getattr(value.method, "__self__", None) is not module:  # wrapped
                        parts.append((name, attribute_key(value.method)))
                elif name not in _EVERY_MODULE or value:
                    parts.append((name, attribute_key(value)))
            number = self._structure_numbers.setdefault(tuple(parts), len(self._structure_numbers))
            self._structures[id(module)] = number
        return number

    def _has_hooks_within(self, module: torch.nn.Module) -> bool:
        found = self._hooked.get(id(module))
        if found is None:
            found = self._is_hooked(module) or any(map(self._has_hooks_within, module.children()))
            self._hooked[id(module)] = found
        return found

    def _is_hooked(self, module: torch.nn.Module) -> bool:
        """Whether a library has put something in place of the forward of *module*."""
        return has_other_forward(module)

    def forget_structures(self) -> None:
        """Look at all modules again before the next call: somebody has changed some."""
        self._structures.clear()
        self._hooked.clear()
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
        self._own_weights(name, module)

    def _own_weights(self, name: str, module: torch.nn.Module) -> None:
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


def new_frame(entry: str) -> _Frame:
    """Return a frame that is no module's call, for :meth:`Recorder.recording`."""
    return _Frame(None, "", entry)


Call = Callable[[Any, str, Callable[..., Any], Any, Any], Any]
"""(module, entry, function, args, kwargs) -> what the function returns."""


@contextlib.contextmanager
def intercepting(
    components: Iterable[torch.nn.Module], call: Call, *, with_hooks: bool = False
) -> Iterator[None]:
    """Route every module call and entry method of *components* through *call*.

    *with_hooks*: a module's forward hooks are part of its call; else they run around it.
    """
    original = torch.nn.Module.__call__
    # Not torch.nn.Module.__call__, which runs what torch.compile made of a module.
    uncompiled = torch.nn.Module._call_impl

    def call_module(module: Any, *args: Any, **kwargs: Any) -> Any:
        attributes = module.__dict__
        is_hooked = attributes["_forward_hooks"] or attributes["_forward_pre_hooks"]
        if with_hooks or not is_hooked:
            return call(module, "forward", functools.partial(uncompiled, module), args, kwargs)
        if isinstance(attributes.get("forward"), _Method):  # a call within its own call
            return uncompiled(module, *args, **kwargs)
        forward = _Method(call, module, "forward", module.forward)
        own = attributes.get("forward")
        attributes["forward"] = forward
        try:
            return uncompiled(module, *args, **kwargs)
        finally:
            if own is None:
                del attributes["forward"]
            else:
                attributes["forward"] = own

    torch.nn.Module.__call__ = call_module  # type: ignore[method-assign]
    wrapped: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for component in components:
            attributes = component.__dict__
            for name in (*ENTRY_METHODS, *TILE_METHODS):
                method, own = getattr(component, name, None), attributes.get(name)
                if callable(method) and not isinstance(own, _Method):
                    # Not setattr: a module's setattr looks for parameters first.
                    attributes[name] = _Method(call, component, name, method)
                    wrapped.append((attributes, name, own))
        yield
    finally:
        torch.nn.Module.__call__ = original  # type: ignore[method-assign]
        for attributes, name, own in wrapped:
            if own is None:
                attributes.pop(name, None)
            else:
                attributes[name] = own  # a strategy's wrapper


def has_own_forward(module: torch.nn.Module) -> bool:
    """Whether something runs with the class's ``forward`` or in its place, as hooks do."""
    return bool(module._forward_pre_hooks or module._forward_hooks) or has_other_forward(module)


def has_other_forward(module: torch.nn.Module) -> bool:
    """Whether a library has put something in place of the class's ``forward``."""
    forward = module.__dict__.get("forward")
    if isinstance(forward, _Method):
        forward = forward.method
    return forward is not None and getattr(forward, "__self__", None) is not module


class _Method:
    """A component's method, routed through what intercepts calls."""

    def __init__(self, call: Call, module: Any, name: str, method: Any) -> None:
        self.call, self.module, self.name, self.method = call, module, name, method
        self.__wrapped__ = method  # what inspect.signature follows

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.module, self.name, self.method, args, kwargs)
