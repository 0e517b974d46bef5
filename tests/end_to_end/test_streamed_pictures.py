"""Streaming changes no bit of any picture, however it is parametrised and whatever happens."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.end_to_end.small_runs import untouched
from tests.small_pipelines import PICTURE_PX, SMALL_PIPELINES, picture, small_call
from tests.strategies.described import described
from tests.strategies.late_copies import late_copies, poisoned_slots

from pipefit.cost_models.blocks import blocks_of
from pipefit.cost_models.machine import Gpu
from pipefit.planner.apply import apply_options
from pipefit.planner.rehearse import rehearse
from pipefit.planner.snapshot import differences, snapshot
from pipefit.strategies import strategy
from pipefit.strategies.live import module_components
from pipefit.strategies.strategy import Option

STREAMING = strategy("streaming")

QUICK = settings(max_examples=2, deadline=None)
THOROUGH = settings(max_examples=40, deadline=None)

BLOCK_BYTES = (1 << 10, 4 << 10, 16 << 10, 64 << 10, 1 << 20)
"""Largest blocks that are tried: from single layers of the small components to all of them."""

VIRTUAL = Gpu(name="cpu", architecture="cpu", total_bytes=1 << 40, free_bytes=1 << 40)
"""Without workspaces: next to those of cuBLAS, small pipelines are nothing."""

OTHER_SHAPES = {
    "stable_diffusion_xl_img2img": {
        "image": torch.rand(1, 3, 32, PICTURE_PX, generator=torch.Generator().manual_seed(2))
    },
    "stable_diffusion_xl_controlnet": {
        "image": torch.rand(1, 3, 32, PICTURE_PX, generator=torch.Generator().manual_seed(2)),
        "height": 32,
    },
    "sana": {"height": 64},
    "cogvideox": {"num_frames": 5, "height": 64},
    "wan": {"num_frames": 5, "height": 64},
    "wan_two_experts": {"num_frames": 5, "height": 64},
}
"""What a second call changes, where it is not the height alone."""


@functools.cache
def other_picture(name: str) -> torch.Tensor:
    """Return the picture of another shape, before anything was applied."""
    return _other(untouched(name)[0], name)


def _other(pipe: Any, name: str) -> torch.Tensor:
    return picture(pipe, name, **OTHER_SHAPES.get(name, {"height": 32}))


@functools.cache
def _described(name: str) -> dict[str, Any]:
    modules = module_components(untouched(name)[0])
    return {component: described(module, component) for component, module in modules.items()}


@st.composite
def streamed(draw: st.DrawFn, name: str) -> list[Option]:
    """Return streaming with parameters of its own for each component of the pipeline *name*."""
    options = []
    for component, one in _described(name).items():
        max_block_bytes = draw(st.sampled_from(BLOCK_BYTES))
        paths = [block.path for block in blocks_of(one, max_block_bytes).blocks]
        lists = {module.path for module in one.modules if module.is_container}
        paths += sorted({path.rpartition(".")[0] for path in paths} - {"", *lists})
        paths = [path for path in paths if path not in lists]
        uncalled = draw(st.lists(st.sampled_from(paths), max_size=2)) if paths else []
        cut = blocks_of(one, max_block_bytes, tuple(uncalled))
        when_idle = draw(st.sampled_from(("stay", "leave")))
        most = len(cut.called) - (when_idle == "stay")
        if most < 0:
            when_idle, most = "leave", 0
        parameters = {
            "resident_blocks": draw(st.integers(0, most)),
            "num_slots": draw(st.integers(1, 4)),
            "look_ahead": draw(st.integers(0, 5)),
            "when_idle": when_idle,
            "host_memory": draw(st.sampled_from(("pinned", "pageable"))),
            "max_block_bytes": max_block_bytes,
            "uncalled_modules": uncalled,
        }
        if when_idle == "leave":
            others = [other for other in _described(name) if other != component]
            parameters["load_with"] = draw(st.sampled_from((None, *others)))
        assert STREAMING.refusal(one, parameters) is None
        options.append(Option(strategy="streaming", component=component, parameters=parameters))
    return options


def check(name: str, options: list[Option]) -> None:
    """Compare the pictures before, under, and after *options*."""
    pipe, expected = untouched(name)
    other = other_picture(name)
    before = snapshot(pipe, with_values=True)
    with apply_options(pipe, options, "cpu"):
        assert torch.equal(picture(pipe, name), expected)
        assert torch.equal(picture(pipe, name), expected)
        assert torch.equal(_other(pipe, name), other)
        assert torch.equal(picture(pipe, name), expected)
    assert differences(before, snapshot(pipe, with_values=True)) == ()
    assert _described_anew(pipe) == _described(name)
    assert torch.equal(picture(pipe, name), expected)


def _described_anew(pipe: Any) -> dict[str, Any]:
    modules = module_components(pipe)
    return {component: described(module, component) for component, module in modules.items()}


@pytest.mark.parametrize("name", SMALL_PIPELINES)
@QUICK
@given(data=st.data())
def test_the_picture_is_bit_identical_under_any_streaming(name: str, data: st.DataObject) -> None:
    options = data.draw(streamed(name))
    with poisoned_slots():
        check(name, options)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL_PIPELINES)
@THOROUGH
@given(data=st.data())
def test_the_picture_is_bit_identical_under_very_many_streamings(
    name: str, data: st.DataObject
) -> None:
    options = data.draw(streamed(name))
    with poisoned_slots():
        check(name, options)


@pytest.mark.parametrize("name", SMALL_PIPELINES)
@settings(QUICK, max_examples=1)
@given(data=st.data())
def test_no_copy_is_early_and_no_kernel_is_before_its_copy(name: str, data: st.DataObject) -> None:
    options = data.draw(streamed(name))
    with late_copies():
        check(name, options)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL_PIPELINES)
@settings(THOROUGH, max_examples=15)
@given(data=st.data())
def test_no_copy_is_early_in_very_many_streamings(name: str, data: st.DataObject) -> None:
    options = data.draw(streamed(name))
    with late_copies():
        check(name, options)


class Broken(Exception):
    """Something that goes wrong in the middle of a step."""


@st.composite
def interruptions(draw: st.DrawFn, name: str) -> tuple[str, str, int, type[BaseException]]:
    """Return in which module, in which of its calls, and as what something goes wrong."""
    component = draw(st.sampled_from(list(_described(name))))
    layers = [module.path for module in _described(name)[component].modules if module.is_leaf_layer]
    error = draw(st.sampled_from((Broken, KeyboardInterrupt)))
    return component, draw(st.sampled_from(layers)), draw(st.integers(0, 2)), error


def interrupt(pipe: Any, name: str, at: tuple[str, str, int, type[BaseException]]) -> bool:
    """Make the picture until something goes wrong; return whether it did."""
    component, path, number, error = at
    num_calls = 0

    def stop(*_: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls > number:
            raise error

    handle = getattr(pipe, component).get_submodule(path).register_forward_pre_hook(stop)
    try:
        picture(pipe, name)
    except error:
        return True
    finally:
        handle.remove()
    return False


def check_interrupted(name: str, data: st.DataObject) -> None:
    pipe, expected = untouched(name)
    options = data.draw(streamed(name))
    before = snapshot(pipe, with_values=True)
    with apply_options(pipe, options, "cpu"):
        for at in data.draw(st.lists(interruptions(name), min_size=1, max_size=2)):
            interrupt(pipe, name, at)
        assert torch.equal(picture(pipe, name), expected)
        assert torch.equal(picture(pipe, name), expected)
        interrupt(pipe, name, data.draw(interruptions(name)))
    assert differences(before, snapshot(pipe, with_values=True)) == ()
    assert torch.equal(picture(pipe, name), expected)


@pytest.mark.parametrize("name", ["stable_diffusion_xl", "flux", "sana", "wan_two_experts"])
@QUICK
@given(data=st.data())
def test_the_picture_after_an_interrupted_one_is_right(name: str, data: st.DataObject) -> None:
    with late_copies():
        check_interrupted(name, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL_PIPELINES)
@settings(THOROUGH, max_examples=20)
@given(data=st.data())
def test_the_picture_after_any_interrupted_one_is_right(name: str, data: st.DataObject) -> None:
    with late_copies():
        check_interrupted(name, data)


@pytest.mark.parametrize("name", ["stable_diffusion_xl_controlnet", "flux"])
def test_something_can_go_wrong_in_every_component(name: str) -> None:
    """The interruptions above would show nothing if they never came about."""
    pipe, _ = untouched(name)
    for component, one in _described(name).items():
        layers = [module.path for module in one.modules if module.is_leaf_layer]
        assert interrupt(pipe, name, (component, layers[-1], 0, Broken))


def rehearse_streamed(name: str, options: list[Option]) -> None:
    """Make the call on a virtual GPU, where a kernel fails that finds a weight on the host."""
    pipe, _ = untouched(name)
    rehearsed = rehearse(pipe, options, small_call(name), VIRTUAL, remember=False)
    assert {phase.component for phase in rehearsed.phases} <= set(_described(name))
    assert rehearsed.phases


@pytest.mark.parametrize("name", SMALL_PIPELINES)
@settings(QUICK, max_examples=1)
@given(data=st.data())
def test_no_kernel_finds_a_weight_on_the_host(name: str, data: st.DataObject) -> None:
    rehearse_streamed(name, data.draw(streamed(name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL_PIPELINES)
@settings(THOROUGH, max_examples=10)
@given(data=st.data())
def test_no_kernel_finds_a_weight_on_the_host_in_very_many_streamings(
    name: str, data: st.DataObject
) -> None:
    rehearse_streamed(name, data.draw(streamed(name)))


def test_a_rehearsal_of_blocks_on_disk_needs_no_folder() -> None:
    options = [
        Option(
            strategy="streaming",
            component=component,
            parameters={"max_block_bytes": 16 << 10, "disk_path": "a folder that is not there"},
        )
        for component in _described("flux")
    ]
    rehearse_streamed("flux", options)
