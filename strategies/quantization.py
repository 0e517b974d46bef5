"""Weights in fewer bits: torchao and quanto, on what is loaded too, bitsandbytes, GGUF files.

A loaded pipeline is past the point where diffusers quantises
(``from_pretrained(quantization_config=...)``). torchao and quanto convert live modules as well, and
so does ``apply``, wherever the weights lie: the originals wait in host RAM, and undo puts those
very parameters back. bitsandbytes' kernels pack on the GPU, and GGUF's blocks are read from a file:
these are for what is yet to be loaded, and ``apply`` refuses.

It is predicted on the weightless twin, whose linear layers are replaced by ones that hold what the
library would hold, so that the library need not be there. Only linear layers are: embeddings, norms
and convolutions keep their dtype in every library.

Which linear layers a library leaves alone is the loader's business, and easily overlooked.
transformers leaves out the output head and what a class wants in float32, T5's ``wo`` among them, a
fifth of that encoder; diffusers leaves out the latter only; torchao's own ``quantize_`` nothing.
``apply`` leaves out what the load would have, and LoRA adapters, which stay in 16 bits.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.storage import (
    INT4_DYNAMIC_GROUP_SIZE,
    TYPES,
    StoredTensor,
    gguf_type,
    stored_bits,
    stored_weight,
)
from pipefit.cost_models.units import format_bytes
from pipefit.cost_models.workload import Component, Workload
from pipefit.errors import InvalidRequest, UnsupportedPipeline
from pipefit.strategies.live import (
    attribute_restorer,
    device_restorer,
    identity_restorer,
    tensor_slots,
    wanted_in_float32,
)
from pipefit.strategies.parameters import not_a_flag, unknown_parameter
from pipefit.strategies.strategy import Kind, Quality, Undo
from pipefit.strategies.traced import changed_bytes, is_called_by_forward

PARAMETERS = (
    "backend",
    "type",
    "file",
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

IN_PLACE = {
    "torchao": (
        "int8_weight_only",
        "int8_dynamic_activation_int8_weight",
        "float8_weight_only",
        "float8_dynamic_activation_float8_weight",
        "int8_dynamic_activation_int4_weight",
    ),
    "quanto": ("int8", "float8", "int4"),
}
"""Backend -> the types that it makes of live modules wherever they lie.

torchao's int4_weight_only is packed by a kernel of the GPU, where a component that is to be made
small may not fit; its 6-bit type it had until 0.14. float8_dynamic_activation_float8_weight asks
for a GPU of compute capability 8.9 at once, and fails without.
"""

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

    ``file`` is that file's path, for a load; a plan without one is a prediction.
    ``double_quant`` is bitsandbytes' ``bnb_4bit_use_double_quant``, ``per_row`` torchao's
    ``granularity=PerRow()``. ``modules_to_not_convert`` replaces what the loader leaves out, and
    ``all_linear`` says that nothing is, as torchao's ``quantize_`` and quanto's ``quantize`` have
    it. ``kept_dtype`` is the dtype of what the class wants in float32: transformers before 5 loads
    T5's ``wo`` in float32 beside bitsandbytes' layers, transformers 5 in the dtype of the load.
    """

    name: str = "quantization"
    kind: Kind = "load"
    quality: Quality = Quality.BALANCED
    is_rehearsed: bool = False

    def goes_on_loaded(self, parameters: Mapping[str, Any]) -> bool:
        """Where the library converts live modules; dtypes of what it leaves out are the load's."""
        types = IN_PLACE.get(str(parameters.get("backend")), ())
        return _type(parameters) in types and "kept_dtype" not in parameters

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
        """Whether there is a linear layer to quantise, which backend has done so, and whether
        diffusers reads the model from one file."""
        from diffusers.loaders import FromOriginalModelMixin
        from torch import nn

        from pipefit.strategies.quantized_linear import QuantizedLinear

        linear = [part for part in module.modules() if isinstance(part, nn.Linear)]
        backends = (part.backend for part in linear if isinstance(part, QuantizedLinear))
        return {
            "has_linear": bool(linear),
            "quantized_by": next(backends, None),
            "reads_single_files": isinstance(module, FromOriginalModelMixin),
        }

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
        if "file" in parameters and (backend != "gguf" or not isinstance(parameters["file"], str)):
            return "quantization:file is the path of a GGUF file, for backend=gguf only."
        if not component.traits.get("has_linear"):
            return f"{component.class_name} has no linear layer."
        if backend == "gguf" and not component.traits.get("reads_single_files"):
            return f"{component.class_name} cannot be read from a GGUF file by diffusers."
        return None

    def placement(self, parameters: Mapping[str, Any]) -> None:
        """Weights stay where they are."""

    def apply(
        self, pipe: Any, component: str | None, parameters: Mapping[str, Any], device: Any
    ) -> Undo:
        """Convert layer by layer, where the weights lie; undo puts layers and weights back.

        Raises:
            UnsupportedPipeline: the library does it while it loads only, or is not installed.
        """
        import torch

        backend, missing = parameters["backend"], self.missing_package(parameters)
        if not self.goes_on_loaded(parameters):
            remedy = "let pipefit.load do it"
            if missing:
                remedy += f"; that needs `pip install {missing}`"
            raise UnsupportedPipeline(
                f"{component} is loaded already, and {backend} quantises weights while they are "
                f"loaded: {remedy}."
            )
        if missing:
            raise UnsupportedPipeline(
                f"{component} cannot be quantised by {backend}, which is not installed: "
                f"`pip install {missing}`."
            )
        module = getattr(pipe, str(component))
        with ExitStack() as undo, torch.no_grad():
            undo.callback(device_restorer(module))
            undo.callback(identity_restorer(module))
            found = list(_quantizable(module, parameters))
            weights = {layer: layer.weight for _, _, layer, _ in found}
            needed = {
                id(slots[key])
                for part in module.modules()
                for slots, key in tensor_slots(part, recurse=False)
                if part not in weights or key != "weight"
            }
            made: dict[Any, Any] = {}
            for part, name, layer, _ in found:
                undo.callback(part._modules.update, {name: layer})
                if layer not in made:
                    undo.callback(attribute_restorer(layer, ("extra_repr",)))  # torchao sets it
                    made[layer] = _converted(layer, parameters)
                    if id(weights[layer]) not in needed:  # an embedding may be tied to it
                        weights[layer].data = weights[layer].data.to("cpu")
                part._modules[name] = made[layer]
            return undo.pop_all().close

    def imitate(self, pipe: Any, component: str, parameters: Mapping[str, Any]) -> None:
        """Give the weightless twin of *component* the layers that the load would have made."""
        import torch

        from pipefit.strategies.quantized_linear import QuantizedLinear

        module = getattr(pipe, component)
        if "kept_dtype" in parameters:
            kept = wanted_in_float32(module)
            for path, part in module.named_modules():
                if path.rpartition(".")[2] in kept:
                    part.to(getattr(torch, parameters["kept_dtype"]))
        made: dict[Any, Any] = {}
        for part, name, layer, type_ in list(_quantizable(module, parameters)):
            if layer not in made:
                stored = _stored(layer, type_, parameters)
                made[layer] = QuantizedLinear(layer, stored, parameters["backend"], type_)
            part._modules[name] = made[layer]

    def note(
        self,
        parameters: Mapping[str, Any],
        before: Component,
        after: Component,
        *,
        is_loaded: bool,
    ) -> str:
        """What it takes to have it: a package, and more of the host."""
        backend, missing = parameters["backend"], self.missing_package(parameters)
        goes_on_loaded = self.goes_on_loaded(parameters)
        when = "once the plan is applied" if is_loaded else "when it is loaded"
        if not goes_on_loaded:
            when = "when it is loaded, not afterwards"
        if backend == "gguf" and "file" not in parameters:
            when += ", which needs file=PATH"
        parts = [
            f"{after.name} is quantised by {backend} {when}"
            + (f": needs `pip install {missing}`." if missing else ".")
        ]
        if is_loaded and goes_on_loaded:
            held = format_bytes(self.held_bytes(before, after, is_loaded=True))
            parts.append(
                f"Until it is undone, {held} of original weights of {before.name} wait in RAM, "
                "which the host RAM stated leaves out."
            )
        elif backend != "gguf":  # a file of that is as small as the weights
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

    def held_bytes(self, before: Component, after: Component, *, is_loaded: bool) -> int:
        """The originals of what ``apply`` converts; none where a load does it."""
        return changed_bytes(before, after) if is_loaded else 0


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


def _quantizable(module: Any, parameters: Mapping[str, Any]) -> Iterator[tuple[Any, str, Any, str]]:
    """Yield (parent, name in it, layer, type) of every layer of *module* that is to be quantised.

    A GGUF file's type says how each of its tensors is stored; elsewhere all are of one.
    """
    from torch import nn

    left_out = _left_out(module, parameters)
    adapters = _adapter_layers(module)
    class_names = [base.__name__ for base in type(module).__mro__]
    for path, part in module.named_modules():
        for name, child in part.named_children():
            below = f"{path}.{name}".removeprefix(".")
            if (
                type(child) is not nn.Linear
                or child in adapters
                or any(f".{one}." in f".{below}." for one in left_out)
            ):
                continue
            type_ = _type(parameters)
            if parameters["backend"] == "gguf":
                type_ = gguf_type(type_, class_names, below)
            if _stored(child, type_, parameters):
                yield part, name, child, type_


def _adapter_layers(module: Any) -> set[Any]:
    """Return what lies in the adapters that PEFT has put beside layers of *module*."""
    from torch import nn

    adapters = (
        getattr(part, name, None)
        for part in module.modules()
        for name in getattr(part, "adapter_layer_names", ())
    )
    return {layer for one in adapters if isinstance(one, nn.Module) for layer in one.modules()}


def _converted(layer: Any, parameters: Mapping[str, Any]) -> Any:
    """Return what the library makes of *layer*: the same one with another weight, or a new one."""
    from torch import nn

    holder = nn.Sequential(layer)
    if parameters["backend"] == "torchao":
        from torchao.quantization import quantize_

        quantize_(holder, torchao_config(parameters))
    else:
        from optimum import quanto

        quanto.quantize(holder, weights=getattr(quanto, f"q{_type(parameters)}"))
        quanto.freeze(holder)
    return holder[0].train(layer.training)


def torchao_config(parameters: Mapping[str, Any]) -> Any:
    """Return the configuration of torchao for one of its types.

    Raises:
        InvalidRequest: for a type that torchao no longer has.
    """
    import torch
    from torchao import quantization
    from torchao.quantization.granularity import PerGroup, PerRow, PerTensor

    # Left to itself it changes settings of torch.compile for the whole process.
    quietly = {"set_inductor_config": False}
    match _type(parameters):
        case "int8_weight_only":
            return quantization.Int8WeightOnlyConfig(**quietly)
        case "int8_dynamic_activation_int8_weight":
            return quantization.Int8DynamicActivationInt8WeightConfig(**quietly)
        case "float8_weight_only":
            return quantization.Float8WeightOnlyConfig(**quietly)
        case "float8_dynamic_activation_float8_weight":
            return quantization.Float8DynamicActivationFloat8WeightConfig(
                granularity=PerRow() if parameters.get("per_row") else PerTensor(), **quietly
            )
        case "int4_weight_only":
            sizes = {k: v for k, v in parameters.items() if k == "group_size"}
            return quantization.Int4WeightOnlyConfig(**sizes, **quietly)
        case "int8_dynamic_activation_int4_weight":
            return quantization.Int8DynamicActivationIntxWeightConfig(
                weight_dtype=torch.int4,
                weight_granularity=PerGroup(parameters.get("group_size", INT4_DYNAMIC_GROUP_SIZE)),
            )
    raise InvalidRequest(
        f"torchao has no type {parameters['type']} any more: choose another of its types."
    )


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
