"""JSON for the frozen dataclasses, driven by their annotations: one way there, one way back."""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, cast

T = TypeVar("T")

OMITTED = "omitted"
"""Metadata of a field that is left out where it is None, and may be missing."""


def to_json(value: Any) -> Any:
    """Return *value* as dicts, lists, numbers and strings."""
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: to_json(found)
            for f in dataclasses.fields(value)
            if (found := getattr(value, f.name)) is not None or not f.metadata.get(OMITTED)
        }
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_json(v) for v in value]
    return value


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def from_json(cls: type[T], data: Any) -> T:
    """Return *data*, made by :func:`to_json`, as an instance of *cls*.

    Raises:
        ValueError: if *data* lacks a field or does not have the shape of *cls*.
    """
    try:
        return cast(T, _decode(cls, data))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"This is not the JSON of a {cls.__name__}: {error}") from error


def _decode(hint: Any, data: Any) -> Any:
    origin = typing.get_origin(hint)
    if hint is Any:
        return data
    if origin in (typing.Union, types.UnionType):
        if data is None:
            return None
        return _decode(next(a for a in typing.get_args(hint) if a is not type(None)), data)
    if origin is typing.Literal:
        return data
    if origin is tuple:
        args = typing.get_args(hint)
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_decode(args[0], item) for item in data)
        return tuple(_decode(a, item) for a, item in zip(args, data, strict=True))
    if origin is not None and issubclass(origin, Mapping):
        key, item = typing.get_args(hint)
        return {_decode(key, k): _decode(item, v) for k, v in data.items()}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(data)
    if dataclasses.is_dataclass(hint):
        hints = _hints(cast(type, hint))
        return cast(type, hint)(
            **{
                f.name: _decode(hints[f.name], data[f.name])
                for f in dataclasses.fields(hint)
                if f.name in data or not f.metadata.get(OMITTED)
            }
        )
    if hint is int:
        return int(data)
    if hint is float:
        return float(data)
    return data
