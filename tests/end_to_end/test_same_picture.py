"""The same picture before, under and after every strategy, on real small pipelines on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.end_to_end.small_runs import block_level_options, options_where_possible, untouched
from tests.small_pipelines import SMALL_PIPELINES, picture

from pipefit.planner.apply import apply_options
from pipefit.planner.snapshot import differences, snapshot
from pipefit.strategies.strategy import Option

EXACT: dict[str, Callable[[Any], list[Option]]] = {
    "model_offload": lambda pipe: [Option(strategy="model_offload")],
    "sequential_offload": lambda pipe: [Option(strategy="sequential_offload")],
    "group_offload by leaf": lambda pipe: options_where_possible(
        pipe, "group_offload", {"offload_type": "leaf_level"}
    ),
    "group_offload by block": block_level_options,
    "some group offload, the rest resident": lambda pipe: options_where_possible(
        pipe,
        "group_offload",
        {"offload_type": "block_level", "num_blocks_per_group": 2},
        otherwise="resident",
    ),
}

ROUNDING = 1e-4
"""Largest difference of a pixel (0 to 1) that another order of float32 additions may make here;
seen: 5e-6."""

ROUNDED: dict[str, Callable[[Any], list[Option]]] = {
    "channels_last": lambda pipe: options_where_possible(pipe, "channels_last", {}),
    "attention in slices": lambda pipe: options_where_possible(pipe, "attention", {"slicing": 1}),
    "attention by math": lambda pipe: options_where_possible(
        pipe, "attention", {"backend": "math"}
    ),
}

SLICED_ATTENTION = (
    "stable_diffusion",
    "stable_diffusion_xl",
    "stable_diffusion_xl_img2img",
    "stable_diffusion_xl_controlnet",
)
"""Pipelines with a UNet; transformers cannot slice their attention."""

NO_MATH_ATTENTION = ("sana", "cogvideox")
"""Pipelines whose models call torch's attention in processors of their own."""


def _check(name: str, options: list[Option], tolerance: float) -> None:
    pipe, expected = untouched(name)
    before = snapshot(pipe, with_values=True)
    with apply_options(pipe, options, "cpu"):
        under = picture(pipe, name)
    assert (under - expected).abs().max() <= tolerance
    assert differences(before, snapshot(pipe, with_values=True)) == ()


@pytest.mark.parametrize("name", SMALL_PIPELINES)
def test_after_undoing_everything_the_picture_is_the_first_one(name: str) -> None:
    pipe, expected = untouched(name)
    for options in EXACT.values():
        apply_options(pipe, options(pipe), "cpu").undo()
    assert torch.equal(picture(pipe, name), expected)


@pytest.mark.parametrize("name", SMALL_PIPELINES)
@pytest.mark.parametrize("strategy_name", EXACT)
def test_the_picture_is_bit_identical_under_an_exact_strategy(
    name: str, strategy_name: str
) -> None:
    options = EXACT[strategy_name](untouched(name)[0])
    assert options
    _check(name, options, tolerance=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL_PIPELINES)
@pytest.mark.parametrize("strategy_name", ROUNDED)
def test_the_picture_only_rounds_differently(name: str, strategy_name: str) -> None:
    options = ROUNDED[strategy_name](untouched(name)[0])
    expected = {
        "channels_last": True,
        "attention in slices": name in SLICED_ATTENTION,
        "attention by math": name not in NO_MATH_ATTENTION,
    }[strategy_name]
    assert bool(options) == expected
    if options:
        _check(name, options, tolerance=ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL_PIPELINES)
def test_bfloat16_weights_keep_the_picture_and_come_back_exactly(name: str) -> None:
    pipe, expected = untouched(name)
    options = options_where_possible(pipe, "precision", {"dtype": "bfloat16"})
    before = snapshot(pipe, with_values=True)
    with apply_options(pipe, options, "cpu"):
        assert {str(one.dtype) for one in pipe.text_encoder.parameters()} == {"torch.bfloat16"}
        under = picture(pipe, name)
    # bfloat16 has 8 bits: single pixels of an untrained video decoder move by a third.
    assert (under - expected).abs().mean() < 0.05
    assert differences(before, snapshot(pipe, with_values=True)) == ()
    assert torch.equal(picture(pipe, name), expected)


@pytest.mark.parametrize(("name", "tile_px"), [("stable_diffusion_xl", 32), ("wan", 32)])
def test_tiles_smaller_than_the_picture_change_it_and_larger_ones_do_not(
    name: str, tile_px: int
) -> None:
    pipe, expected = untouched(name)
    before = snapshot(pipe)
    pictures = {}
    for side_px in (tile_px, 256):
        option = Option(strategy="vae_tiling", component="vae", parameters={"tile_px": side_px})
        with apply_options(pipe, [option], "cpu"):
            pictures[side_px] = picture(pipe, name)
    assert pictures[tile_px].shape == expected.shape
    assert not torch.equal(pictures[tile_px], expected)
    assert torch.equal(pictures[256], expected)
    assert differences(before, snapshot(pipe)) == ()


@pytest.mark.parametrize("name", ["stable_diffusion", "flux", "cogvideox"])
def test_slicing_decodes_a_batch_of_two_to_nearly_the_same_pictures(name: str) -> None:
    pipe, _ = untouched(name)
    prompts = {"prompt": ["a red cube", "a blue sphere"]}
    expected = picture(pipe, name, **prompts)
    with apply_options(pipe, [Option(strategy="vae_slicing", component="vae")], "cpu"):
        assert (picture(pipe, name, **prompts) - expected).abs().max() <= ROUNDING
