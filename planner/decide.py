"""From priced candidates to a plan: search, check by replay and rehearsal, explain.

The search adds up figures of single components; the plan states what the replay of the whole call
says. So the search's answer is replayed before it is accepted, and where the budget would be broken
the difference is charged and the search is asked again. A plan keeps its budget by the replay, and
by a rehearsal where the caller brings one: what that needs more is charged as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from pipefit.cost_models.context import context_bytes
from pipefit.cost_models.host_memory import PROCESS_BYTES
from pipefit.cost_models.machine import Machine
from pipefit.cost_models.memory import PhaseMemory
from pipefit.cost_models.units import GIB, format_bytes, format_seconds
from pipefit.errors import NoPlanFits
from pipefit.planner.devices import DevicePricing
from pipefit.planner.options import quality_of, saved_share
from pipefit.planner.plan import Alternative, Plan, Rehearsed
from pipefit.planner.policy import Policy
from pipefit.planner.pricing import Pick, Pricing, plan_options
from pipefit.planner.search import (
    Budget,
    Candidate,
    Limits,
    Problem,
    Selection,
    alternatives,
    search,
    smallest_budget,
)
from pipefit.strategies import strategy
from pipefit.strategies.prompt_first import drops
from pipefit.strategies.strategy import Option, Quality

MAX_REPLAYS = 12
"""How often the search is asked again before the smallest selection is taken instead."""

NUM_HALVINGS = 5
"""How often charges are halved that rule out more than they need to; our choice: the last is 3 %
of the charge, and each takes a search and a replay."""

MAX_REHEARSALS = 4
"""How many candidates are rehearsed before the smallest is; our choice: each takes seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """A selection with its replay, and with its rehearsal once there is one."""

    pricing: Pricing | DevicePricing
    problem: Problem
    selection: Selection
    picks: Mapping[str, Pick | None]
    peaks: tuple[PhaseMemory, ...]
    rehearsed: Rehearsed | str = ""
    """What was rehearsed, or why nothing was; empty before anybody wanted to know."""

    @property
    def phase_bytes(self) -> tuple[int, ...]:
        """What each phase takes of a budget, its slack included, by replay and by rehearsal."""
        replayed = tuple(peak.promised_bytes for peak in self.peaks)
        if isinstance(self.rehearsed, str):
            return replayed
        main = self.pricing.columns[0][0]
        held = {
            (main if p.device is None else p.device, p.component, p.entry): p.process_bytes
            for p in self.rehearsed.phases
        }
        slack = {d: 0 if self.rehearsed.takes_slack else self.slack_on(d) for d in self.used}
        return tuple(
            max(bytes_, held.get((d, phase.component, phase.entry), 0) + slack.get(d, 0))
            for (d, phase), bytes_ in zip(self.pricing.columns, replayed, strict=True)
        )

    @property
    def promised_bytes(self) -> int:
        """The largest phase with its slack, as a budget counts it, or what loading needs."""
        return max(*self.phase_bytes, _loading_bytes(self.pricing))

    def over_bytes(self, budget: Budget) -> int:
        """Return by how much it exceeds *budget* where it does so most; negative is room left."""
        if not isinstance(budget, Mapping):
            return self.promised_bytes - (budget or 0)
        over = [
            held - most
            for held, most in zip(self.phase_bytes, self.problem.budgets(budget), strict=True)
        ]
        loading_bytes = self.pricing.memory.loading_bytes()
        if loading_bytes:
            main = self.pricing.columns[0][0]
            over.append(loading_bytes + self.peaks[0].context_bytes - budget[main])
        return int(max(over))

    def slack_on(self, device: int) -> int:
        """Return the slack that a plan of it states on *device*, for the whole call."""
        peaks = [
            peak
            for (index, _), peak in zip(self.pricing.columns, self.peaks, strict=True)
            if index == device
        ]
        process_bytes = max(peak.process_bytes for peak in peaks)
        return max(peak.promised_bytes for peak in peaks) - process_bytes

    @property
    def used(self) -> tuple[int, ...]:
        """The GPUs that hold something, the one on which the pipeline computes first."""
        return self.pricing.used(self.picks)

    @property
    def options(self) -> tuple[Option, ...]:
        """What would be applied."""
        return plan_options(self.pricing.fixed_options, self.picks)


Rehearse: TypeAlias = Callable[[Configuration, int | Mapping[int, int]], Rehearsed | str]
"""Rehearses a configuration in a process held to so many bytes, on every GPU or by its index; a
text says why it does not."""


Level: TypeAlias = Callable[[], Sequence[Pricing | DevicePricing]]
"""Prices all that a quality allows, when it is wanted."""


class Candidates:
    """All problems of one request, searched together."""

    def __init__(
        self,
        pricings: Sequence[Pricing | DevicePricing],
        policy: Policy,
        rehearse: Rehearse | None = None,
    ) -> None:
        self._rehearse = rehearse
        self.refuted: list[Configuration] = []
        """What kept the budget by its replay and broke it in its rehearsal."""
        self._of: dict[str, tuple[Pricing | DevicePricing, Problem]] = {}
        for pricing in pricings:
            for problem in pricing.problems(policy):
                named = replace(problem, name=f"{problem.name}{_after(pricing.load_options)}")
                self._of[named.name] = (pricing, named)
        self.problems = [problem for _, problem in self._of.values()]
        self._replayed: dict[tuple[object, ...], Configuration] = {}

    def configure(
        self, selection: Selection, budget_bytes: int | Mapping[int, int]
    ) -> Configuration:
        """Replay *selection* in a process held to *budget_bytes*; remembered."""
        choices = (f"{name}={c.key}" for name, c in sorted(selection.choices.items()))
        key = (repr(budget_bytes), selection.problem, *choices)
        if key not in self._replayed:
            pricing, problem = self._of[selection.problem]
            picks = pricing.picks(selection)
            self._replayed[key] = Configuration(
                pricing=pricing,
                problem=problem,
                selection=selection,
                picks=picks,
                peaks=pricing.replay(picks, budget_bytes),
            )
        return self._replayed[key]

    def best(self, limits: Limits) -> Configuration | None:
        """Return the best configuration whose replay keeps the budget; None if there is none.

        What a rehearsal needs beyond the replay is added to the placement that is to blame before
        the search is asked again.
        """
        budget_bytes = limits.budget_bytes
        assert budget_bytes is not None
        problems = {problem.name: problem for problem in self.loadable(budget_bytes)}
        while len(self.refuted) < MAX_REHEARSALS:
            found = self._kept_by_replay(problems, limits)
            if found is None:
                break
            found = self.rehearsed(found, budget_bytes)
            if found.over_bytes(budget_bytes) <= 0:
                return found
            problem = problems[found.selection.problem]
            problems[problem.name] = _charged_alike(problem, found)
            self.refuted.append(found)
        smallest = self.smallest(limits, is_checked=False)
        if smallest is not None and smallest.over_bytes(budget_bytes) <= 0:
            smallest = self.rehearsed(smallest, budget_bytes)
            if smallest.over_bytes(budget_bytes) <= 0:
                return smallest
            self.refuted.append(smallest)
        return None

    def _kept_by_replay(
        self, problems: Mapping[str, Problem], limits: Limits
    ) -> Configuration | None:
        """Return the best configuration of *problems* whose replay keeps the budget.

        What a replay needs beyond the sums (fragmentation, blocks) is added to its problem, phase
        by phase, before the search is asked again. Other selections may need less: so between the
        charges that refuted something and those that did not, what is best is sought by halving.
        """
        budget_bytes = limits.budget_bytes
        assert budget_bytes is not None

        def asked(charged: Mapping[str, Problem]) -> Configuration | None:
            selection = search(list(charged.values()), limits)
            return selection and self.configure(selection, budget_bytes)

        floor, ceiling = dict(problems), dict(problems)
        more = len(budget_bytes) if isinstance(budget_bytes, Mapping) else 0  # each may be exceeded
        best = asked(ceiling)
        for _ in range(MAX_REPLAYS + more):
            if best is None or best.over_bytes(budget_bytes) <= 0:
                break
            name = best.selection.problem
            ceiling[name] = _charged(ceiling[name], best, budget_bytes)
            best = asked(ceiling)
        if ceiling == floor:
            return best
        if best is not None and best.over_bytes(budget_bytes) > 0:
            best = None
        for _ in range(NUM_HALVINGS):
            middle = {name: _between(floor[name], ceiling[name]) for name in ceiling}
            found = asked(middle)
            if found is not None and found.over_bytes(budget_bytes) > 0:
                floor = middle
            else:
                best, ceiling = found, middle
        return best

    def loadable(self, budget_bytes: int | Mapping[int, int]) -> list[Problem]:
        """Return the problems whose weights can be loaded within *budget_bytes*.

        What is quantised on the GPU is there together before anything is placed, so no selection
        can do about it.
        """

        def room_bytes(pricing: Pricing | DevicePricing) -> int:
            is_one = not isinstance(budget_bytes, Mapping)
            return budget_bytes if is_one else budget_bytes[pricing.gpu.index]

        priced = {name: pricing for name, (pricing, _) in self._of.items()}
        return [
            problem
            for problem in self.problems
            if _loading_bytes(priced[problem.name]) <= room_bytes(priced[problem.name])
        ]

    def rehearsed(
        self, found: Configuration, budget_bytes: int | Mapping[int, int]
    ) -> Configuration:
        """Return *found* with its rehearsal in a process held to *budget_bytes*, if any is made."""
        if self._rehearse is None:
            return found
        return replace(found, rehearsed=self._rehearse(found, budget_bytes))

    def smallest(self, limits: Limits, *, is_checked: bool = True) -> Configuration | None:
        """Return the configuration with the least peak, in a process held to what it needs.

        It is rehearsed where others are, if *is_checked*. None if host memory rules out all.
        """
        ways: dict[int, list[Problem]] = {}
        for problem in self.problems:
            ways.setdefault(id(self._of[problem.name][0]), []).append(problem)
        # What weights are stored in decides how far sums and replays are apart: each on its own.
        found = [one for problems in ways.values() if (one := self._smallest(problems, limits))]
        if not found:
            return None
        least, held_bytes = min(found, key=lambda one: one[0].promised_bytes)
        if self._rehearse is None or not is_checked:
            return least
        for _ in range(MAX_REHEARSALS):
            least = self.rehearsed(self.configure(least.selection, held_bytes), held_bytes)
            if least.promised_bytes <= held_bytes:
                break
            held_bytes = least.promised_bytes
        return least

    def _smallest(
        self, problems: Sequence[Problem], limits: Limits
    ) -> tuple[Configuration, int] | None:
        """Return the least of *problems*, all of one pricing, and the budget that it is held to."""
        least_bytes = smallest_budget(problems, limits)
        if least_bytes is None:
            return None
        selection = search(problems, replace(limits, budget_bytes=least_bytes))
        assert selection is not None
        held_bytes = selection.peak_bytes
        for _ in range(MAX_REPLAYS):
            found = self.configure(selection, held_bytes)
            if found.promised_bytes <= held_bytes:
                break
            held_bytes = found.promised_bytes
        return found, held_bytes


def _loading_bytes(pricing: Pricing | DevicePricing) -> int:
    """Return what loading takes of a budget: the weights that are quantised on the GPU."""
    loading_bytes = pricing.memory.loading_bytes()
    return loading_bytes + context_bytes(pricing.gpu) if loading_bytes else 0


def _after(load_options: Sequence[Option]) -> str:
    """Return what tells the problems of one way to store the weights from those of another."""
    casts = any(option.strategy == "precision" for option in load_options)
    parts = ["precision"] * casts + [
        f"{option.strategy} {sorted(option.parameters.items())} on {option.component}"
        for option in load_options
        if option.strategy != "precision"
    ]
    return f" after {' and '.join(parts)}" if parts else ""


def _charged(problem: Problem, found: Configuration, budget_bytes: Budget) -> Problem:
    """Return *problem* with what *found* needs beyond its sums added to every selection.

    Only in phases that break the budget: elsewhere it may hold what an earlier phase left cached.
    """
    budgets = problem.budgets(budget_bytes)
    more = [
        beyond if needed > most else 0
        for beyond, needed, most in zip(
            _beyond_sums(found), found.phase_bytes, budgets, strict=True
        )
    ]
    base = tuple(b + m for b, m in zip(problem.base_bytes, more, strict=True))
    return replace(problem, base_bytes=base)


def _between(floor: Problem, ceiling: Problem) -> Problem:
    """Return the problem with half of what *ceiling* is charged more than *floor*."""
    base = zip(floor.base_bytes, ceiling.base_bytes, strict=True)
    return replace(floor, base_bytes=tuple((less + more) // 2 for less, more in base))


def _charged_alike(problem: Problem, found: Configuration) -> Problem:
    """Return *problem* with what the rehearsal of *found* needs more added to what is to blame.

    That is the component in whose phase the excess grew most, placed by that strategy: a hook that
    keeps what it should evict does so at every setting, and other placements are not its fault.
    """
    replayed = [peak.promised_bytes for peak in found.peaks]
    excess = [b - a for a, b in zip(replayed, found.phase_bytes, strict=True)]
    grown = [now - before for before, now in zip([0, *excess], excess, strict=False)]
    blamed = found.pricing.columns[grown.index(max(grown))][1].component
    more, how = _beyond_sums(found), _placed_by(found.selection.choices[blamed])
    group = tuple(
        replace(
            candidate,
            phase_bytes=tuple(b + m for b, m in zip(candidate.phase_bytes, more, strict=True)),
        )
        if _placed_by(candidate) == how
        else candidate
        for candidate in problem.components[blamed]
    )
    return replace(problem, components={**problem.components, blamed: group})


def _beyond_sums(found: Configuration) -> tuple[int, ...]:
    pairs = zip(found.phase_bytes, found.selection.phase_bytes, strict=True)
    return tuple(max(0, needed - added) for needed, added in pairs)


def _placed_by(candidate: Candidate) -> str | None:
    pick = candidate.payload
    return pick.options[-1].strategy if pick else None


def decide(
    pricings: Sequence[Pricing | DevicePricing],
    *,
    policy: Policy,
    machine: Machine,
    device: int | None,
    lower: Sequence[tuple[Quality, Level]] = (),
    extra_ram_bytes: int = 0,
    rehearse: Rehearse | None = None,
) -> Plan:
    """Return the best plan for *device*; None: for all that the policy has a budget for.

    *lower* are the next qualities, priced when they are wanted: what they could still do where
    nothing fits, and what the next would gain. The latter is said up to quality high: below, each
    way to store the weights is a trace and a pricing, and planning would take four times as long.
    *extra_ram_bytes* is RAM that the pipeline's weights hold already. *rehearse* checks what would
    be chosen; without it nothing is rehearsed.

    Raises:
        NoPlanFits: with the smallest budget that works at this quality and at the next.
    """
    candidates = Candidates(pricings, policy, rehearse)
    limits = limits_of(policy, machine, device, extra_ram_bytes)
    best = candidates.best(limits) if candidates.problems else None
    if best is None:
        raise _nothing_fits(candidates, policy, limits, lower)
    prediction = best.pricing.prediction(best.picks, best.peaks)
    workload = best.pricing.workload
    options = tuple(replace(option, reason=_reason(option, best)) for option in best.options)
    return Plan(
        pipeline=workload.pipeline,
        call=workload.call,
        machine=machine,
        policy=policy,
        options=options,
        prediction=replace(
            prediction,
            assumptions=(
                *policy.notes,
                *machine.notes,
                *_ram_notes(policy, prediction.host_ram_bytes),
                *prediction.assumptions,
            ),
        ),
        quality=quality_of(options),
        next_quality=_next_gain(best, limits, policy, lower),
        alternatives=_rejected(candidates, limits, best),
        fingerprint=workload.fingerprint,
        versions=workload.versions,
        rehearsal=None if isinstance(best.rehearsed, str) else best.rehearsed,
        not_rehearsed=best.rehearsed if isinstance(best.rehearsed, str) else "",
    )


def limits_of(policy: Policy, machine: Machine, device: int | None, extra_ram_bytes: int) -> Limits:
    """Return what a selection may use on *device*, or on all that have a budget."""
    host = machine.host
    ram_bytes = host.available_bytes + extra_ram_bytes
    if policy.ram_bytes is not None:
        # A budget holds the process as well; what is available has it taken off already.
        ram_bytes = max(0, min(policy.ram_bytes, host.total_bytes) - PROCESS_BYTES)
    return Limits(
        budget_bytes=policy.budget_bytes if device is None else policy.budget_bytes[device],
        ram_bytes=ram_bytes,
        pinnable_bytes=min(host.pinnable_bytes, ram_bytes),
    )


def _ram_notes(policy: Policy, host_ram_bytes: int) -> tuple[str, ...]:
    """Say where the process is larger than a RAM budget: sums count what waits in RAM alone."""
    if policy.ram_bytes is None or host_ram_bytes <= policy.ram_bytes:
        return ()
    return (
        f"Host RAM is above the {format_bytes(policy.ram_bytes)} asked for, which holds what waits "
        "there between calls: while weights are read the kernel drops pages of files when RAM is "
        "short, but not weights that are quantised or cast then.",
    )


# -- what did not fit, or lost


def _nothing_fits(
    candidates: Candidates,
    policy: Policy,
    limits: Limits,
    lower: Sequence[tuple[Quality, Level]],
) -> NoPlanFits:
    assert limits.budget_bytes is not None
    budget = limits.budget_bytes
    budgets = tuple(budget.values()) if isinstance(budget, Mapping) else (budget,)
    smallest: dict[str, int] = {}
    levels = [(policy.quality, candidates)]
    levels += [(q, Candidates(price(), replace(policy, quality=q))) for q, price in lower]
    for quality, level in levels:
        found = level.smallest(limits) if level.problems else None
        if found is not None:
            smallest[quality.value] = found.promised_bytes
    asked = f"No plan keeps {_shown(budget)}"
    if not candidates.problems:
        message = (
            f"{asked}: what is required and forbidden leaves no way to place the pipeline; drop "
            "one of the two."
        )
    else:
        each = " on every GPU" if isinstance(budget, Mapping) else ""
        works = ", ".join(f"{_rounded_up(b)} at quality {q}" for q, b in smallest.items())
        roomy = _would_fit_with_more_ram(candidates, limits)
        more_ram = ""
        if roomy is not None:
            process_bytes = PROCESS_BYTES if policy.ram_bytes is not None else 0
            asked += f" with {format_bytes((limits.ram_bytes or 0) + process_bytes)} of RAM"
            needed_bytes = roomy.selection.host_bytes + process_bytes
            more_ram = f"have {_rounded_up(needed_bytes)} of RAM, "
        enough = [q.value for q, _ in lower if smallest.get(q.value, math.inf) <= min(budgets)]
        allow = f"allow quality {enough[0]}, " if enough else ""
        message = (
            f"{asked}: the smallest budget that works{each} is {works or 'none'}; {more_ram}{allow}"
            "raise the budget, or lower the resolution, frames or batch."
        )
    return NoPlanFits(message, budget_bytes=max(budgets), smallest_budget_bytes=smallest)


def _shown(budget: int | Mapping[int, int]) -> str:
    if not isinstance(budget, Mapping):
        return format_bytes(budget)
    return " and ".join(f"{format_bytes(n)} on GPU {index}" for index, n in budget.items())


def _would_fit_with_more_ram(candidates: Candidates, limits: Limits) -> Configuration | None:
    """Return what keeps the VRAM budget once host memory is no bound; None if nothing does."""
    roomy = replace(limits, ram_bytes=None, pinnable_bytes=None)
    # Where no rehearsal refuted anything, the replay alone says whether RAM was what was short.
    found = candidates.smallest(roomy, is_checked=bool(candidates.refuted))
    if found is None or limits.budget_bytes is None or found.over_bytes(limits.budget_bytes) > 0:
        return None
    return found


def _rounded_up(num_bytes: int) -> str:
    """Show a budget so that what is shown suffices."""
    return format_bytes(math.ceil(num_bytes / GIB * 100) / 100 * GIB)


def _rejected(
    candidates: Candidates, limits: Limits, best: Configuration
) -> tuple[Alternative, ...]:
    """Return what a rehearsal refuted and the three best that lost.

    The reasons are those of their own rehearsal or replay.
    """
    assert limits.budget_bytes is not None
    found = [_refuted(other, limits.budget_bytes) for other in candidates.refuted]
    seen = [other.options for other in candidates.refuted]
    problems = candidates.loadable(limits.budget_bytes)
    for lost in alternatives(problems, limits, best.selection):
        other = candidates.configure(lost.selection, limits.budget_bytes)
        if other.options in seen:
            continue
        over_bytes = other.over_bytes(limits.budget_bytes)
        reason = lost.reason
        if over_bytes > 0 and _host_allows(lost.selection, limits):
            where = _worst(other, [p.promised_bytes for p in other.peaks], limits.budget_bytes)[0]
            reason = f"{format_bytes(over_bytes)} over the budget in {where}"
        found.append(
            Alternative(
                options=other.options,
                process_bytes=max(peak.process_bytes for peak in other.peaks),
                call_s=other.selection.call_s,
                rejected_because=reason,
            )
        )
    return tuple(found)


def _refuted(other: Configuration, budget: int | Mapping[int, int]) -> Alternative:
    assert isinstance(other.rehearsed, Rehearsed)
    where, over_bytes = _worst(other, other.phase_bytes, budget)
    return Alternative(
        options=other.options,
        process_bytes=other.rehearsed.peak.process_bytes,
        call_s=other.selection.call_s,
        rejected_because=f"the rehearsal needs {_rounded_up(over_bytes)} more in {where}",
    )


def _worst(
    found: Configuration, held_bytes: Sequence[int], budget: int | Mapping[int, int]
) -> tuple[str, int]:
    """Return the phase that exceeds *budget* most, named with its GPU where there are several."""
    columns, budgets = found.pricing.columns, found.problem.budgets(budget)
    over = [held - most for held, most in zip(held_bytes, budgets, strict=True)]
    device, phase = columns[over.index(max(over))]
    of_several = isinstance(budget, Mapping)
    return f"{phase.name}{f' on GPU {device}' * of_several}", int(max(over))


def _host_allows(selection: Selection, limits: Limits) -> bool:
    ram, pinnable = limits.ram_bytes, limits.pinnable_bytes
    return (ram is None or selection.host_bytes <= ram) and (
        pinnable is None or selection.pinned_bytes <= pinnable
    )


def _next_gain(
    best: Configuration,
    limits: Limits,
    policy: Policy,
    lower: Sequence[tuple[Quality, Level]],
) -> str:
    for quality, price in lower[:1]:
        if quality.rank > Quality.HIGH.rank:
            continue
        other = Candidates(price(), replace(policy, quality=quality)).best(limits)
        if other is None:
            continue
        gain_s = best.selection.call_s - other.selection.call_s
        if gain_s > 0:
            share = gain_s / best.selection.call_s
            return (
                f"Quality {quality.value} would save {format_seconds(gain_s)} a call ({share:.0%})."
            )
    return ""


# -- why


def _reason(option: Option, best: Configuration) -> str:
    """Say what *option* buys, against the same configuration without it."""
    kind = strategy(option.strategy).kind
    if option.reason:
        return option.reason
    if drops([option]):
        return "Asked for; no text encoder takes memory or time in a call."
    if kind == "process":
        share = saved_share(best.pricing.workload, best.pricing.gpu, option)
        return (
            f"Saves {share:.1%} of a call where everything lies on the GPU."
            if share
            else "Asked for; one call by itself gains nothing."
        )
    if kind == "load":
        return f"Halves what {option.component} weighs and moves."
    if kind == "pipeline_placement":
        return (
            "Components take turns; whatever the GPU holds at once fits: "
            f"{format_bytes(max(p.weight_bytes for p in best.peaks))} of weights at the most."
        )
    if "split" in option.parameters:
        return "It is resident on no single GPU."
    chosen = best.selection.choices[str(option.component)]
    group = best.problem.components[str(option.component)]
    without = _without(option, chosen, group, kind)
    if without is None:
        return "It fits, and nothing is gained by moving it."
    saved = [b - a for a, b in zip(chosen.phase_bytes, without.phase_bytes, strict=True)]
    weigh = abs if kind != "device" else int  # what is gained, and not what that takes elsewhere
    place = max(range(len(saved)), key=lambda i: weigh(saved[i]))
    saved_bytes, gained_s = saved[place], without.call_s - chosen.call_s
    phase = best.problem.phases[place]
    if option.strategy == "resident":
        return (
            f"Offloading it would free {format_bytes(-saved_bytes)} in {phase} and cost "
            f"{format_seconds(gained_s)} a call."
        )
    parts = []
    if saved_bytes:
        verb = "Frees" if saved_bytes > 0 else "Takes"
        parts.append(f"{verb} {format_bytes(abs(saved_bytes))} in {phase}")
    if abs(gained_s) >= 5e-4:
        verb = "saves" if gained_s > 0 else "costs"
        parts.append(f"{verb} {format_seconds(abs(gained_s))} a call")
    said = " and ".join(parts) or "Makes no difference here"
    return f"{said[0].upper()}{said[1:]}."


def _without(
    option: Option, chosen: Candidate, group: Sequence[Candidate], kind: str
) -> Candidate | None:
    """Return the candidate that differs from *chosen* in *option* alone."""
    own = _parts(chosen)
    if kind in ("compute", "device"):
        wanted = {k: v for k, v in own.items() if k != option.strategy}
        return next((c for c in group if _parts(c) == wanted), None)

    def rest(parts: Mapping[str, str]) -> Mapping[str, str]:
        return {k: v for k, v in parts.items() if strategy(k).kind in ("compute", "device")}

    others = [c for c in group if c.key != chosen.key and rest(_parts(c)) == rest(own)]
    if option.strategy == "resident":
        return min(others, key=lambda c: (c.call_s, max(c.phase_bytes)), default=None)
    return next((c for c in others if "resident" in _parts(c)), None)


def _parts(candidate: Candidate) -> dict[str, str]:
    pick = candidate.payload
    if pick is None:
        return {}
    return {o.strategy: repr(sorted(o.parameters.items())) for o in pick.options}
