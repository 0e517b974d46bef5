"""What decides a trace is in the key by which a trace is found again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
from tests.small_pipelines import stable_diffusion

from pipefit.planner.workloads import _described, state_digest


def _halve_the_default_size(pipe: Any) -> None:
    pipe.vae_scale_factor //= 2


def _predict_velocity(pipe: Any) -> None:
    pipe.scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction")


@pytest.mark.parametrize(
    "change",
    [
        _halve_the_default_size,
        _predict_velocity,
        lambda pipe: pipe.vae.enable_tiling(),
        lambda pipe: pipe.vae.enable_slicing(),
        lambda pipe: pipe.unet.set_attention_slice(1),
        lambda pipe: pipe.unet.half(),
    ],
)
def test_a_pipeline_that_would_compute_otherwise_has_another_key(
    change: Callable[[Any], None],
) -> None:
    pipe = stable_diffusion()
    before = state_digest(pipe)
    assert state_digest(stable_diffusion()) == before
    change(pipe)
    assert state_digest(pipe) != before


def test_a_call_does_not_change_the_key() -> None:
    pipe = stable_diffusion()
    before = state_digest(pipe)
    pipe("a cube", height=64, width=64, num_inference_steps=1, output_type="latent")
    assert state_digest(pipe) == before


def test_arguments_inside_a_dictionary_are_told_apart() -> None:
    assert _described({"scale": 0.5}) != _described({"scale": 0.5, "gligen": [1, 2]})
