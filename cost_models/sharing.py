"""What the models of several workloads on several GPUs have in common, worked out once.

A pipeline that is stored in two ways and traced for three kinds of GPUs is six workloads, of which
most routines are equal. :func:`united` numbers them alike, and :class:`Models` then lets models of
the same GPU, or of GPUs that are alike in what counts, remember together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pipefit.cost_models.latency import LatencyModel
from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.memory import MemoryModel
from pipefit.cost_models.roofline import DEFAULT_FLAGS, Flags
from pipefit.cost_models.timeline import Timeline
from pipefit.cost_models.workload import Component, Event, Kernel, Routine, Workload
from pipefit.cost_models.workspace import cublas_bytes


def united(workloads: Sequence[Workload]) -> list[Workload]:
    """Return *workloads* with one table of kernels and one of routines, so that equal ones have the
    same number; equal components are the same object."""
    tables = _Tables()
    moved = [_Renumbered(workload, tables).workload for workload in workloads]
    kernels, routines = tuple(tables.kernels), tuple(tables.routines)
    given = {
        number: num_bytes
        for (_, num_bytes), number in tables.numbers.items()
        if num_bytes is not None
    }
    return [replace(one, kernels=kernels, routines=routines, input_bytes=given) for one in moved]


class _Tables:
    """What is numbered so far."""

    def __init__(self) -> None:
        self.kernels: dict[Kernel, int] = {}
        self.routines: list[Routine] = []
        self.numbers: dict[tuple[Routine, int | None], int] = {}
        """By routine and the bytes that it is given, which do not show in its events."""
        self.components: list[Component] = []


class _Renumbered:
    """One workload whose routines are numbered as in the tables."""

    def __init__(self, workload: Workload, tables: _Tables) -> None:
        self._of, self._tables = workload, tables
        self._kernels = [
            tables.kernels.setdefault(one, len(tables.kernels)) for one in workload.kernels
        ]
        self._numbers: dict[int, int] = {}
        root = self._events(workload.root)
        variants = {
            key: {self._number(i): self._number(other) for i, other in replaced.items()}
            for key, replaced in workload.variants.items()
        }
        self.workload = replace(
            workload,
            components=tuple(self._component(one) for one in workload.components),
            root=root,
            variants=variants,
        )

    def _events(self, events: Sequence[Event]) -> tuple[Event, ...]:
        return tuple(
            ("k", self._kernels[event[1]])
            if event[0] == "k"
            else ("c", self._number(event[1]), *event[2:])
            if event[0] == "c"
            else event
            for event in events
        )

    def _number(self, index: int) -> int:
        if index not in self._numbers:
            old, tables = self._of.routines[index], self._tables
            routine = replace(old, events=self._events(old.events))
            key = routine, self._of.input_bytes.get(index)
            if key not in tables.numbers:
                tables.numbers[key] = len(tables.routines)
                tables.routines.append(routine)
            self._numbers[index] = tables.numbers[key]
        return self._numbers[index]

    def _component(self, component: Component) -> Component:
        known = self._tables.components
        found = next((one for one in known if one == component), component)
        if found is component:
            known.append(component)
        return found


class Models:
    """The models of one request; all of its workloads are :func:`united`."""

    def __init__(self) -> None:
        self._timelines: dict[object, Timeline] = {}
        self._memories: dict[object, MemoryModel] = {}
        self._latencies: dict[tuple[object, ...], LatencyModel] = {}
        self.known: dict[object, Any] = {}
        """What those who ask the models work out, by keys of their own."""

    def memory(self, workload: Workload, gpu: Gpu) -> MemoryModel:
        """Return the memory model of *workload* on *gpu*: the same for all whose libraries ask for
        the same scratch."""
        kind = (
            id(workload.routines),
            gpu.architecture,
            gpu.compute_capability,
            gpu.l2_bytes,
            gpu.num_sms,
        )
        if kind not in self._timelines:
            made = Timeline(workload, gpu)
            alike = (one for one in self._timelines.values() if one.is_alike(made))
            self._timelines[kind] = next(alike, made)
        timeline = self._timelines[kind]
        workspace_bytes = cublas_bytes(gpu, workload.versions.get("torch", ""))
        key = id(workload), id(timeline), workspace_bytes
        if key not in self._memories:
            self._memories[key] = MemoryModel(workload, gpu, timeline=timeline)
        return self._memories[key]

    def latency(
        self, workload: Workload, gpu: Gpu, flags: Flags = DEFAULT_FLAGS, *, num_cores: int = 1
    ) -> LatencyModel:
        """Return a latency model that remembers together with others of a GPU like that one."""
        key = id(workload.routines), figures(gpu), flags, num_cores
        beside = next((m for (r, *_), m in self._latencies.items() if r == key[0]), None)
        made = LatencyModel(
            workload,
            gpu,
            flags,
            num_cores=num_cores,
            like=self._latencies.get(key),
            beside=beside,
        )
        self._latencies.setdefault(key, made)
        return made


def figures(gpu: Gpu) -> str:
    """Return what decides about a GPU's times."""
    alike = replace(
        gpu, index=0, total_bytes=0, free_bytes=0, other_bytes=0, provenance={}, sources=()
    )
    return repr(alike)
