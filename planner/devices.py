"""Candidates on several GPUs: where each component computes, and how its weights lie there.

One GPU is the *main* one: there the pipeline makes its tensors, and there the component computes
that is called most, the denoiser, so that nothing travels in every step. Each GPU may be the main
one, so each makes a problem of its own; in it every other component chooses a GPU together with its
placement there, and a denoiser that fits no single GPU may be split by its blocks. Every GPU has a
column for each phase and keeps its own budget.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipefit.cost_models.context import context_bytes
from pipefit.cost_models.devices import (
    between_seconds,
    blocks_of_split,
    places_of,
    streamed_parts,
)
from pipefit.cost_models.host_memory import host_bytes, host_peak
from pipefit.cost_models.machine import Gpu, Machine
from pipefit.cost_models.memory import SLACK_SHARE, PhaseMemory, simulate
from pipefit.cost_models.placement import (
    MAX_BLOCK_BYTES,
    ModelOffload,
    Placement,
    Resident,
    Split,
)
from pipefit.cost_models.prediction import Choice, Latency, Prediction
from pipefit.cost_models.roofline import Attention
from pipefit.cost_models.sharing import Models, figures, united
from pipefit.cost_models.transfers import link_rates
from pipefit.cost_models.units import MIB
from pipefit.cost_models.workload import Component, Phase, Workload, returned_bytes
from pipefit.errors import InvalidRequest
from pipefit.planner.checkpoints import checkpoints, rewriting_bytes, rewritten_bytes
from pipefit.planner.options import at_device, process_options
from pipefit.planner.policy import Policy
from pipefit.planner.pricing import (
    MIXED,
    Pick,
    Pricing,
    device_peak,
    host_notes,
    loading_notes,
    phase_prediction,
)
from pipefit.planner.search import Budget, Candidate, Problem, Selection
from pipefit.planner.trace_cache import without_garbage_collection
from pipefit.planner.workloads import Observed
from pipefit.strategies import conflict_of, strategy
from pipefit.strategies.strategy import Conditional, Option
from pipefit.strategies.streaming import immovable

ROUNDING_BYTES = 64 * MIB
"""What a split leaves free on each GPU for segments of torch's allocator that are not full; our
choice, three of its 20 MiB: without, the replay refutes the tightest split on one GPU or other."""


OFFERED_ROUNDS = (1, 4, 12)
"""In how many turns the GPUs of a split compute that streams; our choice: a slot or two are filled
in a turn of the others, and each turn costs a copy of what travels."""

FEW_GPUS = 4
"""Unlike GPUs that are all tried as the main one; our choice: each is priced in a second, and more
of them leave room enough for whatever the best of them has not."""


@dataclass(slots=True)
class SharedPrices:
    """What is worked out once for all main GPUs, by figures of a GPU and by component."""

    pricings: dict[str, Pricing] = field(default_factory=dict)
    placements: dict[str, Sequence[tuple[Option, Placement]]] = field(default_factory=dict)
    away: dict[tuple[str, str], Sequence[Candidate]] = field(default_factory=dict)


class DevicePricing:
    """Prices every candidate of one workload on several GPUs, the pipeline on one of them.

    The same questions are answered as by :class:`~pipefit.planner.pricing.Pricing`; peaks are those
    of ``columns``.
    """

    def __init__(
        self,
        workload: Workload,
        machine: Machine,
        budgets: Mapping[int, int],
        main: int,
        price: Callable[[Gpu], Pricing],
        shared: SharedPrices | None = None,
    ) -> None:
        self.workload = workload
        self.main = main
        self.budgets = budgets
        self.machine = machine
        by_index = {gpu.index: gpu for gpu in machine.gpus}
        self._shared = SharedPrices() if shared is None else shared
        priced = self._shared.pricings
        self.gpus: dict[int, Gpu] = {main: by_index[main]}
        self.gpus |= {index: by_index[index] for index in sorted(budgets)}
        self._on: dict[int, Pricing] = {}
        for index, gpu in list(self.gpus.items()):
            alike = figures(gpu)
            if alike not in priced:
                priced[alike] = price(gpu)
            self._on[index] = priced[alike]
            if index != main and budgets[index] < self._idle_bytes(index):
                del self.gpus[index], self._on[index]
        self._bytes: dict[object, tuple[int, ...]] = {}
        self.gpu = self.gpus[main]
        self.memory = self._on[main].memory
        self.load_options = self._on[main].load_options
        self.fixed_options = self._on[main].fixed_options
        self.columns: tuple[tuple[int, Phase], ...] = tuple(
            (index, phase) for index in self.gpus for phase in workload.phases
        )

    # -- problems

    def problems(self, policy: Policy) -> list[Problem]:
        """Return the problems of this main GPU: components anywhere, or all taking turns on it."""
        with without_garbage_collection():
            return self._problems(policy)

    def _problems(self, policy: Policy) -> list[Problem]:
        own = self._on[self.main].problems(policy)
        mixed = next((problem for problem in own if problem.name == MIXED), None)
        wide = [problem for problem in own if problem is not mixed]
        if _maps(policy):
            wide = []
        found = [self._problem(one.name, one.base_s, dict(one.components)) for one in wide]
        if mixed is not None:
            offered = {
                c.name: self._candidates(c, policy, mixed.components[c.name])
                for c in self.workload.components
            }
            if all(offered.values()):
                found.append(self._problem(MIXED, mixed.base_s, offered))
        return found

    def _problem(
        self, name: str, base_s: float, components: Mapping[str, Sequence[Candidate]]
    ) -> Problem:
        carried = self.memory.carried_bytes
        base = [n + context_bytes(self.gpus[self.main]) for n in carried]
        for index in list(self.gpus)[1:]:
            base += [self._idle_bytes(index)] * len(carried)
        return Problem(
            name=f"{name} on GPU {self.main}",
            phases=tuple(
                f"{phase.name} ({phase.component}) on GPU {index}" for index, phase in self.columns
            ),
            base_bytes=tuple(base),
            base_s=base_s,
            components={
                component: [self._filled(candidate) for candidate in group]
                for component, group in components.items()
            },
            devices=tuple(index for index, _ in self.columns),
        )

    def _idle_bytes(self, index: int) -> int:
        """Return what the process holds on a GPU besides what components bring there."""
        return context_bytes(self.gpus[index]) + self._on[index].memory.cublas_bytes

    def _candidates(
        self, component: Component, policy: Policy, here: Sequence[Candidate]
    ) -> list[Candidate]:
        """Return the candidates *here*, on the main GPU, and those on others."""
        if not any(phase.component == component.name for phase in self.workload.phases):
            return list(here)
        asked = next((o for o in _maps(policy) if o.component in (component.name, None)), None)
        if asked is not None:
            return self._asked(component, policy, here, asked)
        found = list(here)
        if "device_map" in policy.forbidden:
            return found
        if component.name == leading(self.workload):
            return found + self._splits(component, policy, found)
        for index in list(self.gpus)[1:] if _maps(policy) else self._others(component):
            found += self._away(component, policy, index)
        return found

    def _asked(
        self, component: Component, policy: Policy, here: Sequence[Candidate], asked: Option
    ) -> list[Candidate]:
        """Return the candidates of *component* on the GPUs that it is wanted on."""
        split = strategy("device_map").placement(asked.parameters)
        if isinstance(split, Split):
            is_led = next(iter(places_of(component, split).values())) == self.main
            whole = [c for c in here if is_led and _placement(c) == Resident()]
            option = replace(asked, component=component.name)
            return [self._divided(component, one, option, split) for one in whole]
        index = asked.parameters["device"]
        if index == self.main:
            return list(here)
        return self._away(component, policy, index) if index in self.gpus else []

    def _others(self, component: Component) -> Iterator[int]:
        """Yield the GPUs that *component* may go to besides the main one.

        Of GPUs that are alike in everything the first component may take the first only, the second
        one of the first two, and so on: whatever else could be chosen is the same with other names.
        """
        lead = leading(self.workload)
        names = [c.name for c in self.workload.components if c.name != lead]
        place = names.index(component.name)
        # A split may take any of them before.
        is_split = bool(blocks_of_split(self.workload.component(lead)))
        room = place + 1 + len(self.gpus) if is_split else place + 1
        taken: dict[object, int] = {}
        for index, gpu in list(self.gpus.items())[1:]:
            alike = (
                figures(gpu),
                self.budgets.get(index),
                between_seconds(self.gpus[self.main], gpu, self.machine.links, 1 << 30),
            )
            taken[alike] = taken.get(alike, 0) + 1
            if taken[alike] <= room:
                yield index

    def _filled(self, candidate: Candidate) -> Candidate:
        """Return *candidate* with a figure for every column: what is on one GPU is on no other."""
        rest = (0,) * (len(self.columns) - len(candidate.phase_bytes))
        return replace(candidate, phase_bytes=(*candidate.phase_bytes, *rest))

    def _away(self, component: Component, policy: Policy, index: int) -> list[Candidate]:
        """Return the candidates of *component* on another GPU: resident, or coarsely streamed."""
        where = at_device(component.name, index)
        if strategy("device_map").refusal(component, where.parameters):
            return []
        travel_s = sum(
            self._travel_seconds(phase, index)
            for phase in self.workload.phases
            if phase.component == component.name
        )
        found = []
        for candidate in self._priced_away(component, policy, index):
            pick = candidate.payload
            assert isinstance(pick, Pick)
            choice = replace(pick.choice, device=index)
            found.append(
                replace(
                    candidate,
                    key=f"{index}:{candidate.key}",
                    phase_bytes=self._phase_bytes(component, choice),
                    call_s=candidate.call_s + travel_s,
                    num_strategies=candidate.num_strategies + 1,
                    payload=replace(pick, choice=choice, options=(where, *pick.options)),
                )
            )
        return found

    def _priced_away(self, component: Component, policy: Policy, index: int) -> Sequence[Candidate]:
        """Return the candidates for a GPU like that one, priced as if it were the main one.

        None where it cannot have what the policy requires.
        """
        key = figures(self.gpus[index]), component.name
        if key not in self._shared.away:
            if component.name not in self._shared.placements:
                offered = self._on[self.main].offered(component, policy)
                self._shared.placements[component.name] = _coarse(offered)
            placements = self._shared.placements[component.name]
            try:
                priced = self._on[index]
                found = priced.candidates(component, placements, policy, is_away=True)
            except InvalidRequest:
                found = []
            self._shared.away[key] = found
        return self._shared.away[key]

    def _phase_bytes(self, component: Component, choice: Choice) -> tuple[int, ...]:
        """Return what *component* takes in every column."""
        found: list[int] = []
        nowhere = (0,) * len(self.workload.phases)
        somewhere = {self.main, choice.device}
        if isinstance(choice.placement, Split):
            somewhere |= set(places_of(component, choice.placement).values())
        for index in self.gpus:
            if index not in somewhere:
                found += nowhere
                continue
            memory = self._on[index].memory
            # On another GPU whose memory is alike it takes as much.
            where = index if choice.device is None else index == self.main
            about = id(memory), component.name, replace(choice, device=None), where
            if about not in self._bytes:
                self._bytes[about] = memory.phase_bytes_on(component, choice, index, self.main)
            found += self._bytes[about]
        return tuple(found)

    def _travel_seconds(self, phase: Phase, index: int) -> float:
        """Return how long what a phase's calls are given and return travels to GPU *index*."""
        calls = self._on[self.main].routine_counts(phase, _PLAIN)
        return sum(
            count
            * (
                self._between_s(self.main, index, self.workload.input_bytes.get(routine, 0))
                + self._between_s(index, self.main, sum(returned_bytes(self.workload, routine)))
            )
            for routine, count in calls.items()
        )

    def _between_s(self, source: int, target: int, num_bytes: int) -> float:
        first, second = self.gpus[source], self.gpus[target]
        return between_seconds(first, second, self.machine.links, num_bytes)

    # -- splits

    def _splits(
        self, component: Component, policy: Policy, whole: Sequence[Candidate]
    ) -> list[Candidate]:
        """Return ways to split *component* where it is resident on no single GPU.

        The GPUs are filled one after the other, the fastest first after the main one, each up to
        its budget but for room that one or all of the other components may be given there.
        """
        blocks = blocks_of_split(component)
        is_placed = any(
            strategy(option.strategy).kind == "placement"
            and option.component in (component.name, None)
            for option in policy.required
        )
        resident = [c for c in whole if _placement(c) == Resident()]
        if not blocks or is_placed or not resident:
            return []
        largest = max(self.budgets.values())
        base = context_bytes(self.gpus[self.main])
        if any(max(c.phase_bytes[: len(self.workload.phases)]) + base <= largest for c in resident):
            return []
        may_stream = "streaming" not in policy.forbidden and immovable(component) is None
        found: list[Candidate] = []
        for plain in resident:
            pick = plain.payload
            assert isinstance(pick, Pick)
            for split in dict.fromkeys(self._fillings(component, pick)):
                if split.resident_blocks and not may_stream:
                    continue
                parameters = {"split": _written(split.blocks)}
                if split.resident_blocks:
                    parameters["resident_blocks"] = _written(split.resident_blocks)
                option = Option(
                    strategy="device_map", component=component.name, parameters=parameters
                )
                if conflict_of([*_compute_options(pick), option]) is None:
                    found.append(self._divided(component, plain, option, split))
        return found

    def _divided(
        self, component: Component, plain: Candidate, option: Option, split: Split
    ) -> Candidate:
        """Return the candidate that *option* makes of a resident one."""
        pick = plain.payload
        assert isinstance(pick, Pick)
        choice = replace(pick.choice, placement=split)
        pinned_bytes = host_bytes(component, split).pinned_bytes
        return replace(
            plain,
            key=f"{'|'.join(map(str, option.parameters.values()))}|{choice.variant}",
            host_bytes=plain.host_bytes + pinned_bytes,
            pinned_bytes=pinned_bytes,
            stock="" if split.resident_blocks else plain.stock,
            phase_bytes=self._phase_bytes(component, choice),
            call_s=sum(
                self._split_seconds(phase, choice, pick.attention)[0]
                for phase in self.workload.phases
                if phase.component == component.name
            ),
            num_strategies=plain.num_strategies + 1,
            payload=replace(pick, choice=choice, options=(*_compute_options(pick), option)),
        )

    def _fillings(self, component: Component, pick: Pick) -> Iterator[Split]:
        choice, blocks = pick.choice, blocks_of_split(component)
        sizes = [
            sum(
                t.num_bytes
                for t in component.tensors
                if t.path.startswith(f"{block}.") and not t.tied_to
            )
            for block in blocks
        ]
        rest_bytes = component.weight_bytes - sum(sizes)
        others = sorted(
            (i for i in self.gpus if self._can_compute(component, pick, i)),
            key=lambda i: (i != self.main, self._block_s(component, i)),
        )
        needed = [
            c.weight_bytes + self.memory.activation_bytes(c, _PLAIN)
            for c in self.workload.components
            if c.name != component.name
        ]
        rooms = sorted({0, *needed, sum(needed)})
        # What computing takes on any of them, as if nothing were elsewhere.
        working_bytes = [
            round(self._on[i].memory.activation_bytes(component, choice) * (1 + SLACK_SHARE))
            + self._idle_bytes(i)
            + ROUNDING_BYTES
            for i in others
        ]
        carried_bytes = max(self.memory.carried_bytes)
        for kept_on, room in itertools.product(range(len(others)), rooms):
            counts: list[tuple[int, int]] = []
            done = 0
            room_bytes: dict[int, int] = {}
            for i, index in enumerate(others):
                free = self.budgets.get(index, 0) - working_bytes[i]
                free -= (room if i == kept_on else 0) + (rest_bytes + carried_bytes if not i else 0)
                room_bytes[index] = free
                count = 0
                while done < len(blocks) and sizes[done] <= free:
                    free -= sizes[done]
                    done += 1
                    count += 1
                if count or not i:
                    counts.append((index, count))
            if done == len(blocks) and len(counts) > 1:
                yield Split(blocks=tuple(counts))
            elif done < len(blocks):
                yield from self._overflowing(component, sizes, room_bytes)

    def _overflowing(
        self, component: Component, sizes: Sequence[int], room_bytes: Mapping[int, int]
    ) -> Iterator[Split]:
        """Yield splits of blocks of these *sizes* of which the GPUs do not have room for all.

        What is too much waits on the host: for the main GPU alone, which is the fastest, or for all
        by what their links carry. Where GPUs take turns, a GPU's slots are filled while others
        compute.
        """
        slots_bytes = 2 * min(max(sizes), MAX_BLOCK_BYTES)
        rates = {i: link_rates(self.gpus[i]).h2d_pinned_bytes_per_s for i in room_bytes}
        for streaming in ((self.main,), tuple(room_bytes)):
            wanted = {
                i: max(0, free - (slots_bytes if i in streaming else 0))
                for i, free in room_bytes.items()
            }
            missing_bytes = sum(sizes) - sum(wanted.values())
            left, owed_bytes = len(sizes), 0.0
            counts: list[tuple[int, int]] = []
            # From the last block on; the main GPU, the first, computes what is left.
            for index in reversed(room_bytes):
                most_bytes: float = wanted[index]
                if index in streaming:
                    share = rates[index] / sum(rates[i] for i in streaming)
                    most_bytes += missing_bytes * share + owed_bytes
                    owed_bytes = 0.0
                if index == self.main:
                    counts.append((index, left))
                    break
                count = 0
                while count < left and sizes[left - 1 - count] <= most_bytes:
                    most_bytes -= sizes[left - 1 - count]
                    count += 1
                owed_bytes += most_bytes
                left -= count
                if count:
                    counts.append((index, count))
            for num_rounds in OFFERED_ROUNDS if len(counts) > 1 else ():
                split = Split(blocks=_in_turns(counts[::-1], num_rounds))
                resident = self._staying(component, split, sizes, room_bytes)
                if resident:
                    yield replace(split, resident_blocks=resident)

    def _staying(
        self,
        component: Component,
        split: Split,
        sizes: Sequence[int],
        room_bytes: Mapping[int, int],
    ) -> tuple[tuple[int, int], ...]:
        """Return how many blocks can stay on each GPU that has not room for all of its part; none
        where one has no room for the slots."""
        own_bytes: dict[int, int] = {}
        done = 0
        for index, count in split.blocks:
            own_bytes[index] = own_bytes.get(index, 0) + sum(sizes[done : done + count])
            done += count
        all_away = replace(split, resident_blocks=tuple((i, 0) for i in own_bytes))
        found: list[tuple[int, int]] = []
        for index, (cut, how) in streamed_parts(component, all_away).items():
            missing_bytes = own_bytes[index] - room_bytes[index]
            if missing_bytes <= 0:
                continue
            stay = len(cut.called) - 1
            while stay >= 0:
                streamed_bytes = sum(cut.blocks[i].weight_bytes for i in cut.streamed(stay))
                slots_bytes = how.num_slots * cut.slot_bytes(stay)
                if streamed_bytes - slots_bytes >= missing_bytes:
                    break
                stay -= 1
            if stay < 0:
                return ()
            found.append((index, stay))
        return tuple(found)

    def _can_compute(self, component: Component, pick: Pick, index: int) -> bool:
        """Whether a GPU can have the kernels that were *pick*ed for the main one."""
        return not any(
            isinstance(one := strategy(option.strategy), Conditional)
            and one.unfit(component, option.parameters, self.workload, self.gpus[index])
            for option in _compute_options(pick)
        )

    def _block_s(self, component: Component, index: int) -> float:
        """Return how long *component*'s calls take whole on a GPU, to rank the GPUs by."""
        pricing = self._on[index]
        return sum(
            pricing.phase_seconds(phase, _PLAIN, "native", with_range=False)[0]
            for phase in self.workload.phases
            if phase.component == component.name
        )

    def _split_seconds(
        self, phase: Phase, choice: Choice, attention: Attention
    ) -> tuple[float, float, float, float]:
        assert isinstance(choice.placement, Split)
        main = self._on[self.main]
        time = main.latency.split_seconds(
            self.workload.component(phase.component),
            list(main.routine_counts(phase, choice).items()),
            choice.placement,
            {i: p.latency for i, p in self._on.items() if i != self.main},
            self._between_s,
            attention=attention,
        )
        return time.call_s, time.first_call_s, time.low_s, time.high_s

    def _seconds(
        self, phase: Phase, choice: Choice, attention: Attention
    ) -> tuple[float, float, float, float]:
        """Return (later call, first call, low, high) seconds of one phase, travelling included."""
        if isinstance(choice.placement, Split):
            return self._split_seconds(phase, choice, attention)
        home = self.main if choice.device is None else choice.device
        times = self._on[home].phase_seconds(phase, choice, attention)
        if home == self.main:
            return times
        travel_s = self._travel_seconds(phase, home)
        call_s, first_s, low_s, high_s = times
        return call_s + travel_s, first_s + travel_s, low_s + travel_s, high_s + travel_s

    # -- predictions

    def used(self, picks: Mapping[str, Pick | None]) -> tuple[int, ...]:
        """Return the GPUs that hold something of *picks*, the main one first."""
        found = {self.main}
        for name, pick in picks.items():
            if pick is None:
                continue
            if isinstance(pick.choice.placement, Split):
                split = pick.choice.placement
                found |= set(places_of(self.workload.component(name), split).values())
            elif pick.choice.device is not None:
                found.add(pick.choice.device)
        return tuple(index for index in self.gpus if index in found)

    def replay(
        self, picks: Mapping[str, Pick | None], budget_bytes: Budget = None
    ) -> tuple[PhaseMemory, ...]:
        """Replay one configuration on every GPU that it uses; others hold nothing at all."""
        idle = Choice(placement=ModelOffload())  # never called, so never brought in
        choices = {name: pick.choice if pick else idle for name, pick in picks.items()}
        used = self.used(picks)
        peaks: list[PhaseMemory] = []
        for index, gpu in self.gpus.items():
            budget = budget_bytes.get(index) if isinstance(budget_bytes, Mapping) else budget_bytes
            peaks += (
                simulate(self.workload, choices, gpu, budget_bytes=budget, main=self.main)
                if index in used
                else [_NOTHING] * len(self.workload.phases)
            )
        return tuple(peaks)

    def prediction(
        self, picks: Mapping[str, Pick | None], peaks: Sequence[PhaseMemory]
    ) -> Prediction:
        """Return what *picks*, with the replayed *peaks*, need; a row for each phase and GPU."""
        used = self.used(picks)
        by_column = {
            (index, phase.component, phase.entry): peak
            for (index, phase), peak in zip(self.columns, peaks, strict=True)
        }
        main = self._on[self.main]
        total = [main.latency.own_seconds()] * 4
        phases = []
        routines: set[int] = set()
        for phase in self.workload.phases:
            pick = picks[phase.component]
            assert pick is not None
            times = self._seconds(phase, pick.choice, pick.attention)
            total = [one + more for one, more in zip(total, times, strict=True)]
            routines.update(main.routine_counts(phase, pick.choice))
            home = self.main if pick.choice.device is None else pick.choice.device
            for index in sorted(used, key=lambda i: i != home):
                peak = by_column[index, phase.component, phase.entry]
                seconds = times[0] if index == home else 0.0
                phases.append(phase_prediction(phase, peak, device=index, seconds=seconds))
        host = host_peak(
            self.workload.components,
            {name: pick.choice.placement for name, pick in picks.items() if pick is not None},
            [phase.component for phase in self.workload.phases],
            stored_bytes=main.stored_bytes(),
            checkpoints=checkpoints(self.workload, main.process_options),
            rewriting_bytes=rewriting_bytes(self.workload, main.process_options),
            activation_bytes=main.host_activation_bytes(picks),
        )
        loading_bytes = self.memory.loading_bytes()
        call_s, first_s, low_s, high_s = total
        return Prediction(
            peak_vram=tuple(
                device_peak(
                    index,
                    [peak for (i, _), peak in zip(self.columns, peaks, strict=True) if i == index],
                    loading_bytes if index == self.main else 0,
                )
                for index in used
            ),
            phases=tuple(phases),
            latency=Latency(
                first_call_s=first_s + main.latency.trial_seconds(routines),
                call_s=call_s,
                low_s=low_s,
                high_s=high_s,
            ),
            host_ram_bytes=host.peak_bytes,
            pinned_bytes=host.pinned_bytes,
            disk_bytes=host.disk_bytes + rewritten_bytes(self.workload, main.process_options),
            assumptions=(
                *self.workload.assumptions,
                *main.notes(picks, first_s - call_s),
                *loading_notes(loading_bytes),
                *host_notes(host),
            ),
        )

    def exactly(self, options: Sequence[Option]) -> dict[str, Pick | None]:
        """Return the one configuration that *options* describe, as for one GPU."""
        return self._on[self.main].exactly(options)

    def picks(self, selection: Selection) -> dict[str, Pick | None]:
        """Return what the selection chose for each component; None where it is not called."""
        return {name: candidate.payload for name, candidate in selection.choices.items()}


_NOTHING = PhaseMemory(
    allocated_bytes=0,
    weight_bytes=0,
    activation_bytes=0,
    workspace_bytes=0,
    carried_bytes=0,
    reserved_bytes=0,
    slack_bytes=0,
    context_bytes=0,
)


def price_devices(
    observe: Callable[[Gpu], Sequence[Observed]],
    price: Callable[[Observed, Gpu, Sequence[Option], Models], Pricing],
    machine: Machine,
    budgets: Mapping[int, int],
    policy: Policy,
) -> list[Pricing | DevicePricing]:
    """Return the pricings for each GPU on which the pipeline may compute.

    *observe* traces the call for a GPU; parts of a kind see the same. *price* prices it on a GPU,
    with switches of the process, which are those that the main GPU wants.

    Raises:
        InvalidRequest: what *observe* raises, if it does so for every GPU that may be the main one.
    """
    seen: dict[object, Sequence[Observed] | InvalidRequest] = {}
    shared: dict[object, SharedPrices] = {}
    by_index = {gpu.index: gpu for gpu in machine.gpus}
    found: list[Pricing | DevicePricing] = []

    def seen_by(index: int) -> Sequence[Observed] | InvalidRequest:
        kind = _kind(by_index[index])
        if kind not in seen:
            try:
                seen[kind] = observe(by_index[index])
            except InvalidRequest as error:
                seen[kind] = error
        return seen[kind]

    mains = _mains(seen_by, machine, budgets, policy)
    traced = _united({_kind(by_index[main]): seen_by(main) for main in mains})
    models = Models()
    for main in mains:
        kind = _kind(by_index[main])
        for number, one in enumerate(traced[kind]):
            switches = process_options(one.workload, by_index[main], policy, machine.host)
            alike = kind, number, tuple(switch.strategy for switch in switches)
            found.append(
                DevicePricing(
                    one.workload,
                    machine,
                    budgets,
                    main,
                    functools.partial(_priced_with, price, one, switches, models),
                    shared.setdefault(alike, SharedPrices()),
                )
            )
    return found


def _united(
    seen: Mapping[object, Sequence[Observed] | InvalidRequest],
) -> dict[object, list[Observed]]:
    """Return what each kind of GPU has seen with all workloads numbered alike."""
    able = {kind: found for kind, found in seen.items() if not isinstance(found, InvalidRequest)}
    workloads = iter(united([one.workload for found in able.values() for one in found]))
    return {
        kind: [replace(one, workload=next(workloads)) for one in found]
        for kind, found in able.items()
    }


def _mains(
    seen_by: Callable[[int], Sequence[Observed] | InvalidRequest],
    machine: Machine,
    budgets: Mapping[int, int],
    policy: Policy,
) -> tuple[int, ...]:
    """Return the GPUs that are tried as the main one, of those that can be.

    A GPU may be too old for what the policy requires. It can be no main one then, and a better one
    that cannot does not rule it out.
    """
    kinds = {gpu.index: _kind(gpu) for gpu in machine.gpus}
    refused: dict[object, InvalidRequest] = {}
    while able := {i: most for i, most in budgets.items() if kinds[i] not in refused}:
        first = seen_by(min(able))
        if isinstance(first, InvalidRequest):
            refused[kinds[min(able)]] = first
            continue
        workload = first[0].workload
        asked = _asked_mains(workload, policy)
        mains = asked or main_gpus(workload, machine, able)
        unable = {
            kinds[main]: error
            for main in mains
            if isinstance(error := seen_by(main), InvalidRequest)
        }
        if not unable:
            return mains
        refused |= unable
        if asked:
            break
    raise list(refused.values())[-1]


def _priced_with(
    price: Callable[[Observed, Gpu, Sequence[Option], Models], Pricing],
    seen: Observed,
    switches: Sequence[Option],
    models: Models,
    gpu: Gpu,
) -> Pricing:
    return price(seen, gpu, switches, models)


def leading(workload: Workload) -> str:
    """Return the component that is called most often, the first of those."""
    counts: dict[str, int] = {}
    for phase in workload.phases:
        counts[phase.component] = counts.get(phase.component, 0) + phase.num_calls
    return max(counts, key=lambda name: counts[name])


def _maps(policy: Policy) -> list[Option]:
    return [option for option in policy.required if option.strategy == "device_map"]


def _asked_mains(workload: Workload, policy: Policy) -> tuple[int, ...]:
    """Return the GPU on which a required device map wants the pipeline, if one says so."""
    lead = leading(workload)
    for option in _maps(policy):
        named = [lead] if option.component is None else [option.component]
        for component in (workload.component(name) for name in named):
            split = strategy("device_map").placement(option.parameters)
            if isinstance(split, Split):
                return (next(iter(places_of(component, split).values())),)
            if component.name == lead:
                return (int(option.parameters["device"]),)
    return ()


def main_gpus(workload: Workload, machine: Machine, budgets: Mapping[int, int]) -> tuple[int, ...]:
    """Return the GPUs that are tried as the main one, the fastest first.

    All of a few; of more than :data:`FEW_GPUS` those that no other exceeds both in speed and in
    budget. Of GPUs that are alike in everything the first.
    """
    lead = leading(workload)
    phases = [phase for phase in workload.phases if phase.component == lead]
    pricings: dict[str, Pricing] = {}
    models = Models()
    unlike: dict[object, tuple[float, int, int]] = {}
    for gpu in machine.gpus:
        if gpu.index in budgets:
            like = figures(gpu)
            pricing = pricings.get(like) or Pricing(workload, gpu, models=models)
            pricings[like] = pricing
            seconds = sum(pricing.phase_seconds(one, _PLAIN, "native")[0] for one in phases)
            links = sorted(
                link.bytes_per_s for link in machine.links if gpu.index in (link.first, link.second)
            )
            alike = like, budgets[gpu.index], *links
            unlike.setdefault(alike, (seconds, -budgets[gpu.index], gpu.index))
    found = sorted(unlike.values())
    if len(found) <= FEW_GPUS:
        return tuple(index for _, _, index in found)
    # Those after which no larger budget has come yet.
    largest = itertools.accumulate((less for _, less, _ in found), min)
    before = [0, *largest]
    return tuple(
        index for (_, less, index), most in zip(found, before, strict=False) if less < most
    )


def _kind(gpu: Gpu) -> object:
    """Return what decides how a call is traced for *gpu*."""
    return gpu.architecture, gpu.compute_capability


_PLAIN = Choice(placement=Resident())
"""As traced, on whichever GPU."""


def _coarse(offered: Sequence[tuple[Option, Placement]]) -> list[tuple[Option, Placement]]:
    """Return the placements that are considered on other GPUs than the main one.

    Resident, and streaming that leaves when it is idle, in the few levels that are offered out of
    ordinary memory too: what is there is called once or twice, and there are many GPUs. Of a single
    placement, which was asked for, that one.
    """

    def level(option: Option) -> tuple[Any, ...]:
        return option.parameters.get("resident_blocks"), option.parameters.get("num_slots")

    levels = {level(o) for o, _ in offered if o.parameters.get("host_memory") == "pageable"}

    def is_wanted(option: Option) -> bool:
        if len(offered) == 1 or option.strategy != "streaming":
            where = at_device(str(option.component), 0)
            return conflict_of([where, option]) is None
        given = option.parameters
        is_plain = given.get("when_idle") == "leave" and not {"load_with", "host_memory"} & {*given}
        return is_plain and level(option) in levels

    return [one for one in offered if is_wanted(one[0])]


def _in_turns(counts: Sequence[tuple[int, int]], num_rounds: int) -> tuple[tuple[int, int], ...]:
    """Return *counts* of blocks by GPU, dealt out in as many rounds as evenly as they can be.

    >>> _in_turns([(0, 5), (1, 2)], 2)
    ((0, 2), (1, 1), (0, 3), (1, 1))
    """
    found: list[tuple[int, int]] = []
    for i in range(num_rounds):
        for index, count in counts:
            share = (i + 1) * count // num_rounds - i * count // num_rounds
            if share and found and found[-1][0] == index:
                found[-1] = index, found[-1][1] + share
            elif share or not found:  # the main GPU comes first, be it with no block
                found.append((index, share))
    return tuple(found)


def _written(counts: Sequence[tuple[int, int]]) -> str:
    return "+".join(f"{index}:{count}" for index, count in counts)


def _placement(candidate: Candidate) -> object:
    pick = candidate.payload
    return pick.choice.placement if isinstance(pick, Pick) else None


def _compute_options(pick: Pick) -> tuple[Option, ...]:
    return tuple(o for o in pick.options if strategy(o.strategy).kind == "compute")
