"""Calls completed to ones that run, and what pipelines make of them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from PIL import Image
from tests.small_pipelines import SMALL_PIPELINES, small_call

from pipefit.errors import InvalidRequest, UnknownName
from pipefit.planner.build import build_pipeline
from pipefit.planner.call import DEFAULT_PROMPT, default_inputs, resolve_call_defaults
from pipefit.planner.catalog import pipeline_entry, pipeline_names

AUDIO_TOLERANCE_S = 0.01
"""The catalogue rounds the length of Stable Audio's clips."""


@functools.cache
def built(name: str) -> Any:
    return build_pipeline(name)[0]


def inputs(name: str, **call: Any) -> dict[str, Any]:
    return default_inputs(built(name), pipeline_entry(name), call)


def test_a_prompt_is_made_up_where_none_is_given() -> None:
    assert inputs("flux.1-dev") == {"prompt": DEFAULT_PROMPT}
    assert inputs("flux.1-dev", prompt=["a", "b"]) == {"prompt": ["a", "b"]}
    embedded = {"prompt_embeds": torch.zeros(1, 2, 3)}
    assert inputs("flux.1-dev", **embedded).keys() == {"prompt_embeds"}


def test_nothing_is_given_to_pipelines_whose_pictures_are_optional() -> None:
    assert inputs("flux.2-klein-4b") == {"prompt": DEFAULT_PROMPT}
    assert inputs("ltx-video-0.9.7-13b") == {"prompt": DEFAULT_PROMPT}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("stable-diffusion-xl-refiner-1.0", (1024, 1024)),
        ("stable-video-diffusion-img2vid-xt", (1024, 576)),
        ("sdxl-controlnet-canny", (1024, 1024)),
        ("sdxl-t2i-adapter-canny", (1024, 1024)),
        ("stable-diffusion-v1-5-img2img", (512, 512)),
        pytest.param("wan2.1-i2v-14b-480p", (832, 480), marks=pytest.mark.slow),
    ],
)
def test_pictures_have_the_size_of_the_call(name: str, size: tuple[int, int]) -> None:
    assert inputs(name)["image"].size == size
    assert inputs(name, height=640, width=512)["image"].size == (512, 640)
    own = Image.new("RGB", (320, 256))
    assert inputs(name, image=own)["image"] is own


def test_pictures_have_the_channels_that_the_pipeline_takes() -> None:
    modes = ("stable-diffusion-v1-5-img2img", "sd15-t2i-adapter-canny", "qwen-image-layered")
    assert [inputs(name)["image"].mode for name in modes] == ["RGB", "L", "RGBA"]
    painted = inputs("stable-diffusion-inpainting")
    assert (painted["image"].mode, painted["mask_image"].mode) == ("RGB", "L")


def test_the_size_of_a_made_up_picture_is_not_an_argument() -> None:
    """The refiner takes its size from the picture: its call has no height."""
    call = inputs("stable-diffusion-xl-refiner-1.0", height=2048, width=2048)
    assert call.keys() == {"prompt", "image"}
    own = Image.new("RGB", (320, 256))
    with pytest.raises(UnknownName, match="height"):
        inputs("stable-diffusion-xl-refiner-1.0", image=own, height=2048)


def test_embeddings_are_what_the_priors_make() -> None:
    call = inputs("kandinsky-2-2-decoder")
    assert {name: tuple(value.shape) for name, value in call.items()} == {
        "image_embeds": (1, 1280),
        "negative_image_embeds": (1, 1280),
    }
    latents = inputs("stable-cascade")["image_embeddings"]
    assert latents.shape == (1, 16, 24, 24)
    assert latents.dtype == torch.bfloat16
    assert inputs("stable-cascade", height=2048)["image_embeddings"].shape == (1, 16, 48, 24)


@pytest.mark.parametrize("name", ["stable_diffusion_xl_img2img", "stable_diffusion_xl_controlnet"])
def test_what_is_made_up_runs_for_real(name: str) -> None:
    pipe = SMALL_PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    call = {key: value for key, value in small_call(name).items() if key != "image"}
    size = {"height": 64, "width": 64}
    picture = pipe(**default_inputs(pipe, None, call | size)).images
    assert picture.shape == (1, 64, 64, 3)


def test_unknown_arguments_are_answered_with_the_closest() -> None:
    with pytest.raises(UnknownName, match="num_inference_steps"):
        inputs("flux.1-dev", num_inferense_steps=4)


@pytest.mark.parametrize("value", [0, -8, 1.5, True, "1024"])
def test_sizes_and_counts_are_whole_and_positive(value: Any) -> None:
    with pytest.raises(InvalidRequest, match="height"):
        inputs("flux.1-dev", height=value)


QUICK_TO_BUILD = ("flux.1-dev", "flux.2-klein-4b", "kandinsky-2-2-decoder", "stable-cascade")


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK_TO_BUILD else pytest.param(name, marks=pytest.mark.slow)
        for name in pipeline_names()
    ],
)
def test_effective_values_are_those_the_catalogue_states(name: str) -> None:
    found = resolve_call_defaults(built(name), inputs(name))
    wanted = pipeline_entry(name)["call"]["effective"]
    assert {k: found.get(k) for k in wanted} == pytest.approx(wanted, abs=AUDIO_TOLERANCE_S)


def test_what_the_call_says_is_effective() -> None:
    call = inputs("flux.1-dev", height=512, num_inference_steps=4)
    found = resolve_call_defaults(built("flux.1-dev"), call)
    assert (found["height"], found["width"], found["num_inference_steps"]) == (512, 1024, 4)


def test_asking_for_the_defaults_changes_nothing_on_the_pipeline() -> None:
    pipe = SMALL_PIPELINES["stable_diffusion"]()
    before = dict(vars(pipe))
    assert resolve_call_defaults(pipe, {"prompt": "a horse"})["height"] == 64
    assert vars(pipe) == before
