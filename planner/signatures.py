"""What a call is given and what it gives: how two calls are told apart, and one made again.

A signature expresses arguments and a module by what decides the call's allocations and kernels:
geometry, plain values, structure; what cannot be expressed makes a call unkeyable, never wrongly
equal. An output specification says how to make a call's result from new storages and the
arguments of another call.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipefit.planner.virtual import VirtualMachine
from pipefit.planner.virtual_tensors import (
    KNOWN_VALUE_LIMIT_ELEMENTS,
    UNSEEN,
    VirtualTensor,
    buffer_of,
    keep_value,
    known_value,
    value_signature,
)

GPU = torch.device("cuda", 0)


class Unkeyable(Exception):
    """A value whose identity a signature cannot express."""


@dataclass(frozen=True)
class OutTensor:
    is_new: bool
    index: int
    """Into what the routine returns, or into the arguments' buffers."""
    offset: int
    """From the start of the buffer, or from the argument's first view of it."""
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class OutKept:
    tensor: torch.Tensor  # a weight, or a view of one


@dataclass(frozen=True)
class OutContainer:
    cls: type
    names: tuple[Any, ...] | None
    items: tuple[Any, ...]


@dataclass(frozen=True)
class ArgTensor:
    """An argument's geometry, kept so that a component call can be repeated under a variant."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    value: torch.Tensor | None


class Given:
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
        raise Unkeyable

    def let_go(self) -> None:
        """Hold no tensor any more: a call that runs may free what its containers hold."""
        for tensor in self.tensors:
            buffer = buffer_of(tensor)
            if buffer.owner is not None and not isinstance(buffer.owner, str):  # a frame's
                self._owners[id(buffer.owner), buffer.number] = self.numbers[id(buffer)]
        self.tensors = []
        self._before = [_contents(c) for c in self.containers]

    def number_of(self, owner: Any, number: int) -> int | None:
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


def refill(container: Any, contents: Any) -> None:
    if isinstance(container, dict):
        container.clear()
        container.update(contents)
    else:
        container[:] = contents


def weight_key(tensor: torch.Tensor | None) -> Any:
    if tensor is None:
        return None
    return (tensor.size(), tensor.stride(), tensor.dtype, tensor.device)


def attribute_key(value: Any, depth: int = 0) -> Any:
    """Express a module's attribute: by value where it is plain, else by identity."""
    kind = type(value)
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return (kind, value)
    if isinstance(value, type) or kind.__name__ in ("function", "builtin_function_or_method"):
        return value
    if kind.__name__ == "method":
        return (value.__func__, id(value.__self__))
    if depth < 3:
        if isinstance(value, functools.partial):
            # By what it calls: its own identity may be that of one that was taken off before.
            return (kind, *(attribute_key(v, depth + 1) for v in (value.func, *value.args)))
        if isinstance(value, (list, tuple)):
            return (kind, *(attribute_key(v, depth + 1) for v in value))
        if isinstance(value, (set, frozenset)):
            return (kind, *sorted(map(str, value)))
        if isinstance(value, Mapping):
            items = ((str(k), attribute_key(v, depth + 1)) for k, v in value.items())
            return (kind, *items)
        if kind.__name__.endswith("Processor") and hasattr(value, "__dict__"):
            # Attention processors: one object a layer, all alike.
            return (kind, attribute_key(vars(value), depth + 1))
    return ("object", id(value))


def same_attributes(now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
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


def output_spec(value: Any, made: Mapping[int, int], given: Given, used: set[int]) -> Any:
    """Describe a call's output so that it can be made again from new buffers and other inputs."""
    if isinstance(value, VirtualTensor):
        buffer = buffer_of(value)
        geometry = (tuple(value.size()), tuple(value.stride()), value.dtype)
        if id(buffer) in made:
            used.add(made[id(buffer)])
            return OutTensor(True, made[id(buffer)], value.storage_offset(), *geometry)
        if id(buffer) in given.numbers:
            number = given.numbers[id(buffer)]
            offset = value.storage_offset() - given.offsets[number]
            return OutTensor(False, number, offset, *geometry)
        if isinstance(buffer.owner, str):
            return OutKept(value)
        raise Unkeyable
    if isinstance(value, torch.Tensor):
        raise Unkeyable
    if isinstance(value, Mapping):
        parts = tuple(output_spec(v, made, given, used) for v in value.values())
        return OutContainer(type(value), tuple(value), parts)
    if isinstance(value, (list, tuple)):
        parts = tuple(output_spec(v, made, given, used) for v in value)
        return OutContainer(type(value), None, parts)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise Unkeyable


def make_output(spec: Any, new: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Any:
    if isinstance(spec, OutTensor):
        base = new[spec.index] if spec.is_new else inputs[spec.index]
        offset = base.storage_offset() + spec.offset
        with torch._C._DisableTorchDispatch():
            view = torch.empty(0, dtype=spec.dtype, device="meta")
            view.set_(base.untyped_storage(), offset, spec.size, spec.stride)
        view.__class__ = VirtualTensor
        return view
    if isinstance(spec, OutKept):
        return spec.tensor
    if isinstance(spec, OutContainer):
        parts = [make_output(i, new, inputs) for i in spec.items]
        if spec.names is not None:
            named = dict(zip(spec.names, parts, strict=True))
            return named if spec.cls is dict else spec.cls(**named)
        return spec.cls(*parts) if hasattr(spec.cls, "_fields") else spec.cls(parts)
    return spec


# -- component calls to repeat under a variant


def kept_argument(value: Any) -> Any:
    """Return *value* with its tensors replaced by geometry, so that it keeps nothing alive."""
    if isinstance(value, torch.Tensor):
        known = known_value(value)
        return ArgTensor(
            tuple(value.size()), tuple(value.stride()), value.dtype, value.device,
            # A large tensor's value is one element, expanded; it is never written to.
            known if known is None or known.numel() > KNOWN_VALUE_LIMIT_ELEMENTS else known.clone(),
        )  # fmt: skip
    if isinstance(value, dict):
        return {k: kept_argument(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(kept_argument(v) for v in value)
    return value


def given_again(value: Any, machine: VirtualMachine) -> Any:
    if isinstance(value, ArgTensor):
        if value.device.type != "cuda":
            zeros = torch.zeros((), dtype=value.dtype).expand(value.size)
            return zeros if value.value is None else value.value
        tensor = machine.empty(value.size, value.stride, value.dtype, GPU)
        if value.value is not None:
            with torch._C._DisableTorchDispatch():
                keep_value(tensor, value.value)
        return tensor
    if isinstance(value, dict):
        return {k: given_again(v, machine) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(given_again(v, machine) for v in value)
    return value
