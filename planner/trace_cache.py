"""Traces and rehearsals remembered on disk: what took seconds with torch takes a tenth without it.

An entry belongs to everything that its making depends on: what the caller names, the versions of
the libraries that were executed, and pipefit's own code. A change in any of them is another entry,
so nothing is ever out of date; entries that nobody asks for any more are the first to go.

The cache is never the reason for a failure. A damaged entry is a missing one, and a folder that
cannot be used is said once on the log. Several processes may share a folder: an entry is written
beside its place and moved there, so that readers see all of it or nothing.

An entry is one line with a checksum, then JSON deflated; not pickle, which executes what it reads.

Beside them lie checkpoints in shards (:mod:`pipefit.strategies.sharded_checkpoint`), which are
counted and cleared here as well. They are the user's weights: none goes by itself.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipefit.cost_models.workload import Workload
from pipefit.cost_models.workload_json import from_json, to_json

T = TypeVar("T")

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "PIPEFIT_CACHE"
"""Environment variable that names the folder of everything pipefit remembers between runs."""

TRACES = "traces"
CHECKPOINTS = "checkpoints"
"""Folders in that one."""

LIMIT_BYTES = 128 << 20
"""What the entries of a folder may take together; the least recently used go first.

Our choice: two thousand traces, an image pipeline's being 30 kB and a video pipeline's 70.
"""

DEFLATE_LEVEL = 6
"""Our choice, measured on the trace of Wan 2.1 1.3B, 460 kB of JSON: level 1 makes 77 kB of it,
6 makes 60 in 0.03 s, 9 makes 56 in 0.2 s. Inflating takes 1 ms whatever the level."""

LIBRARIES = (
    "torch", "diffusers", "transformers", "accelerate",
    "flash-attn", "kernels", "sageattention", "xformers",
)  # fmt: skip
"""Distributions whose code a trace executes, or whose presence a component's traits tell."""

SOURCES = {
    "pipefit.planner": (
        "build.py", "call.py", "kernels.py", "options.py", "recorder.py", "shims.py",
        "signatures.py", "standins.py", "trace.py", "virtual*.py", "workloads.py",
    ),
    "pipefit.strategies": ("*.py",),
    "pipefit.cost_models": (
        "fusion.py", "storage.py", "timeline.py", "workload*.py", "workspace.py",
    ),
}  # fmt: skip
"""Our own files that decide what is in a trace or how it is written; catalogue entries are the
caller's to name."""

_MAGIC = b"pipefit.trace/1 "
_SUFFIX = ".trace"
_UNFINISHED_SUFFIX = ".unfinished"

CHECKPOINT_SUFFIXES = (".shards", ".unfinished")
"""What folders of ours end in among the checkpoints.

As in strategies/sharded_checkpoint.py, whose import would take longer than an entry saves.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheInfo:
    """What a cache folder holds."""

    folder: Path
    num_entries: int
    """Traces and rehearsals."""
    entries_bytes: int
    limit_bytes: int
    """What the entries may take together; checkpoints have no limit."""
    num_checkpoints: int
    """Components whose weights lie there in shards."""
    checkpoints_bytes: int


def cached_trace(
    key: Mapping[str, Any], make: Callable[[], Workload], *, folder: Path | None = None
) -> Workload:
    """Return the workload remembered under *key*, else what *make* returns, and remember that.

    *key* is JSON and names all that *make* depends on besides library versions and pipefit's code:
    the catalogue entry or a fingerprint of the pipeline, call, dtype, device, the variants asked.
    """
    return remembered(
        key, make, name="workload", to_json=to_json, from_json=from_json, folder=folder
    )


def remembered(
    key: Mapping[str, Any],
    make: Callable[[], T],
    *,
    name: str,
    to_json: Callable[[T], Any],
    from_json: Callable[[Any], T],
    code: str | None = None,
    folder: Path | None = None,
) -> T:
    """Return the *name* remembered under *key*, else what *make* returns, and remember that.

    *from_json* undoes *to_json*, and raises ValueError for what is not JSON of *to_json*. *code* is
    a hash of the files that decide what is made; by default those of a trace.
    """
    folder = folder or traces_folder()
    identity = _identity(key, code_version() if code is None else code)
    path = folder / f"{hashlib.sha256(identity.encode()).hexdigest()}{_SUFFIX}"
    made = _read(path, identity, name, from_json)
    if made is None:
        made = make()
        entry = _packed(identity, made, name, to_json, from_json)
        if entry is not None:
            _write(path, entry)
    return made


def cache_info(folder: Path | None = None) -> CacheInfo:
    """Return how much *folder*, by default the user's :func:`cache_folder`, takes."""
    folder = folder or cache_folder()
    entries = _entries(folder / TRACES)
    checkpoints = _checkpoints(folder / CHECKPOINTS)
    return CacheInfo(
        folder=folder,
        num_entries=len(entries),
        entries_bytes=sum(entry.num_bytes for entry in entries),
        limit_bytes=LIMIT_BYTES,
        num_checkpoints=len(checkpoints),
        checkpoints_bytes=sum(checkpoint.num_bytes for checkpoint in checkpoints),
    )


def clear_cache(folder: Path | None = None) -> CacheInfo:
    """Empty *folder*, by default the user's :func:`cache_folder`, of what pipefit put there.

    Returns:
        What could not be removed. Weights that a process has mapped stay valid in it, but a load
        that is rewriting a checkpoint at the time fails.
    """
    folder = folder or cache_folder()
    for entry in _entries(folder / TRACES):
        _remove(entry.path)
    for checkpoint in _checkpoints(folder / CHECKPOINTS):
        shutil.rmtree(checkpoint.path, ignore_errors=True)  # the result says what is left
    return cache_info(folder)


def cache_folder() -> Path:
    """Return where pipefit remembers things: ``$PIPEFIT_CACHE``, else the platform's place."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    home = Path(os.path.expanduser("~"))
    if not home.is_absolute():  # nobody's home: a container's user that no password file lists
        home = Path(tempfile.gettempdir())
    if sys.platform == "win32":
        return (
            Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "pipefit" / "Cache"
        )
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "pipefit"
    # The specification tells to ignore a relative one:
    # https://specifications.freedesktop.org/basedir-spec/latest/
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (shared if shared.is_absolute() else home / ".cache") / "pipefit"


def traces_folder() -> Path:
    """Return where traces are kept when no folder is given."""
    return cache_folder() / TRACES


def checkpoints_folder() -> Path:
    """Return where checkpoints are kept in shards."""
    return cache_folder() / CHECKPOINTS


# -- what an entry belongs to


def _identity(key: Mapping[str, Any], code: str) -> str:
    whole = {"key": key, "code": code, "libraries": library_versions()}
    return json.dumps(whole, sort_keys=True)


@functools.cache
def code_version() -> str:
    """Return a hash of pipefit's files that decide what is in a trace; imports none of them."""
    return _hash_of(source_files())


@functools.cache
def whole_code_version() -> str:
    """Return a hash of all of pipefit's files but its public face: rehearsals depend on most."""
    return _hash_of(source_files(dict.fromkeys(SOURCES, ("*.py",))))


def _hash_of(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.parent.name}/{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def source_files(sources: Mapping[str, Sequence[str]] | None = None) -> tuple[Path, ...]:
    """Return the files that *sources* names by package and pattern; by default :data:`SOURCES`."""
    found = []
    for package, patterns in (SOURCES if sources is None else sources).items():
        spec = importlib.util.find_spec(package)
        for location in (spec.submodule_search_locations if spec else None) or ():
            found += [path for pattern in patterns for path in Path(location).glob(pattern)]
    return tuple(sorted(found))


@functools.cache
def library_versions() -> dict[str, str | None]:
    """Return the versions of the libraries that decide a trace; None where one is missing."""
    versions: dict[str, str | None] = dict.fromkeys(LIBRARIES)
    for name in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


# -- one entry


def _packed(
    identity: str,
    made: T,
    name: str,
    to_json: Callable[[T], Any],
    from_json: Callable[[Any], T],
) -> bytes | None:
    """Return the bytes of an entry; None if reading them would not give *made* back."""
    content = {"identity": identity, name: to_json(made)}
    try:
        text = json.dumps(content, separators=(",", ":"))
    except TypeError as error:
        logger.warning("A %s is not remembered: %s.", name, error)
        return None
    if from_json(json.loads(text)[name]) != made:
        logger.warning("A %s is not remembered: what it holds of the call is not JSON.", name)
        return None
    body = zlib.compress(text.encode(), DEFLATE_LEVEL)
    return _MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def _unpacked(entry: bytes, identity: str, name: str, from_json: Callable[[Any], T]) -> T | None:
    """Return what is in *entry*; None if it is damaged or does not belong to *identity*."""
    head, _, body = entry.partition(b"\n")
    if head != _MAGIC + hashlib.sha256(body).hexdigest().encode():
        return None
    try:
        with without_garbage_collection():
            content = json.loads(zlib.decompress(body))
            return from_json(content[name]) if content["identity"] == identity else None
    except (zlib.error, ValueError, KeyError, TypeError):
        return None  # whole, but not written by us


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Spare the collector a hundred thousand tuples, none of them garbage; it saves a quarter of
    reading them, and an eighth of pricing what they stand for."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _read(path: Path, identity: str, name: str, from_json: Callable[[Any], T]) -> T | None:
    try:
        entry = path.read_bytes()
    except OSError:
        return None  # if it is more than missing, writing will say so
    made = _unpacked(entry, identity, name, from_json)
    if made is not None:
        with suppress(OSError):  # a folder that we may only read
            os.utime(path)  # used last: now
    return made


def _write(path: Path, entry: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        number, unfinished = tempfile.mkstemp(dir=path.parent, suffix=_UNFINISHED_SUFFIX)
        try:
            with os.fdopen(number, "wb") as file:
                file.write(entry)
            os.replace(unfinished, path)
        except OSError:
            _remove(Path(unfinished))
            raise
    except OSError as error:
        _say_unusable(path.parent, error.strerror)
    else:
        _drop_least_recent(path.parent)


@functools.cache
def _say_unusable(folder: Path, reason: str) -> None:
    """Log it; cached, so that it is said once."""
    logger.warning(
        "Traces are not remembered in %s: %s; set %s to a folder that can be written.",
        folder,
        reason,
        FOLDER_VARIABLE,
    )


# -- the folder


@dataclass(frozen=True, slots=True)
class _Entry:
    path: Path
    used_ns: int
    num_bytes: int


def _entries(folder: Path) -> list[_Entry]:
    """Return the entries of *folder*, last used first, and what killed processes left behind."""
    found = []
    with suppress(OSError):
        for item in os.scandir(folder):
            if item.name.endswith((_SUFFIX, _UNFINISHED_SUFFIX)):
                with suppress(FileNotFoundError):  # another process dropped it
                    stat = item.stat()
                    found.append(_Entry(Path(item.path), stat.st_mtime_ns, stat.st_size))
    return sorted(found, key=lambda entry: entry.used_ns, reverse=True)


def _checkpoints(folder: Path) -> list[_Entry]:
    """Return the checkpoints in *folder*, and those that killed processes left half-written."""
    found = []
    with suppress(OSError):
        for item in os.scandir(folder):
            if item.name.endswith(CHECKPOINT_SUFFIXES) and item.is_dir(follow_symlinks=False):
                with suppress(FileNotFoundError):  # another process dropped it
                    files = [file.stat() for file in os.scandir(item)]
                    num_bytes = sum(file.st_size for file in files)
                    found.append(_Entry(Path(item.path), item.stat().st_mtime_ns, num_bytes))
    return found


def _drop_least_recent(folder: Path) -> None:
    kept_bytes = 0
    for entry in _entries(folder):
        kept_bytes += entry.num_bytes
        if kept_bytes > LIMIT_BYTES:
            _remove(entry.path)


def _remove(path: Path) -> None:
    with suppress(OSError):  # gone already, or held open on Windows; the next write tries again
        path.unlink()
