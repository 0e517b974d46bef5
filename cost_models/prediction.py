"""What a configuration is predicted to need; its JSON is ``pipefit.prediction/1``."""

from __future__ import annotations

from dataclasses import dataclass

from pipefit.cost_models.placement import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What one component does: where its weights are, and which traced variant of it runs."""

    placement: Placement
    variant: str = ""
    """A key of ``Workload.variants``; empty: as traced."""
    device: int | None = None
    """Index of the GPU on which it computes; None: the one on which the pipeline does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhasePrediction:
    """Peak and time of one phase on one device. The parts add up to ``allocated_bytes``."""

    name: str
    component: str
    entry: str
    calls: int
    device: int
    seconds: float
    """One later call's share, transfers that nothing hides included."""
    allocated_bytes: int
    weights_bytes: int
    activation_bytes: int
    workspace_bytes: int
    carried_bytes: int
    reserved_bytes: int
    process_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePeak:
    """The largest phase of one device, or loading, where that needs more."""

    device: int
    allocated_bytes: int
    reserved_bytes: int
    process_bytes: int
    context_bytes: int
    slack_bytes: int
    """Kept in hand for fragmentation, above ``process_bytes``; a plan's budget holds both."""
    loading_bytes: int = 0
    """Weights that lie on the device together once all is loaded and nothing placed yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Seconds of one call; the range says how sure that is."""

    first_call_s: float
    call_s: float
    low_s: float
    high_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Memory, time and host needs of one configuration."""

    peak_vram: tuple[DevicePeak, ...]
    phases: tuple[PhasePrediction, ...]
    latency: Latency
    host_ram_bytes: int
    pinned_bytes: int
    disk_bytes: int
    assumptions: tuple[str, ...] = ()
