"""Every module loads its own tensors before its forward: ``pipe.enable_sequential_cpu_offload``.

The least memory of all and by far the slowest: accelerate loads tensor by tensor from pageable
memory and empties torch's cache after each. Leaf-level group offload needs the same memory and less
time, so this is for components that refuse it.
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
    identity_restorer,
    module_components,
    set_execution_device,
)
from pipefit.strategies.parameters import unknown_parameter
from pipefit.strategies.strategy import Kind, Quality, Undo

UNSUPPORTED_BACKENDS = {"bitsandbytes": 10800, "gguf": 14691, "quanto": 10526}
"""Quantisation backends whose parameters accelerate rebuilds without what makes sense of them ->
the diffusers issue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequentialOffload:
    """``pipe.enable_sequential_cpu_offload(device=...)``."""

    name: str = "sequential_offload"
    kind: Kind = "pipeline_placement"
    quality: Quality = Quality.EXACT

    def traits(self, module: Any) -> dict[str, Any]:
        """Whether some module computes with weights of a child whose forward it never calls."""
        from torch import nn

        return {
            "has_multihead_attention": any(
                isinstance(part, nn.MultiheadAttention) for part in module.modules()
            )
        }

    def options(
        self, component: Component, workload: Workload, gpu: Gpu
    ) -> Sequence[Mapping[str, Any]]:
        """One option, where the component allows it."""
        return () if self.refusal(component, {}) else ({},)

    def refusal(self, component: Component, parameters: Mapping[str, Any]) -> str | None:
        """Weights read outside their own module's forward are still on ``meta`` then."""
        if component.traits.get("has_multihead_attention"):
            return (
                f"{component.class_name} has a torch.nn.MultiheadAttention, which reads its output "
                "projection without calling it, so the weights would not have been loaded."
            )
        backend = component.traits.get("quantized_by")
        if backend in UNSUPPORTED_BACKENDS:
            return (
                f"{component.class_name} is quantised by {backend}, whose weights do not survive "
                f"sequential offload (diffusers issue {UNSUPPORTED_BACKENDS[backend]})."
            )
        return unknown_parameter(self.name, parameters, ())

    def placement(self, parameters: Mapping[str, Any]) -> placement.Placement:
        """Every module loads its own tensors."""
        return placement.SequentialOffload()

    def apply(
        self, pipe: Any, component: str | None, parameters: Mapping[str, Any], device: Any
    ) -> Undo:
        """Enable it for the whole pipeline; undo puts the very tensors back that were there."""
        import torch

        modules = module_components(pipe).values()
        with ExitStack() as undo:
            undo.callback(attribute_restorer(pipe, OFFLOAD_ATTRIBUTES))
            for module in modules:
                undo.callback(device_restorer(module))
                # On the CPU accelerate's weights map shares the parameters' storage, so keeping
                # these objects costs nothing, and it saves ties, which accelerate would cut.
                module.to("cpu")
                undo.callback(identity_restorer(module))
                undo.callback(hook_restorer(module))
            undo.callback(pipe.remove_all_hooks)
            pipe.enable_sequential_cpu_offload(device=device)
            if torch.device(device).type == "cpu":
                # diffusers writes "cpu:0", which no CPU tensor's device equals: accelerate moves a
                # parameter "to" it, is left with a plain tensor, and fails after the forward.
                for module in modules:
                    set_execution_device(module, torch.device("cpu"))
            return undo.pop_all().close
