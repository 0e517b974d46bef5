"""Leave a text encoder in host memory and let the CPU compute with it.

Nothing of it is ever on the GPU but its results. From outside it looks like a component that is
offloaded: what it is given may be on the GPU, what it returns is there, and pipelines that ask
where it computes are told the GPU, so that latents and embeddings are made there. A reader would
expect accelerate's ``AlignDevicesHook(execution_device="cpu")``: its device is what diffusers takes
for the whole pipeline's, if the text encoder happens to be the first component
(``DiffusionPipeline._execution_device``, 0.42.1).

The CPU's kernels round differently than the GPU's, so this is not ``exact``.
"""

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

CPU_DTYPES = ("float32", "bfloat16", "float16")
"""Weights in floats of which torch's CPU kernels compute every layer of a text encoder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoderOnCpu:
    """``component.to("cpu")``, its inputs moved there and its results to the GPU."""

    name: str = "text_encoder_on_cpu"
    kind: Kind = "placement"
    quality: Quality = Quality.HIGH

    def traits(self, module: Any) -> dict[str, Any]:
        """Whether it reads tokens by ``forward``; models of text and something else do not."""
        return {"reads_tokens": reads_tokens(module)}

    def options(
        self, component: Component, workload: Workload, gpu: Gpu
    ) -> Sequence[Mapping[str, Any]]:
        """One option, where all its work is done before the denoising begins."""
        if gpu.unified_memory or gpu.architecture in ("apple", "cpu"):
            return ()
        if self.refusal(component, {}) or not _is_done_first(component, workload):
            return ()
        return ({},)

    def refusal(self, component: Component, parameters: Mapping[str, Any]) -> str | None:
        """What is no text encoder, and weights that only a GPU computes with."""
        wrong = unknown_parameter(self.name, parameters, ())
        if wrong:
            return wrong
        name, traits = component.class_name, component.traits
        if not traits.get("reads_tokens"):
            return f"{name} is no text encoder: what computes in every step stays on the GPU."
        if traits.get("quantized_by"):
            return f"{name} is quantised by {traits['quantized_by']}, whose kernels want a GPU."
        for tensor in component.tensors:
            if "float" in tensor.dtype and tensor.dtype not in CPU_DTYPES:
                return f"{name} has weights in {tensor.dtype}, in which the CPU does not compute."
        return None

    def placement(self, parameters: Mapping[str, Any]) -> placement.Placement:
        """All weights stay in host memory."""
        return placement.OnHost()

    def apply(
        self, pipe: Any, component: str | None, parameters: Mapping[str, Any], device: Any
    ) -> Undo:
        """Move the component to the CPU and attach the hooks; undo takes both back."""
        import torch

        from pipefit.strategies.streaming import entry_hook

        module = getattr(pipe, str(component))
        with ExitStack() as undo:
            undo.callback(device_restorer(module))
            module.to("cpu")
            entry_hook(module, torch.device(device), undo)

            def to_host(_: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
                return _moved((args, kwargs), "cpu")  # type: ignore[no-any-return]

            def to_gpu(_: Any, args: Any, output: Any) -> Any:
                return _moved(output, device)

            handle = module.register_forward_pre_hook(to_host, prepend=True, with_kwargs=True)
            undo.callback(handle.remove)
            undo.callback(module.register_forward_hook(to_gpu).remove)
            return undo.pop_all().close


def reads_tokens(module: Any) -> bool:
    """Whether *module* is a text encoder."""
    return getattr(module, "main_input_name", None) == "input_ids" and not hasattr(
        module, "get_text_features"
    )


def _is_done_first(component: Component, workload: Workload) -> bool:
    """Whether the pipeline calls *component* itself, as a whole and only before it denoises."""
    calls = [event for event in workload.root if event[0] == "c"]
    own = [call for p in workload.phases if p.component == component.name for call in p.calls]
    denoising = [call for p in workload.phases if p.name == "denoise" for call in p.calls]
    return max(own, default=0) < min(denoising, default=len(calls)) and all(
        calls[call][2] == f"/{component.name}"
        and workload.routines[calls[call][1]].entry == "forward"
        for call in own
    )


def _moved(value: Any, device: Any) -> Any:
    """Return *value*, a container of any kind, with its tensors on *device*, each copied once."""
    from accelerate.utils import recursively_apply

    # Models return the same tensor in several places; its copy must be the same there, too.
    copies: dict[int, Any] = {}

    def copied(tensor: Any) -> Any:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.to(device)
        return copies[id(tensor)]

    return recursively_apply(copied, value)
