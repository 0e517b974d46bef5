"""A plan executed without hardware: the real hooks, on GPUs whose memory is counted to the byte.

The options are applied to a weightless twin of the pipeline as :mod:`pipefit.planner.apply` does
it, and the pipeline's own call runs under the hooks of diffusers and accelerate on a
:class:`~pipefit.planner.stage.Stage`. Nothing of how hooks move weights is assumed; a prediction
assumes it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from pipefit.cost_models.machine import Gpu, Link
from pipefit.cost_models.placement import Placement
from pipefit.planner.apply import apply_options
from pipefit.planner.plan import Rehearsal
from pipefit.planner.prompt import (
    PromptCall,
    as_loaded,
    divided,
    divided_options,
    encoded,
    is_imitated,
    prompt_calls,
    text_encoders,
)
from pipefit.planner.rehearsals import steps_to_rehearse
from pipefit.planner.shims import shimmed
from pipefit.planner.signatures import GPU
from pipefit.planner.stage import Stage
from pipefit.planner.timeline import Timeline
from pipefit.planner.trace import run_call, weightless
from pipefit.planner.virtual_tensors import CPU, buffer_of
from pipefit.strategies import strategy
from pipefit.strategies.live import module_components, wrap_method
from pipefit.strategies.prompt_first import ENCODE_PROMPT, drops
from pipefit.strategies.strategy import Option

FOLDERS = ("offload_to_disk_path", "disk_path")
"""Parameters that name a folder for weights: of group offload and of streaming."""


@contextlib.contextmanager
def on_stage(
    pipe: Any,
    gpu: Gpu | Sequence[Gpu],
    *,
    budget_bytes: int | Mapping[int, int] | None = None,
    links: Sequence[Link] = (),
    timeline: Timeline | None = None,
    prepare: Callable[[Any], Any] = lambda twin: None,
    is_strict: bool = True,
    in_place: bool = False,
    remember: bool = True,
    num_cores: int = 1,
) -> Iterator[Stage]:
    """Open virtual GPUs with a weightless twin of *pipe*, its weights on the CPU.

    *budget_bytes* bounds the process, context included, as
    :func:`pipefit.planner.guard.hold_to_budget` does: on the first GPU, or by the index of each; by
    default what other processes leave. *links* join GPUs; others copy through the host. *timeline*
    is told what happens when. If not *is_strict*, cached memory is given back at that bound, but it
    may be exceeded. *prepare* may change the twin first, as a load would have made it. With
    *in_place* the pipeline's own modules are converted. With *remember* off every call is executed
    (slow; for tests). *num_cores* are the host's, for what it computes itself.
    """
    gpus = (gpu,) if isinstance(gpu, Gpu) else tuple(gpu)
    budgets = {gpus[0].index: budget_bytes} if isinstance(budget_bytes, int) else budget_bytes
    stage = Stage(
        gpus,
        budgets or {},
        links=links,
        timeline=timeline,
        is_strict=is_strict,
        remember=remember,
        num_cores=num_cores,
    )
    with stage.machine, shimmed(), torch.no_grad():
        load_onto(stage, pipe, prepare=prepare, in_place=in_place)
        stage.host.forget_peak()  # what was loaded as it is now has never been anything else
        yield stage


def load_onto(
    stage: Stage, pipe: Any, *, prepare: Callable[[Any], Any], in_place: bool = False
) -> None:
    """Make a weightless twin of *pipe*, its weights on the CPU, the pipeline of *stage*."""
    twin = weightless(pipe, stage.machine, device=CPU, in_place=in_place)
    prepare(twin)
    for module in module_components(twin).values():
        for tensor in (*module.parameters(), *module.buffers()):
            buffer_of(stage.machine.belonging(tensor)).write()  # a load fills them
    stage.adopt_all(twin)


def rehearse(
    pipe: Any,
    options: Sequence[Option],
    call: Mapping[str, Any],
    gpu: Gpu | Sequence[Gpu],
    *,
    budget_bytes: int | Mapping[int, int] | None = None,
    main: int | None = None,
    links: Sequence[Link] = (),
    timeline: Timeline | None = None,
    is_strict: bool = True,
    in_place: bool = False,
    remember: bool = True,
    num_cores: int = 1,
) -> Rehearsal:
    """Execute ``pipe(**call)`` under *options* on a virtual *gpu*, without weights.

    The call is cut to the denoising steps after which peaks repeat. What a live pipeline is past
    (weights quantised as they are loaded) is imitated on the twin, and nothing is written to the
    disk that *options* may name. *main* is the index of the GPU on which the pipeline computes, of
    several that are given in the order of their indices. *pipe* stays as it is unless *in_place*;
    the other arguments are those of :func:`on_stage`.

    Raises:
        torch.OutOfMemoryError: the call does not fit into *budget_bytes* (context included); not
            raised unless *is_strict*, and the peaks say what is missing.
        ApplyFailed: applying does not, or fails otherwise. InvalidRequest, UnsupportedPipeline: as
            :func:`pipefit.planner.apply.apply_options`; InvalidRequest too where a figure of the
            GPU that times need is unknown. TraceError: the call itself fails.
    """
    shortened = shortened_call(pipe, call, options)
    device = torch.device(GPU.type, main or 0)
    calls: list[PromptCall] = []
    first = pipe
    if drops(options):
        calls = prompt_calls(pipe, shortened, prepare=functools.partial(as_loaded, options))
        encoders, pipe = divided(pipe)
        first, (before, options) = encoders, divided_options(options, text_encoders(encoders))
    with (
        on_stage(
            first,
            gpu,
            budget_bytes=budget_bytes,
            links=links,
            timeline=timeline,
            prepare=_imitating(before if calls else options),
            is_strict=is_strict,
            in_place=in_place and not calls,  # the caller would keep the text encoders
            remember=remember,
            num_cores=num_cores,
        ) as stage,
        tempfile.TemporaryDirectory(prefix="pipefit-") as folder,
    ):

        def perform(options: Sequence[Option], run: Callable[[Any], Any]) -> tuple[Any, Rehearsal]:
            with apply_options(stage.pipe, _on_twin(options, folder), device):
                stage.placements = placements_of(options, module_components(stage.pipe))
                with stage.counting():
                    made = run(stage.pipe)
                # Before undoing, which brings weights back to the host.
                return made, stage.rehearsal(shortened)

        if calls:
            known, _ = perform(before, lambda twin: encoded(twin, calls, device))
            stage.empty()
            load_onto(stage, pipe, prepare=_imitating(options), in_place=in_place)

        def run(twin: Any) -> None:
            if calls:
                wrap_method(twin, ENCODE_PROMPT, known)
            run_call(twin, shortened)

        return perform(options, run)[1]


def _imitating(options: Sequence[Option]) -> Callable[[Any], None]:
    """Return what does to a twin what its load would have done and applying cannot."""
    return functools.partial(as_loaded, [option for option in options if is_imitated(option)])


def _on_twin(options: Sequence[Option], folder: str) -> list[Option]:
    """Return what there is left to apply, with *folder* in place of those that hold weights."""
    return [
        replace(
            option,
            parameters={
                key: folder if key in FOLDERS and value else value
                for key, value in option.parameters.items()
            },
        )
        for option in options
        if not is_imitated(option)
    ]


def placements_of(options: Sequence[Option], components: Iterable[str]) -> dict[str, Placement]:
    """Return what *options* say about the weights of each of *components* that they place."""
    found: dict[str, Placement] = {}
    for option in options:
        placement = strategy(option.strategy).placement(option.parameters)
        if placement is not None:
            names = components if option.component is None else (option.component,)
            found |= dict.fromkeys(names, placement)
    return found


def shortened_call(pipe: Any, call: Mapping[str, Any], options: Sequence[Option]) -> dict[str, Any]:
    """Return *call* with as many denoising steps as *options* need, where it has more.

    Steps that the call lists one by one (``timesteps``, ``sigmas``) stay; with a ``strength`` there
    are as many as leave that number to execute.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    steps = parameters.get("num_inference_steps")
    if steps is None or call.get("timesteps") is not None or call.get("sigmas") is not None:
        return dict(call)
    asked = call.get("num_inference_steps", steps.default)
    strength = parameters.get("strength")
    share = call.get("strength", strength.default if strength else 1.0)
    enough = steps_to_rehearse(options)
    if isinstance(share, (int, float)) and 0 < share < 1:
        enough = math.ceil(enough / share)
    if not isinstance(asked, int) or asked <= enough:
        return dict(call)
    return {**call, "num_inference_steps": enough}
