"""Keep a component on the GPU: the fastest placement, and what every other is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from pipefit.cost_models import placement
from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.workload import Component, Workload
from pipefit.strategies.live import device_restorer
from pipefit.strategies.parameters import unknown_parameter
from pipefit.strategies.strategy import Kind, Quality, Undo


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """``component.to(device)``."""

    name: str = "resident"
    kind: Kind = "placement"
    quality: Quality = Quality.EXACT

    def traits(self, module: Any) -> dict[str, Any]:
        """Nothing needs asking: every module can be moved."""
        return {}

    def options(
        self, component: Component, workload: Workload, gpu: Gpu
    ) -> Sequence[Mapping[str, Any]]:
        """One option without parameters."""
        return ({},)

    def refusal(self, component: Component, parameters: Mapping[str, Any]) -> str | None:
        """Only parameters can be wrong."""
        return unknown_parameter(self.name, parameters, ())

    def placement(self, parameters: Mapping[str, Any]) -> placement.Placement:
        """All weights stay on the GPU."""
        return placement.Resident()

    def apply(
        self, pipe: Any, component: str | None, parameters: Mapping[str, Any], device: Any
    ) -> Undo:
        """Move the component; undo moves each tensor back to where it was."""
        module = getattr(pipe, str(component))
        with ExitStack() as undo:
            undo.callback(device_restorer(module))
            module.to(device)
            return undo.pop_all().close
