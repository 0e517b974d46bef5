"""How a component is cut into blocks that can be streamed one by one, and which of them stay.

The cut depends on the module tree and its sizes alone, so that a plan made without weights and the
engine that carries it out find the same blocks. A block is the largest module below which nothing
needs cutting: items of lists of blocks, large layers outside of them, and the parts of blocks that
are themselves too large. What is left over is the rest and stays with the component: norms, small
projections, weights that two blocks share, and single layers too large for a slot (an embedding of
a language model), because a slot for them would take as much. Of such layers there may be many
alike, as in FLUX.2, where they are most of the model: then they are blocks all the same.

What is easily got wrong: a list of modules is never called, so it cannot be a block; nor can the
component itself, because autoencoders and language models are entered past their ``forward``.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from pipefit.cost_models.residency import ByIdentity, children_of, storage_of
from pipefit.cost_models.workload import CallOrder, Component, TensorInfo, without_numbers

UNSPLITTABLE = "unsplittable_modules"
"""Trait: paths of modules that read their children's weights without calling them."""

SMALLEST_SHARE = 64
"""Modules smaller than a largest block by this factor are no blocks: our choice, their copies would
cost more host time than they save memory."""

MANY_ALIKE = 8
"""Equal layers too large for a block, from which on they are streamed all the same: our choice, two
slots take a quarter of what they save then. FLUX.2-dev has 48 of 648 MiB, and its text encoder 120
of 320 MiB; embeddings and output heads come once or twice."""

ALIGNMENT_BYTES = 256
"""Where tensors begin in a packed block: at least what ``cudaMalloc`` aligns to (CUDA C++
programming guide, "Device memory accesses"), so that kernels choose the same variants."""

NUM_REMEMBERED = 32
"""Cuts kept; our choice, above what one search asks for (a few for each component). Each holds its
component, so that many would make every garbage collection slow."""

NUM_MODULES = 256
"""Modules whose own weights are kept; our choice, above what the components of a pipeline have that
no call enters."""

NUM_LEVELS = 1024
"""Levels of residency that are kept; our choice, above what one search asks for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A module whose weights travel together."""

    path: str
    """Below the component."""
    tensors: tuple[TensorInfo, ...]
    """In the order in which they are packed; tied ones once."""
    is_called: bool = True
    """Whether the planned call enters it; others are copied in only if a call does all the same."""

    num_bytes: int = field(init=False)
    """Weights packed into one buffer, see :data:`ALIGNMENT_BYTES`."""

    def __post_init__(self) -> None:
        """Add up once what a search asks for thousands of times."""
        packed_bytes = sum(aligned(tensor.num_bytes) for tensor in self.tensors)
        object.__setattr__(self, "num_bytes", packed_bytes)

    @property
    def weight_bytes(self) -> int:
        """Weights as such."""
        return sum(tensor.num_bytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """A component, cut."""

    blocks: tuple[Block, ...]
    """In the order in which they are called, as far as is known; else in that of the tree."""
    rest: tuple[TensorInfo, ...]
    """Parameters outside of blocks; tied ones once."""
    buffers: tuple[TensorInfo, ...]
    """On the GPU all the time, because modules write to them."""

    called: tuple[int, ...] = field(init=False)
    """Which blocks the planned call enters."""
    rest_bytes: int = field(init=False)
    """The rest, packed as a block is."""
    sizes: tuple[object, ...] = field(init=False)
    """All that decides how long copies take and which there are."""

    def __post_init__(self) -> None:
        """Add up once what a search asks for thousands of times."""
        called = tuple(i for i, block in enumerate(self.blocks) if block.is_called)
        rest_bytes = sum(aligned(tensor.num_bytes) for tensor in self.rest)
        sizes = called, rest_bytes, *(block.num_bytes for block in self.blocks)
        for name, value in (("called", called), ("rest_bytes", rest_bytes), ("sizes", sizes)):
            object.__setattr__(self, name, value)

    def streamed(self, resident_blocks: int) -> tuple[int, ...]:
        """Return which of the called blocks are streamed when *resident_blocks* of them stay.

        They are spread evenly.

        >>> blocks = tuple(Block(path=f"blocks.{i}", tensors=()) for i in range(6))
        >>> Blocks(blocks=blocks, rest=(), buffers=()).streamed(4)
        (1, 4)
        """
        return _spread(self.called, resident_blocks)

    def slot_bytes(self, resident_blocks: int) -> int:
        """Return what a slot takes, which holds any of the streamed blocks; 0 without such."""
        streamed = self.streamed(resident_blocks)
        return max((self.blocks[number].num_bytes for number in streamed), default=0)


@functools.lru_cache(maxsize=NUM_LEVELS)
def _spread(called: tuple[int, ...], resident_blocks: int) -> tuple[int, ...]:
    count = max(0, len(called) - resident_blocks)
    return tuple(called[(2 * i + 1) * len(called) // (2 * count)] for i in range(count))


def aligned(num_bytes: int) -> int:
    """Return where the next tensor begins behind one of *num_bytes*.

    >>> aligned(1), aligned(256)
    (256, 256)
    """
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def is_large(component: Component, path: str, max_block_bytes: int) -> bool:
    """Whether the module at *path* has weights enough of its own for a block of its own.

    See :data:`SMALLEST_SHARE`.
    """
    return _own_bytes(ByIdentity(component), path) * SMALLEST_SHARE >= max_block_bytes


@functools.lru_cache(maxsize=NUM_MODULES)
def _own_bytes(of: ByIdentity, path: str) -> int:
    """Return the weights below *path* that no module outside of it uses."""
    component = of.component
    shared = {
        storage_of(tensor) for tensor in component.tensors if not tensor.path.startswith(f"{path}.")
    }
    return sum(
        tensor.num_bytes
        for tensor in component.tensors
        if not tensor.is_buffer and tensor.tied_to is None and tensor.path not in shared
    )


def blocks_of(
    component: Component,
    max_block_bytes: int,
    uncalled: tuple[str, ...] = (),
    order: CallOrder = (),
) -> Blocks:
    """Return the cut of *component* into blocks of at most *max_block_bytes*, see the module's
    docstring for larger ones.

    *uncalled* are modules that the planned call does not enter: blocks of their own, of any size.
    *order* says where children are called in another order than they are listed.
    """
    return _blocks_of(ByIdentity(component), max_block_bytes, uncalled, order)


@functools.lru_cache(maxsize=NUM_REMEMBERED)
def _blocks_of(
    of: ByIdentity, max_block_bytes: int, uncalled: tuple[str, ...], order: CallOrder
) -> Blocks:
    component = of.component
    children = children_of(component)
    containers = {module.path for module in component.modules if module.is_container}
    whole = frozenset(component.traits.get(UNSPLITTABLE, ()))
    sizes: dict[str, int] = {}
    for tensor in component.tensors:
        if not tensor.is_buffer and tensor.tied_to is None:
            for path in modules_above(tensor.path):
                sizes[path] = sizes.get(path, 0) + tensor.num_bytes
    names = {module.path: module.class_name for module in component.modules}
    alike = Counter(
        (name, sizes.get(path, 0))
        for path, name in names.items()
        if path in whole or not children.get(path)
    )
    paths: dict[str, bool] = {}
    orders = dict(order)

    def cut(path: str) -> None:
        num_bytes = sizes.get(path, 0)
        if num_bytes * SMALLEST_SHARE < max_block_bytes:
            return
        if path in uncalled and path not in containers:
            paths[path] = False
            return
        if path:
            if num_bytes <= max_block_bytes:
                paths[path] = True
                return
            if path in whole or not children.get(path):
                if alike[names[path], num_bytes] >= MANY_ALIKE:
                    paths[path] = True
                return
        below = list(callees(path))
        begin = len(path) + 1 if path else 0
        ranks = {name: i for i, name in enumerate(orders.get(without_numbers(path), ()))}
        for child in sorted(below, key=lambda child: ranks.get(child[begin:], len(ranks))):
            cut(child)

    def callees(path: str) -> Iterator[str]:
        """Yield what *path* may call: its children, and those of its lists in their place."""
        for child in children.get(path, ()):
            if child in containers:
                yield from callees(child)
            else:
                yield child

    cut("")
    return _filled(component, paths)


def _filled(component: Component, paths: Mapping[str, bool]) -> Blocks:
    """Give each tensor to its block; what two blocks share, or a block and the rest, stays."""
    block_of = {path: number for number, path in enumerate(paths)}
    owner: dict[str, int | None] = {}
    for tensor in component.tensors:
        number = next((block_of[p] for p in modules_above(tensor.path) if p in block_of), None)
        if tensor.is_buffer or not tensor.num_bytes:
            number = None
        storage = storage_of(tensor)
        owner[storage] = number if owner.get(storage, number) == number else None
    packed: list[list[TensorInfo]] = [[] for _ in block_of]
    rest: list[TensorInfo] = []
    buffers: list[TensorInfo] = []
    for tensor in component.tensors:
        if tensor.tied_to is not None:
            continue
        number = owner[tensor.path]
        if number is not None:
            packed[number].append(tensor)
        else:
            (buffers if tensor.is_buffer else rest).append(tensor)
    return Blocks(
        blocks=tuple(
            Block(path=path, tensors=tuple(tensors), is_called=paths[path])
            for path, tensors in zip(block_of, packed, strict=True)
            if tensors
        ),
        rest=tuple(rest),
        buffers=tuple(buffers),
    )


def modules_above(path: str) -> list[str]:
    """Return the modules that a tensor or module lies in, nearest first, the component last.

    >>> modules_above("blocks.0.norm")
    ['blocks.0', 'blocks', '']
    """
    found = []
    while path:
        path = path.rpartition(".")[0]
        found.append(path)
    return found
