"""What a strategy is: one thing that changes memory or time, on a component or on the pipeline.

A strategy is a frozen object in a file of its own, listed in ``pipefit.strategies.BUILT_IN``.
Nothing here or in a strategy's module imports torch or diffusers at the top: planning from a cached
trace must not pay for them.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.placement import Placement
from pipefit.cost_models.workload import Component, Workload

Undo = Callable[[], None]
"""Takes one strategy back; called once, in reverse order of application."""

Kind = Literal["device", "placement", "pipeline_placement", "compute", "load", "process"]
"""device: on which GPU one component computes; may say how its weights lie there, too.
placement: where one component's weights are, exactly one per component.
pipeline_placement: the same, for all components at once (model and sequential offload).
compute: changes how the component computes; its effect on memory and time is traced.
load: how the weights are stored (dtype, fewer bits); changes the whole trace.
process: a switch of the whole process or pipeline; one call needs the same tensors, so it is not
traced (but ``latent_output`` ends the call early, and traces with it)."""


class Quality(str, enum.Enum):
    """How far the picture may move: exact < high < balanced < low (design section 7)."""

    EXACT = "exact"
    HIGH = "high"
    BALANCED = "balanced"
    LOW = "low"

    @property
    def rank(self) -> int:
        """0 for exact … 3 for low."""
        return list(Quality).index(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A strategy with its parameters on a component; None stands for the whole pipeline."""

    strategy: str
    component: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    """Why it is in the plan, one sentence; empty until planned."""


def hooks_within(option: Option) -> bool:
    """Whether *option* hooks onto modules in a component, which a graph of it would not call."""
    if option.strategy == "device_map":
        return "device" not in option.parameters  # split over several GPUs
    hooking = ("streaming", "sequential_offload", "group_offload", "layerwise_casting")
    return option.strategy in hooking


class Strategy(Protocol):
    """One strategy. ``apply`` and ``traits`` touch live objects, everything else is pure."""

    @property
    def name(self) -> str:
        """The file's name; written into plans."""
        ...

    @property
    def kind(self) -> Kind:
        """See :data:`Kind`."""
        ...

    @property
    def quality(self) -> Quality:
        """The best level at which this strategy may be used."""
        ...

    def traits(self, module: Any) -> dict[str, Any]:
        """Ask the live module (weightless or not) what :meth:`options` needs, as JSON values."""
        ...

    def options(
        self, component: Component, workload: Workload, gpu: Gpu
    ) -> Sequence[Mapping[str, Any]]:
        """Parameters of every option worth considering on *component*; empty: none applies."""
        ...

    def refusal(self, component: Component, parameters: Mapping[str, Any]) -> str | None:
        """Why these parameters cannot be used on *component*, one sentence; None: they can."""
        ...

    def placement(self, parameters: Mapping[str, Any]) -> Placement | None:
        """What the option means for weights; None for compute strategies."""
        ...

    def apply(
        self, pipe: Any, component: str | None, parameters: Mapping[str, Any], device: Any
    ) -> Undo:
        """Put it in force on the live pipeline. If it raises, nothing was changed."""
        ...


@runtime_checkable
class Choosy(Protocol):
    """A strategy that some others on the same component rule out, though each is possible."""

    def conflict(self, parameters: Mapping[str, Any], other: Option) -> str | None:
        """Why it cannot be had together with *other*, one sentence; None: it can."""
        ...


@runtime_checkable
class Consented(Protocol):
    """A strategy that no search chooses unless the policy allows it; to ask for it is to allow it.

    No virtual GPU executes what it makes, so plans with it are not rehearsed.
    """

    @property
    def consent(self) -> Literal["compile"]:
        """What the policy has to allow."""
        ...


@runtime_checkable
class Conditional(Protocol):
    """A strategy that some calls rule out, though the component could take it."""

    def unfit(
        self, component: Component, parameters: Mapping[str, Any], workload: Workload, gpu: Gpu
    ) -> str | None:
        """Why the traced call cannot run so on *gpu*, one sentence; None: it can."""
        ...


@runtime_checkable
class Imitated(Protocol):
    """A load strategy whose ``apply`` the weightless twin cannot or need not go through.

    What it is offered for is traced on some components at a time, not on each choice of them.
    """

    @property
    def is_rehearsed(self) -> bool:
        """Whether a rehearsal goes through ``apply``; otherwise it imitates, as a trace does."""
        ...

    def goes_on_loaded(self, parameters: Mapping[str, Any]) -> bool:
        """Whether a pipeline that is loaded already can be given it, by ``apply``."""
        ...

    def imitate(self, pipe: Any, component: str, parameters: Mapping[str, Any]) -> None:
        """Give the twin's component the tensors, and each call the allocations, that it causes."""
        ...

    def note(
        self,
        parameters: Mapping[str, Any],
        before: Component,
        after: Component,
        *,
        is_loaded: bool,
    ) -> str:
        """Say what the prediction of this component leaves out; empty if nothing.

        *is_loaded* says that the pipeline is live, so that ``apply`` does it and no load.
        """
        ...

    def missing_package(self, parameters: Mapping[str, Any]) -> str:
        """What ``pip install`` has to fetch before it can be had here; empty: nothing."""
        ...

    def held_bytes(self, before: Component, after: Component, *, is_loaded: bool) -> int:
        """RAM that is held until it is undone, beside the weights of *after*.

        *is_loaded* says that ``apply`` does it and no load.
        """
        ...
