"""The plan as a value: the chosen options with their prediction and reasons, and its JSON.

A plan is made on one machine and may be applied on another day: it carries the fingerprint of its
pipeline and the versions it was made with. The JSON is ``pipefit.plan/1``, a superset of
``pipefit.prediction/1``: the fields of the prediction stand in it beside those of the plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipefit.cost_models import serial
from pipefit.cost_models.machine import Gpu, Machine
from pipefit.cost_models.prediction import PhasePrediction, Prediction
from pipefit.errors import InvalidRequest
from pipefit.planner.policy import Policy
from pipefit.strategies.strategy import Option, Quality

PREDICTION_SCHEMA = "pipefit.prediction/1"
PLAN_SCHEMA = "pipefit.plan/1"
VERIFICATION_SCHEMA = "pipefit.verification/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A configuration that lost, and why."""

    options: tuple[Option, ...]
    process_bytes: int
    call_s: float
    rejected_because: str
    """``0.31 GiB over in decode``, ``12% slower`` …"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RehearsedPeak:
    """What one phase of a rehearsed call held at its peak."""

    name: str
    component: str
    entry: str
    allocated_bytes: int
    reserved_bytes: int
    process_bytes: int
    """With the context, which is predicted and not rehearsed."""
    device: int | None = field(default=None, metadata={serial.OMITTED: True})
    """Index of the GPU, in a plan for several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsed:
    """What is kept of a rehearsal with its plan: the peaks, phase by phase."""

    phases: tuple[RehearsedPeak, ...]
    within_budget: bool
    """Whether every phase leaves the slack that the plan states, and the call goes through in a
    process that may take all of the budget."""
    takes_slack: bool = field(default=False, metadata={serial.OMITTED: True})
    """Whether these are the peaks of a process that may take all of the budget."""

    @property
    def peak(self) -> RehearsedPeak:
        """The phase in which the process held most."""
        return max(self.phases, key=lambda phase: phase.process_bytes)

    def peak_on(self, device: int) -> RehearsedPeak:
        """Return the same on one GPU, the only one where phases do not name it."""
        there = [phase for phase in self.phases if phase.device in (None, device)]
        return max(there, key=lambda phase: phase.process_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do with a pipeline, what will happen then, and why not otherwise."""

    pipeline: str
    """Catalogue name, folder or class name."""
    call: Mapping[str, Any]
    machine: Machine
    policy: Policy
    options: tuple[Option, ...]
    prediction: Prediction
    quality: Quality
    """The level of the worst option in the plan."""
    next_quality: str = ""
    """What the next lower level would gain, one sentence; empty where there is none."""
    alternatives: tuple[Alternative, ...] = ()
    fingerprint: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    rehearsal: Rehearsed | None = None
    """What the plan's rehearsal held; None if there was none."""
    not_rehearsed: str = ""
    """Why there was none, where one was wanted."""

    @property
    def gpu(self) -> Gpu:
        """The GPU that is planned for; of several the one on which the pipeline computes."""
        main = self.prediction.peak_vram[0].device
        return next(gpu for gpu in self.machine.gpus if gpu.index == main)

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """All GPUs that hold something, :attr:`gpu` first."""
        by_index = {gpu.index: gpu for gpu in self.machine.gpus}
        return tuple(by_index[peak.device] for peak in self.prediction.peak_vram)

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What was taken for granted, one sentence each."""
        return self.prediction.assumptions

    def to_json(self) -> dict[str, Any]:
        """Return the plan as ``pipefit.plan/1``."""
        return {
            **prediction_json(
                self.prediction, pipeline=self.pipeline, call=self.call, machine=self.machine
            ),
            "schema": PLAN_SCHEMA,
            **{name: serial.to_json(getattr(self, name)) for name in _PLAN_ONLY},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Return the plan that :meth:`to_json` wrote.

        Raises:
            InvalidRequest: if *data* is not such a plan.
        """
        found = data.get("schema") if isinstance(data, Mapping) else None
        if found != PLAN_SCHEMA:
            raise InvalidRequest(
                f"This is not a saved plan: its schema is {found!r} where {PLAN_SCHEMA!r} is "
                "expected; write one with `pipefit plan PIPELINE --out plan.json`."
            )
        try:
            # Plans saved by earlier versions know of no rehearsal.
            return serial.from_json(cls, {**_NO_REHEARSAL, **data, "prediction": data})
        except ValueError as error:
            raise InvalidRequest(
                f"The saved plan is damaged ({error}): write it again with `pipefit plan`."
            ) from error

    def __str__(self) -> str:
        """Return the plan as the tables that the command line prints."""
        # rich costs a tenth of a second, and the report reads plans: imported when one is printed
        from pipefit.planner.report import plan_report, to_text

        return to_text(plan_report(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedCall(Prediction):
    """A prediction together with what it is of: the answer of ``predict``."""

    pipeline: str
    call: Mapping[str, Any]
    machine: Machine
    options: tuple[Option, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it as ``pipefit.prediction/1``."""
        return prediction_json(
            self, pipeline=self.pipeline, call=self.call, machine=self.machine
        ) | {"options": serial.to_json(self.options)}

    def __str__(self) -> str:
        """Return the prediction as the tables that the command line prints."""
        from pipefit.planner.report import prediction_report, to_text

        return to_text(prediction_report(self))


@dataclass(slots=True)
class Copies:
    """Bytes that crossed the link, by direction and by the kind of host memory."""

    to_gpu_bytes: int = 0
    to_gpu_pinned_bytes: int = 0
    """Of these, out of page-locked memory."""
    to_host_bytes: int = 0
    to_host_pinned_bytes: int = 0
    to_other_gpus_bytes: int = 0


@dataclass(slots=True)
class RehearsedPhase:
    """What was counted on one GPU from a component's first allocation to that of the next one.

    Placing the weights belongs to the first phase, evicting a component to the phase before it.
    """

    name: str
    component: str
    entry: str
    device: int = 0
    calls: int = 0
    allocated_bytes: int = 0
    """Peak of ``torch.cuda.memory_allocated``."""
    reserved_bytes: int = 0
    seconds: float = 0.0
    """Of all its calls, with what the pipeline does up to the next component's call."""
    last_call_s: float = 0.0
    """Of the last one, in which everything that hooks learn has been learnt."""
    copies: Copies = field(default_factory=Copies)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """What one call needed."""

    phases: tuple[RehearsedPhase, ...]
    placing: Copies
    """Copied before the call, by applying the options."""
    placing_host_bytes: int
    """Peak of tensors in pageable host memory until the call begins: the weights as they were
    loaded, and what applying the options makes of them. Not the process's other RAM."""
    host_bytes: int
    """The same from the first call on, with pages of the files that are being read."""
    pinned_bytes: int
    """Page-locked host memory that torch took and keeps, in blocks of powers of two."""
    disk_bytes: int
    """Written by group offloading."""
    context_bytes: int
    """CUDA context of the first GPU, predicted; a budget holds it besides what torch reserves."""
    call: Mapping[str, Any]
    """As it was executed, with fewer steps."""
    unknown_reads: Mapping[str, int]
    """Where -> how many values were read that only real weights give; zero was taken."""
    num_alloc_retries: int
    """How often cached memory was given back because the budget was reached, on all GPUs; as
    ``torch.cuda.memory_stats`` counts it."""

    @property
    def seconds(self) -> float:
        """How long the call took as it was executed, on the virtual clock."""
        rows = {(phase.component, phase.entry): phase.seconds for phase in self.phases}
        return sum(rows.values())

    @property
    def reserved_bytes(self) -> int:
        """Peak of what torch reserved on the first GPU."""
        first = self.phases[0].device
        return max(p.reserved_bytes for p in self.phases if p.device == first)

    @property
    def process_bytes(self) -> int:
        """Peak of what the driver would show for the process on the first GPU."""
        return self.reserved_bytes + self.context_bytes


@dataclass(frozen=True, slots=True)
class Verification:
    """A plan beside its rehearsal."""

    plan: Plan
    rehearsal: Rehearsal
    """With more room than the budget, if that does not hold."""
    out_of_memory: str = ""
    """torch's words; empty where the budget holds."""

    @property
    def holds(self) -> bool:
        """Whether the call went through with torch's allocator held to the budget."""
        return not self.out_of_memory

    @property
    def process_bytes(self) -> dict[int, int]:
        """What the driver would show for the process at its peak, by GPU."""
        return {
            peak.device: peak.context_bytes
            + max(p.reserved_bytes for p in self.rehearsal.phases if p.device == peak.device)
            for peak in self.plan.prediction.peak_vram
        }

    @property
    def phases(self) -> list[tuple[PhasePrediction | None, RehearsedPhase]]:
        """What was predicted beside what was rehearsed."""
        predicted = {(p.component, p.entry, p.device): p for p in self.plan.prediction.phases}
        used = {peak.device for peak in self.plan.prediction.peak_vram}
        return [
            (predicted.get((p.component, p.entry, p.device)), p)
            for p in self.rehearsal.phases
            if p.device in used
        ]

    def to_json(self) -> dict[str, Any]:
        """Return it as ``pipefit.verification/1``."""
        rehearsal = serial.to_json(self.rehearsal)
        rehearsal["phases"] = [serial.to_json(phase) for _, phase in self.phases]
        for shown, (predicted, phase) in zip(rehearsal["phases"], self.phases, strict=True):
            for key in ("allocated_bytes", "reserved_bytes", "seconds"):
                shown[f"predicted_{key}"] = predicted and getattr(predicted, key)
            shown["call_s"] = call_seconds(predicted, phase)
        return {
            "schema": VERIFICATION_SCHEMA,
            "pipeline": self.plan.pipeline,
            "budget_bytes": self.plan.policy.budget_bytes[self.plan.gpu.index],
            "holds": self.holds,
            "out_of_memory": self.out_of_memory,
            "process_bytes": self.process_bytes[self.plan.gpu.index],
            **rehearsal,
        }

    def __str__(self) -> str:
        """Return the tables that the command line prints."""
        from pipefit.planner.report import to_text, verification_report

        return to_text(verification_report(self))


def call_seconds(predicted: PhasePrediction | None, phase: RehearsedPhase) -> float:
    """Return what a rehearsed phase takes in a call with as many calls of it as were planned."""
    missing = 0 if predicted is None else predicted.calls - phase.calls
    return phase.seconds + missing * phase.last_call_s


def prediction_json(
    prediction: Prediction, *, pipeline: str, call: Mapping[str, Any], machine: Machine
) -> dict[str, Any]:
    """Return *prediction* as ``pipefit.prediction/1`` (design section 6)."""
    fields = {
        f.name: serial.to_json(getattr(prediction, f.name)) for f in dataclasses.fields(Prediction)
    }
    return {
        "schema": PREDICTION_SCHEMA,
        "pipeline": pipeline,
        "call": serial.to_json(call),
        "machine": serial.to_json(machine),
        **fields,
    }


_PLAN_ONLY = (
    "options",
    "alternatives",
    "quality",
    "next_quality",
    "policy",
    "fingerprint",
    "versions",
    "rehearsal",
    "not_rehearsed",
)

_NO_REHEARSAL: Mapping[str, Any] = {"rehearsal": None, "not_rehearsed": ""}
