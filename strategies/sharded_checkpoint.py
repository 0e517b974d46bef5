"""Read a component from smaller files: its checkpoint is rewritten in shards before it is loaded.

Most checkpoints need none of it. Files are mapped, not read, so loading them takes no RAM of its
own whatever their size. Measured with diffusers 0.42.1, transformers 5.23 and torch 2.13, most that
a process held while it loaded, in MiB (tests/strategies/test_sharded_checkpoint.py):

=================================  ==========  ==========================  =====================
file                               loaded as   AutoencoderKL, 210 in bf16  CLIP text, 289 in bf16
=================================  ==========  ==========================  =====================
safetensors, or a zipped pickle    as stored   10, in shards 10            10, in shards 10
float32, either format             bfloat16    634, in shards of 80: 271   875, in shards 875
pickle of torch before 1.6         as stored   213, all of it unmapped     296, all of it unmapped
the same, float32                  bfloat16    633, all of it unmapped     874, all of it unmapped
=================================  ==========  ==========================  =====================

So shards have an effect where diffusers casts, which holds one file's pages beside the copies, and
on old pickles, which are read whole. transformers opens all files before it casts, so only an old
pickle gains there. Pages of a mapped file show in a monitor and count for a container, but the
kernel drops them when RAM is short; what an old pickle takes it cannot. That is why the search asks
for shards of old pickles alone. Quantisation while loading casts no whole file (quanto: 33 and 38).
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipefit.cost_models.host_memory import Checkpoint
from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.units import parse_bytes
from pipefit.cost_models.workload import Component, Workload
from pipefit.errors import InvalidRequest
from pipefit.strategies.parameters import unknown_parameter
from pipefit.strategies.strategy import Kind, Quality, Undo

MAX_SHARD_SIZE = "2GB"
"""Unless said. Our choice: a fifth of what diffusers writes."""

FILES_OF = "_pipefit_checkpoint"
"""Attribute of a weightless module that says what :func:`describe_files` found in its folder."""

SHARDS_SUFFIX = ".shards"
UNFINISHED_SUFFIX = ".unfinished"
"""What folders of a cache end in: with all shards of a component, and while they are written.

By these ``clear_cache`` of planner/trace_cache.py knows what it may remove.
"""

STEMS = (
    ("diffusion_pytorch_model", "safetensors"),
    ("model", "safetensors"),
    ("diffusion_pytorch_model", "bin"),
    ("pytorch_model", "bin"),
)
"""Names that diffusers and transformers look for, in their order."""

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Names in the header of a safetensors file, and torch's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardedCheckpoint:
    """Safetensors shards of ``max_shard_size`` in pipefit's cache, where they stay."""

    name: str = "sharded_checkpoint"
    kind: Kind = "process"
    quality: Quality = Quality.EXACT

    def traits(self, module: Any) -> dict[str, Any]:
        """What lies on disk, of a module that was built from its folder and not loaded."""
        return {"checkpoint": getattr(module, FILES_OF, None)}

    def options(
        self, component: Component, workload: Workload, gpu: Gpu
    ) -> Sequence[Mapping[str, Any]]:
        """None by GPU: RAM decides (:func:`pipefit.planner.options.process_options`)."""
        return ()

    def refusal(self, component: Component, parameters: Mapping[str, Any]) -> str | None:
        """A size that is none, and weights that are no files any more."""
        unknown = unknown_parameter(self.name, parameters, ("max_shard_size",))
        if unknown:
            return unknown
        try:
            shard_bytes(parameters)
        except (InvalidRequest, TypeError):
            given = parameters.get("max_shard_size")
            return f'sharded_checkpoint:max_shard_size is a size as "2GB", but was {given!r}.'
        if component.traits.get("checkpoint") is None:
            return (
                "its weights are loaded already or their files are not here, and shards only "
                "matter while files are read: use pipefit.load with the pipeline's folder."
            )
        return None

    def unfit(
        self, component: Component, parameters: Mapping[str, Any], workload: Workload, gpu: Gpu
    ) -> str | None:
        """Files that are mapped as they are, or are small enough."""
        refusal = self.refusal(component, parameters)
        if refusal:
            return refusal
        checkpoint = checkpoint_of(component)
        if checkpoint is None or not checkpoint.gains_from(
            shard_bytes(parameters), component.library
        ):
            return (
                "its files take no more RAM while they are read than shards would, so "
                "sharded_checkpoint has no effect: leave it out."
            )
        return None

    def placement(self, parameters: Mapping[str, Any]) -> None:
        """Weights stay where they are."""

    def apply(
        self, pipe: Any, component: str | None, parameters: Mapping[str, Any], device: Any
    ) -> Undo:
        """Nothing: ``pipefit.load`` has it done by then, and a rehearsal reads no files."""
        return lambda: None


def shard_bytes(parameters: Mapping[str, Any]) -> int:
    """Return the size that a shard may have at the most."""
    return max(1, parse_bytes(parameters.get("max_shard_size", MAX_SHARD_SIZE)))


def checkpoint_of(component: Component) -> Checkpoint | None:
    """Return what *component* is read from, if its files are known and decide about RAM."""
    found = component.traits.get("checkpoint")
    if found is None or component.traits.get("quantized_by"):
        return None
    stored_bytes = sum(found["file_bytes"])
    dtype = component.traits.get("dtype")
    # What an old pickle holds only reading it would tell; twice the bytes are float32.
    is_cast = dtype != found["dtype"] if found["dtype"] else _is_twice(stored_bytes, component)
    return Checkpoint(
        file_bytes=tuple(found["file_bytes"]),
        is_read_whole=found["is_read_whole"],
        is_cast=bool(dtype) and is_cast,
    )


def _is_twice(num_bytes: int, component: Component) -> bool:
    return num_bytes > 1.5 * component.weight_bytes


# -- files


def weight_files(folder: Path) -> tuple[list[Path], str, str]:
    """Return the weight files of a component, their stem and their variant with its dot.

    None where there are none. The fp16 variant counts where there is no other.
    """
    for variant in ("", ".fp16"):
        for stem, kind in STEMS:
            single = folder / f"{stem}{variant}.{kind}"
            if single.is_file():
                return [single], stem, variant
            index = folder / f"{stem}.{kind}.index{variant}.json"
            if index.is_file():
                said = _mapping(json.loads(index.read_text(encoding="utf-8")), index)
                names = _mapping(said["weight_map"], index).values()
                files = [folder / name for name in dict.fromkeys(names)]
                if all(file.is_file() for file in files):
                    return files, stem, variant
    return [], "", ""


def describe_files(folder: Path) -> dict[str, Any] | None:
    """Return what decides how the weights in *folder* are read, as JSON values.

    None without files that can be read: planning needs none.
    """
    try:
        files, _, _ = weight_files(folder)
        if not files or any(is_read_whole(file) and not _is_pickle(file) for file in files):
            return None
        return {
            "file_bytes": [file.stat().st_size for file in files],
            "is_read_whole": any(is_read_whole(file) for file in files),
            "dtype": _stored_dtype(files[0]),
        }
    except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError):
        return None  # a pointer of git-lfs, say; the load will tell


def is_read_whole(file: Path) -> bool:
    """Whether torch cannot map *file*: a pickle that is no zip file, as before torch 1.6."""
    from zipfile import is_zipfile

    return file.suffix == ".bin" and not is_zipfile(file)


def _is_pickle(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(1) == pickle.PROTO  # as every pickle since protocol 2


def _stored_dtype(file: Path) -> str | None:
    """Return the dtype of most tensors in *file*; None where only reading all of it would tell."""
    if is_read_whole(file):
        return None
    if file.suffix == ".bin":
        dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in _pickled(file).values())
        return dtypes.most_common(1)[0][0] if dtypes else None
    dtypes = Counter(tensor["dtype"] for tensor in _header(file).values())
    return DTYPES.get(dtypes.most_common(1)[0][0]) if dtypes else None


def _header(file: Path) -> dict[str, Any]:
    """Return what a safetensors file says of its tensors (its format is public: length, JSON)."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > file.stat().st_size:
            raise ValueError(f"{file} is no safetensors file.")
        header = _mapping(json.loads(stream.read(size)), file)
    header.pop("__metadata__", None)
    return {name: _mapping(tensor, file) for name, tensor in header.items()}


def _mapping(found: Any, file: Path) -> dict[str, Any]:
    """Return *found* if it holds something by name.

    Raises:
        ValueError: otherwise.
    """
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no object where one was expected.")
    return found


def _pickled(file: Path) -> dict[str, Any]:
    import torch

    is_mapped = not is_read_whole(file)
    found = torch.load(file, map_location="cpu", weights_only=True, mmap=is_mapped)
    if not isinstance(found, dict) or not all(
        isinstance(tensor, torch.Tensor) for tensor in found.values()
    ):
        raise InvalidRequest(
            f"{file} holds more than tensors by name, so it cannot be rewritten in shards: load "
            "without sharded_checkpoint."
        )
    return dict(found)


# -- rewriting


def with_shards(folder: Path, components: Sequence[str], most_bytes: int, cache: Path) -> Path:
    """Return a new folder like *folder* with the weights of *components* in shards.

    It is made of links: to what is in *folder*, and to the shards, which stay in *cache* for the
    next load. Once the weights are read the folder may go, and the links with it.
    """
    linked = Path(tempfile.mkdtemp(prefix="pipefit-"))
    try:
        for entry in folder.resolve().iterdir():
            if entry.name not in components:
                (linked / entry.name).symlink_to(entry)
                continue
            (linked / entry.name).mkdir()
            shards = rewrite(entry, most_bytes, cache)
            kept = [file for file in entry.iterdir() if not _is_of_weights(file)]
            for file in (*kept, *shards.iterdir()):
                (linked / entry.name / file.name).symlink_to(file.resolve())
    except BaseException:
        shutil.rmtree(linked, ignore_errors=True)
        raise
    return linked


def _is_of_weights(file: Path) -> bool:
    return file.suffix in (".safetensors", ".bin") or ".index." in file.name


def rewrite(folder: Path, most_bytes: int, cache: Path) -> Path:
    """Return the folder in *cache* with the weights of *folder* in shards of at most *most_bytes*.

    One shard is in memory at a time, beside it a file that can only be read whole. A tensor is
    never cut, so a larger one makes a larger shard.
    """
    files, stem, variant = weight_files(folder)
    facts = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    key = hashlib.sha256(json.dumps([facts, most_bytes]).encode()).hexdigest()[:16]
    target = cache / f"{key}{SHARDS_SUFFIX}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    stem = "model" if stem == "pytorch_model" else stem
    scratch = Path(tempfile.mkdtemp(suffix=UNFINISHED_SUFFIX, dir=cache))
    try:
        written = []
        for file in files:
            for tensors in _shards(file, most_bytes):
                written.append(_save(tensors, scratch / str(len(written))))
                del tensors
        placed = {}
        for number, (path, names, _) in enumerate(written, start=1):
            name = f"{stem}-{number:05d}-of-{len(written):05d}{variant}.safetensors"
            path.rename(path.with_name(name))
            placed |= dict.fromkeys(names, name)
        index = {
            "metadata": {"total_size": sum(num_bytes for *_, num_bytes in written)},
            "weight_map": placed,
        }
        name = f"{stem}.safetensors.index{variant}.json"
        (scratch / name).write_text(json.dumps(index, indent=2), encoding="utf-8")
        scratch.replace(target)
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if not (isinstance(error, OSError) and target.is_dir()):  # another process was first
            raise
    return target


def _save(tensors: Mapping[str, Any], path: Path) -> tuple[Path, list[str], int]:
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata={"format": "pt"})
    return path, list(tensors), sum(t.numel() * t.element_size() for t in tensors.values())


def _shards(file: Path, most_bytes: int) -> Iterator[dict[str, Any]]:
    """Yield the tensors of *file*, as many at a time as fit in *most_bytes*, at least one.

    What is mapped is opened anew for each, which gives the pages of the one before back.
    """
    whole = _pickled(file) if is_read_whole(file) else None
    groups: list[list[str]] = []
    room_bytes = 0
    for name, num_bytes in _tensor_bytes(file, whole).items():
        if not groups or num_bytes > room_bytes:
            groups.append([])
            room_bytes = most_bytes
        groups[-1].append(name)
        room_bytes -= num_bytes
    for names in groups:
        yield _tensors(file, names, whole)


def _tensor_bytes(file: Path, whole: Mapping[str, Any] | None) -> dict[str, int]:
    if file.suffix == ".bin":
        tensors = _pickled(file) if whole is None else whole
        return {name: t.numel() * t.element_size() for name, t in tensors.items()}
    header = _header(file)
    return {name: one["data_offsets"][1] - one["data_offsets"][0] for name, one in header.items()}


def _tensors(file: Path, names: Sequence[str], whole: Mapping[str, Any] | None) -> dict[str, Any]:
    if file.suffix != ".bin":
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in names}
    tensors = _pickled(file) if whole is None else whole
    found: dict[str, Any] = {}
    seen = set()
    for name in names:
        # A pickle keeps ties and strides; safetensors have neither.
        place = tensors[name].untyped_storage().data_ptr()
        found[name] = tensors[name].clone() if place in seen else tensors[name]
        found[name] = found[name].contiguous()
        seen.add(place)
    return found
