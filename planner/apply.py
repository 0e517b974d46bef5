"""Put options in force on a live pipeline, all of them or none, and take them back.

Everything that can be known beforehand is checked before anything is touched. What fails all the
same (most often memory) is undone in reverse order; the pipeline is then as it was, and the error
says so.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pipefit.errors import ApplyFailed, InvalidRequest, UnknownName, UnsupportedPipeline
from pipefit.planner.snapshot import differences, snapshot
from pipefit.strategies import BUILT_IN, conflict_of, strategy, traits_of
from pipefit.strategies.describe import describe_component
from pipefit.strategies.device_map import home_of
from pipefit.strategies.live import device_restorer, hooks_of, module_components
from pipefit.strategies.prompt_first import ENCODE_PROMPT, ONLY_WHILE_LOADING, Remembered, drops
from pipefit.strategies.strategy import Option, Strategy, Undo

REMEDY_BY_HOOK: Mapping[str, str] = {
    "CpuOffload": "call pipe.remove_all_hooks() first",
    "AlignDevicesHook": "call pipe.remove_all_hooks() first",
    "group_offloading": "undo the earlier plan, or load the pipeline afresh",
    "EntryHook": "undo the earlier plan",
    "layerwise_casting": "load the pipeline afresh, because a cast of weights cannot be taken back",
}
"""What to do about a hook, by accelerate's class or diffusers' name of it."""

OTHER_HOOK_REMEDY = "remove it first (a step cache: component.disable_cache())"


class Applied:
    """Options in force on a pipeline, until :meth:`undo` or the end of the ``with`` block."""

    def __init__(self, undo: ExitStack, device: torch.device, plan: Any = None) -> None:
        self.plan = plan
        """The plan that the options came from; None where they were given one by one."""
        self._undo = undo
        self._device = device

    def also_undo(self, undo: Undo) -> None:
        """Take *undo* back as well, before everything else."""
        self._undo.callback(undo)

    def undo(self) -> None:
        """Take everything back, last applied first; a second call does nothing."""
        self._undo.close()
        _release_memory(self._device)

    def __enter__(self) -> Applied:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()


def check_pipeline(pipe: Any, *, stored: Collection[str | None] = ()) -> tuple[str, ...]:
    """Return what a planner should know of *pipe*, one sentence each, if it can be planned for.

    LoRA adapters are such a thing. Refused are pipelines whose weights somebody else already
    places, packs or compiles: their hooks hold references that a plan would break. Of the
    components *stored* the plan knows how their weights are packed.

    Raises:
        InvalidRequest: it is not a diffusion pipeline. UnsupportedPipeline: it is one, but pipefit
        cannot place its weights; says why and what to do.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise InvalidRequest(
            f"A diffusers DiffusionPipeline was expected, but this is a {type(pipe).__name__}: "
            "build one with DiffusionPipeline.from_pretrained(...)."
        )
    known = getattr(vars(pipe).get(ENCODE_PROMPT), "func", None)
    if isinstance(known, Remembered) and known.is_all:
        raise UnsupportedPipeline(
            "The pipeline was loaded with prompt_first:drop=true and has no text encoders any more:"
            " load it again for another plan."
        )
    modules = module_components(pipe)
    if not modules:
        raise UnsupportedPipeline(
            f"This {type(pipe).__name__} has no model among its components: load it with its "
            "weights."
        )
    if getattr(pipe, "hf_device_map", None):
        raise UnsupportedPipeline(
            "The pipeline was loaded with a device_map, which places its components already: call "
            "pipe.reset_device_map() first."
        )
    for name, module in modules.items():
        reason = _unsupported(module, is_stored=name in stored)
        if reason:
            raise UnsupportedPipeline(f"The component {name} {reason}.")
    return tuple(
        f"{name} has LoRA adapters; load, fuse or remove adapters before applying, not after."
        for name, module in modules.items()
        if getattr(module, "peft_config", None)
    )


def apply_options(
    pipe: Any,
    options: Sequence[Option],
    device: Any,
    *,
    plan: Any = None,
    loaded: Sequence[Option] = (),
) -> Applied:
    """Put *options* in force on *pipe*; *device* is the GPU, or the CPU in its place.

    Those among them that it was *loaded* with are in force already.

    Raises:
        InvalidRequest: an option cannot be used here, or contradicts another; nothing was touched.
        UnsupportedPipeline: see :func:`check_pipeline`, or the weights are not loaded.
        ApplyFailed: it failed half-way and was undone; the cause is attached.
    """
    device = torch.device(device)
    options = [option for option in options if option not in loaded]
    if drops(options):
        raise InvalidRequest(ONLY_WHILE_LOADING)
    check_pipeline(pipe, stored={option.component for option in loaded})
    _check_weights(pipe)
    _check_options(pipe, options)
    before = snapshot(pipe)
    undo = ExitStack()
    if plan is not None:
        _clear_unused(pipe, options, undo)
    for option in sorted(options, key=_order):
        chosen = strategy(option.strategy)
        # A device map leads from the main GPU to the one on which the others put the component.
        place = device if chosen.kind == "device" else home_of(options, option.component, device)
        try:
            undo.callback(chosen.apply(pipe, option.component, option.parameters, place))
        except BaseException as error:
            undo.close()
            _release_memory(device)
            if not isinstance(error, Exception):
                raise
            left = differences(before, snapshot(pipe))
            raise ApplyFailed(_failure(option, error, left)) from error
    return Applied(undo, device, plan)


def _clear_unused(pipe: Any, options: Sequence[Option], undo: ExitStack) -> None:
    """Take components that the plan does not place, because no call enters them, off the GPU."""
    if any(strategy(option.strategy).kind == "pipeline_placement" for option in options):
        return
    placed = {option.component for option in options}
    for name, module in module_components(pipe).items():
        if name not in placed:
            undo.callback(device_restorer(module))
            module.to("cpu")


def _unsupported(module: Any, *, is_stored: bool) -> str | None:
    """Say what about a component rules it out; None where nothing does."""
    for path, names in hooks_of(module).items():
        for name in names:
            remedy = REMEDY_BY_HOOK.get(name, OTHER_HOOK_REMEDY)
            return f"already carries a hook ({name} on {path or 'itself'}): {remedy}"
    if len(getattr(module, "hf_device_map", None) or ()) > 1:
        return "was loaded with a device_map over several devices: load it without"
    if getattr(module, "_parallel_config", None) is not None:
        return "runs in parallel on several GPUs: load it without a parallel_config"
    if not is_stored and _is_quantized(module):
        return (
            "has quantised weights, which pipefit cannot count yet: undo the earlier plan, or load "
            "it unquantised"
        )
    if any(
        hasattr(part, "_orig_mod") or part._compiled_call_impl is not None
        for part in module.modules()
    ):
        return "is compiled, and moving its weights would compile it again: compile afterwards"
    return None


def _is_quantized(module: Any) -> bool:
    if getattr(module, "is_quantized", False) or getattr(module, "hf_quantizer", None) is not None:
        return True
    # What torchao and quanto make of a live module has no flag, only tensors of tensors.
    return any(is_traceable_wrapper_subclass(parameter) for parameter in module.parameters())


def _check_weights(pipe: Any) -> None:
    for name, module in module_components(pipe).items():
        if any(tensor.device.type == "meta" for tensor in module.parameters()):
            raise UnsupportedPipeline(
                f"The weights of {name} are not loaded: load the pipeline with its weights to "
                "apply a plan; planning alone needs none."
            )


def _check_options(pipe: Any, options: Sequence[Option]) -> None:
    modules = module_components(pipe)
    # Others find the weights packed by then, though they are not yet.
    packed = {
        option.component: {"quantized_by": option.parameters.get("backend")}
        for option in options
        if option.strategy == "quantization"
    }
    described = {
        name: describe_component(name, module, {**traits_of(module), **packed.get(name, {})})
        for name, module in modules.items()
    }
    placed: dict[str, Option] = {}
    seen: set[tuple[str, str | None]] = set()
    on: dict[str, list[Option]] = {}
    for option in options:
        chosen = strategy(option.strategy)
        covered = _covered(chosen, option, tuple(modules))
        if (option.strategy, option.component) in seen:
            raise InvalidRequest(f"{_named(option)} is asked for twice: give it once.")
        seen.add((option.strategy, option.component))
        for name in covered:
            on.setdefault(name, []).append(option)
            reason = chosen.refusal(described[name], option.parameters)
            if reason:
                raise InvalidRequest(f"{option.strategy} cannot be used on {name}: {reason}")
            if chosen.placement(option.parameters) is not None:
                other = placed.setdefault(name, option)
                if other is not option:
                    raise InvalidRequest(
                        f"{_named(other)} and {_named(option)} both place the weights of {name}: "
                        "choose one."
                    )
    for name, together in on.items():
        reason = conflict_of(together)
        if reason:
            raise InvalidRequest(f"On {name}, {reason}")


def _covered(chosen: Strategy, option: Option, components: Sequence[str]) -> Sequence[str]:
    """Return the components that *option* touches."""
    if chosen.kind in ("pipeline_placement", "process"):
        if option.component is not None:
            raise InvalidRequest(
                f"{option.strategy} is for the whole pipeline: leave @{option.component} out."
            )
        return components
    if option.component is None:
        raise InvalidRequest(
            f"{option.strategy} needs a component, as in {option.strategy}@{components[0]}."
        )
    if option.component not in components:
        raise UnknownName("component", option.component, components)
    return (option.component,)


def _order(option: Option) -> int:
    return [one.name for one in BUILT_IN].index(option.strategy)


def _named(option: Option) -> str:
    return option.strategy + (f"@{option.component}" if option.component else "")


def _failure(option: Option, error: Exception, left: Sequence[str]) -> str:
    said = str(error).strip().split("\n")[0]
    outcome = "everything was undone"
    if left:
        outcome = f"undoing left {len(left)} differences (first: {left[0]}), so load it afresh"
    hint = ""
    if isinstance(error, torch.OutOfMemoryError):
        hint = " Free memory on the GPU, or plan for a smaller budget."
    return f"{_named(option)} failed ({type(error).__name__}: {said}); {outcome}.{hint}"


def _release_memory(device: torch.device) -> None:
    """Give the driver back what undoing freed, so that other programs see it."""
    if device.type == "cuda":
        gc.collect()  # hooks and modules refer to each other
        torch.cuda.empty_cache()
