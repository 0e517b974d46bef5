"""Which kernel computes attention, or attention in slices.

torch's own scaled dot product attention already picks a kernel whose memory grows with the sequence
and not with its square, so there is little to gain here on an NVIDIA GPU; cuDNN's kernel can be
faster on Hopper. Slicing replaces that attention by plain matrix products, a few heads at a time:
slower, and worth it only where no such kernel exists.

Backends are those of diffusers' dispatcher, which works for models whose processors name one; UNets
and several transformers do not take part. Which there are, what they need installed and what they
take is asked of diffusers' registry; it checks none of it before the call, and the kernel then
fails in the middle of denoising. So it is checked here against the attention that was traced.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.workload import Component, Workload
from pipefit.strategies.live import attention_backends, attention_registry, processor_restorer
from pipefit.strategies.parameters import unknown_parameter
from pipefit.strategies.strategy import Kind, Quality, Undo
from pipefit.strategies.traced import kernels_of

FLASH_PACKAGE = "flash_attn"
"""diffusers calls the kernel of the package flash-attn ``flash``, which for us is torch's own."""

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

COMPILED_BACKENDS = ("flex",)
"""Attention that is written as a program and is a kernel only once torch.compile has seen it."""

UNREGISTERED_LIMITS: tuple[tuple[str, tuple[int, int], int], ...] = (
    ("cudnn", (8, 0), 128),
    ("flash_3", (9, 0), 256),
    ("flash_varlen_3", (9, 0), 256),
    ("flash_4", (9, 0), 256),
    ("flash", (8, 0), 256),
    ("sage", (8, 0), 128),
)
"""(beginning of the name, least compute capability, largest head size) of kernels in 16 bits, which
diffusers does not check. cuDNN and torch's flash: ``check_cudnn_tensor_shapes`` and
``check_head_dim_size_flash`` in sdp_utils.cpp. flash-attn 2 to 4: its README. SageAttention 2: its
``core.py``, which pads heads to 64 and 128 and raises beyond."""

HALF = ("float16", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """``backend=`` or ``slicing=``, one of the two."""

    name: str = "attention"
    kind: Kind = "compute"
    quality: Quality = Quality.HIGH

    def quality_of(self, parameters: Mapping[str, Any]) -> Quality:
        """Return the level of *parameters*: SageAttention multiplies in 8 bits."""
        in_8_bits = str(parameters.get("backend", "")).startswith("sage")
        return Quality.BALANCED if in_8_bits else self.quality

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
            "attention_backends": {
                backend_name(value): facts for value, facts in attention_backends().items()
            }
            if processors
            else {},
            "can_slice_attention": hasattr(module, "set_attention_slice"),
        }

    def options(
        self, component: Component, workload: Workload, gpu: Gpu
    ) -> Sequence[Mapping[str, Any]]:
        """cuDNN's kernel where torch prefers it, slices where torch has no fused kernel.

        Kernels of packages are for asking: nothing is known of how much faster they are.
        """
        offered: list[Mapping[str, Any]] = []
        if gpu.compute_capability is None:
            if gpu.architecture not in FUSED_ARCHITECTURES:
                offered = [{"slicing": word} for word in SLICING_WORDS]
        elif gpu.compute_capability >= FIRST_CUDNN_CAPABILITY:
            offered = [{"backend": "cudnn"}]
        return [
            one
            for one in offered
            if self.refusal(component, one) is None
            and self.unfit(component, one, workload, gpu) is None
        ]

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

    def unfit(
        self, component: Component, parameters: Mapping[str, Any], workload: Workload, gpu: Gpu
    ) -> str | None:
        """Masks, dtypes and head sizes of the traced attention that the backend does not take."""
        backend = parameters.get("backend")
        facts = component.traits.get("attention_backends", {}).get(backend)
        if facts is None or gpu.compute_capability is None:
            return None
        least, largest, dtypes = tuple(facts["capability"] or (0, 0)), math.inf, facts["dtypes"]
        for start, capability, head_size in UNREGISTERED_LIMITS:
            if str(backend).startswith(start):
                least, largest = max(least, capability), head_size
                dtypes = [dtype for dtype in dtypes if dtype in HALF]
                break
        if gpu.compute_capability < least:
            return f"{backend} needs compute capability {least[0]}.{least[1]} or more."
        for kernel in kernels_of(component, workload):
            if kernel.kind != "attention":
                continue
            if kernel.masked and not facts["takes_mask"]:
                return f"{backend} takes no mask, and {component.class_name} gives it one."
            if kernel.dtype not in dtypes:
                return f"{backend} does not compute in {kernel.dtype}."
            for head_size in kernel.shape[4:]:
                sizes = facts["head_sizes"]
                if head_size > largest or (sizes is not None and head_size not in sizes):
                    return f"{backend} does not take heads of {head_size}."
        return None

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
                _dispatch(module, parameters["backend"])
            else:
                _replace_processors(module, parameters["backend"])
            return undo.pop_all().close


def backend_name(value: str) -> str:
    """Return our name of diffusers' backend *value* (``AttentionBackendName``, 0.42.1).

    >>> [backend_name(value) for value in ("native", "_native_flash", "flash", "_flash_3_hub")]
    ['native', 'flash', 'flash_attn', 'flash_3_hub']
    """
    return FLASH_PACKAGE if value == "flash" else value.removeprefix("_native").lstrip("_")


def _slicing_refusal(component: Component, slicing: Any) -> str | None:
    if not component.traits.get("can_slice_attention"):
        return f"{component.class_name} cannot compute attention in slices."
    if slicing in SLICING_WORDS:
        return None
    if not isinstance(slicing, int) or isinstance(slicing, bool) or slicing < 1:
        return f"attention:slicing is auto, max or a number of heads, but was {slicing!r}."
    return None


def _backend_refusal(component: Component, backend: Any) -> str | None:
    if not component.traits.get("attention_processors"):
        return f"{component.class_name} has no attention that diffusers could exchange."
    backends = component.traits["attention_backends"]
    if backend not in backends:
        known = ", ".join(sorted(backends, key=lambda name: (name != "native", name)))
        return f"attention:backend is one of {known}, but was {backend!r}."
    if not component.traits.get("dispatches_attention"):
        others = set(component.traits["attention_processors"]) - {CLASSIC_PROCESSOR}
        if backend not in CLASSIC_BACKENDS or others:
            return (
                f"{component.class_name} calls torch's own attention, which chooses its kernel "
                f"itself, so {backend} cannot be asked for."
            )
    if backend in COMPILED_BACKENDS:
        return f"attention:backend={backend} is a kernel only under torch.compile."
    missing = backends[backend]["missing"]
    return f"attention:backend={backend} {_needs(missing)}" if missing else None


def _needs(message: str) -> str:
    """Return what diffusers' *message* about a missing package asks for."""
    found = re.search(r"install (?:it with )?`(?:pip install )?([^`]+)`", message)
    if found is None:
        return f"cannot be used here: {message}"
    package = found[1] if re.fullmatch(r"[\w.-]+", found[1]) else f'"{found[1]}"'
    return f"needs `pip install {package}`."


def _dispatch(module: Any, backend: str) -> None:
    """Name the backend in this model's processors, and in no other model's.

    ``set_attention_backend`` also makes it the process's default, which ``reset_attention_backend``
    does not take back (models/modeling_utils.py, diffusers 0.42.1).
    """
    registry = attention_registry()
    default, _ = registry.get_active_backend()
    values = {backend_name(one.value): one.value for one in registry.list_backends()}
    try:
        module.set_attention_backend(values[backend])
    finally:
        registry.set_active_backend(default)


def _replace_processors(module: Any, backend: str) -> None:
    from diffusers.models.attention_processor import AttnProcessor, XFormersAttnProcessor

    # `enable_xformers_memory_efficient_attention` would try its kernel on the real GPU first.
    made = XFormersAttnProcessor if backend == "xformers" else AttnProcessor
    for part in module.modules():
        if getattr(part, "processor", None) is not None:
            part.set_processor(made())
