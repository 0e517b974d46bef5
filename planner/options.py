"""Which options the search may choose from: what the policy asks for, allows and rules out.

A component chooses a placement (where its weights are) and a variant (how it computes, traced).
What each choice costs is :mod:`~pipefit.planner.pricing`'s.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from pipefit.cost_models.latency import LatencyModel
from pipefit.cost_models.machine import Gpu, Host
from pipefit.cost_models.placement import GroupOffload, ModelOffload, Placement, Streaming
from pipefit.cost_models.roofline import DEFAULT_FLAGS, Flags
from pipefit.cost_models.workload import Component, Workload
from pipefit.errors import InvalidRequest, UnknownName
from pipefit.planner.checkpoints import shards_option
from pipefit.planner.policy import Policy
from pipefit.planner.search import TIME_TOLERANCE_PERCENT
from pipefit.strategies import BUILT_IN, conflict_of, strategy
from pipefit.strategies import quality_of as option_quality
from pipefit.strategies.prompt_first import drops
from pipefit.strategies.sharded_checkpoint import ShardedCheckpoint
from pipefit.strategies.strategy import Conditional, Consented, Option, Quality, Strategy

Parts = Mapping[str, Mapping[str, Any]]
"""Compute strategies on one component: strategy -> parameters."""

FRUGAL = {"feed_forward_chunking", "guidance_split", "decode_chunks"}
"""Compute strategies that take time and give memory, as streaming does at every level."""

LEVELS_APART = 4
"""Of so many levels of streaming one is priced together with a frugal strategy. Our choice: all
would take as long again for each such strategy."""


def compute_variants(workload: Workload, gpu: Gpu, policy: Policy) -> dict[str, list[Parts]]:
    """Return, for every component that is called, the compute strategies worth tracing together.

    Every combination of the strategies' options; what the policy requires is in all of them.
    """
    called = {phase.component for phase in workload.phases}
    return {
        component.name: [p for p in combinations(component, workload, gpu, policy) if p]
        for component in workload.components
        if component.name in called
    }


def combinations(component: Component, workload: Workload, gpu: Gpu, policy: Policy) -> list[Parts]:
    """Return every combination of compute strategies that *component* may have; empty is plain."""
    axes: list[list[tuple[str, Mapping[str, Any]] | None]] = []
    for one in allowed_strategies("compute", policy):
        required = required_options(policy, one, component, workload, gpu)
        if required:
            axes.append([(one.name, option.parameters) for option in required])
            continue
        if isinstance(one, Consented) and not policy.compile_allowed:
            continue
        offered = one.options(component, workload, gpu)
        if offered:
            must = bool(component.traits.get("must_tile")) and one.name == "vae_tiling"
            axes.append([*([] if must else [None]), *((one.name, p) for p in offered)])
    return [
        dict(combination)
        for combination in (tuple(p for p in one if p) for one in itertools.product(*axes))
        if not conflict_of([Option(strategy=n, parameters=p) for n, p in combination])
    ]


def computing(policy: Policy) -> list[str]:
    """Return the names of the strategies whose variants *policy* has traced."""
    return [
        one.name
        for one in allowed_strategies("compute", policy)
        if policy.compile_allowed or not isinstance(one, Consented) or is_required(policy, one)
    ]


def allowed_strategies(kind: str, policy: Policy) -> list[Strategy]:
    """Return the strategies of *kind* that *policy* lets take part, in the order of applying."""
    return [
        one
        for one in BUILT_IN
        if one.kind == kind
        and one.name not in policy.forbidden
        and one.quality.rank <= policy.quality.rank
    ]


def is_required(policy: Policy, one: Strategy) -> bool:
    """Return whether *policy* asks for *one* anywhere."""
    return any(option.strategy == one.name for option in policy.required)


def required_options(
    policy: Policy,
    one: Strategy,
    component: Component,
    workload: Workload | None = None,
    gpu: Gpu | None = None,
) -> list[Option]:
    """Return what the policy asks of *one* on *component*; unnamed means wherever it can.

    With *workload* and *gpu* that is what the traced call allows too.

    Raises:
        InvalidRequest: if it was asked for by name and cannot be had.
    """
    found = []
    for option in policy.required:
        if option.strategy != one.name or option.component not in (None, component.name):
            continue
        refusal = one.refusal(component, option.parameters)
        if not refusal and workload and gpu and isinstance(one, Conditional):
            refusal = one.unfit(component, option.parameters, workload, gpu)
        if refusal and option.component is not None:
            raise InvalidRequest(f"Strategy {one.name} cannot go on {component.name}: {refusal}")
        if not refusal:
            found.append(option)
    return found


def check_required(workload: Workload, policy: Policy, gpu: Gpu | None = None) -> None:
    """Refuse requirements that no candidate could meet.

    Raises:
        UnknownName: for a component that the pipeline does not have.
        InvalidRequest: for a strategy that applies to none of the components, or two requirements
        that contradict each other.
    """
    names = [c.name for c in workload.components]
    for option in policy.required:
        one = strategy(option.strategy)
        if option.component is not None and option.component not in names:
            raise UnknownName("component", option.component, names)
        reasons = {c.name: one.refusal(c, option.parameters) for c in workload.components}
        if gpu is not None and isinstance(one, Conditional):
            for c in workload.components:
                unfit = one.unfit(c, option.parameters, workload, gpu)
                reasons[c.name] = reasons[c.name] or unfit
        if option.component is None and all(reasons.values()):
            raise InvalidRequest(
                f"Strategy {option.strategy} applies to no component of {workload.pipeline}: "
                f"{next(iter(reasons.values()))}"
            )
        if option.component is not None and one.kind in ("pipeline_placement", "process"):
            raise InvalidRequest(
                f"Strategy {one.name} is for the whole pipeline: leave @{option.component} out."
            )
        if reasons.get(option.component or ""):
            continue  # said below, of that component; what is misspelt is no placement
        if isinstance(one.placement(option.parameters), ModelOffload) and not (
            workload.offload_sequence
        ):
            raise InvalidRequest(
                f"Strategy {one.name} cannot be had: {workload.pipeline_class} declares no "
                "model_cpu_offload_seq, so in which order it offloads is not known; "
                "use group_offload."
            )
    for component in workload.components:
        _check_contradictions(component, policy)


def _check_contradictions(component: Component, policy: Policy) -> None:
    """Refuse two requirements of which *component* can meet only one."""
    asked: dict[str, Option] = {}
    for one in BUILT_IN:
        for option in required_options(policy, one, component):
            # Where the weights are is one decision, whoever takes it; others decide on their own.
            is_placed = one.placement(option.parameters) is not None
            decided = "placement" if is_placed else one.name
            other = asked.setdefault(decided, option)
            if other is not option:
                both = (
                    f"Strategy {one.name} is required twice on {component.name}"
                    if other.strategy == one.name
                    else f"Both {other.strategy} and {one.name} place {component.name}"
                )
                raise InvalidRequest(f"{both}: choose one.")
    reason = conflict_of(list(asked.values()))
    if reason:
        raise InvalidRequest(f"On {component.name}, {reason}")


def sensible_placements(
    placements: Sequence[tuple[Option, Placement]], parts: Parts
) -> list[tuple[Option, Placement]]:
    """Return those of *placements* that are priced together with *parts*.

    Beside frugal strategies most levels of streaming are left out, and the group offload that it
    replaces. An autoencoder that decodes in parts would be copied again for each of them: it is
    there as a whole, or goes leaf by leaf.
    """
    levels = sorted({p.resident_blocks for _, p in placements if isinstance(p, Streaming)})
    if not levels or not FRUGAL & set(parts):
        return list(placements)
    in_parts = "decode_chunks" in parts
    kept = {levels[-1]} if in_parts else {*levels[::LEVELS_APART], levels[-1]}
    return [
        (option, placement)
        for option, placement in placements
        if (placement.resident_blocks in kept if isinstance(placement, Streaming) else True)
        and (in_parts or not isinstance(placement, GroupOffload))
    ]


def offered_parts(parts: Parts, policy: Policy) -> Parts:
    """Return *parts* without what the policy requires, for which there is no alternative."""
    required = {option.strategy for option in policy.required}
    return {name: parameters for name, parameters in parts.items() if name not in required}


def process_options(
    workload: Workload, gpu: Gpu, policy: Policy, host: Host | None = None
) -> tuple[Option, ...]:
    """Return the switches of the process: those asked for, and those that are worth it.

    They change the time of every candidate and the memory of none, so they are no axis of the
    search: each is taken, for all candidates or for none, where the time that it saves the
    untouched pipeline is no tie. Shards of a checkpoint are for RAM: where a budget of it asks, or
    what *host* has available.
    """
    found = []
    for one in allowed_strategies("process", policy):
        if isinstance(one, ShardedCheckpoint):
            shards = shards_option(workload, policy, host)
            found += [shards] if shards is not None else []
            continue
        asked = [option for option in policy.required if option.strategy == one.name]
        option = asked[0] if asked else Option(strategy=one.name)
        if asked or (
            any(one.options(c, workload, gpu) for c in workload.components)
            and 100 * saved_share(workload, gpu, option) > TIME_TOLERANCE_PERCENT
        ):
            found.append(option)
    return tuple(found)


def dropped_components(workload: Workload, options: Sequence[Option]) -> frozenset[str]:
    """Return the text encoders, if *options* drop them once they have encoded the prompt."""
    if not drops(options):
        return frozenset()
    return frozenset(c.name for c in workload.components if c.traits.get("reads_tokens"))


def flags_of(options: Sequence[Option]) -> Flags:
    """Return what the process is switched to by *options*, other strategies left out."""
    named = {option.strategy for option in options}
    return Flags(tf32="tf32" in named, cudnn_benchmark="cudnn_benchmark" in named)


def saved_share(workload: Workload, gpu: Gpu, option: Option) -> float:
    """Return which share of a call's time a switch of the process saves while all is resident."""
    before_s, after_s = (
        model.own_seconds()
        + sum(model.call_seconds(event[1]) for event in workload.root if event[0] == "c")
        for flags in (DEFAULT_FLAGS, flags_of([option]))
        for model in [LatencyModel(workload, gpu, flags)]
    )
    return 1 - after_s / before_s if before_s else 0.0


def at_device(component: str, device: int) -> Option:
    """Return the option that *component* computes on the GPU with this index."""
    return Option(strategy="device_map", component=component, parameters={"device": device})


def quality_of(options: Sequence[Option]) -> Quality:
    """Return the level of the worst of *options*; exact where there is none."""
    ranks = [option_quality(o).rank for o in options]
    return list(Quality)[max(ranks, default=0)]
