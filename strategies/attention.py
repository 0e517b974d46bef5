"""Which kernel computes attention, or attention in slices.

torch's own scaled dot product attention already picks a kernel whose memory grows with the sequence
and not with its square, so there is little to gain here on an NVIDIA GPU; cuDNN's kernel can be
faster on Hopper. Slicing replaces that attention by plain matrix products, a few heads at a time:
slower, and worth it only where no such kernel exists. diffusers' dispatcher works for models whose
processors name a backend; UNets and several transformers do not take part.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.workload import Component, Workload
from pipefit.strategies.live import attention_registry, processor_restorer
from pipefit.strategies.parameters import unknown_parameter
from pipefit.strategies.strategy import Kind, Quality, Undo

DISPATCHED_BACKENDS = {
    "native": "native",
    "flash": "_native_flash",
    "efficient": "_native_efficient",
    "cudnn": "_native_cudnn",
    "math": "_native_math",
    "xformers": "xformers",
}
"""Our name -> diffusers' (``AttentionBackendName`` in models/attention_dispatch.py, 0.42.1)."""

CLASSIC_BACKENDS = ("math", "xformers")
"""What can replace the processors of models outside the dispatcher."""

CLASSIC_PROCESSOR = "AttnProcessor2_0"
"""The processor that calls torch's attention; ``AttnProcessor`` is the same by matrix products."""

FIRST_CUDNN_CAPABILITY = (9, 0)
"""From Hopper on torch itself ranks cuDNN's attention first
(``priority_order`` in aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, torch 2.6)."""

SLICING_WORDS = ("auto", "max")

FUSED_ARCHITECTURES = ("cpu",)
"""Architectures without a compute capability where torch has an attention of linear memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """``backend=`` or ``slicing=``, one of the two."""

    name: str = "attention"
    kind: Kind = "compute"
    quality: Quality = Quality.HIGH

    def traits(self, module: Any) -> dict[str, Any]:
        """Whether the model takes part in the dispatcher, and which processors it has otherwise."""
        processors = [
            part.processor
            for part in module.modules()
            if getattr(part, "processor", None) is not None
        ]
        return {
            "dispatches_attention": hasattr(module, "set_attention_backend")
            and any(hasattr(one, "_attention_backend") for one in processors),
            "attention_processors": sorted({type(one).__name__ for one in processors}),
            "can_slice_attention": hasattr(module, "set_attention_slice"),
        }

    def options(
        self, component: Component, workload: Workload, gpu: Gpu
    ) -> Sequence[Mapping[str, Any]]:
        """cuDNN's kernel where torch prefers it, slices where torch has no fused kernel."""
        offered: list[Mapping[str, Any]] = []
        if gpu.compute_capability is None:
            if gpu.architecture not in FUSED_ARCHITECTURES:
                offered = [{"slicing": word} for word in SLICING_WORDS]
        elif gpu.compute_capability >= FIRST_CUDNN_CAPABILITY:
            offered = [{"backend": "cudnn"}]
        return [one for one in offered if self.refusal(component, one) is None]

    def refusal(self, component: Component, parameters: Mapping[str, Any]) -> str | None:
        """Backends that the component cannot take, and packages that are not installed."""
        wrong = unknown_parameter(self.name, parameters, ("backend", "slicing"))
        if wrong:
            return wrong
        if len(parameters) != 1:
            return "attention takes either backend or slicing."
        if "slicing" in parameters:
            return _slicing_refusal(component, parameters["slicing"])
        return _backend_refusal(component, parameters["backend"])

    def placement(self, parameters: Mapping[str, Any]) -> None:
        """Weights stay where they are."""

    def apply(
        self, pipe: Any, component: str | None, parameters: Mapping[str, Any], device: Any
    ) -> Undo:
        """Change the processors or the backend that they name; undo puts the same objects back."""
        module = getattr(pipe, str(component))
        with ExitStack() as undo:
            undo.callback(processor_restorer(module))
            if "slicing" in parameters:
                module.set_attention_slice(parameters["slicing"])
            elif self.traits(module)["dispatches_attention"]:
                _dispatch(module, DISPATCHED_BACKENDS[parameters["backend"]])
            else:
                _replace_processors(module, parameters["backend"])
            return undo.pop_all().close


def _slicing_refusal(component: Component, slicing: Any) -> str | None:
    if not component.traits.get("can_slice_attention"):
        return f"{component.class_name} cannot compute attention in slices."
    if slicing in SLICING_WORDS:
        return None
    if not isinstance(slicing, int) or isinstance(slicing, bool) or slicing < 1:
        return f"attention:slicing is auto, max or a number of heads, but was {slicing!r}."
    return None


def _backend_refusal(component: Component, backend: Any) -> str | None:
    if backend not in DISPATCHED_BACKENDS:
        known = ", ".join(DISPATCHED_BACKENDS)
        return f"attention:backend is one of {known}, but was {backend!r}."
    if not component.traits.get("dispatches_attention"):
        if not component.traits.get("attention_processors"):
            return f"{component.class_name} has no attention that diffusers could exchange."
        others = set(component.traits["attention_processors"]) - {CLASSIC_PROCESSOR}
        if backend not in CLASSIC_BACKENDS or others:
            return (
                f"{component.class_name} calls torch's own attention, which chooses its kernel "
                f"itself, so {backend} cannot be asked for."
            )
    if backend == "xformers" and importlib.util.find_spec("xformers") is None:
        return "attention:backend=xformers needs `pip install xformers`."
    return None


def _dispatch(module: Any, backend: str) -> None:
    """Name the backend in this model's processors, and in no other model's.

    ``set_attention_backend`` also makes it the process's default, which ``reset_attention_backend``
    does not take back (models/modeling_utils.py, diffusers 0.42.1).
    """
    registry = attention_registry()
    default, _ = registry.get_active_backend()
    try:
        module.set_attention_backend(backend)
    finally:
        registry.set_active_backend(default)


def _replace_processors(module: Any, backend: str) -> None:
    if backend == "xformers":
        module.enable_xformers_memory_efficient_attention()
        return
    from diffusers.models.attention_processor import AttnProcessor

    for part in module.modules():
        if getattr(part, "processor", None) is not None:
            part.set_processor(AttnProcessor())
