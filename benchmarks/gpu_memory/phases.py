"""Peaks phase by phase of a call that really runs, cut where the prediction cuts.

A phase ends when the pipeline enters another component, before that component's weights are brought
in: the peaks are read and reset there, outside of every hook. What the pipeline does between two
calls belongs to the phase before, what it does before the first call to the first phase.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu_memory.counters import Counter
from pipefit.strategies.live import ENTRY_METHODS


@dataclass(slots=True, kw_only=True)
class Phase:
    """The peaks of one component entry; a phase that is left and entered again is one."""

    component: str
    entry: str
    calls: int = 0
    begin_bytes: int = 0
    """Allocated when it was first entered."""
    allocated_bytes: int = 0
    reserved_bytes: int = 0
    requested_bytes: int = 0
    context_bytes: int = 0
    """The driver's figure for the process minus reserved memory, when the phase ended."""
    process_bytes: int = 0
    """Reserved at its peak plus the context, which only grows."""


class PhaseMeter:
    """Reads a counter at the boundaries of a call's phases; use one for one call."""

    def __init__(self, components: Mapping[str, torch.nn.Module], counter: Counter) -> None:
        self._components = dict(components)
        self._counter = counter
        self._names = {
            id(part): name for name, module in components.items() for part in module.modules()
        }
        self._phases: dict[tuple[str, str], Phase] = {}
        self._current: Phase | None = None
        self._is_inside = False

    @property
    def phases(self) -> list[Phase]:
        """The phases in the order of their first calls, as far as they are complete."""
        return list(self._phases.values())

    @contextlib.contextmanager
    def watching(self) -> Iterator[PhaseMeter]:
        """Meter the call that runs meanwhile; the last phase ends with it, or with its error."""
        original = torch.nn.Module.__call__
        meter = self

        def call_module(module: Any, *args: Any, **kwargs: Any) -> Any:
            name = None if meter._is_inside else meter._names.get(id(module))
            if name is None:
                return original(module, *args, **kwargs)
            with meter._entering(name, "forward"):
                return original(module, *args, **kwargs)

        self._counter.reset_peak()
        torch.nn.Module.__call__ = call_module  # type: ignore[method-assign]
        wrapped = self._wrap_methods()
        try:
            yield self
        finally:
            torch.nn.Module.__call__ = original  # type: ignore[method-assign]
            for module, method in wrapped:
                module.__dict__.pop(method, None)
            self._close()
            self._current = None

    def _wrap_methods(self) -> list[tuple[torch.nn.Module, str]]:
        wrapped = []
        for name, module in self._components.items():
            for entry in ENTRY_METHODS:
                method = getattr(module, entry, None)
                if callable(method) and entry not in module.__dict__:
                    # Not setattr: a module's setattr looks for parameters first.
                    module.__dict__[entry] = self._metered(name, entry, method)
                    wrapped.append((module, entry))
        return wrapped

    def _metered(self, name: str, entry: str, method: Any) -> Any:
        @functools.wraps(method)  # pipelines look at signatures
        def run(*args: Any, **kwargs: Any) -> Any:
            if self._is_inside:
                return method(*args, **kwargs)
            with self._entering(name, entry):
                return method(*args, **kwargs)

        return run

    @contextlib.contextmanager
    def _entering(self, component: str, entry: str) -> Iterator[None]:
        key = component, entry
        phase = self._phases.get(key)
        if phase is None:
            phase = self._phases[key] = Phase(component=component, entry=entry)
        if phase is not self._current:
            if self._current is not None:
                self._close()
                self._counter.reset_peak()
            self._current = phase
        if not phase.calls:
            phase.begin_bytes = self._counter.read().allocated
        phase.calls += 1
        self._is_inside = True
        try:
            yield
        finally:
            self._is_inside = False

    def _close(self) -> None:
        phase = self._current
        if phase is None:
            return
        reading = self._counter.read()
        context_bytes = self._counter.process_bytes() - reading.reserved
        phase.allocated_bytes = max(phase.allocated_bytes, reading.peak_allocated)
        phase.reserved_bytes = max(phase.reserved_bytes, reading.peak_reserved)
        phase.requested_bytes = max(phase.requested_bytes, reading.peak_requested)
        phase.context_bytes = max(phase.context_bytes, context_bytes)
        phase.process_bytes = max(phase.process_bytes, reading.peak_reserved + context_bytes)
