"""JSON of a workload: what the trace cache keeps, and what ``--json`` can show of a trace.

Not :mod:`pipefit.cost_models.serial`: annotations do not say where the tuples inside an event are,
and going through them takes half a second for a video pipeline's 20,000 events, where this takes a
tenth. Kernels, tensors and the like are rows, their values in the order of the class's fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
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
    return {
        "schema": SCHEMA,
        **_named_values(workload),
        "components": components,
        "kernels": _rows(Kernel, workload.kernels),
        "routines": _rows(Routine, workload.routines),
        "phases": _rows(Phase, workload.phases),
    }


def from_json(data: Any) -> Workload:
    """Return the workload that :func:`to_json` made *data* of, be it through text or not.

    Raises:
        ValueError: if *data* is not the JSON of a workload, or of another version of it.
    """
    try:
        return _workload(data)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"This is not the JSON of a workload: {error!r}") from error


def _workload(data: Mapping[str, Any]) -> Workload:
    values = dict(data)
    if values.pop("schema") != SCHEMA:
        raise ValueError(f"This is not JSON of schema {SCHEMA}, but of {data['schema']!r}.")
    return Workload(
        **{
            **values,
            "components": tuple(map(_component, values["components"])),
            "kernels": _from_rows(Kernel, values["kernels"], shape=tuple),
            "routines": _from_rows(Routine, values["routines"], events=_events, returns=tuple),
            "root": _events(values["root"]),
            "phases": _from_rows(Phase, values["phases"], calls=tuple),
            "variants": {
                key: {int(plain): replacement for plain, replacement in replaced.items()}
                for key, replaced in values["variants"].items()
            },
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


def _events(events: Iterable[Any]) -> tuple[Event, ...]:
    return tuple(
        [
            ("c", event[1], event[2], tuple(event[3]), tuple(event[4]))
            if event[0] == "c"
            else tuple(event)
            for event in events
        ]
    )


def _names(cls: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls))


def _named_values(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in _names(value)}


def _rows(cls: type[T], values: Iterable[T]) -> list[Any]:
    return list(map(attrgetter(*_names(cls)), values))


def _from_rows(cls: type[T], rows: Iterable[Any], **decoders: Any) -> tuple[T, ...]:
    """Return a *cls* per row, values passing through the decoder of their field if it has one."""
    names = _names(cls)
    made = []
    for row in rows:
        values = dict(zip(names, row, strict=True))
        for name, decode in decoders.items():
            values[name] = decode(values[name])
        made.append(cls(**values))
    return tuple(made)
