"""Hold weights in 8-bit floats and cast each layer up for its own forward: layerwise casting.

diffusers' hook casts a layer's weight and bias up before its forward and down after it, on the GPU.
Which layers: convolutions, linear layers and embeddings, less what the class and the library skip.
On a transformers encoder more is left out than diffusers leaves out on its own: embeddings and the
head that may be tied to them, because such a model's dtype is that of its first parameter and
pipelines cast prompts to it, and what the class keeps in float32, because T5 reads
``wo.weight.dtype`` (diffusers issue 10347).

A reader would expect undo to cast back. Bits are lost, so the originals wait in host RAM while this
is in force, and undo puts those very weights back. A weight beyond the largest value of the 8-bit
type becomes that value, without a word from torch: what is lost so is counted and logged.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.units import format_bytes
from pipefit.cost_models.workload import Component, Workload
from pipefit.strategies.live import (
    LAYERWISE_CASTING_HOOK,
    device_restorer,
    diffusers_hook,
    hook_restorer,
    wanted_in_float32,
)
from pipefit.strategies.parameters import unknown_parameter
from pipefit.strategies.strategy import Kind, Option, Quality, Undo
from pipefit.strategies.traced import changed_bytes, is_called_by_forward

logger = logging.getLogger(__name__)

STORAGE_DTYPES = ("float8_e4m3fn", "float8_e5m2")
COMPUTE_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerwiseCasting:
    """``component.enable_layerwise_casting(...)``; ``apply_layerwise_casting`` where it has none.

    ``compute_dtype`` is by default what most of the component's weights have.
    """

    name: str = "layerwise_casting"
    kind: Kind = "load"
    quality: Quality = Quality.BALANCED
    is_rehearsed: bool = True

    def goes_on_loaded(self, parameters: Mapping[str, Any]) -> bool:
        """Always: the hooks go onto what is there."""
        return True

    def traits(self, module: Any) -> dict[str, Any]:
        """None: the module tree says which layers the library would cast."""
        return {}

    def options(
        self, component: Component, workload: Workload, gpu: Gpu
    ) -> Sequence[Mapping[str, Any]]:
        """e4m3fn for models that compute by ``forward`` alone, in 16 or 32 bits.

        Not for autoencoders: of what is stored in 8 bits theirs is seen first, and they weigh
        little. e5m2 is never worth more memory or time; it is there for weights that are large.
        """
        if gpu.architecture == "apple" or not is_called_by_forward(component, workload):
            return ()
        if component.traits.get("dtype") not in COMPUTE_DTYPES:
            return ()
        parameters = {"storage_dtype": STORAGE_DTYPES[0]}
        return () if self.refusal(component, parameters) else (parameters,)

    def refusal(self, component: Component, parameters: Mapping[str, Any]) -> str | None:
        """Dtypes that the library does not cast to, and components without a layer to cast."""
        wrong = unknown_parameter(self.name, parameters, ("storage_dtype", "compute_dtype"))
        if wrong:
            return wrong
        for key, known in (("storage_dtype", STORAGE_DTYPES), ("compute_dtype", COMPUTE_DTYPES)):
            if key in parameters and parameters[key] not in known:
                given = parameters[key]
                return f"layerwise_casting:{key} is one of {', '.join(known)}, but was {given!r}."
        if not any(module.is_leaf_layer for module in component.modules):
            return f"{component.class_name} has no layer that could be stored in 8 bits."
        if component.traits.get("force_upcast"):
            return (
                f"{component.class_name} is cast to float32 and back by pipelines that read or "
                "write pictures (force_upcast in its config), which undoes the cast to 8 bits."
            )
        return None

    def conflict(self, parameters: Mapping[str, Any], other: Option) -> str | None:
        """Weights that a quantiser has packed are no floats to cast."""
        if other.strategy == "quantization":
            return "the weights are stored in few bits already."
        return None

    def placement(self, parameters: Mapping[str, Any]) -> None:
        """Weights stay where they are."""

    def apply(
        self, pipe: Any, component: str | None, parameters: Mapping[str, Any], device: Any
    ) -> Undo:
        """Attach the hooks; undo takes them off and puts the original weights back."""
        module = getattr(pipe, str(component))
        with ExitStack() as undo:
            undo.callback(device_restorer(module))
            before = [(tensor, tensor.data) for tensor in module.parameters()]
            undo.callback(_put_back, before)
            undo.callback(hook_restorer(module))
            _enable(module, parameters)
            # What was not cast has lost nothing and need not be held.
            before[:] = [
                (tensor, data.to("cpu")) for tensor, data in before if tensor.dtype != data.dtype
            ]
            _report_clipped(str(component), before)
            return undo.pop_all().close

    def imitate(self, pipe: Any, component: str, parameters: Mapping[str, Any]) -> None:
        """Cast the weightless twin of *component*, with layers that are not changed by a call.

        The hooks replace a weight twice in each forward. To a trace that is a module that changes,
        of which no call can be remembered; a copy for the length of the forward needs the same
        memory, at the highest: the 8-bit weight, the wide one and the one cast back, which here is
        the first.
        """
        from diffusers.hooks import HookRegistry

        module = getattr(pipe, component)
        layers = list(module.modules())
        restore = hook_restorer(module)
        _enable(module, parameters)
        hooks = [diffusers_hook(layer, LAYERWISE_CASTING_HOOK) for layer in layers]
        restore()
        for layer, hook in zip(layers, hooks, strict=True):
            if hook is not None:
                layer.__class__ = _casting_class(type(layer), hook.compute_dtype)
                # The dtype that diffusers' models say they have is that of such a hook.
                top = HookRegistry.check_if_exists_or_initialize(module)
                top.hooks.setdefault(LAYERWISE_CASTING_HOOK, hook)

    def note(
        self,
        parameters: Mapping[str, Any],
        before: Component,
        after: Component,
        *,
        is_loaded: bool,
    ) -> str:
        """The RAM in which the originals wait."""
        held = format_bytes(self.held_bytes(before, after, is_loaded=is_loaded))
        return (
            f"Until it is undone, layerwise_casting holds {held} of original weights of "
            f"{before.name} in RAM, which the host RAM stated leaves out."
        )

    def missing_package(self, parameters: Mapping[str, Any]) -> str:
        """Nothing: diffusers has it."""
        return ""

    def held_bytes(self, before: Component, after: Component, *, is_loaded: bool) -> int:
        """The originals of what was cast."""
        return changed_bytes(before, after)


def _enable(module: Any, parameters: Mapping[str, Any]) -> None:
    import torch
    from diffusers import ModelMixin
    from diffusers.hooks import apply_layerwise_casting
    from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN

    storage = getattr(torch, parameters.get("storage_dtype", STORAGE_DTYPES[0]))
    compute = getattr(torch, parameters.get("compute_dtype") or _dtype_of(module))
    if isinstance(module, ModelMixin):
        module.enable_layerwise_casting(storage_dtype=storage, compute_dtype=compute)
        return
    kept = [f"{name}$" for name in wanted_in_float32(module)]
    # The output head may be tied to the embedding, which would be cast with it.
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    kept += [f"^{path}$" for path, part in module.named_modules() if head and part is head]
    apply_layerwise_casting(
        module,
        storage_dtype=storage,
        compute_dtype=compute,
        skip_modules_pattern=(*DEFAULT_SKIP_MODULES_PATTERN, *kept),
        skip_modules_classes=(torch.nn.Embedding,),
    )


def _report_clipped(component: str, before: Sequence[tuple[Any, Any]]) -> None:
    """Log how many of the weights *before* the cast lie beyond what they are stored in now."""
    import torch

    num_clipped, largest, stored = 0, 0.0, STORAGE_DTYPES[0]
    for tensor, data in before:
        # Nothing can be said of weights without values: those of a twin.
        if data.is_meta or type(data) is not torch.Tensor or not data.numel():
            continue
        limit = torch.finfo(tensor.dtype).max
        low, high = data.aminmax()
        furthest = max(-float(low), float(high))
        if furthest > limit:
            num_clipped += int((data.abs() > limit).sum())
            largest, stored = max(largest, furthest), str(tensor.dtype).removeprefix("torch.")
    if num_clipped:
        logger.warning(
            "layerwise_casting clips %d weights of %s to %g, the largest %s; the largest weight is "
            "%g: %s.",
            num_clipped,
            component,
            torch.finfo(getattr(torch, stored)).max,
            stored,
            largest,
            "store them as float8_e5m2, or leave the component as it is"
            if stored == STORAGE_DTYPES[0]
            else "leave the component as it is",
        )


def _dtype_of(module: Any) -> str:
    from pipefit.strategies.precision import Precision

    return str(Precision().traits(module)["dtype"])


def _put_back(before: Sequence[tuple[Any, Any]]) -> None:
    for tensor, data in before:
        tensor.data = data


@functools.cache
def _casting_class(cls: type, dtype: Any) -> type:
    """Return *cls* with a forward that computes with copies of its parameters in *dtype*."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        stored = dict(self._parameters)
        try:
            for name, tensor in stored.items():
                self._parameters[name] = None if tensor is None else tensor.to(dtype)
            return cls.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        finally:
            self._parameters.update(stored)

    return type(f"Casting{cls.__name__}", (cls,), {"forward": forward})
