"""Compute queries, keys and values of an attention in one product: fused projections.

Each attention gets one more layer that holds the three weights, one below the other. Two launches
of a matrix product go where all three read the same input, one where only keys and values do. What
a reader would get wrong: the three layers stay beside it (``fuse_projections`` in
models/attention_processor.py and models/attention.py, diffusers 0.42.1), so weights grow by what
those weigh, and ``unfuse_qkv_projections`` of a UNet takes nothing of it back. Undo here takes the
new layers out again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from pipefit.cost_models.latency import LatencyModel, launch_seconds
from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.placement import Resident
from pipefit.cost_models.workload import Component, Workload
from pipefit.strategies.live import Restore, attribute_restorer, processor_restorer
from pipefit.strategies.parameters import unknown_parameter
from pipefit.strategies.strategy import Kind, Option, Quality, Undo

FUSED_LAYERS = ("to_qkv", "to_kv", "to_added_qkv")
"""What ``fuse_projections`` adds to an attention."""

JOINED_LAYERS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
"""What it joins."""


WORTH_SHARE = 0.02
"""Share of a component's time below which the search would not prefer it, so that it is not worth a
trace of the pipeline: ``TIME_TOLERANCE_PERCENT`` of planner/search.py."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedQkv:
    """What ``component.fuse_qkv_projections()`` does."""

    name: str = "fused_qkv"
    kind: Kind = "load"
    quality: Quality = Quality.HIGH

    def traits(self, module: Any) -> dict[str, Any]:
        """Whether the library can join the projections, and how many launches that saves."""
        can_fuse = hasattr(module, "fuse_qkv_projections") and _can_fuse(module)
        return {
            "can_fuse_qkv": can_fuse,
            "launches_saved_by_fused_qkv": sum(map(_num_saved, _attentions(module)))
            if can_fuse
            else 0,
        }

    def options(
        self, component: Component, workload: Workload, gpu: Gpu
    ) -> Sequence[Mapping[str, Any]]:
        """Where the launches that it saves are worth more than times count as equal by.

        That is, where the host is what a call waits for; the kernels themselves take as long.
        """
        num_calls = sum(p.num_calls for p in workload.phases if p.component == component.name)
        saved_s = (
            num_calls * component.traits.get("launches_saved_by_fused_qkv", 0) * launch_seconds(gpu)
        )
        if not saved_s or self.refusal(component, {}):
            return ()
        routines = Counter(
            [event[1] for event in workload.root if event[0] == "c"][ordinal]
            for phase in workload.phases
            if phase.component == component.name
            for ordinal in phase.calls
        )
        call_s = (
            LatencyModel(workload, gpu)
            .placement_seconds(component, list(routines.items()), Resident())
            .call_s
        )
        return ({},) if saved_s > WORTH_SHARE * call_s else ()

    def refusal(self, component: Component, parameters: Mapping[str, Any]) -> str | None:
        """Components whose attention cannot be joined."""
        wrong = unknown_parameter(self.name, parameters, ())
        if wrong:
            return wrong
        if not component.traits.get("can_fuse_qkv"):
            return (
                f"{component.class_name} has no attention whose plain query, key and value layers "
                "diffusers can join."
            )
        return None

    def conflict(self, parameters: Mapping[str, Any], other: Option) -> str | None:
        """What packs the weights, and processors that do not know the joined layers."""
        if other.strategy == "quantization":
            return "weights that are packed cannot be joined."
        if other.strategy == "attention" and "slicing" in other.parameters:
            return "sliced attention computes with the separate layers."
        return None

    def placement(self, parameters: Mapping[str, Any]) -> None:
        """Weights stay where they are."""

    def apply(
        self, pipe: Any, component: str | None, parameters: Mapping[str, Any], device: Any
    ) -> Undo:
        """Join them; undo takes the joined layers away and puts the processors back."""
        module = getattr(pipe, str(component))
        if all(part.fused_projections for part in _attentions(module)):
            return _nothing
        with ExitStack() as undo:
            for part in _attentions(module):
                undo.callback(_layer_restorer(part))
                undo.callback(attribute_restorer(part, ("fused_projections",)))
            undo.callback(processor_restorer(module))
            for part in _attentions(module):
                for name, layers in _joins(part).items():
                    part.add_module(name, _joined([getattr(part, layer) for layer in layers]))
                part.fused_projections = True
                fused = _processor_made_for_it(type(part.processor))
                if fused is not None:
                    part.set_processor(fused())
            return undo.pop_all().close


def _joins(part: Any) -> dict[str, tuple[str, ...]]:
    """Return the layers that an attention gets, each with those whose rows it holds."""
    is_cross = getattr(part, "is_cross_attention", False)
    joins = {"to_kv": ("to_k", "to_v")} if is_cross else {"to_qkv": ("to_q", "to_k", "to_v")}
    added = ("add_q_proj", "add_k_proj", "add_v_proj")
    if all(getattr(part, name, None) is not None for name in added):
        joins["to_added_qkv"] = added
    return joins


def _joined(layers: Sequence[Any]) -> Any:
    """Return one linear layer with the rows of *layers*.

    The library makes it with random values first, which moves torch's generator on.
    """
    import torch
    from torch import nn

    first = layers[0]
    outputs = sum(layer.out_features for layer in layers)
    joined = nn.Linear(
        first.in_features,
        outputs,
        bias=first.bias is not None,
        device="meta",
        dtype=first.weight.dtype,
    )
    for name in ("weight", "bias"):
        if getattr(first, name) is not None:
            rows = torch.cat([getattr(layer, name).data for layer in layers])
            needs_grad = getattr(first, name).requires_grad
            setattr(joined, name, nn.Parameter(rows, requires_grad=needs_grad))
    return joined.train(first.training)


def _attentions(module: Any) -> Iterator[Any]:
    """Yield the modules whose projections ``fuse_qkv_projections`` of *module* joins.

    The method that most models inherit passes over attentions of the older kind (``Attention``),
    which some of these models still have, as ControlNets do: nothing is joined there.
    """
    from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
    from diffusers.models.attention_processor import Attention

    own = getattr(type(module), "fuse_qkv_projections", None)
    kind = AttentionModuleMixin if own is AttentionMixin.fuse_qkv_projections else Attention
    for part in module.modules():
        if isinstance(part, kind) and getattr(part, "_supports_qkv_fusion", True):
            yield part


def _can_fuse(module: Any) -> bool:
    """Whether there is attention, all of it plain, that computes with joined layers."""
    found = list(_attentions(module))
    return bool(found) and all(map(_is_plain, found))


def _is_plain(part: Any) -> bool:
    from torch import nn

    from pipefit.strategies.quantized_linear import QuantizedLinear

    layers = [getattr(part, name, None) for name in JOINED_LAYERS]
    needed = [*layers[:3], *(layer for layer in layers[3:] if layer is not None)]
    return _knows_joined_layers(type(part.processor)) and all(
        # not where an adapter or a quantiser has taken its place
        isinstance(layer, nn.Linear) and not isinstance(layer, QuantizedLinear)
        for layer in needed
    )


def _num_saved(part: Any) -> int:
    """Return how many launches one forward of an attention is spared at the most.

    Where queries and keys are normalised afterwards it is none: slices of a joined product are
    copied first, one launch each.
    """
    if getattr(part, "fused_projections", False):
        return 0  # somebody has joined them before
    return sum(len(layers) - 1 for layers in _joins(part).values())


def _processor_made_for_it(processor: type) -> Any:
    """Return the library's twin of an older *processor* that uses joined layers; None without."""
    from diffusers.models import attention_processor

    return getattr(attention_processor, f"Fused{processor.__name__}", None)


def _knows_joined_layers(processor: type) -> bool:
    """Whether what will run reads what was joined: a processor made for it, or a flag it asks."""
    if processor.__name__.startswith("Fused") or _processor_made_for_it(processor):
        return True
    call = vars(processor).get("__call__")
    if call is None:
        return False
    # It asks on its own, or by a function beside it (``_get_qkv_projections``).
    called = (call.__globals__.get(name) for name in call.__code__.co_names)
    codes = [call.__code__, *(one.__code__ for one in called if hasattr(one, "__code__"))]
    return any("fused_projections" in code.co_names for code in codes)


def _nothing() -> None:
    """What there is to undo where the user has joined them."""


def _layer_restorer(part: Any) -> Restore:
    before = set(part._modules)

    def restore() -> None:
        for name in FUSED_LAYERS:
            if name not in before:
                part._modules.pop(name, None)

    return restore
