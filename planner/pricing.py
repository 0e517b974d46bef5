"""What the options of a workload cost: candidates of the search, priced by the cost models.

Under model and sequential offload the placement is the whole pipeline's, so each of those is a
problem of its own; everything else is one problem in which components choose independently.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast, get_args

from pipefit.cost_models.context import context_bytes
from pipefit.cost_models.host_memory import PROCESS_BYTES, HostPeak, host_bytes, host_peak
from pipefit.cost_models.machine import DISK_BYTES_PER_S, Gpu
from pipefit.cost_models.memory import PhaseMemory, simulate
from pipefit.cost_models.placement import (
    GroupOffload,
    ModelOffload,
    OnHost,
    Placement,
    Resident,
    Streaming,
)
from pipefit.cost_models.prediction import Choice, DevicePeak, Latency, PhasePrediction, Prediction
from pipefit.cost_models.residency import model_offload_residency
from pipefit.cost_models.roofline import Attention
from pipefit.cost_models.sharing import Models, figures
from pipefit.cost_models.units import format_bytes, format_seconds
from pipefit.cost_models.workload import Component, Phase, Workload, calls_in_order, variant_key
from pipefit.planner.checkpoints import (
    checkpoints,
    rewriting_bytes,
    rewriting_notes,
    rewritten_bytes,
)
from pipefit.planner.options import (
    Parts,
    allowed_strategies,
    at_device,
    combinations,
    computing,
    dropped_components,
    flags_of,
    is_required,
    offered_parts,
    required_options,
    sensible_placements,
)
from pipefit.planner.policy import Policy
from pipefit.planner.search import Budget, Candidate, Problem, Selection
from pipefit.strategies import BUILT_IN, conflict_of, strategy
from pipefit.strategies import quality_of as option_quality
from pipefit.strategies.cudnn_benchmark import TRIALS_NOTE
from pipefit.strategies.live import CAPTURING_MODES
from pipefit.strategies.prompt_first import ENCODE_PROMPT, PROMPT_NOTE
from pipefit.strategies.strategy import Option, Strategy

Shared: TypeAlias = dict[object, list[Candidate]]
"""Candidates of the pricings of one request: what stores one component in fewer bits changes no
other's, and most of the time of a pricing goes to one component."""

MIXED = "mixed"
"""The problem in which every component chooses its own placement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """What one candidate stands for: the payload of a :class:`Candidate`."""

    choice: Choice
    options: tuple[Option, ...]
    attention: Attention = "native"


class Pricing:
    """Prices every candidate of one workload on one GPU; memory and time are worked out once."""

    def __init__(
        self,
        workload: Workload,
        gpu: Gpu,
        *,
        load_options: Sequence[Option] = (),
        process_options: Sequence[Option] = (),
        held_bytes: Mapping[str, int] | None = None,
        shared: Shared | None = None,
        num_cores: int = 1,
        disk_bytes_per_s: float = DISK_BYTES_PER_S,
        ram_bytes: int | None = None,
        models: Models | None = None,
    ) -> None:
        self._disk_bytes_per_s = disk_bytes_per_s
        self.workload = workload
        self.gpu = gpu
        self.load_options = tuple(load_options)
        """Options that made this workload out of the user's pipeline: a cast, fewer bits."""
        self.process_options = tuple(process_options)
        """Switches of the process under which everything is priced."""
        self.fixed_options = (*self.process_options, *self.load_options)
        """What every candidate has."""
        self._ram_bytes = ram_bytes
        """What is available for text encoders that are dropped, which no sum counts; None: as much
        as they take."""
        self._held_bytes = held_bytes or {}
        self._shared = {} if shared is None else shared
        self._models = models
        models = Models() if models is None else models
        flags = flags_of(process_options)
        self.memory = models.memory(workload, gpu)
        self.latency = models.latency(workload, gpu, flags, num_cores=num_cores)
        self._remembers_prompt = any(o.strategy == "prompt_first" for o in self.process_options)
        self._dropped = dropped_components(workload, self.process_options)
        self._is_beforehand = tuple(p.component in self._dropped for p in workload.phases)
        self.columns = tuple((gpu.index, phase) for phase in workload.phases)
        """(index of the GPU, phase) of every peak."""
        self._root_calls = [event for event in workload.root if event[0] == "c"]
        self._facts_of: dict[str, tuple[object, ...]] = {}
        self._computed: dict[str, list[Parts]] = {}
        self._offered: dict[object, list[tuple[Option, Placement]]] = {}
        self._residency = model_offload_residency(workload)

    # -- problems

    def problems(self, policy: Policy) -> list[Problem]:
        """Return what the search has to solve: one problem a way of placing the pipeline."""
        found = []
        pipeline_wide = allowed_strategies("pipeline_placement", policy)
        required_wide = [one for one in pipeline_wide if is_required(policy, one)]
        per_component = allowed_strategies("placement", policy)
        if not required_wide:
            groups = {
                c.name: self.candidates(c, self.offered(c, policy), policy)
                for c in self.workload.components
            }
            groups = self._encodable(groups, policy)
            if all(groups.values()):
                found.append(self._problem(MIXED, groups))
        if not any(is_required(policy, one) for one in per_component):
            for one in required_wide or pipeline_wide:
                if not all(
                    one.options(c, self.workload, self.gpu) for c in self.workload.components
                ):
                    continue
                option = Option(strategy=one.name)
                placement = one.placement({})
                assert placement is not None
                groups = {
                    c.name: self.candidates(c, [(option, placement)], policy)
                    for c in self.workload.components
                }
                if not self._dropped or all(self._encodable(groups, policy).values()):
                    found.append(self._problem(one.name, groups))
        return found

    def _encodable(
        self, groups: Mapping[str, list[Candidate]], policy: Policy
    ) -> dict[str, list[Candidate]]:
        """Return *groups* without what of text encoders that are dropped the host cannot hold.

        They count in no sum with the rest, and any of those returned can be had together.
        """
        found = dict(groups)
        room_bytes = math.inf if self._ram_bytes is None else self._ram_bytes
        if policy.ram_bytes is not None:
            room_bytes = min(room_bytes, policy.ram_bytes - PROCESS_BYTES)
        needed = {
            name: [self._encoding_ram_bytes(name, c.payload) for c in groups[name]]
            for name in self._dropped
        }
        for name in sorted(needed, key=lambda name: -max(needed[name], default=0)):
            mine = needed.pop(name)
            most_bytes = room_bytes - sum(min(others, default=0) for others in needed.values())
            pairs = zip(groups[name], mine, strict=True)
            found[name] = [c for c, num_bytes in pairs if num_bytes <= most_bytes]
            room_bytes -= max((n for n in mine if n <= most_bytes), default=0)
        return found

    def _encoding_ram_bytes(self, name: str, pick: Pick | None) -> int:
        """Return what a text encoder takes of the host's memory, once back from its placement."""
        component = self.workload.component(name)
        if pick is None:
            return component.weight_bytes
        host = host_bytes(component, pick.choice.placement)
        return self._host_activation_bytes(name, pick.choice.placement) + max(
            component.weight_bytes, host.pageable_bytes + host.pinned_bytes
        )

    def _problem(self, name: str, groups: Mapping[str, list[Candidate]]) -> Problem:
        context = context_bytes(self.gpu)
        return Problem(
            name=name,
            phases=tuple(f"{p.name} ({p.component})" for p in self.workload.phases),
            base_bytes=tuple(carried + context for carried in self.memory.carried_bytes),
            base_s=self.latency.own_seconds(),
            components=groups,
        )

    def offered(self, component: Component, policy: Policy) -> list[tuple[Option, Placement]]:
        """Return the placements that *component* may choose by itself."""
        about: object = f"{component.name} {policy}"
        known = self._offered
        if self._models is not None:
            about, known = ("offered", about, self._facts(component)), self._models.known
        if about not in known:
            allowed = allowed_strategies("placement", policy)
            known[about] = self._placements(component, allowed, policy)
        return known[about]

    def _facts(self, component: Component) -> tuple[object, ...]:
        """Return all that decides about *component*'s candidates, but for policy and placements.

        For pricings whose models are shared: other components may be stored in another way.
        """
        found = self._facts_of.get(component.name)
        if found is None:
            order = calls_in_order(self.workload)
            asked = {component.name}  # ... and those with which it may be loaded
            asked |= {one for one, later in itertools.pairwise(order) if later == component.name}
            found = self._facts_of[component.name] = (
                id(component),
                figures(self.gpu),
                tuple(
                    (name, event[1] if name in asked else None)
                    for name, event in zip(order, self._root_calls, strict=True)
                ),
                tuple(
                    (key, tuple(sorted(replaced.items())))
                    for key, replaced in self.workload.variants.items()
                    if key.split("|")[0] == component.name
                ),
                self._held_bytes.get(component.name, 0),
                self._residency.onloads.get(component.name, 0),
                self._residency.offloads.get(component.name, 0),
            )
        return found

    def _placements(
        self, component: Component, strategies: Sequence[Strategy], policy: Policy
    ) -> list[tuple[Option, Placement]]:
        required = [
            (one, option)
            for one in strategies
            for option in required_options(policy, one, component)
        ]
        if required:
            offered = [(one, option.parameters) for one, option in required]
        else:
            offered = [
                (one, parameters)
                for one in strategies
                for parameters in one.options(component, self.workload, self.gpu)
            ]
        found = []
        for one, parameters in offered:
            if self._dropped and self._is_apart(component.name, parameters.get("load_with")):
                parameters = {k: v for k, v in parameters.items() if k != "load_with"}
            placement = one.placement(parameters)
            assert placement is not None
            option = Option(strategy=one.name, component=component.name, parameters=parameters)
            found.append((option, placement))
        return found

    def _is_apart(self, component: str, other: str | None) -> bool:
        """Whether one of the two is dropped before the other is loaded."""
        return other is not None and (component in self._dropped) != (other in self._dropped)

    def candidates(
        self,
        component: Component,
        placements: Sequence[tuple[Option, Placement]],
        policy: Policy,
        *,
        is_away: bool = False,
    ) -> list[Candidate]:
        """Return *component* under each of *placements*, computing in each way that was traced.

        For a GPU on which the pipeline does not compute (*is_away*) the bytes are left out.
        """
        phases = [p for p in self.workload.phases if p.component == component.name]
        if not phases and all(o.component is not None for o, _ in placements):
            return [self._unused(component)]
        casts = [
            (o.component, o.parameters) for o in self.load_options if o.strategy == "precision"
        ]
        loaded = [o for o in self.load_options if o.component == component.name]
        parts_of = (
            component.name,
            [(o.strategy, o.parameters) for o in loaded],
            [(option.strategy, option.parameters) for option, _ in placements],
            computing(policy),
            [(o.strategy, o.parameters) for o in self.process_options],
            is_away,
        )
        key: object = repr((*parts_of, casts))  # a cast changes what others are given
        known: dict[Any, list[Candidate]] = self._shared
        if self._models is not None:
            held = () if is_away else self.memory.facts(component)
            key, known = (repr(parts_of), self._facts(component), held), self._models.known
        if key not in known:
            about = f"{component.name} {policy}"
            if about not in self._computed:
                self._computed[about] = (
                    combinations(component, self.workload, self.gpu, policy) if phases else [{}]
                )
            known[key] = [
                self._candidate(component, option, placement, parts, is_away=is_away)
                for parts in self._computed[about]
                if not parts or variant_key(component.name, parts) in self.workload.variants
                for option, placement in sensible_placements(
                    placements, offered_parts(parts, policy)
                )
                if not conflict_of(
                    [option, *loaded, *(Option(strategy=n, parameters=parts[n]) for n in parts)]
                )
            ]
        rank = max((option_quality(o).rank for o in self.fixed_options), default=0)
        return [c if c.quality_rank >= rank else replace(c, quality_rank=rank) for c in known[key]]

    def _unused(self, component: Component) -> Candidate:
        """Return the candidate of a component that the call never enters: it stays where it is."""
        return Candidate(
            key="unused",
            phase_bytes=(0,) * len(self.workload.phases),
            call_s=0.0,
            host_bytes=0 if component.name in self._dropped else component.weight_bytes,
            payload=None,
        )

    def _candidate(
        self,
        component: Component,
        option: Option,
        placement: Placement,
        parts: Parts,
        *,
        is_away: bool = False,
    ) -> Candidate:
        variant = variant_key(component.name, parts) if parts else ""
        choice = Choice(placement=placement, variant=variant)
        attention = attention_of(parts)
        host = host_bytes(component, placement)
        options = (
            *(Option(strategy=n, component=component.name, parameters=p) for n, p in parts.items()),
            option,
        )
        counted = [o for o in options if o.strategy != "resident"]
        is_dropped = component.name in self._dropped
        phase_bytes = () if is_away else self.memory.phase_bytes(component, choice)
        if self._dropped and not is_away:  # text encoders and the rest are never there together
            phase_bytes = tuple(
                n if is_beforehand == is_dropped else 0
                for n, is_beforehand in zip(phase_bytes, self._is_beforehand, strict=True)
            )
        return Candidate(
            key=f"{option.strategy}:{sorted(option.parameters.items())}|{variant}",
            phase_bytes=phase_bytes,
            call_s=sum(
                self.phase_seconds(phase, choice, attention, with_range=False)[0]
                for phase in self.workload.phases
                if phase.component == component.name
            ),
            host_bytes=0
            if is_dropped
            else host.pageable_bytes
            + host.pinned_bytes
            + self._held_bytes.get(component.name, 0)
            + self._host_activation_bytes(component.name, placement),
            pinned_bytes=host.pinned_bytes,
            quality_rank=max(option_quality(o).rank for o in options),
            num_strategies=len(counted),
            stock=_stock_way(placement),
            payload=Pick(choice=choice, options=options, attention=attention),
        )

    def phase_seconds(
        self, phase: Phase, choice: Choice, attention: Attention, *, with_range: bool = True
    ) -> tuple[float, float, float, float]:
        """Return (later call, first call, low, high) seconds of one phase."""
        if phase.component in self._dropped:
            return 0.0, 0.0, 0.0, 0.0
        if self._remembers_prompt and phase.name == ENCODE_PROMPT:
            return 0.0, self._phase_seconds(phase, choice, attention, with_range=False)[1], 0.0, 0.0
        return self._phase_seconds(phase, choice, attention, with_range=with_range)

    def _phase_seconds(
        self, phase: Phase, choice: Choice, attention: Attention, *, with_range: bool
    ) -> tuple[float, float, float, float]:
        component = self.workload.component(phase.component)
        if isinstance(choice.placement, Streaming):
            replaced = self.workload.variants[choice.variant] if choice.variant else {}
            streamed = self.latency.streaming_seconds(
                phase, choice.placement, replaced, attention=attention, with_range=with_range
            )
            return streamed.call_s, streamed.first_call_s, streamed.low_s, streamed.high_s
        # Model offload moves a component once, however many phases it has: charged to the first.
        first = next(p for p in self.workload.phases if p.component == phase.component)
        moves = phase == first
        counts = self.routine_counts(phase, choice)
        time = self.latency.placement_seconds(
            component,
            list(counts.items()),
            choice.placement,
            attention=attention,
            num_onloads=self._residency.onloads.get(component.name, 0) if moves else 0,
            num_offloads=self._residency.offloads.get(component.name, 0) if moves else 0,
        )
        compiling_s = self.latency.compiling_seconds(counts) if choice.variant else 0.0
        return time.call_s, time.first_call_s + compiling_s, time.low_s, time.high_s

    def routine_counts(self, phase: Phase, choice: Choice) -> dict[int, int]:
        """Return the routines that the calls of *phase* run, and how often each."""
        counts: dict[int, int] = {}
        for ordinal in phase.calls:
            routine = self._root_calls[ordinal][1]
            if choice.variant:
                routine = self.workload.variants[choice.variant].get(routine, routine)
            counts[routine] = counts.get(routine, 0) + 1
        return counts

    # -- predictions

    def replay(
        self, picks: Mapping[str, Pick | None], budget_bytes: Budget = None
    ) -> tuple[PhaseMemory, ...]:
        """Replay one configuration through the allocator model, held to *budget_bytes* if given."""
        if isinstance(budget_bytes, Mapping):
            budget_bytes = budget_bytes[self.gpu.index]
        choices = self._choices(picks)
        if not self._dropped:
            return simulate(self.workload, choices, self.gpu, budget_bytes=budget_bytes)
        # Of what is not there yet, or no longer, only results are on the GPU: what others read.
        away = Choice(placement=OnHost())
        beforehand, later = (
            simulate(
                self.workload,
                {n: c if (n in self._dropped) == is_first else away for n, c in choices.items()},
                self.gpu,
                budget_bytes=budget_bytes,
            )
            for is_first in (True, False)
        )
        return tuple(
            one if is_first else other
            for one, other, is_first in zip(beforehand, later, self._is_beforehand, strict=True)
        )

    def used(self, picks: Mapping[str, Pick | None]) -> tuple[int, ...]:
        """Return the GPUs that hold something of *picks*: the only one."""
        return (self.gpu.index,)

    def _choices(self, picks: Mapping[str, Pick | None]) -> dict[str, Choice]:
        idle = Choice(placement=ModelOffload())  # never called, so never brought in
        return {name: pick.choice if pick else idle for name, pick in picks.items()}

    def prediction(
        self, picks: Mapping[str, Pick | None], peaks: Sequence[PhaseMemory]
    ) -> Prediction:
        """Return what *picks*, with the replayed *peaks*, need."""
        device = self.gpu.index
        phases = []
        routines: set[int] = set()
        first_s = low_s = high_s = call_s = self.latency.own_seconds()
        for phase, peak in zip(self.workload.phases, peaks, strict=True):
            pick = picks[phase.component]
            assert pick is not None
            seconds, phase_first_s, phase_low_s, phase_high_s = self.phase_seconds(
                phase, pick.choice, pick.attention
            )
            call_s, first_s = call_s + seconds, first_s + phase_first_s
            low_s, high_s = low_s + phase_low_s, high_s + phase_high_s
            routines.update(self.routine_counts(phase, pick.choice))
            phases.append(phase_prediction(phase, peak, device=device, seconds=seconds))
        host = self._host_peak(picks)
        loading_bytes = self.memory.loading_bytes()
        return Prediction(
            peak_vram=(device_peak(device, peaks, loading_bytes),),
            phases=tuple(phases),
            latency=Latency(
                first_call_s=first_s + self.latency.trial_seconds(routines),
                call_s=call_s,
                low_s=low_s,
                high_s=high_s,
            ),
            host_ram_bytes=host.peak_bytes,
            pinned_bytes=host.pinned_bytes,
            disk_bytes=host.disk_bytes + rewritten_bytes(self.workload, self.process_options),
            assumptions=(
                *self.workload.assumptions,
                *self.notes(picks, first_s - call_s),
                *loading_notes(loading_bytes),
                *host_notes(host),
            ),
        )

    def _host_peak(self, picks: Mapping[str, Pick | None]) -> HostPeak:
        """Return the host's peak; text encoders that are dropped are never there with the rest."""

        def of(components: Sequence[Component]) -> HostPeak:
            here = {c.name: pick for c in components if (pick := picks[c.name])}
            return host_peak(
                components,
                {name: pick.choice.placement for name, pick in here.items()},
                [phase.component for phase in self.workload.phases if phase.component in here],
                stored_bytes={k: v for k, v in self.stored_bytes().items() if k in here},
                checkpoints=checkpoints(self.workload, self.process_options),
                rewriting_bytes=rewriting_bytes(self.workload, self.process_options),
                activation_bytes=self.host_activation_bytes(here),
            )

        components = self.workload.components
        if not self._dropped:
            return of(components)
        encoders = [c for c in components if c.name in self._dropped]
        first, later = of(encoders), of([c for c in components if c.name not in self._dropped])
        # Undoing their placement brings them to the host once more; torch keeps what it pinned.
        undone_bytes = PROCESS_BYTES + sum(c.weight_bytes for c in encoders)
        return replace(
            later,
            load_bytes=max(
                first.peak_bytes,
                undone_bytes + first.pinned_bytes,
                later.load_bytes + first.pinned_bytes,
            ),
            call_bytes=later.call_bytes + first.pinned_bytes,
            pinned_bytes=later.pinned_bytes + first.pinned_bytes,
            disk_bytes=max(first.disk_bytes, later.disk_bytes),
        )

    def notes(self, picks: Mapping[str, Pick | None], first_more_s: float) -> tuple[str, ...]:
        """Say what the first call does, and what is not counted, under *picks*."""
        compiled = {
            str(option.component): option.parameters
            for pick in picks.values()
            for option in (pick.options if pick else ())
            if option.strategy == "compile"
        }
        trials = (TRIALS_NOTE,) if self.latency.flags.cudnn_benchmark else ()
        prompts = (PROMPT_NOTE,) if self._remembers_prompt else ()
        if self._dropped:
            prompts = (self._drop_note(picks),)
        shards = rewriting_notes(self.workload, self.process_options, self._disk_bytes_per_s)
        return (*_compiling_notes(compiled, first_more_s), *trials, *prompts, *shards)

    def _drop_note(self, picks: Mapping[str, Pick | None]) -> str:
        seconds = sum(
            self._phase_seconds(phase, pick.choice, pick.attention, with_range=False)[1]
            for phase in self.workload.phases
            if phase.component in self._dropped and (pick := picks[phase.component])
        )
        return (
            f"The prompt is encoded while loading ({format_seconds(seconds)} once the text "
            f"encoders are read), with only {' and '.join(sorted(self._dropped))} in memory; they "
            "are dropped then, which cannot be undone: another prompt needs another load."
        )

    def host_activation_bytes(self, picks: Mapping[str, Pick | None]) -> int:
        """Return what the largest call takes of those that the CPU computes."""
        return max(
            self._host_activation_bytes(name, pick.choice.placement) if pick else 0
            for name, pick in picks.items()
        )

    def _host_activation_bytes(self, component: str, placement: Placement) -> int:
        """Return what the largest call of *component* takes, where the CPU computes it."""
        if not isinstance(placement, OnHost):
            return 0
        ordinals = (n for p in self.workload.phases if p.component == component for n in p.calls)
        routines = {self._root_calls[ordinal][1] for ordinal in ordinals}
        peaks = (self.memory.activation_peak(one).activation_bytes for one in routines)
        return max(peaks, default=0)

    def stored_bytes(self) -> dict[str, int]:
        """Return what lies on disk for the components that are cast to 16 bits after it is read."""
        return {
            component.name: 2 * component.weight_bytes
            for component in self.workload.components
            if any(
                o.strategy == "precision" and o.component == component.name
                for o in self.load_options
            )
        }

    def picks(self, selection: Selection) -> dict[str, Pick | None]:
        """Return what the selection chose for each component; None where it is not called."""
        return {name: candidate.payload for name, candidate in selection.choices.items()}

    def exactly(self, options: Sequence[Option]) -> dict[str, Pick | None]:
        """Return the one configuration that *options* describe; what they leave open is resident.

        They have passed :func:`check_required`, so that no two of them contradict each other.
        """
        picks: dict[str, Pick | None] = {}
        for component in self.workload.components:
            parts: dict[str, Mapping[str, Any]] = {}
            option, placement = Option(strategy="resident", component=component.name), None
            device: int | None = None
            for one in BUILT_IN:
                policy = Policy(budget_bytes={}, required=tuple(options))
                for asked in required_options(policy, one, component, self.workload, self.gpu):
                    if one.kind == "compute":
                        parts[one.name] = asked.parameters
                    elif one.kind == "device" and one.placement(asked.parameters) is None:
                        device = asked.parameters["device"]
                    elif one.kind == "device" or "placement" in one.kind:
                        option = replace(asked, component=component.name)
                        placement = one.placement(asked.parameters)
            variant = variant_key(component.name, parts) if parts else ""
            picks[component.name] = Pick(
                choice=Choice(placement=placement or Resident(), variant=variant, device=device),
                options=(
                    *(
                        Option(strategy=n, component=component.name, parameters=p)
                        for n, p in parts.items()
                    ),
                    *([] if device is None else [at_device(component.name, device)]),
                    option,
                ),
                attention=attention_of(parts),
            )
        return picks


def _stock_way(placement: Placement) -> str:
    """Name the way of diffusers that *placement* is; empty for what only pipefit does.

    Groups are the same way whatever blocks a component has.
    """
    if isinstance(placement, (Streaming, OnHost)):
        return ""
    if isinstance(placement, GroupOffload):
        placement = replace(placement, block_modules=())
    return repr(placement)


def _compiling_notes(compiled: Mapping[str, Mapping[str, Any]], more_s: float) -> tuple[str, ...]:
    if not compiled:
        return ()
    names = " and ".join(compiled)
    notes = [
        f"The first call compiles {names}: {format_seconds(more_s)} more with nothing cached.",
        "Memory includes what inductor takes to time kernels in the first call, nothing cached.",
    ]
    modes = {str(parameters.get("mode")) for parameters in compiled.values()}
    if any(mode.startswith("max-autotune") for mode in modes):
        notes.append("How long max-autotune tries kernels out is not known and comes on top.")
    if modes.intersection(CAPTURING_MODES):
        notes.append("CUDA graphs keep the memory that they reserve from everything else.")
    return tuple(notes)


def phase_prediction(
    phase: Phase, peak: PhaseMemory, *, device: int, seconds: float
) -> PhasePrediction:
    """Return a phase's row for one GPU."""
    return PhasePrediction(
        name=phase.name,
        component=phase.component,
        entry=phase.entry,
        calls=phase.num_calls,
        device=device,
        seconds=seconds,
        allocated_bytes=peak.allocated_bytes,
        weights_bytes=peak.weight_bytes,
        activation_bytes=peak.activation_bytes,
        workspace_bytes=peak.workspace_bytes,
        carried_bytes=peak.carried_bytes,
        reserved_bytes=peak.reserved_bytes,
        process_bytes=peak.process_bytes,
    )


def device_peak(device: int, peaks: Sequence[PhaseMemory], loading_bytes: int) -> DevicePeak:
    """Return the largest of the *peaks* of one GPU, or what loading needs there."""
    worst = max(peaks, key=lambda peak: peak.promised_bytes)
    process_bytes = max(
        loading_bytes + worst.context_bytes, *(peak.process_bytes for peak in peaks)
    )
    return DevicePeak(
        device=device,
        allocated_bytes=max(loading_bytes, *(peak.allocated_bytes for peak in peaks)),
        reserved_bytes=max(loading_bytes, *(peak.reserved_bytes for peak in peaks)),
        process_bytes=process_bytes,
        context_bytes=worst.context_bytes,
        slack_bytes=max(0, worst.promised_bytes - process_bytes),
        loading_bytes=loading_bytes,
    )


def loading_notes(loading_bytes: int) -> tuple[str, ...]:
    if not loading_bytes:
        return ()
    return (
        f"{format_bytes(loading_bytes)} of weights are quantised on the GPU and lie there together "
        "once the pipeline is loaded, until an offload takes them away.",
    )


def host_notes(host: HostPeak) -> tuple[str, ...]:
    if host.load_bytes <= host.call_bytes:
        return ()
    return (
        "Host RAM peaks while the pipeline loads, with the weight files that are read, whose pages "
        f"the kernel drops when RAM is short; calls take {format_bytes(host.call_bytes)}.",
    )


def attention_of(parts: Parts) -> Attention:
    """Return which attention kernel *parts* ask for."""
    backend = parts.get("attention", {}).get("backend", "native")
    if backend not in get_args(Attention):
        # Of packages: flash attention, or priced as it for want of published rows (SageAttention).
        return "flash"
    return cast(Attention, backend)


def plan_options(
    fixed_options: Sequence[Option], picks: Mapping[str, Pick | None]
) -> tuple[Option, ...]:
    """Return the options of a configuration, each once, in the order of application.

    *fixed_options* are those of its pricing.
    """
    found: list[Option] = list(fixed_options)
    for name, pick in picks.items():
        if pick is None:
            continue
        for option in pick.options:
            wide = strategy(option.strategy).kind == "pipeline_placement"
            placed = replace(option, component=None if wide else name)
            if placed not in found:
                found.append(placed)
    order = {one.name: i for i, one in enumerate(BUILT_IN)}
    return tuple(sorted(found, key=lambda o: (order[o.strategy], o.component or "")))
