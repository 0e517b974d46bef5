"""RAM of the process: what the weights take while it loads, gets ready and runs.

resident set = process + anonymous copies + pinned copies + pages of the files being read

Weights in safetensors files are mapped, not read: loaded in the dtype that is stored, a component
takes nothing until something reads it, and then pages of its file, which stay until the last tensor
of that file is replaced. What makes RAM of its own is a cast while loading, a round trip to the GPU
(``.to("cpu")`` allocates anew) and pinning. Weights that group offloading puts on disk take none,
but what a cast had made may stay with the process. Easily overlooked: pages of a file count in the
resident set, but the kernel takes them back before it runs out; so :func:`host_bytes`, which a RAM
budget is compared with, leaves them out, and :func:`host_peak`, which a monitor would show, counts
them. Pictures and videos handed over at the end are not counted.

Sources: ``load_model_dict_into_meta`` and ``_load_shard_file`` in diffusers 0.42.1,
``hooks/group_offloading.py`` there, ``core_model_loading.py`` in transformers 5.23, safetensors
0.8, ``ATen/core/CachingHostAllocator.h`` of torch 2.13; the loading rules were measured with them
(``RssAnon`` and ``RssFile`` of a process: tests/cost_models/test_host_memory.py). Pinned memory is
in the resident set, as shared: https://github.com/MakazhanAlpamys/Soup/issues/655.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from pipefit.cost_models.devices import split_host_bytes
from pipefit.cost_models.placement import (
    GroupOffload,
    ModelOffload,
    OnHost,
    Placement,
    Resident,
    SequentialOffload,
    Split,
    Streaming,
)
from pipefit.cost_models.residency import load_order, offload_groups
from pipefit.cost_models.streaming import streamed_bytes
from pipefit.cost_models.units import GIB, MIB
from pipefit.cost_models.workload import Component

LOADING_PROCESS_BYTES = 1 * GIB
"""Python, torch, diffusers and transformers with CUDA begun but hardly a kernel loaded.

Two runs of Z-Image-Turbo on an RTX 5090 whose peak falls into loading leave 0.91 and 0.96 GiB
beside the largest file (10.20 and 10.25 less 9.29;
https://github.com/asomoza/diffusers-recipes, models/z-image/benchmark_results.csv at 46df7a9).
"""

PROCESS_BYTES = 2 * GIB
"""The same once a pipeline has run: cuDNN, cuBLAS and kernels are loaded when first used.

FLUX.1-dev resident: 1.84 (https://github.com/huggingface/diffusers/pull/11682); LTX-2.3 with all
weights mapped: 2.30 to 2.43 without the libraries' own files
(https://github.com/asomoza/diffusers-recipes, models/ltx2_3/scripts at cb6ed50c). Chosen between.
"""

FILE_BYTES: Mapping[str, int] = {"diffusers": 10 * 10**9}
"""Largest weight file by library: default ``max_shard_size`` of ``ModelMixin.save_pretrained``."""

OTHER_FILE_BYTES = 5 * 10**9
"""The same for transformers up to version 4, which saved nearly all published text encoders."""

MAPPED_ALLOCATION_BYTES = 32 * MIB
"""From this size on glibc always maps an allocation of its own, which goes back when it is freed.

``DEFAULT_MMAP_THRESHOLD_MAX`` on 64 bits (https://man7.org/linux/man-pages/man3/mallopt.3.html).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostBytes:
    """RAM that the kernel cannot take back."""

    pageable_bytes: int = 0
    pinned_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPeak:
    """Largest resident set of the process, with what it shares and with pages of files."""

    load_bytes: int
    """Until the pipeline is ready: reading, casting, moving to the GPU, pinning."""
    call_bytes: int
    """From the first call on."""
    pinned_bytes: int
    disk_bytes: int
    """Files that group offloading writes once and reads for every forward."""

    @property
    def peak_bytes(self) -> int:
        """The larger of the two."""
        return max(self.load_bytes, self.call_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The files that a component is read from."""

    file_bytes: tuple[int, ...]
    is_read_whole: bool = False
    """Not mapped: pickles that are no zip files, as torch before 1.6 wrote them."""
    is_cast: bool = True
    """While it is read, to another dtype than is stored."""

    def gains_from(self, most_bytes: int, library: str) -> bool:
        """Whether safetensors shards of *most_bytes* would take less RAM while they are read."""
        is_large = max(self.file_bytes, default=0) > most_bytes
        return self.is_read_whole or (self.is_cast and is_large and library == "diffusers")

    def in_shards(self, most_bytes: int) -> Checkpoint:
        """Return it as safetensors files of *most_bytes*."""
        shards = (shard for file in self.file_bytes for shard in _cut(file, most_bytes))
        return Checkpoint(file_bytes=tuple(shards), is_cast=self.is_cast)


def host_bytes(component: Component, placement: Placement) -> HostBytes:
    """Return the RAM that the weights of *component* take while it is away from the GPU."""
    if isinstance(placement, Resident):
        return HostBytes()
    if isinstance(placement, Split):
        return HostBytes(pinned_bytes=split_host_bytes(component, placement))
    if isinstance(placement, Streaming):
        packed_bytes = streamed_bytes(component, placement).host
        return HostBytes(
            pageable_bytes=packed_bytes if placement.host_memory == "pageable" else 0,
            pinned_bytes=packed_bytes if placement.host_memory == "pinned" else 0,
        )
    pageable_bytes = 0 if _is_on_disk(placement) else component.weight_bytes
    if isinstance(placement, ModelOffload | SequentialOffload | OnHost):
        return HostBytes(pageable_bytes=pageable_bytes)
    if not placement.is_pinned_ahead:
        staged_bytes = _kept_bytes(_staging_blocks(component, placement))
        pageable_bytes += offload_groups(component, placement).replaced_bytes
        return HostBytes(pageable_bytes=pageable_bytes, pinned_bytes=staged_bytes)
    return HostBytes(
        pageable_bytes=offload_groups(component, placement).unmatched_bytes,
        pinned_bytes=sum(map(pinned_bytes, _pinned_tensors(component, placement))),
    )


def pinned_bytes(num_bytes: int) -> int:
    """Return the block that torch's pinned allocator takes for one tensor: a power of two.

    By default, that is with ``pinned_max_round_threshold_mb`` unset.

    >>> pinned_bytes(0), pinned_bytes(1024), pinned_bytes(1025)
    (0, 1024, 2048)
    """
    return 1 << (num_bytes - 1).bit_length() if num_bytes else 0


def host_peak(
    components: Sequence[Component],
    placements: Mapping[str, Placement],
    called: Collection[str],
    *,
    stored_bytes: Mapping[str, int] | None = None,
    checkpoints: Mapping[str, Checkpoint] | None = None,
    rewriting_bytes: int = 0,
    activation_bytes: int = 0,
) -> HostPeak:
    """Return the largest resident set while *components* are loaded, placed and called.

    *components* are in the pipeline's order; those without a placement stay where they were loaded.
    *called* names, in order, those that a call enters. *stored_bytes* is what lies on disk for
    components that are cast while they are loaded, as float32 files to bfloat16; *checkpoints* what
    is known of their files. *rewriting_bytes* is the most that rewriting files takes before any is
    loaded. *activation_bytes* is the most that a call takes which the CPU computes.
    """
    read = {
        c.name: Checkpoint(file_bytes=tuple(_files(c, stored_bytes[c.name])))
        for c in components
        if stored_bytes and c.name in stored_bytes
    }
    read |= checkpoints or {}
    stored = {n for n, one in read.items() if one.is_cast or one.is_read_whole}
    held: dict[str, int] = {}
    load_bytes, call_bytes = rewriting_bytes, 0

    for component in components:
        others_bytes = sum(held.values())
        held[component.name] = component.weight_bytes if component.name in stored else 0
        if component.name in stored:
            peak_bytes = _reading_bytes(component, read[component.name])
            load_bytes = max(load_bytes, others_bytes + peak_bytes)
    for component in components:
        placement = placements.get(component.name)
        if placement is None:
            continue
        is_mapped = component.name not in stored
        others_bytes = sum(held.values()) - held[component.name]
        peak_bytes, held[component.name] = _placed(component, placement, is_mapped=is_mapped)
        load_bytes = max(load_bytes, others_bytes + peak_bytes)

    pinned: dict[str, int] = {}
    staging: Counter[int] = Counter()
    for component in components:
        placement = placements.get(component.name)
        if isinstance(placement, Streaming | Split):
            pinned[component.name] = host_bytes(component, placement).pinned_bytes
        if isinstance(placement, GroupOffload):
            if placement.is_pinned_ahead:
                pinned[component.name] = host_bytes(component, placement).pinned_bytes
            elif component.name in called:
                staging |= _staging_blocks(component, placement)

    for component in sorted(
        (c for c in components if c.name in called),
        key=lambda component: list(called).index(component.name),
    ):
        placement = placements.get(component.name)
        if placement is None or isinstance(placement, Resident | Split):
            continue
        if isinstance(placement, Streaming):
            continue  # it stays as it was placed
        if _is_on_disk(placement):
            # One group's file is mapped while it is read.
            groups = offload_groups(component, placement).all
            file_bytes = max((group.num_bytes for group in groups), default=0)
            call_bytes = max(call_bytes, sum(held.values()) + file_bytes)
            continue
        others_bytes = sum(held.values()) - held[component.name]
        is_mapped = component.name not in stored
        resting = host_bytes(component, placement)
        held[component.name] = resting.pageable_bytes + pinned.get(component.name, 0)
        peak_bytes = held[component.name]
        if is_mapped and isinstance(placement, GroupOffload) and not placement.use_stream:
            peak_bytes = _replaced_bytes(_files(component, component.weight_bytes))
        call_bytes = max(call_bytes, others_bytes + peak_bytes)
    call_bytes = max(call_bytes, sum(held.values()) + activation_bytes)
    return HostPeak(
        load_bytes=LOADING_PROCESS_BYTES + load_bytes,
        call_bytes=PROCESS_BYTES + call_bytes + _kept_bytes(staging),
        pinned_bytes=sum(pinned.values()) + _kept_bytes(staging),
        disk_bytes=sum(
            _disk_bytes(component, placements.get(component.name)) for component in components
        ),
    )


def _disk_bytes(component: Component, placement: Placement | None) -> int:
    if isinstance(placement, Streaming) and placement.host_memory == "disk":
        return streamed_bytes(component, placement).host
    return component.weight_bytes if _is_on_disk(placement) else 0


def _is_on_disk(placement: Placement | None) -> TypeGuard[GroupOffload]:
    return isinstance(placement, GroupOffload) and placement.offload_to_disk_path is not None


def _placed(component: Component, placement: Placement, *, is_mapped: bool) -> tuple[int, int]:
    """Return the most that *component* takes while it is placed, and what it takes then."""
    weight_bytes = component.weight_bytes
    before_bytes = 0 if is_mapped else weight_bytes
    if isinstance(placement, Resident | Split) or _is_on_disk(placement):
        # Each file's pages go with its last tensor.
        pages_bytes = max(_files(component, weight_bytes), default=0)
        kept_bytes = 0
        if isinstance(placement, Split):
            kept_bytes = host_bytes(component, placement).pinned_bytes
            pages_bytes += kept_bytes
        if _is_on_disk(placement) and not is_mapped:
            # Placeholders of the same size come instead (ModuleGroup._offload_to_disk). Nobody
            # writes to them, but small ones are cut from the heap that the weights have left.
            kept_bytes = sum(n for n in load_order(component) if n < MAPPED_ALLOCATION_BYTES)
        return (pages_bytes if is_mapped else weight_bytes), kept_bytes
    if isinstance(placement, Streaming):
        # Block after block is packed, and what it was loaded as goes, with its file's last tensor.
        held = host_bytes(component, placement)
        kept_bytes = held.pageable_bytes + held.pinned_bytes
        source_bytes = max(_files(component, weight_bytes), default=0) if is_mapped else 0
        return max(weight_bytes, kept_bytes) + source_bytes, kept_bytes
    if not isinstance(placement, GroupOffload) or not placement.is_pinned_ahead:
        return before_bytes, before_bytes
    # What no group streams is neither read nor copied yet.
    groups = offload_groups(component, placement)
    copied_bytes = sum(map(pinned_bytes, _pinned_tensors(component, placement)))
    rest_bytes = 0 if is_mapped else groups.unmatched_bytes
    # Blocks are all pinned before the first gives up what it was loaded as; leaves one by one, but
    # norms come last, and while they are there, so are all pages of their file.
    all_at_once = is_mapped or placement.offload_type == "block_level"
    source_bytes = weight_bytes - groups.unmatched_bytes if all_at_once else 0
    return max(before_bytes, copied_bytes + source_bytes + rest_bytes), copied_bytes + rest_bytes


def unmapped_bytes(components: Sequence[Component], checkpoints: Mapping[str, Checkpoint]) -> int:
    """Return the most that loading takes and the kernel cannot take back, pages of files aside."""
    peak_bytes = held_bytes = 0
    for component in components:
        checkpoint = checkpoints.get(component.name)
        if checkpoint is None or not (checkpoint.is_cast or checkpoint.is_read_whole):
            continue
        reading_bytes = component.weight_bytes
        if checkpoint.is_read_whole:
            reading_bytes = _reading_bytes(component, checkpoint)
        peak_bytes = max(peak_bytes, held_bytes + reading_bytes)
        held_bytes += component.weight_bytes
    return peak_bytes


def _reading_bytes(component: Component, checkpoint: Checkpoint) -> int:
    """Return the most that reading takes: copies so far, and the files behind them.

    diffusers opens one file after the other; transformers opens all and closes them at the end.
    What is read whole and not cast is the copy itself.
    """
    stored_bytes = sum(checkpoint.file_bytes)
    if not checkpoint.is_cast:
        return stored_bytes
    if component.library != "diffusers":
        return component.weight_bytes + stored_bytes
    peak_bytes = done_bytes = 0
    for file_bytes in checkpoint.file_bytes:
        done_bytes += file_bytes
        copied_bytes = component.weight_bytes * done_bytes // stored_bytes
        peak_bytes = max(peak_bytes, copied_bytes + file_bytes)
    return peak_bytes


def _files(component: Component, num_bytes: int) -> list[int]:
    """Return the sizes of the files that *num_bytes* of *component* are cut into when saved."""
    return _cut(num_bytes, FILE_BYTES.get(component.library, OTHER_FILE_BYTES))


def _cut(num_bytes: int, largest_bytes: int) -> list[int]:
    whole, rest_bytes = divmod(num_bytes, largest_bytes)
    return [largest_bytes] * whole + ([rest_bytes] if rest_bytes else [])


def _replaced_bytes(files: Sequence[int]) -> int:
    """Return the most that copies and pages take while copies replace mapped tensors in order."""
    peak_bytes = done_bytes = 0
    for file_bytes in files:
        done_bytes += file_bytes
        peak_bytes = max(peak_bytes, done_bytes + file_bytes)
    return peak_bytes


def _pinned_tensors(component: Component, placement: GroupOffload) -> list[int]:
    """Return the bytes of each tensor that is pinned before the first call.

    A leaf gives up what it was loaded as when it is pinned, so that a later leaf with the same,
    tied tensor finds it pinned; blocks are all pinned first, each with its own copy
    (``ModuleGroup._init_cpu_param_dict`` in hooks/group_offloading.py, diffusers 0.42.1).
    """
    if placement.offload_type == "leaf_level":
        return list(load_order(component))
    groups = offload_groups(component, placement).groups
    return [num_bytes for group in groups for num_bytes in group.tensor_bytes]


def _staging_blocks(component: Component, placement: GroupOffload) -> Counter[int]:
    """Return the pinned blocks that bringing weights in leaves in torch's cache, by size.

    A freed block is kept for the next request of its size; none is given back. Streamed groups are
    pinned whole, those read from disk as well where the link is slower than the reading. Other
    files go to the GPU tensor by tensor through page-locked memory (``get_tensor_pinned_cuda`` in
    bindings/python/src/lib.rs, safetensors 0.8; https://github.com/safetensors/safetensors/pull/760;
    not before).
    """
    groups = offload_groups(component, placement)
    blocks: Counter[int] = Counter()
    for group in groups.all:
        if group.is_streamed:
            blocks |= Counter(map(pinned_bytes, group.tensor_bytes))
        elif _is_on_disk(placement):
            blocks |= Counter(set(map(pinned_bytes, group.tensor_bytes)))
    return blocks


def _kept_bytes(blocks: Mapping[int, int]) -> int:
    return sum(num_bytes * count for num_bytes, count in blocks.items())
