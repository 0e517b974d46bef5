"""Peak memory of a pipeline call, twice: fast and additive for the search, replayed for the plan.

allocated = weights on the GPU + activations + library workspace + carried tensors

The additive model charges each component, phase by phase, for its own choice alone, so that the
search can add choices up; it counts in 512-byte blocks and takes the worst call of each phase. The
replay (:func:`simulate`) drives every allocation through a model of torch's allocator and is what
a plan states. Easily overlooked: for model offload the additive model assumes that all components
are under it; where some are not, an eviction may come later, and only the replay sees that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from pipefit.cost_models.allocator import allocated_bytes, block_bytes
from pipefit.cost_models.context import context_bytes
from pipefit.cost_models.devices import part_peak_bytes, split_bytes
from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.placement import (
    GroupOffload,
    ModelOffload,
    OnHost,
    Placement,
    Resident,
    SequentialOffload,
    Split,
    Streaming,
)
from pipefit.cost_models.prediction import Choice
from pipefit.cost_models.replay import Moment, Replay
from pipefit.cost_models.residency import (
    GroupHooks,
    Groups,
    load_order,
    model_offload_residency,
    offload_groups,
    sequential_groups,
    sequential_resident_bytes,
)
from pipefit.cost_models.storage import QUANTISED_ON_GPU
from pipefit.cost_models.streaming import StreamedBytes, streamed_bytes, turns
from pipefit.cost_models.timeline import Outcome, RoutinePeak, Timeline
from pipefit.cost_models.workload import Component, Workload, calls_in_order
from pipefit.cost_models.workspace import cublas_bytes

SLACK_SHARE = 0.06
"""Share of reserved memory above the weights that a plan keeps in hand for fragmentation.

Chosen: replayed memory plus this covers the published reserved and process peaks that pipefit
predicts (docs/accuracy.md), except three stages of LTX-2.3 on a development version (up to 0.6 GiB
short), FLUX.1-dev with quanto's int4 (0.8) and with offloaded q4_1 (0.1), and leaves of
Z-Image-Turbo on recorded streams, whose weights pile up by the pace of host and GPU (0.5).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseMemory:
    """Peak of one phase; weights, activations, workspace and carried add up to allocated."""

    allocated_bytes: int
    weight_bytes: int
    activation_bytes: int
    workspace_bytes: int
    """Library scratch at the peak, the workspace that cuBLAS keeps included."""
    carried_bytes: int
    reserved_bytes: int
    slack_bytes: int
    """What fragmentation may add: :data:`SLACK_SHARE`; no part of ``process_bytes``."""
    context_bytes: int

    @property
    def process_bytes(self) -> int:
        """What the driver is expected to show for the process."""
        return self.reserved_bytes + self.context_bytes

    @property
    def promised_bytes(self) -> int:
        """What a budget is compared with: the process and the slack kept in hand."""
        return self.process_bytes + self.slack_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _RootCall:
    """Equal calls of a component in a phase, with what the pipeline itself holds around them."""

    phase: int
    routine: int
    live_bytes: int
    """The pipeline's own tensors, and the cuBLAS workspace, when a call begins; the most."""
    outside_bytes: tuple[int, ...]
    """Those of its tensors that go while the call runs."""
    added_bytes: tuple[tuple[str, int], ...]
    """By how much weights differ from what was traced as loaded, by component."""
    gap_peak_bytes: int
    """The most that the pipeline's tensors, its kernels and added weights take until the next call;
    before the first call, too."""


class MemoryModel:
    """Everything that follows from one workload on one GPU; keeps what it has added up.

    Use one for all questions about a workload: the search asks thousands.
    """

    def __init__(self, workload: Workload, gpu: Gpu, *, timeline: Timeline | None = None) -> None:
        self.workload = workload
        self.timeline = timeline or Timeline(workload, gpu)
        self._weight_bytes = {
            component.name: allocated_bytes(load_order(component))
            for component in workload.components
        }
        self._residency = model_offload_residency(workload)
        self.cublas_bytes = cublas_bytes(gpu, workload.versions.get("torch", ""))
        """cuBLAS's workspace, which stays once it is there."""
        self._calls = _distinct_calls(workload, self.timeline, self.cublas_bytes)
        self.carried_bytes = tuple(max(call.live_bytes for call in calls) for calls in self._calls)
        """What the pipeline itself holds in each phase at the most, cuBLAS's workspace included."""
        self._added_bytes = [
            {
                component.name: max(_added_to(component, call) for call in calls)
                for component in workload.components
            }
            for calls in self._calls
        ]
        self._groups: dict[tuple[str, Placement], Groups] = {}
        self._streamed_bytes: dict[tuple[str, Placement], StreamedBytes] = {}
        self._order = calls_in_order(workload)
        self._turns: dict[tuple[str, str | None], tuple[bool, ...]] = {}
        self._streamed_outcomes: dict[object, Outcome] = {}
        self._part_peaks: dict[object, int] = {}

    def facts(self, component: Component) -> tuple[object, ...]:
        """Return all that :meth:`phase_bytes` of *component* depends on besides its choice.

        Models of workloads that are united agree in the bytes where they agree in this.
        """
        own = [p.component == component.name for p in self.workload.phases]
        return (
            id(self.timeline),
            tuple(calls for calls, is_own in zip(self._calls, own, strict=True) if is_own),
            tuple(n for n, is_own in zip(self.carried_bytes, own, strict=True) if is_own),
            tuple(
                (added[component.name], sum(added.values()) if is_own else 0)
                for added, is_own in zip(self._added_bytes, own, strict=True)
            ),
            tuple(component.name in held for held in self._residency.phases),
        )

    def loading_bytes(self) -> int:
        """Return the weights on the GPU once all components are loaded and none is placed yet.

        ``from_pretrained`` loads them all before it returns, so that what its loader quantises on
        the GPU is there together, whatever is offloaded afterwards. The layer that is being
        quantised, for a moment there unquantised too, is not counted.
        """
        return sum(
            self._weight_bytes[component.name]
            for component in self.workload.components
            if component.traits.get("quantized_by") in QUANTISED_ON_GPU
        )

    def activation_peak(self, routine: int) -> RoutinePeak:
        """Return the peak of one call of *routine* above what is alive when it begins."""
        outside = (0,) * self.workload.routines[routine].num_outside
        return self.timeline.outcome(routine, outside).peak

    def activation_bytes(self, component: Component, choice: Choice) -> int:
        """Return the most that any call of *component* takes besides weights; 0 without calls."""
        return max(
            (
                self.timeline.outcome(*self._routine(choice, call)).peak.peak_bytes
                for phase, calls in zip(self.workload.phases, self._calls, strict=True)
                if phase.component == component.name
                for call in calls
            ),
            default=0,
        )

    def streamed_peak(
        self, component: str, routine: int, groups: Groups, *, look_ahead: bool
    ) -> RoutinePeak:
        """Return the peak of a call of *component* that brings its weights along in *groups*.

        With *look_ahead* the call is a later one, in which each group may bring the next; without,
        it is a first one. The weights on the GPU are part of the peak.
        """
        outside = (0,) * self.workload.routines[routine].num_outside
        return self._later_outcome(
            component, routine, outside, groups, 1.0, look_ahead=look_ahead
        ).peak

    def phase_bytes(self, component: Component, choice: Choice) -> tuple[int, ...]:
        """Return what *component* adds to each phase under *choice*.

        The peak allocated in a phase is ``carried_bytes`` of it plus this of all components.
        """
        return tuple(
            self._active_bytes(component, choice, i)
            if phase.component == component.name
            else self._idle_bytes(component, choice, i)
            for i, phase in enumerate(self.workload.phases)
        )

    def phase_bytes_on(
        self, component: Component, choice: Choice, device: int, main: int
    ) -> tuple[int, ...]:
        """Return what *component* adds to each phase on *device*, a GPU like the model's own.

        The pipeline computes on *main*.

        The peak allocated there is this of all components, plus ``carried_bytes`` on *main* and
        ``cublas_bytes`` on others.
        """
        placement = choice.placement
        home = main if choice.device is None else choice.device
        own = [phase.component == component.name for phase in self.workload.phases]
        if isinstance(placement, Split):
            weight_bytes = allocated_bytes(split_bytes(component, placement, device))
            return tuple(
                weight_bytes + (self._part_bytes(component, choice, i, device) if is_own else 0)
                for i, is_own in enumerate(own)
            )
        if home == main == device:
            return self.phase_bytes(component, choice)
        if device == home:
            return tuple(
                max(
                    self._call_bytes(component, choice, call)
                    + self.workload.input_bytes.get(call.routine, 0)
                    for call in self._calls[i]
                )
                if is_own
                else self._idle_bytes(component, choice, i)
                for i, is_own in enumerate(own)
            )
        if device != main:
            return (0,) * len(own)
        # Its results come, and what the pipeline makes of them.
        return tuple(
            max(0, *(call.gap_peak_bytes - self.carried_bytes[i] for call in self._calls[i]))
            if is_own
            else 0
            for i, is_own in enumerate(own)
        )

    def _part_bytes(self, component: Component, choice: Choice, phase: int, device: int) -> int:
        assert isinstance(choice.placement, Split)
        key = component.name, choice, phase, device
        if key not in self._part_peaks:
            routines = {self._routine(choice, call)[0] for call in self._calls[phase]}
            self._part_peaks[key] = max(
                part_peak_bytes(self.timeline, component, choice.placement, device, routine)
                for routine in routines
            )
        return self._part_peaks[key]

    def _active_bytes(self, component: Component, choice: Choice, phase: int) -> int:
        """Return the worst of the phase's calls and of the gaps after them, above the carried."""
        added = self._added_bytes[phase]
        elsewhere_bytes = sum(added.values()) - added[component.name]
        resting_bytes = self._resting_bytes(component, choice)
        needed = [
            max(
                call.live_bytes + self._call_bytes(component, choice, call),
                call.gap_peak_bytes + resting_bytes - elsewhere_bytes,
            )
            for call in self._calls[phase]
        ]
        return max(0, max(needed) - self.carried_bytes[phase])

    def _idle_bytes(self, component: Component, choice: Choice, phase: int) -> int:
        placement = choice.placement
        if isinstance(placement, ModelOffload):
            if component.name not in self._residency.phases[phase]:
                return 0
        elif isinstance(placement, Streaming):
            streamed = self._streaming(component, placement)
            about = component.name, placement.load_with
            if about not in self._turns:
                self._turns[about] = turns(self._order, *about)
            here = self._turns[about]
            is_loaded = any(here[call] for call in self.workload.phases[phase].calls)
            return streamed.loaded_bytes if is_loaded else streamed.idle_bytes
        elif not isinstance(placement, Resident):
            return self._resting_bytes(component, choice)
        return self._weight_bytes[component.name] + self._added_bytes[phase][component.name]

    def _resting_bytes(self, component: Component, choice: Choice) -> int:
        """Return the traced weights that stay on the GPU right after a call of *component*."""
        placement = choice.placement
        if isinstance(placement, OnHost):
            return 0
        if isinstance(placement, SequentialOffload):
            return allocated_bytes(sequential_resident_bytes(component))
        if isinstance(placement, Streaming):
            return self._streaming(component, placement).loaded_bytes
        if not isinstance(placement, GroupOffload):
            return self._weight_bytes[component.name]
        if not placement.use_stream:
            return 0
        # A module that is called twice in a forward prefetches its successor twice; nobody drops
        # the second copy before the next forward.
        return max(
            (
                self._streamed(component, choice, call).weight_bytes
                for phase, calls in zip(self.workload.phases, self._calls, strict=True)
                if phase.component == component.name
                for call in calls
            ),
            default=0,
        )

    def _call_bytes(self, component: Component, choice: Choice, call: _RootCall) -> int:
        """Return weights, activations and workspace of one call at their highest."""
        placement = choice.placement
        if isinstance(placement, OnHost):
            return sum(self.timeline.outcome(*self._routine(choice, call)).returned_bytes)
        if isinstance(placement, SequentialOffload):
            peak_bytes = self._streamed(component, choice, call).peak.peak_bytes
            return peak_bytes + self._resting_bytes(component, choice)
        if isinstance(placement, GroupOffload):
            return self._streamed(component, choice, call).peak.peak_bytes
        weight_bytes = self._weight_bytes[component.name]
        if isinstance(placement, Streaming):
            weight_bytes = self._streaming(component, placement).loaded_bytes
        weight_bytes += _added_to(component, call)
        return weight_bytes + self.timeline.outcome(*self._routine(choice, call)).peak.peak_bytes

    def _routine(self, choice: Choice, call: _RootCall) -> tuple[int, tuple[int, ...]]:
        """Return the routine that runs under *choice*, and the outside buffers it frees."""
        routine = call.routine
        if choice.variant:
            routine = self.workload.variants[choice.variant].get(routine, routine)
        return routine, call.outside_bytes[: self.workload.routines[routine].num_outside]

    def _streamed(self, component: Component, choice: Choice, call: _RootCall) -> Outcome:
        """Return a later one of equal calls that bring their weights along.

        Its weights are all that such calls hold, also at the end.
        """
        placement = choice.placement
        routine, outside = self._routine(choice, call)
        added_bytes = _added_to(component, call)
        key = component.name, placement, routine, outside, added_bytes
        found = self._streamed_outcomes.get(key)
        if found is None:
            weight_bytes = component.weight_bytes
            ratio = 1 + added_bytes / weight_bytes if weight_bytes else 1.0
            groups, known = self._groups_of(component, placement), self.timeline.streamed_outcomes
            about = component.name, routine, outside, groups, ratio
            found = known.get(about)
            if found is None:
                found = known[about] = self._later_outcome(
                    component.name, routine, outside, groups, ratio, look_ahead=True
                )
            self._streamed_outcomes[key] = found
        return found

    def _streaming(self, component: Component, placement: Streaming) -> StreamedBytes:
        key = component.name, placement
        if key not in self._streamed_bytes:
            self._streamed_bytes[key] = streamed_bytes(component, placement)
        return self._streamed_bytes[key]

    def _groups_of(self, component: Component, placement: Placement) -> Groups:
        key = component.name, placement
        if key not in self._groups:
            self._groups[key] = (
                offload_groups(component, placement)
                if isinstance(placement, GroupOffload)
                else sequential_groups(component)
            )
        return self._groups[key]

    def _later_outcome(
        self,
        component: str,
        routine: int,
        outside: tuple[int, ...],
        groups: Groups,
        ratio: float,
        *,
        look_ahead: bool,
    ) -> Outcome:
        hooks = GroupHooks(groups)
        # The first call records the order, the second prefetches by it, and what it leaves behind
        # is there when the third begins.
        held_bytes = left_bytes = 0
        for number in range(3 if look_ahead and groups.recorders else 1):
            if number == 2 and not left_bytes:
                break
            held_bytes = left_bytes
            outcome = self.timeline.streamed_outcome(
                routine, hooks, component, outside_bytes=outside, weight_ratio=ratio
            )
            left_bytes += outcome.weight_bytes
        peak = replace(outcome.peak, weight_bytes=outcome.peak.weight_bytes + held_bytes)
        return Outcome(peak, outcome.returned_bytes, left_bytes)


def simulate(
    workload: Workload,
    choices: Mapping[str, Choice],
    gpu: Gpu,
    *,
    budget_bytes: int | None = None,
    main: int | None = None,
) -> tuple[PhaseMemory, ...]:
    """Replay the whole call and return the peak of each phase.

    *choices* names every component of the workload. Allocated and reserved peaks of a phase need
    not fall on the same moment; the parts are those of the allocated peak.

    torch gives cached segments back before it runs out of memory. *budget_bytes* says where that
    is: what the process is held to (``torch.cuda.set_per_process_memory_fraction``), slack and
    context included; by default what other processes leave of the GPU. A phase whose
    ``promised_bytes`` are above it does not fit.

    They give memory back before the process takes what slack is to leave free. The process itself
    does so later, and then other gaps stay between what it keeps: what would fit into less must
    fit into *budget_bytes* too.

    *main* is the index of the GPU on which the pipeline computes, where *choices* spread over
    several; the peaks are then those of *gpu* alone.
    """
    context = context_bytes(gpu)
    if budget_bytes is None:
        budget_bytes = gpu.total_bytes - gpu.other_bytes

    def held_to(most_bytes: int) -> Replay:
        run = Replay(workload, choices, gpu, capacity_bytes=most_bytes - context, main=main)
        run.run()
        return run

    run = held_to(flushing_bytes(gpu, budget_bytes))
    peaks = _phases(run, context)
    keeps_slack = all(peak.promised_bytes <= budget_bytes for peak in peaks)
    if not keeps_slack or not run.allocator.num_alloc_retries:
        return peaks
    later = _phases(held_to(budget_bytes), context)
    keeps_budget = all(peak.process_bytes <= budget_bytes for peak in later)
    return peaks if keeps_budget else later


def _phases(run: Replay, context: int) -> tuple[PhaseMemory, ...]:
    return tuple(
        PhaseMemory(
            allocated_bytes=peak.allocated_bytes,
            weight_bytes=peak.weight_bytes,
            activation_bytes=peak.allocated_bytes - sum(peak[1:]),
            workspace_bytes=peak.workspace_bytes,
            carried_bytes=peak.carried_bytes,
            reserved_bytes=reserved_bytes,
            slack_bytes=_slack_bytes(peak, reserved_bytes, grown_bytes),
            context_bytes=context,
        )
        for peak, reserved_bytes, grown_bytes in zip(
            run.peaks, run.peak_reserved_bytes, run.grown_reserved_bytes, strict=True
        )
    )


def _slack_bytes(peak: Moment, reserved_bytes: int, grown_bytes: int) -> int:
    """Return what fragmentation may take above *reserved_bytes*.

    What the phase before left cached and this one does not need is given back when memory is short,
    so it asks for no slack of its own.
    """
    needed = (
        held + SLACK_SHARE * (held - peak.weight_bytes)
        for held in (peak.allocated_bytes, grown_bytes)
        if held
    )
    return max(0, round(max(needed, default=0) - reserved_bytes))


def flushing_bytes(gpu: Gpu, budget_bytes: int) -> int:
    """Return what a process held to *budget_bytes* reaches before cached memory is given back.

    Less than the budget by the slack, so that a peak with its slack keeps it.
    """
    context = context_bytes(gpu)
    return context + int((budget_bytes - context) / (1 + SLACK_SHARE))


def _added_to(component: Component, call: _RootCall) -> int:
    return next((added for name, added in call.added_bytes if name == component.name), 0)


def _distinct_calls(
    workload: Workload, timeline: Timeline, cublas_workspace_bytes: int
) -> tuple[tuple[_RootCall, ...], ...]:
    """Return the calls of each phase, equal ones merged into their worst case."""
    phases: list[dict[object, _RootCall]] = [{} for _ in workload.phases]
    for call in _root_calls(workload, timeline, cublas_workspace_bytes):
        key = call.routine, call.outside_bytes, call.added_bytes
        other = phases[call.phase].get(key, call)
        phases[call.phase][key] = replace(
            call,
            live_bytes=max(call.live_bytes, other.live_bytes),
            gap_peak_bytes=max(call.gap_peak_bytes, other.gap_peak_bytes),
        )
    return tuple(tuple(calls.values()) for calls in phases)


def _root_calls(
    workload: Workload, timeline: Timeline, cublas_workspace_bytes: int
) -> Iterator[_RootCall]:
    """Walk the pipeline's own frame as traced, call by call."""
    phase_of = {call: i for i, phase in enumerate(workload.phases) for call in phase.calls}
    sizes: dict[int, int] = {}
    live = gap_peak = num_calls = 0
    has_cublas = False
    added: dict[str, int] = {}
    pending: _RootCall | None = None
    for event in workload.root:
        kind = event[0]
        scratch = 0
        if kind == "a":
            sizes[event[1]] = block_bytes(event[2])
            live += sizes[event[1]]
        elif kind == "f":
            live -= sizes.pop(event[1])
        elif kind == "k":
            scratch = timeline.scratch_bytes[event[1]]
        elif kind == "w":
            sign = 1 if event[2] > 0 else -1
            added[event[1]] = added.get(event[1], 0) + sign * block_bytes(abs(event[2]))
        else:
            if pending is not None:
                yield replace(pending, gap_peak_bytes=gap_peak)
                gap_peak = 0
            _, routine, _, returned, freed = event
            if not has_cublas and timeline.launches_gemm(routine):
                has_cublas = True
                live += cublas_workspace_bytes
            outside = tuple(sizes.pop(n) for n in freed)
            pending = _RootCall(
                phase=phase_of[num_calls],
                routine=routine,
                live_bytes=live,
                outside_bytes=outside,
                added_bytes=tuple(added.items()),
                gap_peak_bytes=0,
            )
            num_calls += 1
            outcome = timeline.outcome(routine, outside)
            sizes.update(zip(returned, outcome.returned_bytes, strict=True))
            live += sum(outcome.returned_bytes) - sum(outside)
        gap_peak = max(gap_peak, live + scratch + sum(added.values()))
    if pending is not None:
        yield replace(pending, gap_peak_bytes=gap_peak)
