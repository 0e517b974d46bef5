"""Have torch compile a component: ``Module.compile`` in place, of its repeated blocks or of all.

Inductor fuses what lies between matrix products, convolutions and attention, and its wrapper
launches kernels with less Python than modules do. The price is the first call, which compiles:
seconds for a block, a minute for a large model. So it is never chosen unless that was allowed, and
only for what is called often within one call.

What one would get wrong: ``component.compile()`` compiles ``forward``, which pipelines never call
of an autoencoder; there the encoder and the decoder are compiled. And whatever hooks onto layers
*within* a compiled module breaks its graph at each of them: such placements are excluded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.workload import Component, Workload
from pipefit.errors import InvalidRequest
from pipefit.strategies.live import COMPILE_MODE, COMPILED, attribute_restorer, repeated_blocks
from pipefit.strategies.parameters import not_a_flag, unknown_parameter
from pipefit.strategies.strategy import Kind, Option, Quality, Undo, hooks_within

SCOPES = ("repeated_blocks", "component")

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""What ``torch.compile`` knows (``list_mode_options`` in torch/_inductor/__init__.py, 2.13) but
``lite``, which fuses nothing."""

REGIONAL_SHARE = 0.9
"""Share of a component's weights in its repeated blocks above which those alone are offered.

Our choice: transformers lie above and gain as much from it (the source of ``GRAPH_S`` in
cost_models/latency.py: 4.5 s either way for FLUX.1); UNets, whose convolutions are no such blocks,
lie below.
"""

LEAST_CALLS = 4
"""Calls within one pipeline call from which compiling is offered; our choice: fewer gain less than
it takes in any session that somebody waits for."""

FIRST_TRITON_CAPABILITY = (7, 0)
"""Inductor's GPU kernels are Triton's, which has none for older GPUs (``has_triton`` and
``GPUTooOldForTriton`` in torch/_inductor/exc.py, 2.13)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compile:
    """``scope=`` repeated_blocks or component; ``mode``, ``fullgraph``, ``dynamic``, ``backend``
    as ``torch.compile`` has them."""

    name: str = "compile"
    kind: Kind = "compute"
    quality: Quality = Quality.HIGH
    consent: Literal["compile"] = "compile"

    def traits(self, module: Any) -> dict[str, Any]:
        """How much of the weights lies in blocks that the class names as repeated."""
        total = sum(parameter.numel() for parameter in module.parameters())
        blocks = repeated_blocks(module)
        inside = sum(p.numel() for block in blocks for p in block.parameters())
        return {"repeated_share": inside / total if total else 0.0}

    def options(
        self, component: Component, workload: Workload, gpu: Gpu
    ) -> Sequence[Mapping[str, Any]]:
        """One option, for what one pipeline call enters often: the blocks where they are nearly
        all of it, else the whole."""
        if gpu.compute_capability is not None and gpu.compute_capability < FIRST_TRITON_CAPABILITY:
            return ()
        calls = (p.num_calls for p in workload.phases if p.component == component.name)
        if max(calls, default=0) < LEAST_CALLS:
            return ()
        is_regional = component.traits.get("repeated_share", 0.0) >= REGIONAL_SHARE
        return ({"scope": SCOPES[0] if is_regional else SCOPES[1]},)

    def refusal(self, component: Component, parameters: Mapping[str, Any]) -> str | None:
        """Blocks that the class does not name, and words that ``torch.compile`` does not know."""
        known = ("scope", "mode", "fullgraph", "dynamic", "backend")
        wrong = unknown_parameter(self.name, parameters, known)
        wrong = wrong or not_a_flag(self.name, parameters, ("fullgraph",))
        if wrong:
            return wrong
        scope = parameters.get("scope", SCOPES[1])
        if scope not in SCOPES:
            return f"compile:scope is {' or '.join(SCOPES)}, but was {scope!r}."
        if scope == SCOPES[0] and not component.traits.get("repeated_share"):
            return f"{component.class_name} names no repeated blocks: use scope=component."
        mode = parameters.get("mode", "default")
        if mode not in MODES:
            return f"compile:mode is one of {', '.join(MODES)}, but was {mode!r}."
        if "backend" in parameters and "mode" in parameters:
            return "compile:mode is inductor's: leave backend out."
        if not isinstance(parameters.get("dynamic"), (bool, type(None))):
            return f"compile:dynamic is true, false or none, but was {parameters['dynamic']!r}."
        return None

    def conflict(self, parameters: Mapping[str, Any], other: Option) -> str | None:
        """Whatever has hooks within what is compiled."""
        scope = parameters.get("scope", SCOPES[1])
        if not hooks_within(other):
            return None
        if other.strategy != "group_offload":
            return "its hooks within a compiled module would break the graph at each of them."
        if other.parameters.get("offload_type") == "leaf_level" or scope == SCOPES[1]:
            return (
                "hooks within a compiled module break the graph at each of them: use "
                "scope=repeated_blocks with offload_type=block_level."
            )
        if parameters.get("fullgraph"):
            return "its hooks break the graph of a block: use fullgraph=false."
        return None

    def placement(self, parameters: Mapping[str, Any]) -> None:
        """Weights stay where they are."""

    def apply(
        self, pipe: Any, component: str | None, parameters: Mapping[str, Any], device: Any
    ) -> Undo:
        """Mark the modules; torch compiles each in its first call. Undo takes the marks off, and
        what was compiled is forgotten with them."""
        import torch

        module = getattr(pipe, str(component))
        keys = ("mode", "fullgraph", "dynamic", "backend")
        arguments = {key: parameters[key] for key in keys if key in parameters}
        is_triton_used = torch.version.cuda and str(device) != "cpu" and "backend" not in arguments
        if is_triton_used and importlib.util.find_spec("triton") is None:
            raise InvalidRequest("compile needs Triton on a GPU: `pip install triton`.")
        with ExitStack() as undo:
            for part in _compiled_parts(module, parameters):
                undo.callback(attribute_restorer(part, (COMPILED, COMPILE_MODE)))
                part.compile(**arguments)
                vars(part)[COMPILE_MODE] = parameters.get("mode", "default")
            return undo.pop_all().close


def _compiled_parts(module: Any, parameters: Mapping[str, Any]) -> list[Any]:
    """Return the modules that become a graph each."""
    if parameters.get("scope", SCOPES[1]) == SCOPES[0]:
        return list(repeated_blocks(module))
    if hasattr(module, "decode"):
        return [part for name in ("encoder", "decoder") if (part := getattr(module, name, None))]
    return [module]
