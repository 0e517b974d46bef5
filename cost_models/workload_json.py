"""JSON of a workload: what the trace cache keeps, and what ``--json`` can show of a trace.

Not :mod:`pipefit.cost_models.serial`: annotations do not say where the tuples inside an event are,
and going through them takes half a second for a video pipeline's 20,000 events, where this takes a
third. Kernels, tensors and the like are rows, their values in the order of the class's fields.
Routines are much alike: each distinct event is written once, and routines are lists of its numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from typing import Any, TypeVar

from pipefit.cost_models.workload import (
    Component,
    Event,
    Kernel,
    ModuleInfo,
    Phase,
    Routine,
    TensorInfo,
    Workload,
)

SCHEMA = "pipefit.workload/1"

T = TypeVar("T")
Coder = Callable[[Any], Any]
"""One way between a field and its JSON."""


def to_json(workload: Workload) -> dict[str, Any]:
    """Return *workload* as what ``json.dumps`` takes; its call and traits must be JSON already."""
    components = [
        {
            **_named_values(component),
            "tensors": _rows(TensorInfo, component.tensors),
            "modules": _rows(ModuleInfo, component.modules),
        }
        for component in workload.components
    ]
    numbers: dict[Event, int] = {}

    def numbered(events: Iterable[Event]) -> list[int]:
        return [numbers.setdefault(event, len(numbers)) for event in events]

    return {
        "schema": SCHEMA,
        **_named_values(workload),
        "components": components,
        "kernels": _rows(Kernel, workload.kernels),
        "routines": _rows(Routine, workload.routines, events=numbered),
        "root": numbered(workload.root),
        "phases": _rows(Phase, workload.phases),
        "events": list(numbers),
    }


def from_json(data: Any) -> Workload:
    """Return the workload that :func:`to_json` made *data* of, be it through text or not.

    Raises:
        ValueError: if *data* is not the JSON of a workload, or of another version of it.
    """
    try:
        return _workload(data)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"This is not the JSON of a workload: {error!r}") from error


def _workload(data: Mapping[str, Any]) -> Workload:
    values = dict(data)
    if values.pop("schema") != SCHEMA:
        raise ValueError(f"its schema is {data['schema']!r}, not {SCHEMA!r}")
    distinct = _events(values.pop("events"))

    def events(numbers: Iterable[int]) -> tuple[Event, ...]:
        return tuple(map(distinct.__getitem__, numbers))

    return Workload(
        **{
            **values,
            "components": tuple(map(_component, values["components"])),
            "kernels": _from_rows(Kernel, values["kernels"], shape=tuple),
            "routines": _from_rows(Routine, values["routines"], events=events, returns=tuple),
            "root": events(values["root"]),
            "phases": _from_rows(Phase, values["phases"], calls=tuple),
            "variants": {
                key: {int(plain): replacement for plain, replacement in replaced.items()}
                for key, replaced in values["variants"].items()
            },
            "input_bytes": {int(key): size for key, size in values["input_bytes"].items()},
            "offload_sequence": tuple(values["offload_sequence"]),
            "offload_excluded": tuple(values["offload_excluded"]),
            "assumptions": tuple(values["assumptions"]),
        }
    )


def _component(values: Mapping[str, Any]) -> Component:
    return Component(
        **{
            **values,
            "tensors": _from_rows(TensorInfo, values["tensors"], shape=tuple),
            "modules": _from_rows(ModuleInfo, values["modules"]),
        }
    )


def _events(events: Iterable[Any]) -> list[Event]:
    return [
        ("c", event[1], event[2], tuple(event[3]), tuple(event[4]))
        if event[0] == "c"
        else tuple(event)
        for event in events
    ]


def _names(cls: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls))


def _named_values(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in _names(value)}


def _rows(cls: type[T], values: Iterable[T], **encoders: Coder) -> list[list[Any]]:
    """Return a row per value, fields passing through their encoder if they have one."""
    names = _names(cls)
    rows = [list(row) for row in map(attrgetter(*names), values)]
    for name, encode in encoders.items():
        column = names.index(name)
        for row in rows:
            row[column] = encode(row[column])
    return rows


def _from_rows(cls: type[T], rows: Iterable[Any], **decoders: Coder) -> tuple[T, ...]:
    """Return a *cls* per row, fields passing through their decoder if they have one."""
    names = _names(cls)
    made = []
    for row in rows:
        values = dict(zip(names, row, strict=True))
        for name, decode in decoders.items():
            values[name] = decode(values[name])
        made.append(cls(**values))
    return tuple(made)
