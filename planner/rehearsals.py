"""Which candidates are rehearsed before a plan is made of them: those whose rehearsal is quick.

Plans are decided from predictions, and a rehearsal checks one (:mod:`pipefit.planner.rehearse`). It
imports torch, builds the pipeline and executes every operator of the shortened call, so how long it
takes is estimated first, and what it says is remembered on disk as traces are.

Here a rehearsal gives cached memory back where the replay does, and may exceed that bound: one run
says whether the budget holds, what is missing, and how far the prediction is off. Where it did give
memory back, a second one holds the process to the budget itself, as applying the plan does: what is
given back later leaves other gaps.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipefit.cost_models import serial
from pipefit.cost_models.context import context_bytes
from pipefit.cost_models.machine import Gpu, Link
from pipefit.cost_models.memory import flushing_bytes
from pipefit.cost_models.units import format_seconds
from pipefit.cost_models.workload import Workload
from pipefit.errors import PipefitError
from pipefit.planner.decide import Configuration
from pipefit.planner.plan import Rehearsal, Rehearsed, RehearsedPeak
from pipefit.planner.trace_cache import remembered, whole_code_version
from pipefit.planner.workloads import Progress, Source, described_call
from pipefit.strategies import strategy
from pipefit.strategies.strategy import Consented, Option

REHEARSED_STEPS = 3
"""Denoising steps of a rehearsed call: streamed group offload records the order of its groups in
the first forward, looks ahead in the second, and begins the third with what the second left behind
(hooks/group_offloading.py, diffusers 0.42.1). Peaks of later steps repeat."""

RECORDED_STEPS = 5
"""The same where a stream is recorded. Weights are then given back late instead of waited for, so
host and copies gain on the GPU from step to step, until the queue of launches is full. Rehearsed,
leaves of Z-Image-Turbo on an RTX 5090 reserve 9.55 GiB within three steps, 10.24 within four or 20.
"""

QUICK_S = 5.0
"""Seconds that a rehearsal may take by :func:`estimated_s` where nobody asked for it.

Our choice: what an interactive answer may take longer for being checked. Where memory is given
back, which an estimate does not know, a second rehearsal takes as long again.
"""

SECONDS_PER_KERNEL = 110e-6
"""CPU seconds of a rehearsal per kernel launch of the shortened call.

Launches are what a trace counts; views, modules and hooks come on top of each. Chosen: image
pipelines come out right, and tiled video decoders, whose many launches have no hooks, too slow.
Source: benchmarks/results/rehearsal_speed_2core_2026-11.md.
"""

SECONDS_TO_START = 1.0
"""CPU seconds of a rehearsal whatever the call, the pipeline's building included; same source."""


def steps_to_rehearse(options: Iterable[Option]) -> int:
    """Return after how many denoising steps under *options* the peaks repeat."""
    records = any(option.parameters.get("record_stream") for option in options)
    return RECORDED_STEPS if records else REHEARSED_STEPS


def rehearsed_kernels(found: Configuration) -> int:
    """Return how many kernels the rehearsal of *found* launches, its call cut as it will be."""
    workload = found.pricing.workload
    num_steps = steps_to_rehearse(found.options)
    share = _share_of_steps(workload, num_steps)
    calls = [event for event in workload.root if event[0] == "c"]
    counts = _Counts(workload)
    num_kernels = sum(event[0] == "k" for event in workload.root) * share
    for phase in workload.phases:
        pick = found.picks[phase.component]
        variant = pick.choice.variant if pick else ""
        replaced = workload.variants[variant] if variant else {}
        launched = sum(counts[replaced.get(calls[n][1], calls[n][1])] for n in phase.calls)
        # Only what is called once a step or more often becomes less with fewer steps.
        is_stepped = phase.num_calls * share >= num_steps
        num_kernels += launched * (share if is_stepped else 1)
    return math.ceil(num_kernels)


def estimated_s(found: Configuration) -> float:
    """Return how long the rehearsal of *found* takes, torch's import not counted."""
    return SECONDS_TO_START + SECONDS_PER_KERNEL * rehearsed_kernels(found)


def _share_of_steps(workload: Workload, num_steps: int) -> float:
    call = workload.call
    steps = call.get("num_inference_steps")
    if call.get("timesteps") is not None or call.get("sigmas") is not None:
        return 1.0
    return min(1.0, num_steps / steps) if isinstance(steps, int) and steps > 0 else 1.0


class _Counts(dict[int, int]):
    """Routine -> kernels that one call of it launches, those of the routines it calls included."""

    def __init__(self, workload: Workload) -> None:
        self._routines = workload.routines

    def __missing__(self, routine: int) -> int:
        count = 0
        for event in self._routines[routine].events:
            if event[0] == "k":
                count += 1
            elif event[0] == "c":
                count += self[event[1]]
        self[routine] = count
        return count


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearser:
    """Rehearses candidates of one request; called by :func:`pipefit.planner.decide.decide`."""

    source: Source
    call: Mapping[str, Any]
    gpus: Sequence[Gpu]
    """The one that is planned for; or all of the machine, by index, for a plan over several."""
    links: Sequence[Link] = ()
    is_asked_for: bool = False
    """However long it takes; what fails is then an error. Otherwise only what is quick."""
    progress: Progress | None = None

    def __call__(
        self, found: Configuration, budget_bytes: int | Mapping[int, int]
    ) -> Rehearsed | str:
        """Return what *found* holds in a process held to *budget_bytes*, or why nobody knows.

        Raises:
            ApplyFailed, TraceError, InvalidRequest, UnsupportedPipeline: the rehearsal was asked
                for, and fails.
        """
        for option in found.options:
            if isinstance(strategy(option.strategy), Consented):
                return f"no virtual GPU executes what {option.strategy} makes of {option.component}"
        expected_s = estimated_s(found)
        if not self.is_asked_for and expected_s > QUICK_S:
            return f"would take about {format_seconds(round(expected_s))}; `pipefit verify` does it"
        options = tuple(replace(option, reason="") for option in found.options)
        # What else the GPU does now is in the budget.
        gpus = [replace(gpu, free_bytes=gpu.total_bytes, other_bytes=0) for gpu in self.gpus]
        described = [
            {k: v for k, v in serial.to_json(gpu).items() if k not in _SAY_NOTHING} for gpu in gpus
        ]
        slack_bytes = [found.slack_on(device) for device in found.used]
        key = {
            **self.source.key,
            "call": described_call(self.call),
            "rehearsed_options": serial.to_json(options),
            "gpus": described,
            "used": found.used,
            "links": serial.to_json(self.links),
            "budget_bytes": budget_bytes,
            "slack_bytes": slack_bytes,
        }
        try:
            rehearsed = remembered(
                json.loads(json.dumps(key, default=str)),
                lambda: self._execute(found, options, gpus, budget_bytes),
                name="rehearsal",
                to_json=serial.to_json,
                from_json=functools.partial(serial.from_json, Rehearsed),
                code=whole_code_version(),
            )
        except PipefitError as error:
            if self.is_asked_for:
                raise
            return f"it fails: {error}"
        return rehearsed

    def _execute(
        self,
        found: Configuration,
        options: tuple[Option, ...],
        gpus: Sequence[Gpu],
        budget_bytes: int | Mapping[int, int],
    ) -> Rehearsed:
        from pipefit.planner.build import quietly
        from pipefit.planner.call import default_inputs
        from pipefit.planner.rehearse import rehearse

        if self.progress is not None:
            about = format_seconds(round(estimated_s(found)))
            self.progress(f"rehearsing {self.source.name}, about {about} …")
        budgets = {
            gpu.index: budget_bytes[gpu.index]
            if isinstance(budget_bytes, Mapping)
            else budget_bytes
            for gpu in gpus
            if gpu.index in found.used
        }

        def held_to(bounds: Mapping[int, int]) -> Rehearsal:
            with quietly():
                pipe, entry = self.source.get()
                return rehearse(
                    pipe,
                    options,
                    default_inputs(pipe, entry, self.call),
                    gpus,
                    budget_bytes=bounds,
                    main=found.used[0] if len(gpus) > 1 else None,
                    links=self.links,
                    is_strict=False,
                    in_place=self.source.is_ours,
                )

        by_index = {gpu.index: gpu for gpu in gpus}
        rehearsal = held_to({i: flushing_bytes(by_index[i], b) for i, b in budgets.items()})
        held = {device: most - found.slack_on(device) for device, most in budgets.items()}
        rehearsed = compact(rehearsal, held, gpus)
        if not rehearsed.within_budget or not rehearsal.num_alloc_retries:
            return rehearsed
        later = compact(held_to(budgets), budgets, gpus)
        return rehearsed if later.within_budget else replace(later, takes_slack=True)


def compact(found: Rehearsal, held_bytes: Mapping[int, int], gpus: Sequence[Gpu]) -> Rehearsed:
    """Return what a plan keeps of *found*, whose process was to hold *held_bytes* at the most.

    Of several *gpus* that are those with such a bound.
    """
    contexts = {gpu.index: context_bytes(gpu) for gpu in gpus}
    phases = tuple(
        RehearsedPeak(
            name=phase.name,
            component=phase.component,
            entry=phase.entry,
            allocated_bytes=phase.allocated_bytes,
            reserved_bytes=phase.reserved_bytes,
            process_bytes=phase.reserved_bytes + contexts[phase.device],
            device=phase.device if len(gpus) > 1 else None,
        )
        for phase in found.phases
        if phase.device in held_bytes
    )
    within_budget = all(
        phase.process_bytes <= held_bytes[gpus[0].index if phase.device is None else phase.device]
        for phase in phases
    )
    return Rehearsed(phases=phases, within_budget=within_budget)


_SAY_NOTHING = ("index", "free_bytes", "other_bytes", "provenance", "sources")
"""Figures of a GPU on which a rehearsal within a budget does not depend."""
