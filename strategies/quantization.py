"""Weights quantised when they are loaded: torchao, bitsandbytes, GGUF files, quanto.

Predicted and not yet applied. A loaded pipeline is past the point where diffusers quantises
(``from_pretrained(quantization_config=...)``), so ``apply`` refuses, and the search is offered it
only for what is yet to be loaded. It is predicted on the weightless twin, whose linear layers are
replaced by ones that hold what the library would hold, so that the library need not be there. Only
linear layers are: embeddings, norms and convolutions keep their dtype in every library.

Which linear layers a library leaves alone is the loader's business, and easily overlooked.
transformers leaves out the output head and what a class wants in float32, T5's ``wo`` among them, a
fifth of that encoder; diffusers leaves out the latter only; torchao's own ``quantize_`` nothing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.storage import (
    TYPES,
    StoredTensor,
    gguf_type,
    stored_bits,
    stored_weight,
)
from pipefit.cost_models.units import format_bytes
from pipefit.cost_models.workload import Component, Workload
from pipefit.errors import UnsupportedPipeline
from pipefit.strategies.live import wanted_in_float32
from pipefit.strategies.parameters import not_a_flag, unknown_parameter
from pipefit.strategies.strategy import Kind, Quality, Undo
from pipefit.strategies.traced import is_called_by_forward

PARAMETERS = (
    "backend",
    "type",
    "double_quant",
    "group_size",
    "per_row",
    "modules_to_not_convert",
    "all_linear",
    "kept_dtype",
)
FLAGS = ("double_quant", "per_row", "all_linear")

KEPT_DTYPES = ("float32", "bfloat16", "float16")

ONLY_FOR = {
    "double_quant": ("nf4", "fp4"),
    "group_size": ("int4_weight_only", "int8_dynamic_activation_int4_weight"),
    "per_row": ("float8_dynamic_activation_float8_weight",),
}
"""Parameter -> the types that know it."""

PACKAGES = {
    "torchao": ("torchao", "torchao"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "gguf": ("gguf", "gguf"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
}
"""Backend -> its module, and what ``pip install`` calls the package."""

OFFERED = (
    {"backend": "torchao", "type": "int8_weight_only"},
    {"backend": "bitsandbytes", "type": "nf4"},
)
"""One type of 8 bits and one of 4. torchao's is quantised on the host, so that loading it needs no
memory of the GPU; nf4 is what most 4-bit models are stored in. Our choice: the others weigh about
the same, and each would be another trace of the pipeline."""

GROUP_SIZES = (32, 64, 128, 256)
"""What ``Int4WeightOnlyConfig`` allows (quantization/quant_api.py, torchao 0.18)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """``backend=`` and ``type=``, a GGUF file's type being the end of its name (``Q4_K_M``).

    ``double_quant`` is bitsandbytes' ``bnb_4bit_use_double_quant``, ``per_row`` torchao's
    ``granularity=PerRow()``. ``modules_to_not_convert`` replaces what the loader leaves out, and
    ``all_linear`` says that nothing is, as torchao's ``quantize_`` and quanto's ``quantize`` have
    it. ``kept_dtype`` is the dtype of what the class wants in float32: transformers before 5 loads
    T5's ``wo`` in float32 beside bitsandbytes' layers, transformers 5 in the dtype of the load.
    """

    name: str = "quantization"
    kind: Kind = "load"
    quality: Quality = Quality.BALANCED
    goes_on_loaded: bool = False

    def quality_of(self, parameters: Mapping[str, Any]) -> Quality:
        """Low where weights have fewer than eight bits; what is refused is of the best level."""
        backend = str(parameters.get("backend"))
        if _type(parameters) not in TYPES.get(backend, ()):
            return self.quality
        bits = stored_bits(backend, _type(parameters))
        if bits > 8:
            return Quality.HIGH
        return Quality.BALANCED if bits == 8 else Quality.LOW

    def traits(self, module: Any) -> dict[str, Any]:
        """Whether there is a linear layer to quantise, and which backend has done so."""
        from torch import nn

        from pipefit.strategies.quantized_linear import QuantizedLinear

        linear = [part for part in module.modules() if isinstance(part, nn.Linear)]
        backends = (part.backend for part in linear if isinstance(part, QuantizedLinear))
        return {"has_linear": bool(linear), "quantized_by": next(backends, None)}

    def options(
        self, component: Component, workload: Workload, gpu: Gpu
    ) -> Sequence[Mapping[str, Any]]:
        """8 and 4 bits on NVIDIA GPUs, for models that compute by ``forward`` alone."""
        if gpu.compute_capability is None or not is_called_by_forward(component, workload):
            return ()
        if component.traits.get("quantized_by"):
            return ()
        return [one for one in OFFERED if self.refusal(component, one) is None]

    def refusal(self, component: Component, parameters: Mapping[str, Any]) -> str | None:
        """Types and parameters that the backend does not have."""
        wrong = unknown_parameter(self.name, parameters, PARAMETERS) or not_a_flag(
            self.name, parameters, FLAGS
        )
        if wrong:
            return wrong
        backend, known = parameters.get("backend"), TYPES.get(str(parameters.get("backend")))
        if known is None:
            return f"quantization:backend is one of {', '.join(TYPES)}, but was {backend!r}."
        if _type(parameters) not in known:
            given = parameters.get("type")
            return f"{backend} has the types {', '.join(known)}, but was asked for {given!r}."
        for name, types in ONLY_FOR.items():
            if name in parameters and _type(parameters) not in types:
                return f"quantization:{name} is for {' and '.join(types)} only."
        if parameters.get("group_size", GROUP_SIZES[0]) not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            return f"quantization:group_size is one of {sizes}."
        if parameters.get("kept_dtype", KEPT_DTYPES[0]) not in KEPT_DTYPES:
            return f"quantization:kept_dtype is one of {', '.join(KEPT_DTYPES)}."
        if not component.traits.get("has_linear"):
            return f"{component.class_name} has no linear layer."
        if backend == "gguf" and component.library != "diffusers":
            return f"{component.class_name} cannot be read from a GGUF file by diffusers."
        return None

    def placement(self, parameters: Mapping[str, Any]) -> None:
        """Weights stay where they are."""

    def apply(
        self, pipe: Any, component: str | None, parameters: Mapping[str, Any], device: Any
    ) -> Undo:
        """Refuse.

        Raises:
            UnsupportedPipeline: always.
        """
        missing = self.missing_package(parameters)
        raise UnsupportedPipeline(
            f"{component} is loaded already, and weights are quantised while they are loaded: load "
            f"it with a quantization_config for {parameters['backend']}"
            f"{f', which needs `pip install {missing}`' if missing else ''}."
        )

    def imitate(self, pipe: Any, component: str, parameters: Mapping[str, Any]) -> None:
        """Give the weightless twin of *component* the layers that the load would have made."""
        import torch
        from torch import nn

        from pipefit.strategies.quantized_linear import QuantizedLinear

        module = getattr(pipe, component)
        left_out = _left_out(module, parameters)
        if "kept_dtype" in parameters:
            kept = wanted_in_float32(module)
            for path, part in module.named_modules():
                if path.rpartition(".")[2] in kept:
                    part.to(getattr(torch, parameters["kept_dtype"]))
        class_names = [base.__name__ for base in type(module).__mro__]
        for path, part in list(module.named_modules()):
            for name, child in list(part.named_children()):
                below = f"{path}.{name}".removeprefix(".")
                if type(child) is not nn.Linear or any(
                    f".{one}." in f".{below}." for one in left_out
                ):
                    continue
                backend, type_ = parameters["backend"], _type(parameters)
                if backend == "gguf":
                    type_ = gguf_type(type_, class_names, below)
                stored = _stored(child, type_, parameters)
                if stored:
                    part._modules[name] = QuantizedLinear(child, stored, backend, type_)

    def note(self, parameters: Mapping[str, Any], before: Component, after: Component) -> str:
        """What it takes to have it: a package, and more of the host while it is loaded."""
        backend, missing = parameters["backend"], self.missing_package(parameters)
        parts = [
            f"{after.name} is quantised by {backend} when it is loaded, not afterwards"
            + (f": needs `pip install {missing}`." if missing else ".")
        ]
        if backend != "gguf":  # a file of that is as small as the weights
            stored, read = format_bytes(after.weight_bytes), format_bytes(before.weight_bytes)
            parts.append(
                f"Host RAM is predicted for a {after.name} stored in {stored} of files; quantising "
                f"it while it loads reads {read}."
            )
        return " ".join(parts)

    def missing_package(self, parameters: Mapping[str, Any]) -> str:
        """What has to be installed for the backend of *parameters*; empty: it is there."""
        module, package = PACKAGES[parameters["backend"]]
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # not even the package that the module is in
            found = False
        return "" if found else package

    def held_bytes(self, before: Component, after: Component) -> int:
        """None: nothing waits to be put back."""
        return 0


def _type(parameters: Mapping[str, Any]) -> str:
    given = str(parameters.get("type"))
    return given.upper() if parameters.get("backend") == "gguf" else given


def _left_out(module: Any, parameters: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the modules, by name or path, that the loader of *module*'s library leaves out."""
    given = () if parameters.get("all_linear") else parameters.get("modules_to_not_convert")
    if given is not None:
        return (given,) if isinstance(given, str) else tuple(given)
    kept = wanted_in_float32(module)
    if not type(module).__module__.startswith("transformers."):
        return kept
    from transformers.quantizers.base import HfQuantizer

    return tuple(HfQuantizer.get_modules_to_not_convert(module, None, kept))


def _stored(linear: Any, type_: str, parameters: Mapping[str, Any]) -> tuple[StoredTensor, ...]:
    return stored_weight(
        parameters["backend"],
        type_,
        outputs=linear.out_features,
        inputs=linear.in_features,
        dtype=str(linear.weight.dtype).removeprefix("torch."),
        group_size=parameters.get("group_size"),
        double_quant=parameters.get("double_quant", False),
        per_row=parameters.get("per_row", False),
    )
