"""Which weights are on the GPU when: what the hooks of diffusers and accelerate cause.

Two machines, each a small state that is told what is called and answers what is copied or dropped:
:class:`OffloadChain` for model offload, :class:`GroupHooks` for group offload and sequential
offload. The memory model drives them along a trace.

What is easily got wrong: model offload evicts the *direct predecessor in the chain* only, so
whatever else was called before stays; and group offload's prefetch order belongs to the module
whose ``forward`` was recorded, so an autoencoder that is entered by ``decode`` never prefetches.

Sources: ``diffusers/hooks/group_offloading.py`` and ``enable_model_cpu_offload`` in
``diffusers/pipelines/pipeline_utils.py`` of 0.42.1, ``accelerate/hooks.py`` and ``cpu_offload`` in
``accelerate/big_modeling.py`` of 1.15.0.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, pairwise

from pipefit.cost_models.placement import GroupOffload
from pipefit.cost_models.workload import Component, TensorInfo, Workload

DECLARED_BLOCKS = "declared_block_modules"
"""Trait: children that the class itself wants divided where ``block_modules`` is not given."""

NUM_REMEMBERED = 256
"""Divisions kept; our choice, above what one search asks for (a few for each component)."""


@dataclass(frozen=True, slots=True, eq=False)
class ByIdentity:
    """A component as a key: comparing thousands of tensors would cost what is to be saved."""

    component: Component

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByIdentity) and self.component is other.component

    def __hash__(self) -> int:
        return id(self.component)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Weights that come before the first of ``paths`` is called and leave after the last."""

    paths: tuple[str, ...]
    """Modules below the component, "" for itself; the first one's call brings the weights."""
    tensor_bytes: tuple[int, ...]
    """In the order in which they are copied; tied tensors once."""
    is_streamed: bool = False
    """Copied on the copy stream from pinned memory."""

    @property
    def num_bytes(self) -> int:
        """Weights of the group."""
        return sum(self.tensor_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """How group offload cuts a component."""

    groups: tuple[Group, ...]
    unmatched: tuple[Group, ...] = ()
    """Block level: what is in no block list, loaded for a whole forward of its module; one for the
    component and one for each module of ``block_modules``. Never streamed."""
    recorders: frozenset[str] = frozenset()
    """Modules whose first ``forward`` records the order in which groups are then prefetched."""
    replaced_bytes: int = 0
    """Buffers that an unmatched group keeps after ``Module.to`` has put others in their place."""

    @property
    def unmatched_bytes(self) -> int:
        """Weights outside all block lists."""
        return sum(group.num_bytes for group in self.unmatched)

    @property
    def all(self) -> tuple[Group, ...]:
        """Unmatched groups first."""
        return self.unmatched + self.groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Residency:
    """Model offload along one pipeline call."""

    phases: tuple[frozenset[str], ...]
    """Components on the GPU during any call of each phase, the active one included."""
    onloads: Mapping[str, int]
    """Copies to the GPU per pipeline call."""
    offloads: Mapping[str, int]
    """Copies back per pipeline call, the one at its end included."""


def load_order(component: Component) -> tuple[int, ...]:
    """Return the bytes of the component's tensors in the order in which ``Module.to`` moves them.

    Children before their parent, parameters before buffers; tied tensors once.
    """
    return _load_order(ByIdentity(component))


@functools.lru_cache(maxsize=NUM_REMEMBERED)
def _load_order(of: ByIdentity) -> tuple[int, ...]:
    component = of.component
    children = children_of(component)
    own: dict[str, list[TensorInfo]] = {}
    for tensor in component.tensors:
        own.setdefault(_owner(tensor), []).append(tensor)

    def ordered(path: str) -> Iterator[TensorInfo]:
        for child in children.get(path, ()):
            yield from ordered(child)
        yield from sorted(own.pop(path, ()), key=lambda tensor: tensor.is_buffer)

    found = list(ordered(""))
    return tuple(_storages(found + [tensor for rest in own.values() for tensor in rest]))


def offload_groups(component: Component, placement: GroupOffload) -> Groups:
    """Return the groups that ``apply_group_offloading`` builds for *component*.

    Remembered for the last components asked about: a search asks the same thousands of times.
    """
    if placement.offload_type == "leaf_level":
        return _leaf_groups(ByIdentity(component), placement.use_stream)
    num_blocks = 1 if placement.use_stream else placement.num_blocks_per_group or 1
    block_modules = placement.block_modules or tuple(component.traits.get(DECLARED_BLOCKS, ()))
    return _block_groups(
        ByIdentity(component),
        num_blocks,
        block_modules,
        is_streamed=placement.use_stream,
        is_on_disk=placement.offload_to_disk_path is not None,
    )


@functools.lru_cache(maxsize=NUM_REMEMBERED)
def _block_groups(
    of: ByIdentity,
    num_blocks: int,
    block_modules: tuple[str, ...],
    *,
    is_streamed: bool,
    is_on_disk: bool,
) -> Groups:
    component = of.component
    children, below = children_of(component), _by_prefix(component)
    lists = {module.path for module in component.modules if module.is_block_list}
    groups: list[Group] = []
    unmatched: list[Group] = []
    replaced: list[int] = []

    def cut(root: str, outer: frozenset[str]) -> None:
        covered: list[str] = []
        nested: list[str] = []
        twice: list[TensorInfo] = []
        has_rest = False
        for child in children.get(root, ()):
            if child.rpartition(".")[2] in block_modules:
                nested.append(child)
                covered.append(child)
            elif child in lists:
                blocks = children.get(child, [])
                covered += blocks
                for start in range(0, len(blocks), num_blocks):
                    paths = tuple(blocks[start : start + num_blocks])
                    tensors = chain.from_iterable(below.get(path, ()) for path in paths)
                    tensor_bytes = tuple(_storages(tensors))
                    groups.append(
                        Group(
                            paths=paths,
                            tensor_bytes=tensor_bytes,
                            is_streamed=is_streamed,
                        )
                    )
            else:
                has_rest = True
                twice += (t for t in below.get(child, ()) if t.is_buffer)
        taken = {t.path for path in covered for t in below.get(path, ())}
        rest = [t for t in below.get(root, ()) if t.path not in taken]
        # What an enclosing module holds already, tied, is on the GPU when this one is called.
        missing = [t for t in rest if storage_of(t) not in outer]
        place = len(unmatched)
        for child in nested:
            cut(child, outer.union(map(storage_of, rest)))
        if has_rest or rest:
            # The group lists the buffers of its modules as well, and Module.to makes new ones: from
            # the second forward on, old and new are both loaded (ModuleGroup._offload_to_memory).
            # What goes to disk stays the same tensor.
            again = () if is_on_disk else tuple(_storages(twice))
            replaced.extend(again)
            unmatched.insert(
                place, Group(paths=(root,), tensor_bytes=(*_storages(missing), *again))
            )

    cut("", frozenset())
    return Groups(
        groups=tuple(groups),
        unmatched=tuple(unmatched),
        recorders=frozenset(g.paths[0] for g in unmatched if is_streamed),
        replaced_bytes=sum(replaced),
    )


def sequential_groups(component: Component) -> Groups:
    """Return what sequential offload loads: the direct tensors of every module.

    Buffers stay on the GPU (see :func:`sequential_resident_bytes`) unless they are saved and the
    component itself owns a parameter.
    """
    return _sequential_groups(ByIdentity(component))


@functools.lru_cache(maxsize=NUM_REMEMBERED)
def _sequential_groups(of: ByIdentity) -> Groups:
    component = of.component
    kept = _kept_buffers(component)
    own: dict[str, list[TensorInfo]] = {}
    for tensor in component.tensors:
        if tensor not in kept:
            own.setdefault(_owner(tensor), []).append(tensor)
    return Groups(
        groups=tuple(
            Group(paths=(path,), tensor_bytes=tuple(_storages(tensors)))
            for path, tensors in own.items()
        )
    )


def sequential_resident_bytes(component: Component) -> tuple[int, ...]:
    """Return the buffers that sequential offload leaves on the GPU, in order."""
    return tuple(_storages(_kept_buffers(component)))


def model_offload_residency(workload: Workload) -> Residency:
    """Return who is on the GPU in each phase when all components are under model offload."""
    hooks = OffloadChain(workload)
    onloads = dict.fromkeys(hooks.members, 0)
    offloads = dict.fromkeys(hooks.members, 0)
    phases: list[frozenset[str]] = [frozenset(hooks.excluded)] * len(workload.phases)
    calls = sorted((call, i) for i, phase in enumerate(workload.phases) for call in phase.calls)
    for _, index in calls:
        called = workload.phases[index].component
        evicted, is_loaded = hooks.call(called)
        if is_loaded:
            onloads[called] += 1
        for name in evicted:
            offloads[name] += 1
        phases[index] |= set(hooks.resident)
    for name in hooks.resident:
        offloads[name] += 1
    return Residency(phases=tuple(phases), onloads=onloads, offloads=offloads)


class OffloadChain:
    """accelerate's chain of ``CpuOffload`` hooks over some components of a pipeline.

    ``resident`` lists who is on the GPU, in order of arrival; the call of a component evicts its
    predecessor in the chain. Components that the pipeline excludes stay on the GPU for good.
    """

    def __init__(self, workload: Workload, members: Collection[str] | None = None) -> None:
        names = [c.name for c in workload.components if members is None or c.name in members]
        # The sequence comes first: what it names has its hook, excluded or not
        # (enable_model_cpu_offload in pipelines/pipeline_utils.py, diffusers 0.42.1).
        excluded = set(workload.offload_excluded) - set(workload.offload_sequence)
        self.excluded = tuple(n for n in names if n in excluded)
        self.members = tuple(n for n in names if n not in excluded)
        self.resident: list[str] = []
        in_chain = [n for n in dict.fromkeys(workload.offload_sequence) if n in names]
        self._predecessor = {after: before for before, after in pairwise(in_chain)}

    def call(self, name: str) -> tuple[tuple[str, ...], bool]:
        """Note a call of *name*; return who is evicted, and whether *name* is copied in."""
        if name not in self.members:
            return (), False
        predecessor = self._predecessor.get(name)
        evicted: tuple[str, ...] = ()
        if predecessor in self.resident:
            self.resident.remove(predecessor)
            evicted = (predecessor,)
        if name in self.resident:
            return evicted, False
        self.resident.append(name)
        return evicted, True


class GroupHooks:
    """The hooks of group or sequential offload on one component, told of every module call.

    ``before`` and ``after`` frame each call and return the groups to copy in or to drop, as indices
    of ``groups``. The first ``forward`` of a recorder notes the order of the groups; afterwards
    each group brings its successor along.
    """

    def __init__(self, groups: Groups) -> None:
        self.groups = groups.all
        self.loaded: set[int] = set()
        self.recorders = set(groups.recorders)
        """Recorders whose first forward has not ended."""
        self._leads = {group.paths[0]: i for i, group in enumerate(self.groups)}
        self._ends = {group.paths[-1]: i for i, group in enumerate(self.groups)}
        self._next: dict[int, int] = {}
        self._blocking = {
            i
            for i, group in enumerate(self.groups)
            if group.is_streamed and group.paths[0] not in groups.recorders
        }
        self._order: dict[str, list[int]] = {}
        self._ancestors = {
            prefix for path in (*self._leads, *self._ends) for prefix in _prefixes(path)
        }

    def concerns(self, path: str) -> bool:
        """Whether a group begins or ends in *path* or below."""
        return path in self._ancestors

    def leads(self, path: str) -> bool:
        """Whether the call of *path* itself copies a group in."""
        return path in self._leads

    @property
    def is_recording(self) -> bool:
        """Whether a recorder's first forward is under way."""
        return bool(self._order)

    def is_blocking(self, index: int) -> bool:
        """Whether the host waits for each tensor of the group: until its place is recorded."""
        return index in self._blocking

    def before(self, path: str, entry: str) -> tuple[int, ...]:
        """Return the groups to copy in before the call of *path*."""
        if path in self.recorders and entry == "forward":
            self._order[path] = []
        index = self._leads.get(path)
        if index is None:
            return ()
        for recorder, order in self._order.items():
            if recorder != path:
                order.append(index)
        wanted = {index: None, self._next.get(index, index): None}
        missing = tuple(i for i in wanted if i not in self.loaded)
        self.loaded.update(missing)
        return missing

    def after(self, path: str) -> tuple[int, ...]:
        """Return the groups to drop when the call of *path* has ended."""
        order = self._order.pop(path, None)
        if order is not None:
            self.recorders.discard(path)
            called = [self._leads[path], *order] if path in self._leads else order
            self._blocking.difference_update(order)
            self._next.update(pairwise(called))
        index = self._ends.get(path)
        if index is None or index not in self.loaded:
            return ()
        self.loaded.discard(index)
        return (index,)


@functools.lru_cache(maxsize=NUM_REMEMBERED)
def _leaf_groups(of: ByIdentity, use_stream: bool) -> Groups:
    component = of.component
    leaves = [module.path for module in component.modules if module.is_leaf_layer]
    below = _by_prefix(component)
    groups = [(leaf, below.get(leaf, [])) for leaf in leaves]
    taken = {tensor.path for _, tensors in groups for tensor in tensors}
    rest: dict[str, list[TensorInfo]] = {}
    for tensor in below.get("", ()):
        if tensor.path not in taken:
            rest.setdefault(_owner(tensor), []).append(tensor)
    if use_stream:
        # The component itself starts the first prefetch, whether it owns tensors or not.
        rest.setdefault("", [])
    return Groups(
        groups=tuple(
            Group(paths=(path,), tensor_bytes=tuple(_storages(tensors)), is_streamed=use_stream)
            for path, tensors in [*groups, *rest.items()]
        ),
        recorders=frozenset({""} if use_stream else ()),
    )


def _owner(tensor: TensorInfo) -> str:
    return tensor.path.rpartition(".")[0]


def _prefixes(path: str) -> Iterator[str]:
    """Yield *path* and every module above it, the component itself last."""
    yield path
    while path:
        path = path.rpartition(".")[0]
        yield path


def children_of(component: Component) -> dict[str, list[str]]:
    """Return the paths of each module's direct children, in order."""
    children: dict[str, list[str]] = {}
    for module in component.modules:
        if module.path:
            children.setdefault(module.path.rpartition(".")[0], []).append(module.path)
    return children


def _by_prefix(component: Component) -> dict[str, list[TensorInfo]]:
    """Return the tensors at or below each path, parameters first."""
    below: dict[str, list[TensorInfo]] = {}
    for tensor in sorted(component.tensors, key=lambda tensor: tensor.is_buffer):
        for prefix in _prefixes(tensor.path):
            below.setdefault(prefix, []).append(tensor)
    return below


def storage_of(tensor: TensorInfo) -> str:
    """Return the path of the first tensor that shares this one's memory, its own included."""
    return tensor.tied_to or tensor.path


def _storages(tensors: Iterable[TensorInfo]) -> Iterator[int]:
    """Yield the bytes of each distinct storage among *tensors*."""
    seen = set()
    for tensor in tensors:
        storage = storage_of(tensor)
        if storage not in seen:
            seen.add(storage)
            yield tensor.num_bytes


def _kept_buffers(component: Component) -> list[TensorInfo]:
    """diffusers asks for buffers to be offloaded where the component itself owns a parameter
    (``enable_sequential_cpu_offload`` in pipelines/pipeline_utils.py, 0.42.1); accelerate 1.15 then
    leaves out those that are not saved (``remove_non_persistent`` in hooks.py)."""
    offloads_buffers = any("." not in t.path and not t.is_buffer for t in component.tensors)
    return [t for t in component.tensors if t.is_buffer and not (offloads_buffers and t.persistent)]
