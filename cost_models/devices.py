"""Where the parts of a component lie that is split over GPUs, and what travels between GPUs."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from pipefit.cost_models.machine import Gpu, Link
from pipefit.cost_models.placement import Split
from pipefit.cost_models.residency import ByIdentity, children_of
from pipefit.cost_models.transfers import link_rates
from pipefit.cost_models.workload import Component, Workload

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


def split_bytes(component: Component, split: Split, device: int) -> tuple[int, ...]:
    """Return the bytes of the tensors of *component* that lie on *device*."""
    return _split_bytes(ByIdentity(component), split).get(device, ())


@functools.lru_cache(maxsize=NUM_REMEMBERED)
def _split_bytes(of: ByIdentity, split: Split) -> dict[int, tuple[int, ...]]:
    places = dict(_places(of, split))
    found: dict[int, list[int]] = {}
    for tensor in of.component.tensors:
        if tensor.tied_to is None:
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
    """Yield (path, routine) of the calls of *blocks* that a call of *routine* makes, in order."""
    for event in workload.routines[routine].events:
        if event[0] != "c" or event[2].startswith("/"):
            continue
        below = ".".join(part for part in (path, event[2]) if part)
        if below in blocks and event[2]:
            yield below, event[1]
        else:
            yield from block_calls(workload, event[1], blocks, below)


def between_bytes_per_s(first: Gpu, second: Gpu, links: Sequence[Link]) -> float:
    """Return how fast tensors go from one GPU to another: by their link, else through the host,
    one half after the other."""
    for link in links:
        if {link.first, link.second} == {first.index, second.index}:
            return link.bytes_per_s
    rates = (link_rates(first).h2d_pinned_bytes_per_s, link_rates(second).h2d_pinned_bytes_per_s)
    return 1 / sum(1 / rate for rate in rates) if min(rates) > 0 else 0.0
