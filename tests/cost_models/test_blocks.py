"""The cut of a component: what a block may be, what stays, and which blocks are streamed."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.cost_models.workloads import linear_stack

from pipefit.cost_models.blocks import (
    ALIGNMENT_BYTES,
    MANY_ALIKE,
    SMALLEST_SHARE,
    UNSPLITTABLE,
    Block,
    Blocks,
    blocks_of,
    is_large,
    modules_above,
)
from pipefit.cost_models.residency import storage_of
from pipefit.cost_models.workload import (
    Component,
    Event,
    ModuleInfo,
    Phase,
    Routine,
    TensorInfo,
    Workload,
    uncalled_modules,
)

MAX_BLOCK_BYTES = 1 << 16


@st.composite
def components(draw: st.DrawFn) -> Component:
    """Return a tree of modules with tensors of any size, some tied, some lists among them."""
    modules = [ModuleInfo(path="", class_name="Root")]
    tensors: list[TensorInfo] = []
    whole = []
    for number in range(draw(st.integers(1, 14))):
        parent = draw(st.sampled_from(modules)).path
        path = f"{parent}.m{number}".removeprefix(".")
        is_list = draw(st.integers(0, 3)) == 0
        modules.append(ModuleInfo(path=path, class_name="M", is_container=is_list))
        if draw(st.integers(0, 5)) == 0:
            whole.append(path)
        for index in range(0 if is_list else draw(st.integers(0, 3))):
            of = draw(st.sampled_from(tensors)) if tensors and draw(st.booleans()) else None
            is_tied = of is not None and draw(st.integers(0, 2)) == 0
            num_bytes = draw(st.sampled_from((0, 4, 1000, 20_000, 60_000, 100_000)))
            tensors.append(
                TensorInfo(
                    path=f"{path}.t{index}",
                    num_bytes=of.num_bytes if of and is_tied else num_bytes,
                    dtype="uint8",
                    shape=(num_bytes,),
                    is_buffer=draw(st.integers(0, 4)) == 0,
                    tied_to=storage_of(of) if of and is_tied else None,
                )
            )
    order = {path: place for place, path in enumerate(_depth_first([m.path for m in modules]))}
    return Component(
        name="part",
        class_name="Root",
        library="tests",
        tensors=tuple(tensors),
        modules=tuple(sorted(modules, key=lambda module: order[module.path])),
        traits={UNSPLITTABLE: whole},
    )


def _depth_first(paths: list[str], root: str = "") -> list[str]:
    children = [path for path in paths if path and path.rpartition(".")[0] == root]
    return [root, *(below for child in children for below in _depth_first(paths, child))]


uncalled_ones = st.lists(st.integers(0, 14), max_size=3)


def _cut(component: Component, numbers: list[int]) -> tuple[Blocks, tuple[str, ...]]:
    paths = [module.path for module in component.modules if module.path]
    uncalled = tuple(paths[number % len(paths)] for number in numbers)
    return blocks_of(component, MAX_BLOCK_BYTES, uncalled), uncalled


@given(component=components(), numbers=uncalled_ones)
def test_every_tensor_is_in_one_place(component: Component, numbers: list[int]) -> None:
    cut, _ = _cut(component, numbers)
    placed = [tensor.path for block in cut.blocks for tensor in block.tensors]
    placed += [tensor.path for tensor in (*cut.rest, *cut.buffers)]
    assert sorted(placed) == sorted(t.path for t in component.tensors if t.tied_to is None)
    assert all(tensor.is_buffer for tensor in cut.buffers)
    assert not any(t.is_buffer for t in cut.rest)
    assert not any(t.is_buffer for block in cut.blocks for t in block.tensors)


@given(component=components(), numbers=uncalled_ones)
def test_a_block_is_a_module_that_is_called_and_fits(
    component: Component, numbers: list[int]
) -> None:
    cut, uncalled = _cut(component, numbers)
    paths = [block.path for block in cut.blocks]
    assert len(set(paths)) == len(paths)
    containers = {module.path for module in component.modules if module.is_container}
    assert containers.isdisjoint(paths)
    assert "" not in paths
    for block in cut.blocks:
        above = modules_above(block.path)
        assert set(above).isdisjoint(paths)
        assert block.tensors
        assert block.is_called == (block.path not in uncalled)
        assert all(tensor.path.startswith(f"{block.path}.") for tensor in block.tensors)
        if block.is_called:
            # Trees of 14 modules may have MANY_ALIKE that are larger.
            assert block.weight_bytes <= MAX_BLOCK_BYTES or len(component.modules) > MANY_ALIKE
            # A whole one may lie in a list that bears its name, which nobody calls.
            assert set(above).isdisjoint(set(component.traits[UNSPLITTABLE]) - containers)


@given(component=components(), numbers=uncalled_ones)
def test_what_two_blocks_share_is_in_neither(component: Component, numbers: list[int]) -> None:
    cut, _ = _cut(component, numbers)
    for block in cut.blocks:
        packed = {tensor.path for tensor in block.tensors}
        for tensor in component.tensors:
            if storage_of(tensor) in packed:
                assert tensor.path.startswith(f"{block.path}.")
                assert not tensor.is_buffer


@given(component=components(), numbers=uncalled_ones)
def test_blocks_come_in_the_order_of_the_tree(component: Component, numbers: list[int]) -> None:
    cut, _ = _cut(component, numbers)
    order = [module.path for module in component.modules]
    places = [order.index(block.path) for block in cut.blocks]
    assert places == sorted(places)


@given(
    flags=st.lists(st.booleans(), max_size=40), resident=st.integers(0, 45), size=st.integers(1, 9)
)
def test_the_streamed_blocks_are_spread_evenly(flags: list[bool], resident: int, size: int) -> None:
    blocks = tuple(
        Block(path=f"b.{number}", tensors=(_tensor(number, size * number + 1),), is_called=flag)
        for number, flag in enumerate(flags)
    )
    cut = Blocks(blocks=blocks, rest=(), buffers=())
    streamed = cut.streamed(resident)
    assert len(streamed) == max(0, sum(flags) - resident)
    assert set(streamed) <= set(cut.called)
    places = [cut.called.index(number) for number in streamed]
    assert places == sorted(set(places))
    if streamed:
        # The step after the last block is followed by the next one's first.
        gaps = [b - a for a, b in pairwise([*places, places[0] + len(cut.called)])]
        assert max(gaps) - min(gaps) <= 1
    slot_bytes = cut.slot_bytes(resident)
    assert slot_bytes == max((blocks[number].num_bytes for number in streamed), default=0)


def _tensor(number: int, num_bytes: int) -> TensorInfo:
    return TensorInfo(path=f"b.{number}.w", num_bytes=num_bytes, dtype="uint8", shape=(num_bytes,))


@given(sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=9))
def test_a_packed_block_wastes_less_than_a_line_for_each_tensor(sizes: list[int]) -> None:
    block = Block(path="b", tensors=tuple(_tensor(*pair) for pair in enumerate(sizes)))
    assert block.weight_bytes == sum(sizes)
    assert 0 <= block.num_bytes - block.weight_bytes < ALIGNMENT_BYTES * len(sizes)
    assert block.num_bytes % ALIGNMENT_BYTES == 0


def test_what_is_small_beside_a_largest_block_is_the_rest() -> None:
    least = MAX_BLOCK_BYTES // SMALLEST_SHARE
    cut = blocks_of(linear_stack("net", [least, least - 1, MAX_BLOCK_BYTES]), MAX_BLOCK_BYTES)
    assert [block.weight_bytes for block in cut.blocks] == [least, MAX_BLOCK_BYTES]
    assert [tensor.num_bytes for tensor in cut.rest] == [least - 1]


def test_a_layer_that_is_too_large_for_a_slot_stays() -> None:
    cut = blocks_of(linear_stack("net", [1 << 15, MAX_BLOCK_BYTES + 1]), MAX_BLOCK_BYTES)
    assert [block.path for block in cut.blocks] == ["blocks.0"]
    assert [tensor.num_bytes for tensor in cut.rest] == [MAX_BLOCK_BYTES + 1]


@pytest.mark.parametrize("count", [MANY_ALIKE - 1, MANY_ALIKE])
def test_of_many_layers_alike_each_is_a_block_however_large(count: int) -> None:
    large = [MAX_BLOCK_BYTES + 2] * count
    cut = blocks_of(linear_stack("net", [1 << 15, *large], top_bytes=1 << 20), MAX_BLOCK_BYTES)
    assert [block.weight_bytes for block in cut.blocks] == [
        1 << 15,
        *(large if count == MANY_ALIKE else ()),
    ]
    assert (1 << 20) in [tensor.num_bytes for tensor in cut.rest]


def test_what_is_not_called_is_a_block_of_any_size() -> None:
    component = linear_stack("net", [1 << 15, 10 * MAX_BLOCK_BYTES])
    cut = blocks_of(component, MAX_BLOCK_BYTES, ("blocks.1",))
    assert [(block.path, block.is_called) for block in cut.blocks] == [
        ("blocks.0", True),
        ("blocks.1", False),
    ]
    assert cut.called == (0,)
    assert cut.slot_bytes(0) == 1 << 15


@pytest.mark.parametrize(("tied", "expected"), [(False, True), (True, False)])
def test_a_module_is_large_by_what_is_its_own(tied: bool, expected: bool) -> None:
    component = Component(
        name="net",
        class_name="Net",
        library="tests",
        modules=tuple(ModuleInfo(path=path, class_name="M") for path in ("", "a", "b")),
        tensors=(
            TensorInfo(path="a.w", num_bytes=1 << 15, dtype="uint8", shape=(1 << 15,)),
            TensorInfo(
                path="b.w",
                num_bytes=1 << 15,
                dtype="uint8",
                shape=(1 << 15,),
                tied_to="a.w" if tied else None,
            ),
        ),
    )
    assert is_large(component, "b", MAX_BLOCK_BYTES) == expected


def _calling(*paths: str) -> Workload:
    """Return a workload whose only call enters these modules of a stack of three blocks."""
    component = linear_stack("net", [1 << 15] * 3)
    inner = Routine(module_class="Linear", entry="forward", events=(), returns=())
    events: tuple[Event, ...] = tuple(("c", 0, path, (), ()) for path in paths)
    outer = Routine(module_class="Stack", entry="forward", events=events, returns=())
    return Workload(
        pipeline="p",
        pipeline_class="P",
        call={},
        components=(component,),
        kernels=(),
        routines=(inner, outer),
        root=(("c", 1, "/net", (), ()),),
        phases=(Phase(name="denoise", component="net", entry="forward", calls=(0,)),),
    )


def test_uncalled_are_the_largest_modules_of_which_nothing_is_entered() -> None:
    names = [module.path for module in _calling().components[0].modules]
    assert {"blocks.0", "blocks.1", "blocks.2"} <= set(names)
    uncalled = uncalled_modules(_calling("blocks.0"), "net")
    assert {"blocks.1", "blocks.2"} <= set(uncalled)
    assert "blocks.0" not in uncalled
    assert not {"blocks.1", "blocks.2"} & set(
        uncalled_modules(_calling("blocks.0", "blocks.1", "blocks.2"), "net")
    )
