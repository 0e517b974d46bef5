"""Each small pipeline built once with the picture that it makes untouched, for all tests to share.

Sharing is part of the test: whatever a test applies has to be undone without a trace.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tests.small_pipelines import FURTHER_PIPELINES, SMALL_PIPELINES, picture

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.memory import PhaseMemory, simulate
from pipefit.cost_models.prediction import Choice
from pipefit.cost_models.workload import Workload
from pipefit.planner.plan import Rehearsal
from pipefit.strategies import strategy, traits_of
from pipefit.strategies.describe import describe_component
from pipefit.strategies.live import module_components
from pipefit.strategies.strategy import Option


@functools.cache
def untouched(name: str) -> tuple[Any, torch.Tensor]:
    """Return the pipeline *name* and its picture before anything was applied."""
    torch.set_num_threads(1)  # ten times faster than several for tensors of this size
    pipe = {**SMALL_PIPELINES, **FURTHER_PIPELINES}[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, picture(pipe, name)


def options_where_possible(
    pipe: Any, name: str, parameters: Mapping[str, Any], *, otherwise: str | None = None
) -> list[Option]:
    """Return the strategy *name* on each component that takes it, *otherwise* on the rest."""
    chosen, options = strategy(name), []
    for component, module in module_components(pipe).items():
        described = describe_component(component, module, traits_of(module))
        if chosen.refusal(described, parameters) is None:
            options.append(Option(strategy=name, component=component, parameters=parameters))
        elif otherwise is not None:
            options.append(Option(strategy=otherwise, component=component))
    return options


def block_level_options(pipe: Any) -> list[Option]:
    """Return block-level offload with each component's own block modules, leaf level elsewhere."""
    options = []
    for component, module in module_components(pipe).items():
        traits = traits_of(module)
        parameters: dict[str, Any] = {"offload_type": "block_level", "num_blocks_per_group": 1}
        if traits["block_modules"]:
            parameters["block_modules"] = traits["block_modules"]
        described = describe_component(component, module, traits)
        if strategy("group_offload").refusal(described, parameters):
            parameters = {"offload_type": "leaf_level"}
        options.append(Option(strategy="group_offload", component=component, parameters=parameters))
    return options


def _by_group(**parameters: Any) -> Callable[[Any], list[Option]]:
    return lambda pipe: options_where_possible(
        pipe, "group_offload", parameters, otherwise="resident"
    )


_BLOCKS = {"offload_type": "block_level", "num_blocks_per_group": 1}
_LEAVES = {"offload_type": "leaf_level"}

PLACEMENTS: dict[str, Callable[[Any], list[Option]]] = {
    "resident": lambda pipe: [
        Option(strategy="resident", component=name) for name in module_components(pipe)
    ],
    "model_offload": lambda pipe: [Option(strategy="model_offload")],
    "sequential_offload": lambda pipe: [Option(strategy="sequential_offload")],
    "leaves": _by_group(**_LEAVES),
    "leaves, streamed": _by_group(**_LEAVES, use_stream=True),
    "leaves, streamed and recorded": _by_group(**_LEAVES, use_stream=True, record_stream=True),
    "leaves, streamed, little RAM": _by_group(**_LEAVES, use_stream=True, low_cpu_mem_usage=True),
    "blocks": _by_group(**_BLOCKS),
    "blocks of their own": block_level_options,
    "blocks, streamed": _by_group(**_BLOCKS, use_stream=True),
}
"""How every component of a pipeline is placed -> the options for it."""


def predicted(
    found: Workload, options: list[Option], gpu: Gpu
) -> dict[tuple[str, str], PhaseMemory]:
    choices = {}
    for component in found.components:
        option = next(o for o in options if o.component in (component.name, None))
        placement = strategy(option.strategy).placement(option.parameters)
        choices[component.name] = Choice(placement=placement)
    keys = [(phase.component, phase.entry) for phase in found.phases]
    return dict(zip(keys, simulate(found, choices, gpu), strict=True))


def apart(rehearsal: Rehearsal, prediction: dict[tuple[str, str], PhaseMemory]) -> float:
    """Return by which share the allocated peaks of a phase differ at most."""
    assert [(p.component, p.entry) for p in rehearsal.phases] == list(prediction)
    return max(
        abs(prediction[p.component, p.entry].allocated_bytes / p.allocated_bytes - 1)
        for p in rehearsal.phases
    )


def save(pipe: Any, folder: Path) -> None:
    """Write *pipe* to *folder* as what can be loaded.

    T5's own tokenizer takes no vocabulary of whole words, which the small ones have.
    """
    pipe.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    for part, value in index.items():
        if isinstance(value, list) and str(value[1]).startswith("T5Tokenizer"):
            index[part] = ["transformers", "PreTrainedTokenizerFast"]
    (folder / "model_index.json").write_text(json.dumps(index))
