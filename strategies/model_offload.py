"""Whole components take turns on the GPU: ``pipe.enable_model_cpu_offload``.

Which components are on the GPU together follows the pipeline's ``model_cpu_offload_seq``, not the
order of the calls; the memory model plays those rules (diffusers 0.42.1,
pipelines/pipeline_utils.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from pipefit.cost_models import placement
from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.workload import Component, Workload
from pipefit.strategies.live import (
    OFFLOAD_ATTRIBUTES,
    attribute_restorer,
    device_restorer,
    hook_restorer,
    module_components,
)
from pipefit.strategies.parameters import unknown_parameter
from pipefit.strategies.strategy import Kind, Quality, Undo


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOffload:
    """``pipe.enable_model_cpu_offload(device=...)``."""

    name: str = "model_offload"
    kind: Kind = "pipeline_placement"
    quality: Quality = Quality.EXACT

    def traits(self, module: Any) -> dict[str, Any]:
        """Nothing: the order of offloading is the pipeline's, ``Workload.offload_sequence``."""
        return {}

    def options(
        self, component: Component, workload: Workload, gpu: Gpu
    ) -> Sequence[Mapping[str, Any]]:
        """One option, where the pipeline's class declares an order of offloading."""
        return ({},) if workload.offload_sequence else ()

    def refusal(self, component: Component, parameters: Mapping[str, Any]) -> str | None:
        """Only parameters can be wrong."""
        return unknown_parameter(self.name, parameters, ())

    def placement(self, parameters: Mapping[str, Any]) -> placement.Placement:
        """Whole components take turns."""
        return placement.ModelOffload()

    def apply(
        self, pipe: Any, component: str | None, parameters: Mapping[str, Any], device: Any
    ) -> Undo:
        """Enable it for the whole pipeline; undo removes the hooks and moves the weights back."""
        modules = module_components(pipe).values()
        with ExitStack() as undo:
            undo.callback(attribute_restorer(pipe, OFFLOAD_ATTRIBUTES))
            for module in modules:
                undo.callback(device_restorer(module))
                undo.callback(hook_restorer(module))
            undo.callback(pipe.remove_all_hooks)
            pipe.enable_model_cpu_offload(device=device)
            return undo.pop_all().close
