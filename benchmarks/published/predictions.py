"""Records beside what pipefit predicts for them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from multiprocessing import get_context
from typing import Any, Literal, TypeVar

from diffusers import DiffusionPipeline

from benchmarks.published.older_versions import torch_version
from benchmarks.published.records import (
    LOADING,
    Record,
    Setup,
    Unusable,
    counts_inputs,
    explanation,
    is_of_whole_process,
    outside_bytes,
    phases_of,
    setup_of,
    states_growth,
    subject_of,
    usable,
    weights_are_published,
)
from pipefit.cost_models.allocator import CachingAllocator
from pipefit.cost_models.prediction import PhasePrediction
from pipefit.cost_models.units import GIB
from pipefit.planner.catalog import find_gpu, reference_machine

Task = TypeVar("Task")
Result = TypeVar("Result")

OUTLIER = 0.02
"""Errors above this share of the published figure are explained, or marked unexplained."""

LOAD = "load"
"""What :meth:`Predicted.peak` calls the time before the call."""

Kind = Literal["allocated", "reserved", "process"]
KINDS: tuple[Kind, ...] = ("allocated", "reserved", "process")


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What pipefit says about one setup."""

    phases: tuple[PhasePrediction, ...]
    host_ram_bytes: int
    loading_bytes: int = 0
    """What lies on the GPU once all is loaded, before any offload."""
    context_bytes: int = 0
    loaded_reserved_bytes: int = 0
    """What torch has reserved before one component is called; 0 for whole pipelines."""

    @property
    def loaded_bytes(self) -> int:
        """Weights on the GPU in the first phase: what a resident pipeline holds once loaded."""
        return self.phases[0].weights_bytes

    def peak(self, kind: Kind, counts: Callable[[str], bool] = lambda phase: True) -> int:
        """Return the highest of the phases that count, in bytes; loading is one called load."""
        peak_bytes = max(getattr(p, f"{kind}_bytes") for p in self.phases if counts(p.name))
        return max(peak_bytes, self._loading_peak(kind)) if counts(LOAD) else peak_bytes

    def peak_phase(self, kind: Kind = "allocated") -> str:
        """Return the name of the phase in which *kind* is highest."""
        peaks = [(getattr(p, f"{kind}_bytes"), p.name) for p in self.phases]
        num_bytes, name = max(peaks, key=lambda peak: peak[0])
        return LOAD if self._loading_peak(kind) > num_bytes else name

    def _loading_peak(self, kind: Kind) -> int:
        if not self.loading_bytes:
            return 0
        return self.loading_bytes + (self.context_bytes if kind == "process" else 0)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One record with its prediction, or with the reason why there is none."""

    record: Record
    kind: Kind
    published_gib: float
    predicted_gib: float | None = None
    setup: Setup | None = None
    has_published_weights: bool = False
    """The record's own weights and the predicted growth: its storage format is not modelled."""
    ram_gib: float | None = None
    """Predicted host RAM, where the record's is of the whole process."""
    note: str = ""

    @property
    def error(self) -> float:
        """Predicted over published, less one."""
        assert self.predicted_gib is not None
        return self.predicted_gib / self.published_gib - 1


def predict_setup(setup: Setup, subject: Any = None) -> Predicted:
    """Ask pipefit; seconds where the trace is not in the cache.

    *subject* is what ``subject_of`` made of the setup, where that is at hand.
    """
    from pipefit import predict

    subject = subject_of(setup) if subject is None else subject
    with torch_version(setup.torch):
        found = predict(
            subject,
            setup.strategies,
            call=setup.call,
            machine=reference_machine([setup.gpu]),
            dtype=setup.dtype if isinstance(subject, str) else None,
        )
    (peak,) = found.peak_vram
    return Predicted(
        phases=found.phases,
        host_ram_bytes=found.host_ram_bytes,
        loading_bytes=peak.loading_bytes,
        context_bytes=peak.context_bytes,
        loaded_reserved_bytes=_loaded_reserved_bytes(subject) if setup.component else 0,
    )


def _loaded_reserved_bytes(pipe: DiffusionPipeline) -> int:
    """Return what torch reserves for the tensors of *pipe*, loaded one by one and nothing else."""
    allocator = CachingAllocator()
    for component in pipe.components.values():
        for tensor in chain(component.parameters(), component.buffers()):
            allocator.allocate(tensor.nbytes)
    return allocator.reserved_bytes


def rows_of(records: Iterable[Record], *, num_workers: int) -> list[Row]:
    """Return a row for every usable record, each distinct setup predicted once."""
    chosen = [record for record in records if usable(record)]
    setups: dict[str, Setup] = {}
    asked: list[tuple[Record, Setup | str]] = []
    for record in chosen:
        try:
            setup = setup_of(record)
        except Unusable as reason:
            asked.append((record, str(reason)))
        else:
            setups[setup.key] = setup
            asked.append((record, setup))
    predicted = in_pool(_predict_or_say, setups, num_workers, "predicted")
    rows = []
    for record, setup in asked:
        for kind, gib in _figures(record):
            if isinstance(setup, str):
                rows.append(Row(record=record, kind=kind, published_gib=gib, note=setup))
            else:
                rows.append(_row(record, kind, gib, setup, predicted[setup.key]))
    return rows


def _figures(record: Record) -> Iterator[tuple[Kind, float]]:
    """Yield the peaks that *record* states."""
    yield record["peak_kind"].removesuffix("_presumed"), record["peak_memory_gib"]
    if states_growth(record):
        yield "reserved", record["peak_reserved_gib"]


def in_pool(
    work: Callable[[Task], Result], tasks: Mapping[str, Task], num_workers: int, what: str
) -> dict[str, Result]:
    """Do *work* for each of *tasks* in processes of their own; says how far it is."""
    found: dict[str, Result] = {}
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        for key, result in zip(tasks, pool.map(work, tasks.values()), strict=True):
            found[key] = result
            print(f"\r{what}: {len(found)} of {len(tasks)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def _predict_or_say(setup: Setup) -> Predicted | str:
    from pipefit.errors import PipefitError

    try:
        return predict_setup(setup)
    except PipefitError as error:
        return str(error)


def _row(
    record: Record, kind: Kind, published_gib: float, setup: Setup, predicted: Predicted | str
) -> Row:
    """Return a row; *predicted* may say why there is no prediction."""
    if isinstance(predicted, str):
        return Row(record=record, kind=kind, published_gib=published_gib, note=predicted)
    num_bytes = predicted.peak(kind, phases_of(record))
    if kind == "reserved" and states_growth(record):
        num_bytes -= predicted.loaded_reserved_bytes
    if not counts_inputs(record):
        num_bytes -= max(phase.carried_bytes for phase in predicted.phases)
    if kind == "process":
        num_bytes -= outside_bytes(record, find_gpu(setup.gpu))
    predicted_gib = num_bytes / GIB
    has_published_weights = weights_are_published(record) and bool(record["weights_gib"])
    if has_published_weights:
        predicted_gib += record["weights_gib"] - predicted.loaded_bytes / GIB
    row = Row(
        record=record,
        kind=kind,
        published_gib=published_gib,
        predicted_gib=predicted_gib,
        setup=setup,
        has_published_weights=has_published_weights,
        ram_gib=predicted.host_ram_bytes / GIB if is_of_whole_process(record) else None,
    )
    is_off = abs(row.error) > OUTLIER
    notes = [explanation(record)] if is_off else []
    if predicted.peak_phase(kind) == LOAD and phases_of(record)(LOAD):
        notes.insert(0, LOADING)
    if kind == "reserved" and states_growth(record):
        notes.append("growth in the call")
    notes += [f"run with {change}" for change in setup.changes if change.startswith("diffusers")]
    return replace(row, note="; ".join(note for note in notes if note))
