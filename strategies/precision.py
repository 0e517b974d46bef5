"""Hold a component's weights in 16 bits: the load dtype, or a cast of a float32 component.

A plain ``.to(float16)`` is not enough. T5's feed-forward output overflows in float16 and is kept in
float32 by its class when loaded, but not when cast (diffusers issues 8604 and 9096), and some
denoisers keep modules in float32 whatever is asked for. So the cast here keeps what a load would
have kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.workload import Component, Workload
from pipefit.strategies.live import tensor_slots, wanted_in_float32
from pipefit.strategies.parameters import unknown_parameter
from pipefit.strategies.strategy import Kind, Quality, Undo

DTYPES = ("bfloat16", "float16", "float32")

FIRST_BFLOAT16_CAPABILITY = (8, 0)
"""NVIDIA computes in bfloat16 from Ampere on.

Source: table "Supported data types" by compute capability, CUDA C++ Programming Guide,
https://docs.nvidia.com/cuda/cuda-c-programming-guide/#features-and-technical-specifications.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """``dtype=`` of the load; on a live component a cast that keeps what a load keeps."""

    name: str = "precision"
    kind: Kind = "load"
    quality: Quality = Quality.HIGH

    def traits(self, module: Any) -> dict[str, Any]:
        """The dtype of most of the weights, and whether pipelines cast them up (layerwise casting
        asks)."""
        num_bytes: Counter[str] = Counter()
        for parameter in module.parameters():
            if parameter.is_floating_point():
                name = str(parameter.dtype).removeprefix("torch.")
                num_bytes[name] += parameter.numel() * parameter.element_size()
        config = getattr(module, "config", None)
        return {
            "dtype": num_bytes.most_common(1)[0][0] if num_bytes else None,
            "force_upcast": bool(getattr(config, "force_upcast", False)),
        }

    def options(
        self, component: Component, workload: Workload, gpu: Gpu
    ) -> Sequence[Mapping[str, Any]]:
        """bfloat16 for float32 components, float16 on GPUs without it."""
        if component.traits.get("dtype") != "float32":
            return ()
        capability = gpu.compute_capability
        has_bfloat16 = capability is None or capability >= FIRST_BFLOAT16_CAPABILITY
        parameters = {"dtype": "bfloat16" if has_bfloat16 else "float16"}
        return () if self.refusal(component, parameters) else (parameters,)

    def refusal(self, component: Component, parameters: Mapping[str, Any]) -> str | None:
        """Dtypes that are none of ours.

        An autoencoder that overflows in float16 takes it all the same: its pipeline casts it back
        for each picture, and hands it float16 latents if it was not cast with the others.
        """
        wrong = unknown_parameter(self.name, parameters, ("dtype",))
        if wrong:
            return wrong
        dtype = parameters.get("dtype")
        if dtype not in DTYPES:
            return f"precision:dtype is one of {', '.join(DTYPES)}, but was {dtype!r}."
        return None

    def placement(self, parameters: Mapping[str, Any]) -> None:
        """Weights stay where they are."""

    def apply(
        self, pipe: Any, component: str | None, parameters: Mapping[str, Any], device: Any
    ) -> Undo:
        """Cast in place; the originals stay in memory, because no cast back can restore them."""
        import torch

        module = getattr(pipe, str(component))
        dtype = getattr(torch, parameters["dtype"])
        kept = _kept_in_float32(module, parameters["dtype"])
        with ExitStack() as undo:
            for path, part in module.named_modules():
                if kept.isdisjoint(path.split(".")):
                    for slots, key in _stored_tensors(part):
                        tensor = slots[key]
                        if key not in kept and tensor.is_floating_point():
                            undo.callback(_set_data, tensor, tensor.data)
                            tensor.data = tensor.data.to(dtype)
            return undo.pop_all().close


def _set_data(tensor: Any, data: Any) -> None:
    tensor.data = data


def _stored_tensors(module: Any) -> list[tuple[dict[str, Any], str]]:
    """Return the module's own tensors that a checkpoint holds; computed tables keep theirs."""
    return [
        (slots, key)
        for slots, key in tensor_slots(module, recurse=False)
        if key not in module._non_persistent_buffers_set
    ]


def _kept_in_float32(module: Any, dtype: str) -> set[str]:
    """Return names that stay in float32: diffusers' always, transformers' by its two lists.

    transformers 5 heeds ``_keep_in_fp32_modules`` for float16 only and the strict list for both.
    """
    listed = set(wanted_in_float32(module))
    strict = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    is_transformers = type(module).__module__.startswith("transformers.")
    return strict if is_transformers and dtype != "float16" else listed | strict
