"""Decode the pictures of a batch one after another: ``vae.enable_slicing``.

It does nothing for one picture, and nothing at all where a class has the flag and never reads it.
The sums are the same and the kernels need not be: on the CPU one picture of Stable Diffusion's
decoder comes out a rounding error away from the same picture in a batch of two. So this is not
``exact``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.workload import Component, Workload
from pipefit.strategies.live import attribute_restorer, reads_flag
from pipefit.strategies.parameters import unknown_parameter
from pipefit.strategies.strategy import Kind, Quality, Undo
from pipefit.strategies.traced import batch_of


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeSlicing:
    """``vae.enable_slicing()``."""

    name: str = "vae_slicing"
    kind: Kind = "compute"
    quality: Quality = Quality.HIGH

    def traits(self, module: Any) -> dict[str, Any]:
        """Whether the class slices."""
        return {
            "can_slice": hasattr(module, "use_slicing") and reads_flag(type(module), "use_slicing")
        }

    def options(
        self, component: Component, workload: Workload, gpu: Gpu
    ) -> Sequence[Mapping[str, Any]]:
        """One option, where the call has a batch."""
        if self.refusal(component, {}) or batch_of(component, workload) < 2:
            return ()
        return ({},)

    def refusal(self, component: Component, parameters: Mapping[str, Any]) -> str | None:
        """Classes without slicing."""
        if not component.traits.get("can_slice"):
            return f"{component.class_name} cannot work on one picture of a batch at a time."
        return unknown_parameter(self.name, parameters, ())

    def placement(self, parameters: Mapping[str, Any]) -> None:
        """Weights stay where they are."""

    def apply(
        self, pipe: Any, component: str | None, parameters: Mapping[str, Any], device: Any
    ) -> Undo:
        """Set the flag; undo sets it back to what it was."""
        vae = getattr(pipe, str(component))
        with ExitStack() as undo:
            undo.callback(attribute_restorer(vae, ("use_slicing",)))
            vae.enable_slicing()
            return undo.pop_all().close
