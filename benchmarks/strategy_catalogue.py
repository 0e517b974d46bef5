"""Which strategy goes on which component class: asked of every component of the catalogue.

Every component is built by its own class on the meta device, in float32 as if nobody had chosen a
dtype, and each strategy is asked as the planner asks it. "No effect" is not believed but tried: the
strategy is put on the weightless component, and nothing about the component is different.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.workload import Component, Workload
from pipefit.errors import PipefitError
from pipefit.planner.build import build_pipeline, quietly
from pipefit.planner.catalog import find_gpu, pipeline_entry, pipeline_names
from pipefit.planner.snapshot import snapshot
from pipefit.strategies import BUILT_IN, traits_of
from pipefit.strategies.describe import describe_component
from pipefit.strategies.live import module_components
from pipefit.strategies.strategy import Imitated, Strategy

APPLIES = "applies"
NO_EFFECT = "no effect"

ON_THE_CPU = Gpu(name="cpu", architecture="cpu", total_bytes=1 << 40, free_bytes=1 << 40)
"""The CPU in the place of a GPU, with room for everything."""

GPUS = (ON_THE_CPU, *map(find_gpu, ("rtx-4060", "h100-sxm", "rx-7900-xtx", "apple-m3-max")))
"""Kinds of GPU that strategies tell apart: an option for one of them is an option."""

TO_EXERCISE: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "precision": ({"dtype": "bfloat16"}, {"dtype": "float16"}),
    "quantization": (
        {"backend": "torchao", "type": "int8_weight_only"},
        {"backend": "bitsandbytes", "type": "nf4"},
    ),
    "layerwise_casting": (
        {"storage_dtype": "float8_e4m3fn"},
        {"storage_dtype": "float8_e5m2"},
    ),
    "attention": ({"backend": "math"}, {"slicing": 1}),
    "decode_chunks": ({"num_frames": 4},),
    "device_map": ({"device": 1},),
    "feed_forward_chunking": ({"chunk_size": 1},),
    "step_cache": ({"cache_interval": 2, "disable_cache_before_step": 1},),
}
"""Parameters of strategies that cannot do without, or whose quality depends on them; everything
else is exercised with what it offers itself, or without parameters."""

MACHINE_S_OWN = "pip install"
"""What a refusal says if a package is missing here: that is no matter of the component."""

MODULE_SLOTS = frozenset(vars(torch.nn.Module())) - {"training"}
"""What every module has; its hooks are looked at, its children come by themselves."""

MAX_DEPTH = 3
"""How deep attributes of modules are compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What all strategies say of one component of the catalogue."""

    class_name: str
    pipeline: str
    component: str
    outcomes: tuple[str, ...]
    """One for each of ``BUILT_IN``: ``applies``, ``no effect``, or why it is refused."""


def ask_catalogue(
    names: Iterable[str] = (), say: Callable[[str], None] = lambda text: None
) -> list[Asked]:
    """Ask all strategies about each configuration of a component in the pipelines *names*, once.

    Without names: in all of the catalogue.
    """
    found: dict[str, Asked] = {}
    for name in names or pipeline_names():
        parts = pipeline_entry(name)["components"]
        keys = {
            part: json.dumps([about["class"], about["config"]], sort_keys=True)
            for part, about in parts.items()
        }
        if found.keys() >= set(keys.values()):
            continue
        say(f"asking about {name}")
        pipe, built = build_pipeline(name, dtype="float32")
        for part, key in keys.items():
            if key not in found:
                found[key] = ask(pipe, part, name, required=built.required.get(part, ()))
    return list(found.values())


def ask(pipe: Any, name: str, pipeline: str, *, required: Container[str] = ()) -> Asked:
    """Ask all strategies about the component *name* of a weightless *pipe*.

    What is *required* is on it already, or it would not work.
    """
    module = getattr(pipe, name)
    about = describe_component(name, module, traits_of(module))
    with quietly():
        outcomes = tuple(
            APPLIES if one.name in required else outcome(pipe, about, one) for one in BUILT_IN
        )
    return Asked(class_name=about.class_name, pipeline=pipeline, component=name, outcomes=outcomes)


def outcome(pipe: Any, component: Component, one: Strategy) -> str:
    """Say whether *one* applies to *component*, has no effect, or why it is refused.

    It applies with any of its parameters; of several refusals the first counts.
    """
    untraced = Workload(
        pipeline="",
        pipeline_class=type(pipe).__name__,
        call={},
        components=(component,),
        kernels=(),
        routines=(),
        root=(),
        phases=(),
        offload_sequence=(component.name,),
    )
    offered = [p for gpu in GPUS for p in one.options(component, untraced, gpu)]
    tried = [*offered[:1], *TO_EXERCISE.get(one.name, ()), {}]
    refusals = [one.refusal(component, parameters) for parameters in tried]
    for parameters, refusal in zip(tried, refusals, strict=True):
        if refusal is None:
            try:
                changes = has_effect(pipe, component.name, one, parameters)
            except PipefitError as error:  # what the component cannot tell: its pipeline
                return impersonal(str(error), type(pipe).__name__)
            return APPLIES if changes else NO_EFFECT
    reasons = [reason for reason in refusals if reason is not None]
    if any(MACHINE_S_OWN in reason for reason in reasons):
        return APPLIES
    return impersonal(reasons[0], component.class_name)


def impersonal(reason: str, class_name: str) -> str:
    """Return *reason* without the class's name, so that equal reasons are equal.

    >>> impersonal("T5EncoderModel cannot work in tiles.", "T5EncoderModel")
    'It cannot work in tiles.'
    """
    if reason.startswith(class_name):
        reason = f"It{reason.removeprefix(class_name)}"
    return reason.replace(class_name, "it")


def has_effect(pipe: Any, name: str, one: Strategy, parameters: Mapping[str, Any]) -> bool:
    """Whether anything about a weightless component is different with the strategy on it.

    Where weights lie is always a difference.
    """
    if one.placement(parameters) is not None:
        return True
    if isinstance(one, Imitated):
        twin = copy.copy(pipe)
        vars(twin)[name] = _copied(getattr(pipe, name))
        before = list(_state(twin, name))
        one.imitate(twin, name, parameters)
        return _differs(before, _state(twin, name))
    before = list(_state(pipe, name))
    place = None if one.kind == "process" else name
    undo = one.apply(pipe, place, parameters, torch.device("cpu"))
    try:
        return _differs(before, _state(pipe, name))
    finally:
        undo()
        if _differs(before, _state(pipe, name)):
            raise AssertionError(f"Undoing {one.name} on {name} of {type(pipe).__name__} left it.")


def _copied(module: torch.nn.Module) -> torch.nn.Module:
    # What weight_norm computed is no leaf, and torch copies leaves alone.
    computed = (
        value
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, torch.Tensor) and not value.is_leaf
    )
    return copy.deepcopy(module, {id(tensor): tensor.detach() for tensor in computed})


def _differs(before: list[Any], after: Iterator[Any]) -> bool:
    missing = object()
    old = iter(before)
    return any(next(old, missing) != one for one in after) or next(old, missing) is not missing


def _state(pipe: Any, name: str) -> Iterator[Any]:
    """Yield everything about a component, its pipeline and the process that could differ."""
    yield snapshot(SimpleNamespace(components={}))  # the process
    yield type(pipe)
    yield _plain(vars(pipe))
    module = getattr(pipe, name)
    for path, part in module.named_modules():
        own = vars(part)
        yield path, type(part), len(own["_forward_pre_hooks"]), len(own["_forward_hooks"])
        for key, value in own.items():
            if key not in MODULE_SLOTS:
                yield path, key, _plain(value)
    for path, tensor in (*module.named_parameters(), *module.named_buffers()):
        yield path, id(tensor), tensor.dtype, tensor.device, tensor.stride()


def _plain(value: Any, depth: int = 0) -> Any:
    """Return *value* as something that is compared by value, objects with their identity."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return value
    if depth < MAX_DEPTH:
        if isinstance(value, Mapping):
            return [(key, _plain(one, depth + 1)) for key, one in value.items()]
        if isinstance(value, (list, tuple)):
            return [_plain(one, depth + 1) for one in value]
        if hasattr(value, "__dict__") and not isinstance(value, (type, torch.nn.Module)):
            return id(value), _plain(vars(value), depth + 1)
    return id(value)


def components_of(pipe: Any) -> dict[str, Component]:
    """Return a live pipeline's components as strategies see them."""
    return {
        name: describe_component(name, module, traits_of(module))
        for name, module in module_components(pipe).items()
    }
