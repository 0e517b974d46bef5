"""A live pipeline without weights, from a catalogue name or a folder of configurations.

Every component is built by its own class, as ``from_pretrained`` would leave it: parameters in the
dtype that a load gives them, tied where they are tied, in evaluation mode. Only the data is
missing: parameters, and buffers that come from the checkpoint, are on the meta device. Small
buffers that a constructor computes keep their values, because pipelines branch on them.

Nothing is downloaded, ever.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
import transformers
from diffusers.models.modeling_utils import no_init_weights
from torch.utils._python_dispatch import TorchDispatchMode

from pipefit.errors import InvalidRequest, UnknownName, UnsupportedPipeline
from pipefit.planner.catalog import pipeline_entry
from pipefit.planner.standins import build_processor, is_processor
from pipefit.planner.virtual import KNOWN_VALUE_LIMIT_ELEMENTS
from pipefit.strategies.sharded_checkpoint import FILES_OF, describe_files

META = torch.device("meta")

DTYPES = {
    "float32": torch.float32, "fp32": torch.float32,
    "float16": torch.float16, "fp16": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
}  # fmt: skip
"""The dtypes that weights can be loaded in."""

FOLDER_DTYPE = "bfloat16"
"""Load dtype of a folder that names no 16-bit dtype; what most of the catalogue recommends."""

INDEX_FILE = "model_index.json"
MODEL_FILE = "config.json"
CONFIG_FILES = (MODEL_FILE, "scheduler_config.json", "guider_config.json")
"""Where a component's configuration is; a processor's is the first file ending in config.json."""

LARGE_TABLE_ELEMENTS = 1 << 18
"""Tables that a constructor computes are not computed beyond this size.

The position table of Stable Diffusion 3.5 medium, 226 million elements that the checkpoint then
overwrites, takes 13 s; the largest tables that are read while planning have 2**18 (Qwen-Image).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltInfo:
    """What :func:`build_pipeline` chose, besides the pipeline itself."""

    name: str
    """Catalogue name, or the folder's."""

    pipeline_class: str

    dtype: Mapping[str, str]
    """Component -> load dtype."""

    stand_ins: tuple[str, ...]
    """Components that stand in for a tokenizer or processor whose files are not here."""

    required: Mapping[str, Mapping[str, Mapping[str, Any]]]
    """Component -> strategy -> parameters without which it cannot run; already applied."""

    entry: Mapping[str, Any] | None
    """The catalogue entry; None for a folder."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One component of a pipeline, before it is built."""

    library: str
    class_name: str
    config: Mapping[str, Any]
    folder: Path | None


@dataclass(frozen=True, slots=True)
class _Blueprint:
    name: str
    pipeline_class: str
    options: Mapping[str, Any]
    parts: Mapping[str, _Part | None]
    dtype: Mapping[str, str]
    entry: Mapping[str, Any] | None


def build_pipeline(
    source: str | Path, *, dtype: Mapping[str, str] | str | None = None
) -> tuple[diffusers.DiffusionPipeline, BuiltInfo]:
    """Return the pipeline *source* with every model on the meta device, and what was chosen.

    Args:
        source: a catalogue name, or a folder with ``model_index.json`` and a folder a component.
        dtype: load dtype, of all components or by component name with ``"default"`` for the rest;
            what is not said is as recommended by the catalogue.

    Raises:
        UnknownName: if a pipeline, class, component or dtype of that name does not exist.
        InvalidRequest: if a folder or one of its files is not what it should be.
        UnsupportedPipeline: if a class needs a package that is not installed.
    """
    blueprint = _blueprint(source)
    pipeline_class = _pipeline_class(blueprint.pipeline_class)
    classes = {
        name: _component_class(part.library, part.class_name)
        for name, part in blueprint.parts.items()
        if part is not None
    }
    models = [name for name, cls in classes.items() if issubclass(cls, torch.nn.Module)]
    dtypes = _load_dtypes(blueprint.dtype, dtype, models)
    components: dict[str, Any] = dict.fromkeys(blueprint.parts)
    with quietly():
        for name, cls in classes.items():
            components[name] = _build_part(name, cls, blueprint.parts[name], dtypes.get(name))
        pipe = _assemble(pipeline_class, components, blueprint.options)
    required = _required(pipe)
    for component in required:
        getattr(pipe, component).enable_tiling()
    return pipe, BuiltInfo(
        name=blueprint.name,
        pipeline_class=blueprint.pipeline_class,
        dtype=dtypes,
        stand_ins=tuple(n for n, c in components.items() if getattr(c, "is_stand_in", False)),
        required=required,
        entry=blueprint.entry,
    )


# -- where a pipeline is described


def _blueprint(source: str | Path) -> _Blueprint:
    path = Path(source).expanduser()
    if isinstance(source, Path) or (os.sep in source and path.is_dir()):
        return _from_folder(path)
    try:
        entry = pipeline_entry(source)
    except UnknownName:
        if path.is_dir():
            return _from_folder(path)
        if "/" in source:
            raise InvalidRequest(
                f"{source!r} is neither in the catalogue nor a folder here, and pipefit downloads "
                "nothing: give a name that `pipefit catalog` lists, or the folder it is saved in."
            ) from None
        raise
    return _from_catalogue(entry)


def _from_catalogue(entry: Mapping[str, Any]) -> _Blueprint:
    parts: dict[str, _Part | None] = dict.fromkeys(entry.get("absent", ()))
    for kind in ("components", "schedulers", "processors", "guiders"):
        for name, part in entry.get(kind, {}).items():
            parts[name] = _Part(part["library"], part["class"], part["config"], None)
    options = entry.get("options", {})
    return _Blueprint(entry["name"], entry["pipeline_class"], options, parts, entry["dtype"], entry)


def _from_folder(folder: Path) -> _Blueprint:
    if not (folder / INDEX_FILE).is_file():
        raise InvalidRequest(
            f"There is no {INDEX_FILE} in {folder}: give the folder that a pipeline was saved to, "
            "or a name that `pipefit catalog` lists."
        )
    index = _read_json(folder / INDEX_FILE)
    class_name = index.get("_class_name")
    if not isinstance(class_name, str):
        raise InvalidRequest(
            f"{folder / INDEX_FILE} does not say which class of diffusers the pipeline has (its "
            f"_class_name is {class_name!r}): pipelines with their own code cannot be planned for."
        )
    parts: dict[str, _Part | None] = {}
    options: dict[str, Any] = {}
    for name, value in index.items():
        if name.startswith("_"):
            continue
        if not (isinstance(value, list) and len(value) == 2):
            options[name] = value
        else:
            parts[name] = None if value[0] is None else _part_in(folder / name, *value)
    recommended = {"default": _declared_dtype(parts)}
    return _Blueprint(folder.resolve().name, class_name, options, parts, recommended, None)


def _part_in(folder: Path, library: str, class_name: str) -> _Part:
    if not folder.is_dir():
        raise InvalidRequest(
            f"{folder.parent / INDEX_FILE} names a component {folder.name!r}, but there is no "
            f"folder {folder}: add it with its configuration."
        )
    named = [folder / name for name in CONFIG_FILES if (folder / name).is_file()]
    found = named or sorted(folder.glob("*config.json"))
    if not found:
        raise InvalidRequest(f"There is no configuration in {folder}: add its {MODEL_FILE}.")
    return _Part(library, class_name, _read_json(found[0]), folder)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path} cannot be read as JSON ({error}): repair it.") from error
    if not isinstance(content, dict):
        raise InvalidRequest(f"{path} holds no JSON object but a {type(content).__name__}.")
    return content


def _declared_dtype(parts: Mapping[str, _Part | None]) -> str:
    """Return the 16-bit dtype that the published weights were saved in, as far as they say."""
    for part in parts.values():
        config = part.config if part is not None else {}
        declared = config.get("dtype") or config.get("torch_dtype")
        if declared in ("float16", "bfloat16"):
            return str(declared)
    return FOLDER_DTYPE


# -- classes and dtypes


def _pipeline_class(name: str) -> type:
    cls = getattr(diffusers, name, None)
    if cls is None:
        names = [n for n in dir(diffusers) if n.endswith("Pipeline")]
        raise UnknownName(f"pipeline class in diffusers {diffusers.__version__}", name, names)
    _require_packages(cls)
    if not (inspect.isclass(cls) and issubclass(cls, diffusers.DiffusionPipeline)):
        raise InvalidRequest(f"{name} of diffusers is not a pipeline: correct the _class_name.")
    return cls


def _component_class(library: str, name: str) -> type:
    """Return the class that an entry ``[library, name]`` of a pipeline's index stands for."""
    for package in _packages(library):
        cls = getattr(package, name, None)
        if inspect.isclass(cls):
            _require_packages(cls)
            return cls
    names = [n for package in _packages(library) for n in dir(package) if n[0].isupper()]
    raise UnknownName(f"class in {library}", name, names)


def _packages(library: str) -> list[Any]:
    if library in ("diffusers", "transformers"):
        return [{"diffusers": diffusers, "transformers": transformers}[library]]
    found = []
    for path in ("diffusers.pipelines", "diffusers.pipelines.deprecated"):
        with contextlib.suppress(ModuleNotFoundError):
            found.append(importlib.import_module(f"{path}.{library}"))
    return found


def _require_packages(cls: type) -> None:
    """Refuse what the libraries put in place of a class whose packages are missing.

    A processor needs none: a stand-in takes its place.
    """
    placeholders = (diffusers.utils.DummyObject, transformers.utils.DummyObject)
    if isinstance(cls, placeholders) and not is_processor(cls):
        missing = [b for b in cls._backends if importlib.util.find_spec(b) is None]
        missing = missing or list(cls._backends)  # installed, but not in a version that serves
        raise UnsupportedPipeline(
            f"{cls.__name__} needs {' and '.join(missing)}, which is not installed here: "
            f"`pip install {' '.join(missing)}`."
        )


def _load_dtypes(
    recommended: Mapping[str, str], asked: Mapping[str, str] | str | None, models: list[str]
) -> dict[str, str]:
    """Return the load dtype of each of *models*: as asked, else as recommended."""
    if isinstance(asked, str):
        asked = {"default": asked}
    asked = dict(asked or {})
    for component in asked.keys() - {"default"}:
        if component not in models:
            raise UnknownName("component", component, models)
    for value in asked.values():
        if value not in DTYPES:
            raise UnknownName("dtype", value, DTYPES)
    chosen = asked if "default" in asked else {**recommended, **asked}
    return {
        name: str(DTYPES[chosen.get(name, chosen["default"])]).removeprefix("torch.")
        for name in models
    }


# -- building


def _build_part(name: str, cls: type, part: _Part | None, dtype: str | None) -> Any:
    assert part is not None
    try:
        if dtype is not None:
            model = _build_model(cls, part.config, DTYPES[dtype])
            if part.folder is not None:
                vars(model)[FILES_OF] = describe_files(part.folder)
            return model
        if is_processor(cls):
            return build_processor(cls, part.config, part.folder)
        return cls.from_config(dict(part.config))
    except (TypeError, ValueError, KeyError, AttributeError, NotImplementedError) as error:
        if isinstance(error, InvalidRequest):
            raise
        raise InvalidRequest(
            f"The configuration of {name!r} does not make a {cls.__name__} "
            f"({type(error).__name__}: {error}): compare it with the published one."
        ) from error


def _build_model(cls: type, config: Mapping[str, Any], dtype: torch.dtype) -> torch.nn.Module:
    if issubclass(cls, transformers.PreTrainedModel):
        return _transformers_model(cls, config, dtype)
    return _diffusers_model(cls, config, dtype)


def _diffusers_model(cls: type, config: Mapping[str, Any], dtype: torch.dtype) -> torch.nn.Module:
    """Build as ``ModelMixin.from_pretrained`` does, but for the reading of weights."""
    with (
        _default_dtype(dtype),
        no_init_weights(),
        _LargeTablesOnMeta(),
        accelerate.init_empty_weights(),
    ):
        model = cls.from_config(dict(config))
    kept = set(cls._keep_in_fp32_modules or ())
    _cast_saved(model, lambda name: torch.float32 if kept & set(name.split(".")) else dtype)
    _large_buffers_to_meta(model)
    return model.eval()


def _transformers_model(
    cls: type, config: Mapping[str, Any], dtype: torch.dtype
) -> torch.nn.Module:
    """Build as ``PreTrainedModel.from_pretrained`` does, but for the reading of weights."""
    with _LargeTablesOnMeta(), META:
        model = cls._from_config(_transformers_config(cls.config_class, config), dtype=dtype)
    kept = "|".join(name.replace("*", ".*") for name in model._get_dtype_plan(dtype))
    _cast_saved(model, lambda name: torch.float32 if kept and re.search(kept, name) else None)
    _compute_small_buffers(model)
    return model.eval()


def _transformers_config(cls: type, config: Mapping[str, Any]) -> Any:
    """Return *config* as a *cls*; one tower's model also loads from the whole model's config."""
    whole = cls.base_config_key and cls.base_config_key in config
    if whole and config.get("model_type") != cls.model_type:
        config = config[cls.base_config_key]
    return cls.from_dict(dict(config))


def _cast_saved(model: torch.nn.Module, dtype_of: Any) -> None:
    """Give every floating tensor of a checkpoint the dtype that a load gives it, on meta."""
    cast: dict[int, torch.Tensor] = {}  # tied tensors stay one tensor
    for prefix, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                unsaved = tensor is None or name in module._non_persistent_buffers_set
                if unsaved or not tensor.is_floating_point():
                    continue
                wanted = dtype_of(f"{prefix}.{name}" if prefix else name) or tensor.dtype
                if id(tensor) not in cast:
                    cast[id(tensor)] = _on_meta(tensor, wanted)
                store[name] = cast[id(tensor)]


def _on_meta(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if tensor.is_meta and tensor.dtype == dtype:
        return tensor
    moved = torch.empty_like(tensor, dtype=dtype, device=META)
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(moved, requires_grad=tensor.requires_grad)
    return moved


def _large_buffers_to_meta(model: torch.nn.Module) -> None:
    """Leave values only where they are computed by the model and small."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            saved = name not in module._non_persistent_buffers_set
            if saved or buffer.numel() > KNOWN_VALUE_LIMIT_ELEMENTS:
                module._buffers[name] = _on_meta(buffer, buffer.dtype)


def _compute_small_buffers(model: transformers.PreTrainedModel) -> None:
    """Let a transformers model compute the buffers that no checkpoint holds, as after a load."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = True  # what transformers skips
    computes = False
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None and buffer.numel() <= KNOWN_VALUE_LIMIT_ELEMENTS:
                module._buffers[name] = torch.zeros_like(buffer, device="cpu")
                computes = True
    if computes:
        model.initialize_weights()


class _LargeTablesOnMeta(TorchDispatchMode):
    """Keeps what a constructor computes on the meta device where it is large."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True wraps every operator in a call that turns dynamo off

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [t for t in _flat(args) if isinstance(t, torch.Tensor)]
        unknown = any(t.is_meta for t in inputs)
        small = all(t.numel() <= KNOWN_VALUE_LIMIT_ELEMENTS for t in inputs)
        if small and not unknown and (inputs or "device" not in kwargs):
            return func(*args, **kwargs)
        device = {"device": META} if "device" in kwargs else {}
        made = func(*map(_to_meta, args), **{**kwargs, **device})
        sizes = [t.numel() for t in _flat((made,)) if isinstance(t, torch.Tensor)]
        if unknown or any(size > LARGE_TABLE_ELEMENTS for size in sizes):
            return made
        return func(*args, **kwargs)


def _flat(values: Any) -> Iterator[Any]:
    """The elements of *values* and of the lists in it, as deep as operators nest tensors."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


def _to_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(META)
    if isinstance(value, (list, tuple)):
        return type(value)(_to_meta(item) for item in value)
    return value


def _assemble(
    cls: type, components: dict[str, Any], options: Mapping[str, Any]
) -> diffusers.DiffusionPipeline:
    parameters = inspect.signature(cls.__init__).parameters
    given = {**components, **options}
    for name in given.keys() - parameters.keys():
        raise UnknownName(f"component of {cls.__name__}", name, list(parameters)[1:])
    for name in cls._optional_components:
        if name in parameters and parameters[name].default is inspect.Parameter.empty:
            given.setdefault(name, None)
    missing = [
        name
        for name, parameter in list(parameters.items())[1:]
        if name not in given
        and parameter.default is inspect.Parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if missing:
        raise InvalidRequest(
            f"A {cls.__name__} needs {' and '.join(missing)}, which its {INDEX_FILE} does not "
            "name: add it."
        )
    # AnimateDiff builds another UNet, from weights that are not here, while it is constructed.
    with accelerate.init_empty_weights(include_buffers=True):
        return cls(**given)


def _required(pipe: diffusers.DiffusionPipeline) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the strategies without which a component refuses to work.

    AutoencoderKLAllegro raises NotImplementedError from encode and decode unless it is tiled;
    nothing but its code says so.
    """
    return {
        name: {"vae_tiling": {}}
        for name, component in pipe.components.items()
        if hasattr(component, "enable_tiling") and _refuses_untiled(type(component))
    }


def _refuses_untiled(cls: type) -> bool:
    return (
        re.search(r"NotImplementedError\([^)]*without tiling", inspect.getsource(cls)) is not None
    )


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep the libraries' remarks to themselves: about configuration keys, casts, deprecations.

    They are meant for whoever wrote a call; here a call is only played through.
    """
    loggings = (diffusers.utils.logging, transformers.utils.logging)
    before = [logging.get_verbosity() for logging in loggings]
    for logging in loggings:
        logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logging, level in zip(loggings, before, strict=True):
            logging.set_verbosity(level)
