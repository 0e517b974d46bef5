"""Peaks of a trace's routines without an allocator: each distinct call is added up once.

Live bytes are counted in 512-byte blocks above what was alive at entry. The approximation against a
replay: a block's rest that is too small to be split off (at most 1 MiB for each tensor above 1 MiB)
is not seen here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pipefit.cost_models.allocator import allocated_bytes, block_bytes
from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.residency import GroupHooks
from pipefit.cost_models.workload import Workload, returned_bytes, split_path
from pipefit.cost_models.workspace import scratch_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutinePeak:
    """The largest sum while a routine runs, above what was alive at its entry, and its parts."""

    activation_bytes: int
    workspace_bytes: int
    weight_bytes: int = 0
    """Weights that were copied in for this call."""

    @property
    def peak_bytes(self) -> int:
        """The sum of the parts."""
        return self.activation_bytes + self.workspace_bytes + self.weight_bytes


class Outcome(NamedTuple):
    """What a call leaves behind, all relative to its entry."""

    peak: RoutinePeak
    returned_bytes: tuple[int, ...]
    weight_bytes: int
    """How much more weights are on the GPU at the end than at the entry."""


class Timeline:
    """Adds up routines of one workload on one GPU, each distinct call once."""

    def __init__(self, workload: Workload, gpu: Gpu) -> None:
        self.workload = workload
        self.scratch_bytes = tuple(
            sum(map(block_bytes, scratch_bytes(kernel, gpu))) for kernel in workload.kernels
        )
        self._outcomes: dict[tuple[int, tuple[int, ...]], Outcome] = {}
        self._launches_gemm: dict[int, bool] = {}
        self._returned: dict[int, tuple[int, ...]] = {}
        self.streamed_outcomes: dict[object, Outcome] = {}
        """What memory models of this timeline have found out about calls that bring weights."""

    def is_alike(self, other: Timeline) -> bool:
        """Whether *other*, of the same routines, adds up to the same."""
        return self.scratch_bytes == other.scratch_bytes

    def outcome(self, routine: int, outside_bytes: tuple[int, ...] = ()) -> Outcome:
        """Return the outcome of a call whose outside buffers have these sizes."""
        key = routine, outside_bytes
        found = self._outcomes.get(key)
        if found is None:
            found = self._outcomes[key] = _Walk(self, None, "", 1.0).events(
                routine, outside_bytes, "", ""
            )
        return found

    def streamed_outcome(
        self,
        routine: int,
        hooks: GroupHooks,
        component: str,
        *,
        outside_bytes: tuple[int, ...] = (),
        weight_ratio: float = 1.0,
    ) -> Outcome:
        """Return the outcome of a call of *component* during which *hooks* move its weights."""
        return _Walk(self, hooks, component, weight_ratio).call(
            routine, outside_bytes, component, "", is_entered=True
        )

    def returned(self, routine: int) -> tuple[int, ...]:
        """Return the blocks of what a call of *routine* leaves behind, as copied to another GPU."""
        found = self._returned.get(routine)
        if found is None:
            sizes = returned_bytes(self.workload, routine)
            found = self._returned[routine] = tuple(map(block_bytes, sizes))
        return found

    def launches_gemm(self, routine: int) -> bool:
        """Whether a matrix product runs in *routine* or below: then cuBLAS takes its workspace."""
        found = self._launches_gemm.get(routine)
        if found is None:
            found = self._launches_gemm[routine] = any(
                self.workload.kernels[event[1]].kind == "gemm"
                if event[0] == "k"
                else event[0] == "c" and self.launches_gemm(event[1])
                for event in self.workload.routines[routine].events
            )
        return found


class _Walk:
    """One pass over a call; with hooks, calls are told apart by path and by what is loaded."""

    def __init__(
        self, timeline: Timeline, hooks: GroupHooks | None, component: str, weight_ratio: float
    ) -> None:
        self.timeline = timeline
        self.hooks = hooks
        self.component = component
        self.group_bytes = [
            allocated_bytes(round(n * weight_ratio) for n in group.tensor_bytes)
            for group in (hooks.groups if hooks else ())
        ]
        self.outcomes: dict[
            tuple[int, tuple[int, ...], str, frozenset[int]], tuple[Outcome, frozenset[int]]
        ] = {}

    def call(
        self, routine: int, outside: tuple[int, ...], component: str, path: str, *, is_entered: bool
    ) -> Outcome:
        hooks = self.hooks
        if hooks is None or component != self.component or not hooks.concerns(path):
            return self.timeline.outcome(routine, outside)
        key = routine, outside, path, frozenset(hooks.loaded)
        recorders = set(hooks.recorders)
        if not hooks.is_recording and key in self.outcomes:
            outcome, loaded = self.outcomes[key]
            hooks.loaded = set(loaded)
            return outcome
        if not is_entered:
            outcome = self.events(routine, outside, component, path)
        else:
            entry = self.timeline.workload.routines[routine].entry
            loaded_bytes = sum(self.group_bytes[i] for i in hooks.before(path, entry))
            inner = self.events(routine, outside, component, path)
            dropped_bytes = sum(self.group_bytes[i] for i in hooks.after(path))
            outcome = Outcome(
                RoutinePeak(
                    activation_bytes=inner.peak.activation_bytes,
                    workspace_bytes=inner.peak.workspace_bytes,
                    weight_bytes=inner.peak.weight_bytes + loaded_bytes,
                ),
                inner.returned_bytes,
                inner.weight_bytes + loaded_bytes - dropped_bytes,
            )
        if not hooks.is_recording and recorders == hooks.recorders:
            self.outcomes[key] = outcome, frozenset(hooks.loaded)
        return outcome

    def events(self, index: int, outside: tuple[int, ...], component: str, path: str) -> Outcome:
        routine = self.timeline.workload.routines[index]
        scratch = self.timeline.scratch_bytes
        sizes: dict[int, int] = {}
        live = weights = 0
        highest, at_peak = 0, (0, 0, 0)
        for event in routine.events:
            kind = event[0]
            if kind == "a":
                sizes[event[1]] = num_bytes = block_bytes(event[2])
                live += num_bytes
                moment = live, 0, weights
            elif kind == "f":
                live -= sizes.pop(event[1])
                continue
            elif kind == "k":
                if not scratch[event[1]]:
                    continue
                moment = live, scratch[event[1]], weights
            elif kind == "c":
                _, callee, relative, returned, freed = event
                freed_bytes = tuple(sizes[n] if n >= 0 else outside[-1 - n] for n in freed)
                if self.hooks is None:
                    outcome = self.timeline.outcome(callee, freed_bytes)
                else:
                    where, below = split_path(relative, component, path)
                    outcome = self.call(
                        callee, freed_bytes, where, below, is_entered=relative != ""
                    )
                peak = outcome.peak
                moment = (
                    live + peak.activation_bytes,
                    peak.workspace_bytes,
                    weights + peak.weight_bytes,
                )
                weights += outcome.weight_bytes
                live += sum(outcome.returned_bytes) - sum(freed_bytes)
                sizes.update(zip(returned, outcome.returned_bytes, strict=True))
                for number in freed:
                    sizes.pop(number, None)
            elif kind == "x":
                live -= outside[event[1]]
                continue
            else:
                num_bytes = block_bytes(abs(event[2]))
                weights += num_bytes if event[2] > 0 else -num_bytes
                moment = live, 0, weights
            if sum(moment) > highest:
                highest, at_peak = sum(moment), moment
        activations, workspace, weight_peak = at_peak
        return Outcome(
            RoutinePeak(
                activation_bytes=activations,
                workspace_bytes=workspace,
                weight_bytes=weight_peak,
            ),
            tuple(sizes[n] for n in routine.returns),
            weights,
        )
