"""Where the parts of a component lie that is split over GPUs, and what travels between GPUs."""

from __future__ import annotations

import functools
from collections.abc import Container, Iterator, Mapping, Sequence

from pipefit.cost_models.allocator import block_bytes
from pipefit.cost_models.blocks import Block, Blocks, blocks_of, modules_above
from pipefit.cost_models.machine import Gpu, Link
from pipefit.cost_models.placement import Split, Streaming
from pipefit.cost_models.residency import ByIdentity, children_of
from pipefit.cost_models.timeline import Timeline
from pipefit.cost_models.transfers import COPY_LATENCY_S, link_rates
from pipefit.cost_models.workload import Component, Event, Workload, returned_bytes

NO_SPLIT_MODULES = "no_split_modules"
"""Trait: class names of the modules that must lie on one GPU; what is between may be divided."""

NUM_REMEMBERED = 64
"""Splits whose places are kept; our choice, above what one search offers for a component."""


def blocks_of_split(component: Component) -> tuple[str, ...]:
    """Return the blocks between which *component* may be divided, in the order of the tree.

    Its class names them; none where they do not stand in a row. Those of a UNet do not: what one
    returns is added to what another does, on whichever GPU either is.
    """
    return _blocks(ByIdentity(component))


@functools.lru_cache(maxsize=NUM_REMEMBERED)
def _blocks(of: ByIdentity) -> tuple[str, ...]:
    component = of.component
    whole = set(component.traits.get(NO_SPLIT_MODULES, ()))
    found: list[str] = []
    for module in component.modules:
        is_below = bool(found) and module.path.startswith(f"{found[-1]}.")
        if module.class_name in whole and module.path and not is_below:
            found.append(module.path)
    rows = {path.rpartition(".")[0].rpartition(".")[0] for path in found}
    is_autoencoder = component.traits.get("is_autoencoder")
    return () if is_autoencoder or len(rows) > 1 else tuple(found)


def places_of(component: Component, split: Split) -> dict[str, int]:
    """Return path -> GPU such that every tensor of *component* lies at or below just one path.

    Blocks go to the GPUs in order, everything else to the first.
    """
    return dict(_places(ByIdentity(component), split))


@functools.lru_cache(maxsize=NUM_REMEMBERED)
def _places(of: ByIdentity, split: Split) -> tuple[tuple[str, int], ...]:
    if split.places:
        return split.places
    component = of.component
    order = [index for index, count in split.blocks for _ in range(count)]
    places = dict(zip(blocks_of_split(component), order, strict=True))
    children = children_of(component)
    first = split.blocks[0][0]
    owned = {tensor.path.rpartition(".")[0] for tensor in component.tensors}

    def rest(path: str) -> Iterator[str]:
        """Yield the largest modules below *path* that hold no block, and its own tensors."""
        yield from (t.path for t in component.tensors if t.path.rpartition(".")[0] == path)
        for child in children.get(path, ()):
            if child in places:
                continue
            if any(block.startswith(f"{child}.") for block in places):
                yield from rest(child)
            elif any(owner == child or owner.startswith(f"{child}.") for owner in owned):
                yield child

    found = dict.fromkeys(rest(""), first)
    return (*found.items(), *places.items())


def streamed_parts(component: Component, split: Split) -> Mapping[int, tuple[Blocks, Streaming]]:
    """Return, for each GPU that streams some of its part of *component*, how that is cut.

    As for one GPU, but that what lies on several is no block, and neither is what has a tensor that
    is tied: accelerate goes by the addresses of those, and blocks take turns at an address.
    """
    return _streamed_parts(ByIdentity(component), split)


@functools.lru_cache(maxsize=NUM_REMEMBERED)
def _streamed_parts(of: ByIdentity, split: Split) -> Mapping[int, tuple[Blocks, Streaming]]:
    if not split.resident_blocks:
        return {}
    component, places = of.component, dict(_places(of, split))
    tied = {tensor.tied_to for tensor in component.tensors if tensor.tied_to is not None}
    own: dict[int, list[Block]] = {}
    for block in blocks_of(component, split.max_block_bytes).blocks:
        if _is_within(block.path, places.keys()) and not tied & {t.path for t in block.tensors}:
            own.setdefault(place_of(places, block.path), []).append(block)
    return {
        device: (
            Blocks(blocks=tuple(own.get(device, ())), rest=(), buffers=()),
            Streaming(resident_blocks=count, max_block_bytes=split.max_block_bytes),
        )
        for device, count in split.resident_blocks
    }


def split_host_bytes(component: Component, split: Split) -> int:
    """Return what waits on the host, packed, because no GPU of *split* holds it."""
    return sum(
        cut.blocks[i].num_bytes
        for cut, how in streamed_parts(component, split).values()
        for i in cut.streamed(how.resident_blocks)
    )


def split_parts(
    workload: Workload, component: Component, split: Split, routine: int
) -> Iterator[tuple[int, int | None, Event]]:
    """Cut one call of a split *component*: yield where each part computes, which of the streamed
    blocks of that GPU it is (None: nothing is waited for), and its event."""
    places = dict(_places(ByIdentity(component), split))
    number = {
        cut.blocks[i].path: i
        for cut, how in streamed_parts(component, split).values()
        for i in cut.streamed(how.resident_blocks)
    }
    above = {prefix for path in (*number, *places) for prefix in modules_above(path)}

    def walk(index: int, path: str) -> Iterator[tuple[int, int | None, Event]]:
        for event in workload.routines[index].events:
            if event[0] == "k":
                yield place_of(places, path), None, event
            elif event[0] == "c":
                below = ".".join(filter(None, (path, event[2])))
                if event[2].startswith("/"):
                    yield place_of(places, path), None, event
                elif below in number and event[2]:
                    yield place_of(places, below), number[below], event
                elif below in above:
                    yield from walk(event[1], below)
                else:
                    yield place_of(places, below), None, event

    yield from walk(routine, "")


def split_bytes(component: Component, split: Split, device: int) -> tuple[int, ...]:
    """Return the bytes of what *component* keeps on *device*: its slots, if any, and tensors."""
    return _split_bytes(ByIdentity(component), split).get(device, ())


@functools.lru_cache(maxsize=NUM_REMEMBERED)
def _split_bytes(of: ByIdentity, split: Split) -> dict[int, tuple[int, ...]]:
    places = dict(_places(of, split))
    found: dict[int, list[int]] = {}
    away: set[str] = set()
    for device, (cut, how) in _streamed_parts(of, split).items():
        found[device] = [cut.slot_bytes(how.resident_blocks)] * how.num_slots
        streamed = (cut.blocks[i] for i in cut.streamed(how.resident_blocks))
        away |= {tensor.path for block in streamed for tensor in block.tensors}
    for tensor in of.component.tensors:
        if tensor.tied_to is None and tensor.path not in away:
            found.setdefault(place_of(places, tensor.path), []).append(tensor.num_bytes)
    return {device: tuple(sizes) for device, sizes in found.items()}


def place_of(places: dict[str, int], path: str) -> int:
    """Return the GPU of what lies at *path*, by the nearest of *places* at or above it.

    What is above all of them computes on the first one's GPU.
    """
    while path:
        if path in places:
            return places[path]
        path = path.rpartition(".")[0]
    return next(iter(places.values()))


def block_calls(
    workload: Workload, routine: int, blocks: frozenset[str], path: str = ""
) -> Iterator[tuple[str, int]]:
    """Yield (path, routine) of the calls at or below *blocks* that a call of *routine* makes.

    In order; of nested calls the outermost, because a list of blocks is not called itself.
    """
    for event in workload.routines[routine].events:
        if event[0] != "c" or event[2].startswith("/"):
            continue
        below = ".".join(part for part in (path, event[2]) if part)
        if event[2] and _is_within(below, blocks):
            yield below, event[1]
        else:
            yield from block_calls(workload, event[1], blocks, below)


def _is_within(path: str, places: Container[str]) -> bool:
    while path and path not in places:
        path = path.rpartition(".")[0]
    return bool(path)


def between_seconds(first: Gpu, second: Gpu, links: Sequence[Link], num_bytes: int) -> float:
    """Return how long a copy takes from one GPU to another: by their link, or through the host, one
    half after the other."""
    for link in links:
        if {link.first, link.second} == {first.index, second.index}:
            return num_bytes / link.bytes_per_s + COPY_LATENCY_S
    halves = (num_bytes / link_rates(gpu).h2d_pinned_bytes_per_s for gpu in (first, second))
    return sum(halves) + COPY_LATENCY_S


def part_peak_bytes(
    timeline: Timeline, component: Component, split: Split, device: int, routine: int
) -> int:
    """Return the most that activations and workspace of one call of *component* take on *device*.

    As the replay has it: what is given to a block elsewhere travels there, and what the part before
    returned travels only where that was elsewhere, too.
    """
    workload, places = timeline.workload, dict(_places(ByIdentity(component), split))
    before = (True, 0)

    def walk(index: int, path: str) -> tuple[int, tuple[int, ...]]:
        nonlocal before
        here = place_of(places, path) == device
        sizes: dict[int, int] = {}
        live = highest = 0
        for event in workload.routines[index].events:
            kind, peak = event[0], 0
            if kind == "a":
                sizes[event[1]] = block_bytes(event[2]) if here else 0
                live += sizes[event[1]]
            elif kind == "f":
                live -= sizes.pop(event[1])
            elif kind == "k":
                peak = timeline.scratch_bytes[event[1]] if here else 0
            elif kind == "c":
                _, callee, relative, returned, freed = event
                below = ".".join(part for part in (path, relative) if part)
                begin = f"{below}." if below else ""
                if below not in places and any(place.startswith(begin) for place in places):
                    peak, left = walk(callee, below)
                else:
                    was_here, moved_bytes = before
                    left = timeline.returned(callee)
                    is_there = place_of(places, below) == device
                    before = is_there, sum(left)
                    if is_there:
                        given = workload.input_bytes.get(callee, 0)
                        peak = 0 if was_here else moved_bytes
                        peak += 0 if here else max(0, given - moved_bytes)
                        outside = (0,) * workload.routines[callee].num_outside
                        peak += timeline.outcome(callee, outside).peak.peak_bytes
                    else:
                        left = (0,) * len(left)
                sizes.update(zip(returned, left, strict=True))
                peak = max(peak, sum(left))
                highest = max(highest, live + peak)
                live += sum(left) - sum(sizes.pop(n, 0) for n in freed if n >= 0)
                continue
            highest = max(highest, live + peak)
        return highest, tuple(sizes.get(n, 0) for n in workload.routines[index].returns)

    return walk(routine, "")[0]


def travelled_bytes(
    workload: Workload, component: Component, split: Split, routine: int
) -> dict[tuple[int, int], int]:
    """Return (from GPU, to GPU) -> bytes that one call of a split *component* copies."""
    places = dict(_places(ByIdentity(component), split))
    first = next(iter(places.values()))
    crossed: dict[tuple[int, int], int] = {}
    before, moved_bytes = first, 0
    for path, callee in block_calls(workload, routine, frozenset(places)):
        place = place_of(places, path)
        given = max(0, workload.input_bytes.get(callee, 0) - moved_bytes)
        for source, num_bytes in ((before, moved_bytes), (first, given)):
            if source != place and num_bytes:
                key = source, place
                crossed[key] = crossed.get(key, 0) + num_bytes
        before, moved_bytes = place, sum(returned_bytes(workload, callee))
    if before != first:
        crossed[before, first] = crossed.get((before, first), 0) + moved_bytes
    return crossed
