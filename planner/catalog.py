"""The known pipelines and GPUs: reads ``pipefit/catalog`` and answers for the names people write.

It imports neither torch nor diffusers, so that ``pipefit catalog`` answers at once; what an entry
describes is built elsewhere. A name is forgiven its spelling but never matched in part:
``rtx-4090`` is not the ``RTX 4090 D``, and a name that could be several variants is the one that
lists it as an alias (``rtx-3060`` is the 12 GB card, ``a100`` the 80 GB SXM).
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipefit.cost_models.machine import Gpu, Host, Link, Machine, Provenance
from pipefit.cost_models.transfers import PINNED_SHARE, link_rates, pcie_bytes_per_s
from pipefit.cost_models.units import GIB, format_bytes
from pipefit.errors import InvalidRequest, UnknownName

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

DEFAULT_RAM_BYTES = 64 * GIB
"""RAM assumed around a catalogue GPU when none is stated. Our choice: what a desktop built for
these pipelines has; every machine made with it says so in its notes."""

SYSTEM_RAM_BYTES = 4 * GIB
"""RAM that the system and a desktop session hold beside us; never counted as more than a quarter of
the whole. Microsoft asks 4 GB for Windows 11 alone:
https://www.microsoft.com/en-us/windows/windows-11-specifications."""

PINNABLE_SHARE = 0.5
"""Share of RAM that may be page-locked on a machine we cannot ask. Windows stops at about one half
(https://github.com/comfyanonymous/ComfyUI, comfy/model_management.py, ``MAX_PINNED_MEMORY``);
Linux has no such bound, but https://github.com/deepbeepmeep/mmgp stops there as well."""

DEFAULT_NUM_CORES = 8
"""CPU cores assumed around a catalogue GPU; our choice; only what the host computes itself hangs
on it."""

METAL_SHARES = ((36 * GIB, 2 / 3), (None, 3 / 4))
"""Share of unified memory that Metal lets the GPU use (``recommendedMaxWorkingSetSize``), by the
size up to which it holds. 10.67 of 16 GB (https://github.com/exo-explore/exo/pull/1672), 65 to
75 % in general (https://github.com/sgl-project/sglang/pull/29949); recent systems allow more."""

INTEGRATED_SHARE = 3 / 4
"""Share of unified memory that other integrated GPUs use: a Ryzen AI Max with 128 GB gives its GPU
96 (https://www.amd.com/en/blogs/2025/faqs-amd-variable-graphics-memory-vram-ai-model-sizes-\
quantization-mcp-more.html). For others it is our cautious choice."""

_GPU_NOISE = re.compile(
    r"nvidia|geforce|tesla|\bamd\b|intel|radeon|\(r\)|\(tm\)|generation|edition|graphics|gpu"
)
_BRAND = re.compile(r"^(rtx|gtx|rx|arc)(?=[a-z]?\d)")


def pipeline_names() -> tuple[str, ...]:
    """Return the catalogue's pipelines, sorted."""
    return tuple(sorted(_pipeline_files()))


def pipeline_entry(name: str) -> Mapping[str, Any]:
    """Return what is known of the pipeline *name*: a catalogue name, an alias or a hub id.

    Raises:
        UnknownName: if there is none; the message offers the closest.
    """
    files = _pipeline_files()
    found = name if name in files else _pipeline_spellings().get(_squash(name))
    if found is None:
        aliases = (
            alias for known in pipeline_names() for alias in _read_pipeline(known)["aliases"]
        )
        raise UnknownName("pipeline", name, (*pipeline_names(), *aliases))
    return _read_pipeline(found)


def _folder() -> Traversable:
    return importlib.resources.files("pipefit") / "catalog"


@functools.cache
def _pipeline_files() -> Mapping[str, Traversable]:
    folder = _folder() / "pipelines"
    return {
        file.name.removesuffix(".json"): file
        for file in folder.iterdir()
        if file.name.endswith(".json")
    }


@functools.cache
def _read_pipeline(name: str) -> Mapping[str, Any]:
    entry: dict[str, Any] = _resolved(json.loads(_pipeline_files()[name].read_text("utf-8")))
    return entry


def _resolved(value: Any) -> Any:
    """Return *value* with every ``like`` in it replaced by what it names.

    ``{"like": "sana", ...}`` is the entry ``sana`` with changes, ``"sana/components/vae"`` a part
    of it: objects are merged and null removes a key (RFC 7386). Names and aliases are never taken
    over, so that each belongs to one entry.
    """
    if not isinstance(value, Mapping):
        return value
    changes = {key: _resolved(part) for key, part in value.items() if key != "like"}
    if "like" not in value:
        return changes
    name, *path = value["like"].split("/")
    base = functools.reduce(lambda part, key: part[key], path, _read_pipeline(name))
    return _merged({k: v for k, v in base.items() if k not in ("name", "aliases")}, changes)


def _merged(base: Any, changes: Any) -> Any:
    if not (isinstance(base, Mapping) and isinstance(changes, Mapping)):
        return changes
    kept = {key: part for key, part in base.items() if key not in changes}
    changed = {k: _merged(base.get(k), part) for k, part in changes.items() if part is not None}
    return kept | changed


@functools.cache
def _pipeline_spellings() -> Mapping[str, str]:
    return {
        _squash(spelling): name
        for name in pipeline_names()
        for spelling in (name, *_read_pipeline(name)["aliases"])
    }


def _squash(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", name.casefold())


def gpu_names() -> tuple[str, ...]:
    """Return the catalogue's GPUs in its own order: by vendor, kind and age."""
    return tuple(_gpu_entries())


def gpu_entry(name: str) -> Mapping[str, Any]:
    """Return all that the catalogue holds on the GPU *name*, sources and confidence included.

    Raises:
        UnknownName: if there is none; the message offers the closest.
    """
    return _gpu_entries()[_resolve_gpu(name)[0]]


def find_gpu(name: str) -> Gpu:
    """Return the GPU *name* as its data sheet has it, all of its memory free.

    ``4060ti16``, ``RTX 4060 Ti 16GB`` and ``rtx-4060-ti-16gb`` are one card. Host-to-device rates
    are left out where the PCIe link implies them: a machine may wire fewer lanes than the card has.

    >>> find_gpu("4060ti16").name, find_gpu("A100-SXM4-80GB").name
    ('rtx-4060-ti-16gb', 'a100-80gb')

    Raises:
        UnknownName: if there is none; the message offers the closest.
    """
    found, unified_bytes = _resolve_gpu(name)
    return _gpu(found, unified_bytes)


def match_device(device_name: str, total_bytes: int | None) -> Gpu | None:
    """Return the GPU that a driver calls *device_name*, or None where the catalogue has none.

    Variants that share a name (RTX 3060 with 8 and 12 GB) are told apart by *total_bytes*: the
    nearest wins. All figures are the catalogue's; what the driver reports is more certain.
    """
    candidates = _device_names().get(_gpu_key(device_name), ())
    if not candidates:
        return None
    if total_bytes is None:
        plain = _gpu_spellings().get(_gpu_key(device_name))
        return _gpu(plain[0] if plain and plain[0] in candidates else candidates[0])
    return min(map(_gpu, candidates), key=lambda gpu: abs(gpu.total_bytes - total_bytes))


@functools.cache
def _gpu_entries() -> Mapping[str, Mapping[str, Any]]:
    text = (_folder() / "gpus.json").read_text("utf-8")
    entries: dict[str, Mapping[str, Any]] = json.loads(text)["gpus"]
    return entries


def _resolve_gpu(name: str) -> tuple[str, int | None]:
    found = _gpu_spellings().get(_gpu_key(name))
    if found is None:
        aliases = (alias for entry in _gpu_entries().values() for alias in entry["aliases"])
        raise UnknownName("GPU", name, (*gpu_names(), *aliases))
    return found


def _gpu_key(name: str) -> str:
    """What is left of a name without vendor, punctuation and "GB" after a size."""
    text = re.sub(r"(?<=\d)[\s_-]*gi?b\b", "", name.casefold())
    return _squash(_GPU_NOISE.sub(" ", text).replace("mobile", "laptop"))


@functools.cache
def _gpu_spellings() -> Mapping[str, tuple[str, int | None]]:
    """Key of every accepted spelling -> entry, and the memory named where it is the host's.

    A name, alias or device name goes before a derived spelling (the brand left out, the memory size
    added); a spelling that would stand for two entries stands for none.
    """
    stated: dict[str, tuple[str, int | None]] = {}
    derived: defaultdict[str, set[tuple[str, int | None]]] = defaultdict(set)
    shared = {key for key, names in _device_names().items() if len(names) > 1}
    for name, entry in _gpu_entries().items():
        keys = {_gpu_key(spelling) for spelling in (name, *entry["aliases"])}
        keys |= {_gpu_key(spelling) for spelling in entry["device_names"]} - shared
        stated |= dict.fromkeys(keys, (name, None))
        for key in keys | {_BRAND.sub("", key) for key in keys}:
            derived[key].add((name, None))
            for size_gib, unified_bytes in _memory_sizes(entry["memory"]):
                derived[f"{key}{size_gib}"].add((name, unified_bytes))
    clear = {key: next(iter(found)) for key, found in derived.items() if len(found) == 1}
    return clear | stated


def _memory_sizes(memory: Mapping[str, Any]) -> Iterable[tuple[int, int | None]]:
    if "options_gib" in memory:
        return [(gib, gib * GIB) for gib in memory["options_gib"]]
    return [(memory["marketed_bytes"] // GIB, None)]


@functools.cache
def _device_names() -> Mapping[str, tuple[str, ...]]:
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name, entry in _gpu_entries().items():
        for key in {_gpu_key(device_name) for device_name in entry["device_names"]}:
            found[key].append(name)
    return {key: tuple(names) for key, names in found.items()}


def _gpu(name: str, unified_bytes: int | None = None) -> Gpu:
    """The entry as a value; *unified_bytes* is the host's memory, for a GPU that shares it."""
    entry = _gpu_entries()[name]
    memory, link = entry["memory"], entry.get("host_link", {})
    total_bytes = memory["total_bytes"]
    if entry.get("unified_memory"):
        total_bytes = _unified_share_bytes(entry, unified_bytes or memory["marketed_bytes"])
    capability = entry.get("compute_capability")
    figures: dict[str, Any] = {
        "total_bytes": total_bytes,
        "flops_per_s": entry["flops_per_s"],
        "memory_bytes_per_s": float(entry["memory_bytes_per_s"]),
        "half_rate_accumulate": entry["half_rate_accumulate"],
        "tdp_w": float(entry["tdp_w"]),
    }
    optional = {
        "compute_capability": (capability[0], capability[1]) if capability else None,
        "l2_bytes": entry.get("l2_bytes"),
        "num_sms": entry.get("num_sms"),
        "clock_hz": float(entry["clock_hz"]) if "clock_hz" in entry else None,
        "pcie_generation": link.get("generation"),
        "pcie_lanes": link.get("lanes"),
        "h2d_pinned_bytes_per_s": _chip_link_bytes_per_s(link),
        "d2h_pinned_bytes_per_s": _chip_link_bytes_per_s(link),
    }
    figures |= {field: value for field, value in optional.items() if value is not None}
    return Gpu(
        name=name,
        architecture=entry["architecture"],
        free_bytes=total_bytes,
        unified_memory=bool(entry.get("unified_memory")),
        server=entry["form"] == "server",
        provenance=dict.fromkeys(figures, "catalogue"),
        sources=(entry["source"], f"confidence: {entry['confidence']}"),
        **figures,
    )


def _unified_share_bytes(entry: Mapping[str, Any], host_bytes: int) -> int:
    if entry["vendor"] == "Apple":
        share = next(s for limit, s in METAL_SHARES if limit is None or host_bytes <= limit)
    else:
        share = INTEGRATED_SHARE
    return int(host_bytes * share)


def _chip_link_bytes_per_s(link: Mapping[str, Any]) -> float | None:
    """What a host link other than PCIe (NVLink-C2C) brings from pinned memory, else None."""
    return None if link.get("kind", "pcie") == "pcie" else PINNED_SHARE * float(link["bytes_per_s"])


def reference_machine(
    gpus: Sequence[str], *, ram_bytes: int | None = None, pcie: tuple[int, int] | None = None
) -> Machine:
    """Return a machine with these catalogue GPUs and nothing else running on it.

    *pcie* is generation and lanes of the slots: a card uses the smaller of its own and its slot's.
    Without *ram_bytes* the host has 64 GiB, or the memory that an integrated GPU shares with it. A
    link between GPUs is assumed where the part is sold with one to all its neighbours (SXM boards);
    cards that need a bridge get none.

    >>> machine = reference_machine(["rtx-4060"], ram_bytes=32 * GIB, pcie=(3, 16))
    >>> machine.gpus[0].pcie_generation, machine.gpus[0].pcie_lanes
    (3, 8)

    Raises:
        InvalidRequest: if no GPU is named, or a slot is stated for a GPU that has no PCIe link.
        UnknownName: if a GPU is not in the catalogue.
    """
    if not gpus:
        raise InvalidRequest("No GPU was named: write at least one, for example rtx-4060.")
    resolved = [_resolve_gpu(name) for name in gpus]
    found = []
    for index, (name, unified_bytes) in enumerate(resolved):
        gpu = replace(_gpu(name, ram_bytes or unified_bytes), index=index)
        found.append(_with_nominal_rates(_in_slot(gpu, pcie) if pcie else gpu))
    host, notes = _host(resolved, ram_bytes, is_server=all(gpu.server for gpu in found))
    return Machine(gpus=tuple(found), host=host, links=_links(found), notes=notes)


def _in_slot(gpu: Gpu, pcie: tuple[int, int]) -> Gpu:
    generation, lanes = pcie
    pcie_bytes_per_s(generation, lanes)  # refuses a link that does not exist
    if gpu.pcie_generation is None or gpu.pcie_lanes is None:
        raise InvalidRequest(
            f"The {gpu.name} is not attached through PCIe, so its slot cannot be PCIe {generation}"
            f" x{lanes}: leave --pcie out."
        )
    return replace(
        gpu,
        pcie_generation=min(generation, gpu.pcie_generation),
        pcie_lanes=min(lanes, gpu.pcie_lanes),
        provenance={**gpu.provenance, "pcie_generation": "assumed", "pcie_lanes": "assumed"},
    )


def _with_nominal_rates(gpu: Gpu) -> Gpu:
    rates = link_rates(gpu)
    assumed: dict[str, Provenance] = dict.fromkeys(
        (
            "h2d_pinned_bytes_per_s",
            "d2h_pinned_bytes_per_s",
            "h2d_pageable_bytes_per_s",
            "d2h_pageable_bytes_per_s",
        ),
        "assumed",
    )
    return replace(
        gpu,
        h2d_pinned_bytes_per_s=rates.h2d_pinned_bytes_per_s,
        d2h_pinned_bytes_per_s=rates.h2d_pinned_bytes_per_s,
        h2d_pageable_bytes_per_s=rates.h2d_pageable_bytes_per_s,
        d2h_pageable_bytes_per_s=rates.d2h_pageable_bytes_per_s,
        provenance={**assumed, **gpu.provenance},
    )


def _host(
    resolved: Sequence[tuple[str, int | None]], ram_bytes: int | None, *, is_server: bool
) -> tuple[Host, tuple[str, ...]]:
    """The host, and what was assumed about it."""
    notes: tuple[str, ...] = ()
    shared_bytes = [
        named or _gpu_entries()[name]["memory"]["marketed_bytes"]
        for name, named in resolved
        if _gpu_entries()[name].get("unified_memory")
    ]
    total_bytes = ram_bytes or max(shared_bytes, default=DEFAULT_RAM_BYTES)
    if ram_bytes is None:
        notes = (f"Host RAM was not stated: {format_bytes(total_bytes)} is assumed.",)
    available_bytes = total_bytes - min(SYSTEM_RAM_BYTES, total_bytes // 4)
    host = Host(
        total_bytes=total_bytes,
        available_bytes=available_bytes,
        # Data-centre parts run under Linux, which has no bound of its own.
        pinnable_bytes=available_bytes if is_server else int(total_bytes * PINNABLE_SHARE),
        num_cores=DEFAULT_NUM_CORES,
        provenance=dict.fromkeys(
            ("total_bytes", "available_bytes", "pinnable_bytes", "num_cores", "disk_bytes_per_s"),
            "assumed",
        ),
    )
    return host, notes


def _links(gpus: Sequence[Gpu]) -> tuple[Link, ...]:
    return tuple(
        Link(
            first=first.index,
            second=second.index,
            bytes_per_s=float(nvlink["bytes_per_s_per_direction"]),
            kind="nvlink",
        )
        for first in gpus
        for second in gpus[first.index + 1 :]
        if first.name == second.name
        and (nvlink := _gpu_entries()[first.name].get("nvlink"))
        and nvlink["switched"]
    )


def catalog_json() -> dict[str, list[dict[str, Any]]]:
    """Return every name with what helps to choose: class, task, size, memory, architecture."""
    return {
        "pipelines": [_pipeline_summary(_read_pipeline(name)) for name in pipeline_names()],
        "gpus": [_gpu_summary(find_gpu(name)) for name in gpu_names()],
    }


def _pipeline_summary(entry: Mapping[str, Any]) -> dict[str, Any]:
    components = entry["components"].values()
    return {
        "name": entry["name"],
        "aliases": entry["aliases"],
        "pipeline_class": entry["pipeline_class"],
        "task": entry["task"],
        "num_parameters": sum(component["parameters"] for component in components),
    }


def _gpu_summary(gpu: Gpu) -> dict[str, Any]:
    entry = _gpu_entries()[gpu.name]
    return {
        "name": gpu.name,
        "aliases": entry["aliases"],
        "vendor": entry["vendor"],
        "architecture": gpu.architecture,
        "total_bytes": gpu.total_bytes,
        "confidence": entry["confidence"],
    }
