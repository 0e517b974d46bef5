"""``load``: plan before any weight is read, load as the plan says, put the rest of it in force.

A pipeline that is loaded already is past what happens while weights are read: the dtype they are
read in, and quantisation. Planned from a folder's configurations, both are open, and neither the
larger weights nor a second copy of them is ever in memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from pipefit.errors import InvalidRequest, UnknownName
from pipefit.planner import api
from pipefit.planner.build import DTYPES, build_pipeline, quietly
from pipefit.planner.call import default_inputs
from pipefit.planner.catalog import pipeline_entry
from pipefit.planner.plan import Plan
from pipefit.planner.policy import BudgetRequest
from pipefit.planner.trace import spared
from pipefit.planner.workloads import Progress
from pipefit.strategies import strategy
from pipefit.strategies.live import module_components
from pipefit.strategies.loader_config import loader_config
from pipefit.strategies.prompt_first import ENCODE_PROMPT, Remembered, remember_prompts
from pipefit.strategies.quantization import Quantization
from pipefit.strategies.strategy import Imitated, Option, Quality


def load(
    name_or_folder: str | Path,
    vram_budget: BudgetRequest = None,
    *,
    call: Mapping[str, Any] | None = None,
    quality: str | Quality = Quality.HIGH,
    device: str | int | None = None,
    dtype: Mapping[str, str] | str | None = None,
    with_: api.Strategies = (),
    without: Sequence[str] = (),
    compile: bool = False,
    ram: str | int | float | None = None,
    rehearse: bool | None = None,
    progress: Progress | None = None,
) -> DiffusionPipeline:
    """Return the pipeline, loaded and with the best plan for *vram_budget* in force.

    Args:
        name_or_folder: a folder with ``model_index.json``, a catalogue name or a hub id; the last
            two are fetched to the hub's cache first.
        dtype: load dtype, of all components or by component name with ``"default"`` for the rest;
            what is not said is as recommended by the catalogue, or as the folder declares.
        vram_budget, call, quality, device, with_, without, compile, ram, rehearse, progress: see
            :func:`pipefit.auto_optimize`.

    Returns:
        The pipeline. Its attribute ``pipefit`` is what :func:`pipefit.auto_optimize` returns: the
        plan, and ``undo()``, which leaves what happened while it was loaded.

    Raises:
        InvalidRequest: the pipeline cannot be loaded, a package for quantised weights is missing,
            or something asked for cannot be understood.
        NoPlanFits: nothing keeps the budget; no weight was read.
        ApplyFailed: applying failed.
    """
    folder, recommended = folder_of(name_or_folder)
    with quietly():
        # Dtypes of all components, so that what is planned for is what is loaded.
        chosen = dict(build_pipeline(folder, dtype=_dtypes(recommended, dtype))[1].dtype)
    machine, budget = api.machine_and_budget(device, vram_budget)
    made = api.plan(
        folder,
        budget,
        call=call,
        machine=machine,
        dtype=chosen,
        quality=quality,
        with_=with_,
        without=without,
        compile=compile,
        ram=ram,
        rehearse=rehearse,
        progress=progress,
    )
    at_load = [option for option in made.options if _is_at_load(option)]
    _check_packages(at_load)
    done = list(at_load)
    gone: tuple[str, ...] = ()
    remembered = None
    if any(option.strategy == "prompt_first" for option in made.options):
        gone = _only_encoding(made)
        say = progress or (lambda text: None)
        remembered = _encoded(folder, chosen, made, at_load, call or {}, gone, say)
        done += [o for o in made.options if o.component in gone or o.strategy == "prompt_first"]
    pipe = _read(folder, chosen, at_load, gone, progress)
    pipe.pipefit = api.put_in_force(pipe, made, loaded=done)
    if remembered is not None:
        pipe.pipefit.also_undo(remember_prompts(pipe, remembered))
    return pipe


def folder_of(name_or_folder: str | Path) -> tuple[Path, Mapping[str, str]]:
    """Return where the pipeline lies, fetched if need be, and the dtypes recommended for it.

    Raises:
        UnknownName: it is neither a folder, a catalogue name, nor could it be a hub id.
        InvalidRequest: it could not be fetched.
    """
    if Path(name_or_folder).exists():
        return Path(name_or_folder), {}
    name = str(name_or_folder)
    repository, recommended = name, {}
    try:
        entry = pipeline_entry(name)
    except UnknownName:
        if "/" not in name:
            raise
    else:
        repository = name if "/" in name else entry["repository"]
        recommended = entry["dtype"]
    try:
        return Path(DiffusionPipeline.download(repository)), recommended
    except (OSError, ValueError) as error:
        raise _not_loaded(repository, error) from error


def _dtypes(
    recommended: Mapping[str, str], asked: Mapping[str, str] | str | None
) -> Mapping[str, str] | str | None:
    """Return what is asked for, completed by what the catalogue recommends."""
    if isinstance(asked, str) or not recommended:
        return asked
    return asked if "default" in (asked or {}) else {**recommended, **(asked or {})}


def _is_at_load(option: Option) -> bool:
    """Whether nothing but reading the weights can do it, or does it better."""
    one = strategy(option.strategy)
    return one.name == "precision" or isinstance(one, Quantization)


def _check_packages(at_load: Sequence[Option]) -> None:
    for option in at_load:
        one = strategy(option.strategy)
        missing = one.missing_package(option.parameters) if isinstance(one, Imitated) else ""
        if missing:
            raise InvalidRequest(
                f"The plan stores {option.component} by {option.parameters['backend']}, which is "
                f"not installed: `pip install {missing}`, or plan --without {option.strategy}."
            )


def _read(
    folder: Path,
    dtype: Mapping[str, str],
    at_load: Sequence[Option],
    gone: Sequence[str],
    progress: Progress | None,
) -> DiffusionPipeline:
    """Read the weights in *dtype*, as far as *at_load* says nothing else, but those of *gone*."""
    at_load = [option for option in at_load if option.component not in gone]
    casts = {o.component: o.parameters["dtype"] for o in at_load if o.strategy == "precision"}
    stored = {o.component: o for o in at_load if o.strategy != "precision"}
    index = DiffusionPipeline.load_config(folder)
    configs = {
        name: loader_config(index[name][0], option.parameters, dtype[str(name)])
        for name, option in stored.items()
    }
    if progress is not None:
        progress(f"reading the weights of {folder.name} …")
    asked: dict[str, Any] = {
        "dtype": {name: DTYPES[value] for name, value in {**dtype, **casts}.items()},
        **dict.fromkeys(gone),
    }
    if configs:
        asked["quantization_config"] = diffusers.PipelineQuantizationConfig(quant_mapping=configs)
    try:
        return DiffusionPipeline.from_pretrained(folder, **asked)
    except (OSError, ValueError, ImportError) as error:
        raise _not_loaded(str(folder), error) from error


# -- prompt_first


def _only_encoding(made: Plan) -> tuple[str, ...]:
    """Return the components that the call enters to encode the prompt, and for nothing else."""
    phases: dict[str, set[str]] = {}
    for phase in made.prediction.phases:
        phases.setdefault(phase.component, set()).add(phase.name)
    return tuple(name for name, names in phases.items() if names == {ENCODE_PROMPT})


def _encoded(
    folder: Path,
    dtype: Mapping[str, str],
    made: Plan,
    at_load: Sequence[Option],
    call: Mapping[str, Any],
    encoders: Sequence[str],
    progress: Progress,
) -> Remembered:
    """Load the text *encoders* alone, encode the prompt of *call*, and let go of them.

    With which arguments the pipeline encodes, its own call says: without weights it is executed up
    to where something else than a text encoder is needed.
    """
    with quietly():
        twin, info = build_pipeline(folder, dtype=dtype)
        arguments = default_inputs(twin, info.entry, call)
        arguments = {name: spared(value) for name, value in arguments.items()}
    others = [name for name in module_components(twin) if name not in encoders]
    part = _read(folder, dtype, at_load, others, progress)
    elsewhere = [option for option in made.options if option.component not in (None, *encoders)]
    first = [option for option in made.options if option.strategy == "prompt_first"]
    applied = api.put_in_force(part, made, loaded=[*at_load, *elsewhere, *first])
    remembered = Remembered(is_all=True)
    device = torch.device(api.torch_device(made.gpu))

    def encode(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(part.encode_prompt).bind(*args, **kwargs)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            if isinstance(value, torch.device):
                bound.arguments[name] = device
        noted = {k: v for k, v in vars(twin).items() if k not in before}
        vars(part).update(noted)  # what the call has set before it encodes
        result = part.encode_prompt(*bound.args, **bound.kwargs)
        remembered.add(bound.arguments, result)
        return result

    def stop(*_: Any, **__: Any) -> None:
        raise _Encoded

    vars(twin)[ENCODE_PROMPT] = encode
    before = set(vars(twin))
    for name in others:
        for entry in ("forward", "encode", "decode"):
            vars(getattr(twin, name))[entry] = stop
    twin.scheduler.set_timesteps = stop
    try:
        with quietly(), torch.no_grad():
            twin(**arguments)
    except _Encoded:
        pass
    finally:
        applied.undo()
    return remembered


class _Encoded(Exception):
    """The prompt is encoded; what follows needs weights."""


def _not_loaded(source: str, error: Exception) -> InvalidRequest:
    said = next(iter(str(error).splitlines()), type(error).__name__)
    return InvalidRequest(
        f"The pipeline {source!r} could not be loaded ({said}): "
        "name a folder with model_index.json, or a hub id that can be reached."
    )
