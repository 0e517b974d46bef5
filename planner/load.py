"""``load``: plan before any weight is read, load as the plan says, put the rest of it in force.

A pipeline that is loaded already is past what happens while weights are read: the dtype they are
read in, and quantisation. Planned from a folder's configurations, both are open, and neither the
larger weights nor a second copy of them is ever in memory.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import pickle
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from pipefit.cost_models.units import format_bytes
from pipefit.errors import InvalidRequest, UnknownName
from pipefit.planner import api
from pipefit.planner.build import DTYPES, build_pipeline, quietly
from pipefit.planner.call import default_inputs
from pipefit.planner.catalog import pipeline_entry
from pipefit.planner.plan import Plan
from pipefit.planner.policy import BudgetRequest
from pipefit.planner.prompt import (
    PromptCall,
    alone,
    as_loaded,
    divided_options,
    encoded,
    prompt_calls,
    text_encoders,
)
from pipefit.planner.trace_cache import checkpoints_folder
from pipefit.planner.workloads import Progress
from pipefit.strategies import strategy, traits_of
from pipefit.strategies.describe import describe_component
from pipefit.strategies.live import module_components, wrap_method
from pipefit.strategies.loader_config import loader_config, read_gguf
from pipefit.strategies.prompt_first import ENCODE_PROMPT, Remembered, drops
from pipefit.strategies.quantization import Quantization
from pipefit.strategies.sharded_checkpoint import checkpoint_of, shard_bytes, with_shards
from pipefit.strategies.strategy import Imitated, Option, Quality


def load(
    name_or_folder: str | Path,
    vram_budget: BudgetRequest = None,
    *,
    call: Mapping[str, Any] | None = None,
    quality: str | Quality = Quality.HIGH,
    device: str | int | None = None,
    dtype: Mapping[str, Any] | Any = None,
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
        dtype: load dtype by torch's name of it (or torch's own), of all components or by component
            name with ``"default"`` for the rest; what is not said is as recommended by the
            catalogue, or as the folder declares.
        vram_budget, call, quality, device, with_, without, compile, ram, rehearse, progress: see
            :func:`pipefit.auto_optimize`.

    Returns:
        The pipeline. Its attribute ``pipefit`` is what :func:`pipefit.auto_optimize` returns: the
        plan, and ``undo()``, which leaves what happened while it was loaded, the shards of
        ``sharded_checkpoint`` in the cache included.

    Raises:
        InvalidRequest: the pipeline cannot be loaded, a package for quantised weights is missing,
            or something asked for cannot be understood.
        NoPlanFits: nothing keeps the budget; no weight was read.
        ApplyFailed: applying failed.
    """
    folder, recommended = folder_of(name_or_folder)
    with quietly():
        # Dtypes of all components, so that what is planned for is what is loaded.
        bare, info = build_pipeline(folder, dtype=_dtypes(recommended, dtype))
        chosen = dict(info.dtype)
    machine, budget = api.machine_and_budget(device, vram_budget)
    policy = api.policy_of(budget, machine, quality, ram, with_, without, compile)
    made = api.plan_by(
        replace(policy, installed_only=True),
        folder,
        call=call,
        machine=machine,
        dtype=chosen,
        rehearse=rehearse,
        progress=progress,
    )
    at_load = [option for option in made.options if _is_at_load(option)]
    _check_packages(at_load)
    device = torch.device(api.torch_device(made.gpu))
    calls: list[PromptCall] = []
    if drops(made.options):
        with quietly():
            inputs = default_inputs(bare, info.entry, call)
            _check_prompt(inputs, call or {})
            calls = prompt_calls(bare, inputs, prepare=functools.partial(as_loaded, at_load))

    def read(stand_ins: Mapping[str, Any]) -> DiffusionPipeline:
        return _read(source, chosen, at_load, device, progress, stand_ins)

    with _in_shards(folder, chosen, at_load, progress) as source:
        if not calls:
            pipe = read({})
            _check_files(pipe, bare, at_load)
            pipe.pipefit = api.put_in_force(pipe, made, loaded=at_load)
            return pipe
        modules = module_components(bare)
        encoders = {name: modules.pop(name) for name in text_encoders(bare)}
        known = _encoded(read(modules), calls, made, at_load, device)
        pipe = read(encoders)
        _check_files(pipe, bare, at_load)
    pipe.register_modules(**dict.fromkeys(encoders))
    kept = divided_options(made.options, encoders)[1]
    done = [option for option in made.options if option in at_load or option not in kept]
    pipe.pipefit = api.put_in_force(pipe, made, loaded=done)
    wrap_method(pipe, ENCODE_PROMPT, known)
    return pipe


def _check_prompt(inputs: Mapping[str, Any], call: Mapping[str, Any]) -> None:
    """Refuse to encode a text that completed *call* to *inputs*: it is not what will be called.

    Raises:
        InvalidRequest: naming the argument.
    """
    for name, value in inputs.items():
        if isinstance(value, str) and value and name not in call:
            raise InvalidRequest(
                f"prompt_first:drop=true encodes the {name} while loading and then drops the text "
                f'encoders, but the call names no {name}: load with call={{"{name}": ...}} as the '
                "pipeline will be called, or leave drop=true out."
            )


def _encoded(
    pipe: DiffusionPipeline,
    calls: Sequence[PromptCall],
    made: Plan,
    at_load: Sequence[Option],
    device: torch.device,
) -> Remembered:
    """Return what the text encoders of *pipe* make of *calls*, placed as the plan *made* has it.

    All else in *pipe* has no weights. Once this returns nothing refers to the text encoders.
    """
    view = alone(pipe, {name: getattr(pipe, name) for name in text_encoders(pipe)})
    options = divided_options(made.options, text_encoders(pipe))[0]
    del pipe
    try:
        with api.put_in_force(view, replace(made, options=tuple(options)), loaded=at_load):
            return encoded(view, calls, device)
    finally:
        del view
        gc.collect()  # hooks and modules refer to each other
        if device.type == "cuda":
            torch.cuda.empty_cache()


def folder_of(name_or_folder: str | Path) -> tuple[Path, Mapping[str, str]]:
    """Return where the pipeline lies, fetched if need be, and the dtypes recommended for it.

    Raises:
        UnknownName: it is neither a folder, a catalogue name, nor could it be a hub id.
        InvalidRequest: it could not be fetched.
    """
    if Path(name_or_folder).expanduser().exists():
        return Path(name_or_folder).expanduser(), {}
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


def _dtypes(recommended: Mapping[str, str], asked: Any) -> Mapping[str, str] | str | None:
    """Return what is asked for by name, completed by what the catalogue recommends."""
    if isinstance(asked, torch.dtype):
        asked = _name_of(asked)
    if isinstance(asked, Mapping):
        asked = {part: _name_of(value) for part, value in asked.items()}
    if isinstance(asked, str) or not recommended:
        return asked
    return asked if "default" in (asked or {}) else {**recommended, **(asked or {})}


def _name_of(dtype: Any) -> Any:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype


def _is_at_load(option: Option) -> bool:
    """Whether nothing but reading the weights can do it, or does it better."""
    one = strategy(option.strategy)
    at_load = ("precision", "sharded_checkpoint")
    return one.name in at_load or isinstance(one, Quantization)


def _check_packages(at_load: Sequence[Option]) -> None:
    for option in at_load:
        one = strategy(option.strategy)
        missing = one.missing_package(option.parameters) if isinstance(one, Imitated) else ""
        if missing:
            raise InvalidRequest(
                f"The plan stores {option.component} by {option.parameters['backend']}, which is "
                f"not installed: `pip install {missing}`, or load without {option.strategy}."
            )


@contextlib.contextmanager
def _in_shards(
    folder: Path,
    dtype: Mapping[str, str],
    at_load: Sequence[Option],
    progress: Progress | None,
) -> Iterator[Path]:
    """Rewrite what ``sharded_checkpoint`` is for; give the folder to read from meanwhile."""
    asked = next((o for o in at_load if o.strategy == "sharded_checkpoint"), None)
    if asked is None:
        yield folder
        return
    most_bytes = shard_bytes(asked.parameters)
    casts = {str(o.component): o.parameters["dtype"] for o in at_load if o.strategy == "precision"}
    stored = {o.component for o in at_load if isinstance(strategy(o.strategy), Quantization)}
    with quietly():
        pipe, _ = build_pipeline(folder, dtype={**dtype, **casts})
    names = [
        name
        for name, module in module_components(pipe).items()
        if name not in stored
        and (about := describe_component(name, module, traits_of(module)))
        and (found := checkpoint_of(about))
        and found.gains_from(most_bytes, about.library)
    ]
    if progress is not None and names:
        progress(f"rewriting {' and '.join(names)} in shards unless an earlier load did …")
    try:
        linked = with_shards(folder, names, most_bytes, checkpoints_folder())
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise InvalidRequest(
            f"{' and '.join(names)} could not be rewritten in shards ({error}): make room on the "
            "disk, name a folder by PIPEFIT_CACHE, or leave sharded_checkpoint out."
        ) from error
    try:
        yield linked
    finally:
        shutil.rmtree(linked)  # links alone: what is mapped stays in the cache


def _read(
    folder: Path,
    dtype: Mapping[str, str],
    at_load: Sequence[Option],
    device: torch.device,
    progress: Progress | None,
    stand_ins: Mapping[str, Any],
) -> DiffusionPipeline:
    """Read the weights in *dtype*, as far as *at_load* says nothing else, but those of *stand_ins*,
    which come in the place of components."""
    casts = {o.component: o.parameters["dtype"] for o in at_load if o.strategy == "precision"}
    dtype = {**dtype, **casts}
    index = DiffusionPipeline.load_config(folder)
    stored = {
        str(option.component): option.parameters
        for option in at_load
        if isinstance(strategy(option.strategy), Quantization) and option.component not in stand_ins
    }
    configs = {
        name: loader_config(index[name][0], parameters, dtype[name])
        for name, parameters in stored.items()
    }
    files = [name for name, parameters in stored.items() if parameters["backend"] == "gguf"]
    if progress is not None:
        names = [name for name in dtype if name not in stand_ins]
        of = f"{', '.join(names)} of {folder.name}" if stand_ins else folder.name
        progress(f"reading the weights of {of} …")
    asked: dict[str, Any] = {"dtype": {name: DTYPES[value] for name, value in dtype.items()}}
    if _has_only_fp16_files(folder):
        asked["variant"] = "fp16"
    mapping = {name: config for name, config in configs.items() if name not in files}
    if mapping:
        asked["quantization_config"] = diffusers.PipelineQuantizationConfig(quant_mapping=mapping)
    # bitsandbytes packs on the current GPU.
    place = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    try:
        with place:
            read = {
                name: read_gguf(folder, name, index[name][1], stored[name], dtype[name])
                for name in files
            }
            return DiffusionPipeline.from_pretrained(folder, **asked, **stand_ins, **read)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise _not_loaded(str(folder), error) from error


def _check_files(
    pipe: DiffusionPipeline, bare: DiffusionPipeline, at_load: Sequence[Option]
) -> None:
    """Hold files that say themselves how they store weights to what was planned.

    *bare* is the same without weights, and becomes what was planned.

    Raises:
        InvalidRequest: one stores more.
    """
    named = [o for o in at_load if "file" in o.parameters]
    if not named:
        return
    as_loaded(at_load, bare)
    for option in named:
        found, planned = (
            sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
            for module in (getattr(one, str(option.component)) for one in (pipe, bare))
        )
        if found > planned * (1 + FILE_SHARE):
            raise InvalidRequest(
                f"{option.component} was planned in {format_bytes(planned)} of "
                f"{option.parameters['type']}, but {option.parameters['file']} stores "
                f"{format_bytes(found)}: give type= as the file was made."
            )


FILE_SHARE = 0.01
"""Share of a component by which its file may store more than was planned: of some types the first
layers are stored one step better (cost_models/storage.py). Our choice."""


def _has_only_fp16_files(folder: Path) -> bool:
    """Whether weights are there in the files of the ``fp16`` variant alone."""
    names = [path.name for path in folder.glob("*/*.safetensors")]
    return bool(names) and all(".fp16." in name for name in names)


def _not_loaded(source: str, error: Exception) -> InvalidRequest:
    said = next(iter(str(error).splitlines()), type(error).__name__)
    return InvalidRequest(
        f"The pipeline {source!r} could not be loaded ({said}): "
        "give a folder with model_index.json and all weights, or a hub id that can be reached."
    )
