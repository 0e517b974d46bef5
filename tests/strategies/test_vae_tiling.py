"""Tiles: where they have an effect, which sizes are offered, what is set."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from tests.strategies.described import ADA, decoding, described

from pipefit.strategies import strategy

TILING = strategy("vae_tiling")
SLICING = strategy("vae_slicing")


def image_vae(sample_size: int = 1024) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=sample_size,
    )


def cogvideox_vae() -> Any:
    return diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
    )


def wan_vae() -> Any:
    return diffusers.AutoencoderKLWan(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1)


def sides(vae: Any, side_px: int) -> list[int]:
    component = described(vae, "vae")
    offered = TILING.options(component, decoding(component, side_px=side_px), ADA)
    return [parameters["tile_px"] for parameters in offered]


def test_only_tiles_smaller_than_the_picture_are_offered() -> None:
    assert sides(image_vae(), 1024) == [256, 512]
    assert sides(image_vae(), 1025) == [256, 512, 1024]
    assert sides(image_vae(), 256) == []


def test_sizes_keep_tile_and_overlap_whole_latents() -> None:
    # CogVideoX: 8 pixels a latent, overlaps of a sixth and a fifth: steps of 48 and of 40.
    assert all(side % 48 == 0 for side in sides(cogvideox_vae(), 2000))


@pytest.mark.parametrize("name", ["AutoencoderKLCosmos", "AutoencoderKLKVAEVideo"])
def test_a_flag_that_is_never_read_is_no_tiling(name: str) -> None:
    with torch.device("meta"):
        component = described(getattr(diffusers, name)())
    assert "cannot work in tiles" in str(TILING.refusal(component, {}))
    assert SLICING.refusal(component, {}) is None


def test_models_without_tiles_are_refused() -> None:
    with torch.device("meta"):
        component = described(diffusers.AutoencoderKLTemporalDecoder())
    assert TILING.options(component, decoding(component), ADA) == ()
    assert "cannot work in tiles" in str(TILING.refusal(component, {"tile_px": 256}))
    assert "one picture of a batch" in str(SLICING.refusal(component, {}))


def test_allegro_has_to_tile_and_has_one_size() -> None:
    with torch.device("meta"):
        component = described(diffusers.AutoencoderKLAllegro(), "vae")
    assert component.traits["must_tile"]
    assert TILING.options(component, decoding(component), ADA) == ({},)
    assert "one size only" in str(TILING.refusal(component, {"tile_px": 256}))


@pytest.mark.parametrize("tile_px", [0, 31, -256, "512", 2.5, True])
def test_what_is_no_size_is_refused(tile_px: Any) -> None:
    assert "pixels from 32 up" in str(TILING.refusal(described(image_vae()), {"tile_px": tile_px}))


@pytest.mark.parametrize(
    ("build", "tile_px", "expected"),
    [
        (image_vae, 512, {"tile_sample_min_size": 512, "tile_latent_min_size": 64}),
        (image_vae, 500, {"tile_sample_min_size": 480, "tile_latent_min_size": 60}),
        (
            wan_vae,
            512,
            {"tile_sample_min_height": 512, "tile_sample_stride_width": 384},
        ),
        (
            cogvideox_vae,
            256,
            {
                "tile_sample_min_height": 240,
                "tile_latent_min_height": 30,
                "tile_sample_min_width": 240,
                "tile_latent_min_width": 30,
            },
        ),
    ],
)
def test_tile_and_stride_change_together_and_come_back(
    build: Any, tile_px: int, expected: dict[str, int]
) -> None:
    vae = build()
    before = dict(vars(vae))
    undo = TILING.apply(SimpleNamespace(vae=vae), "vae", {"tile_px": tile_px}, "cpu")
    assert vae.use_tiling
    assert {name: getattr(vae, name) for name in expected} == expected
    undo()
    assert {name: vars(vae)[name] for name in before} == before
    assert set(vars(vae)) == set(before)


def test_tiles_decode_to_the_size_of_the_whole_picture() -> None:
    torch.set_num_threads(1)
    vae = cogvideox_vae().eval()
    latents = torch.randn(1, 16, 1, 32, 36)
    with torch.no_grad():
        whole = vae.decode(latents).sample
        undo = TILING.apply(SimpleNamespace(vae=vae), "vae", {"tile_px": 300}, "cpu")
        tiled = vae.decode(latents).sample
        undo()
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)


def test_slicing_is_offered_for_batches_only() -> None:
    component = described(image_vae(), "vae")
    assert SLICING.options(component, decoding(component), ADA) == ()
    assert SLICING.options(component, decoding(component, batch=2), ADA) == ({},)
