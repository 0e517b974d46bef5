"""Strategies that work on a part at a time: where they apply, what they touch, what comes back."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from tests.strategies.described import ADA, decoding, described
from tests.strategies.test_compute import applied, flux, t5, unet

from pipefit.strategies import quality_of, strategy
from pipefit.strategies.feed_forward_chunking import _sizes
from pipefit.strategies.strategy import Option, Quality

CHUNKING = strategy("feed_forward_chunking")
SPLIT = strategy("guidance_split")
DECODING = strategy("decode_chunks")


def video_unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        layers_per_block=1,
        cross_attention_dim=16,
        num_attention_heads=2,
        num_frames=4,
    ).eval()


def frames_vae() -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",)
    ).eval()


def ltx_vae() -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        patch_size=1,
    ).eval()


def hunyuan_dit() -> Any:
    return diffusers.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        hidden_size=16,
        num_layers=2,
    )


# -- feed_forward_chunking


def test_blocks_are_asked_whether_they_work_in_parts_and_by_which_dimension() -> None:
    found = {build: described(build()).traits["chunked_blocks"] for build in (unet, video_unet)}
    assert found == {
        unet: {"BasicTransformerBlock": True},
        video_unet: {"BasicTransformerBlock": True, "TemporalBasicTransformerBlock": False},
    }


@pytest.mark.parametrize("build", [flux, t5, hunyuan_dit, frames_vae])
def test_blocks_without_parts_are_refused_even_where_they_have_the_method(build: Any) -> None:
    refusal = CHUNKING.refusal(described(build()), {"chunk_size": 1})
    assert "no feed-forward layer that works in parts" in str(refusal)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "number from 1 up, but was None"),
        ({"chunk_size": 0}, "number from 1 up"),
        ({"chunk_size": True}, "number from 1 up"),
        ({"chunk_size": 1, "dim": 2}, "is 0 .batch. or 1 .tokens., but was 2"),
    ],
)
def test_sizes_and_dimensions_that_are_none_are_refused(
    parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        raise ValueError(CHUNKING.refusal(described(unet()), parameters))


@pytest.mark.parametrize(
    ("inputs", "dim", "expected"),
    [
        # SDXL at 1024 px: four parts of the longest, one of the others.
        ([(2, 4096, True), (2, 1024, True)], 1, (4, {"chunk_size": 1024, "dim": 1})),
        ([(2, 4096, True), (2, 1024, True)], 0, (2, {"chunk_size": 1, "dim": 0})),
        # Down to 64 tokens: 64 parts of the longest are too many.
        ([(2, 4096, True), (2, 64, True)], 1, (0, {"chunk_size": 64, "dim": 1})),
        # Blocks over time divide frames, whatever is asked; half the batch divides too.
        ([(50, 9216, True), (18432, 25, False)], 0, (10, {"chunk_size": 5, "dim": 0})),
        ([(1, 100, True)], 0, (1, {"chunk_size": 1, "dim": 0})),
        ([], 0, (0, {})),
    ],
)
def test_a_size_divides_what_every_block_sees(
    inputs: list[tuple[int, int, bool]], dim: int, expected: tuple[int, dict[str, int]]
) -> None:
    assert _sizes(inputs, dim) == expected


def test_blocks_get_their_own_sizes_back() -> None:
    module = video_unet()
    blocks = [part for part in module.modules() if hasattr(part, "set_chunk_feed_forward")]
    blocks[0].set_chunk_feed_forward(2, dim=0)
    before = [(block._chunk_size, block._chunk_dim) for block in blocks]
    undo = applied(CHUNKING, module, {"chunk_size": 1})
    assert {block._chunk_size for block in blocks} == {1}
    undo()
    assert [(block._chunk_size, block._chunk_dim) for block in blocks] == before


# -- guidance_split


@pytest.mark.parametrize("build", [t5, frames_vae])
def test_what_computes_without_a_timestep_is_no_denoiser(build: Any) -> None:
    assert "is no denoiser" in str(SPLIT.refusal(described(build()), {}))


@pytest.mark.parametrize(("batch", "expected"), [(1, ()), (2, ({},)), (3, ()), (4, ({},))])
def test_only_an_even_batch_is_split(batch: int, expected: tuple[Any, ...]) -> None:
    component = described(unet())
    assert SPLIT.options(component, decoding(component, batch=batch), ADA) == expected


def arguments(batch: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(batch, 4, 16, 16, generator=draw),
        "timestep": torch.tensor(3),
        "encoder_hidden_states": torch.randn(batch, 7, 32, generator=draw),
    }


@torch.no_grad()
@pytest.mark.parametrize("return_dict", [True, False])
def test_halves_come_back_as_one_output_of_the_same_kind(return_dict: bool) -> None:
    module = unet().eval()
    seen: list[int] = []
    module.conv_in.register_forward_hook(lambda _, given, out: seen.append(len(given[0])))
    given = {**arguments(4), "return_dict": return_dict}
    expected = module(**given)
    undo = applied(SPLIT, module, {})
    found = module(given.pop("sample"), given.pop("timestep"), **given)
    undo()
    assert seen == [4, 2, 2]
    assert type(found) is type(expected)
    assert (found[0] - expected[0]).abs().max() < 1e-5
    assert "forward" not in vars(module)


@torch.no_grad()
def test_an_odd_batch_goes_through_whole() -> None:
    module = unet().eval()
    expected = module(**arguments(3)).sample
    undo = applied(SPLIT, module, {})
    assert torch.equal(module(**arguments(3)).sample, expected)
    undo()


@torch.no_grad()
def test_every_argument_that_has_the_batch_is_split_and_nothing_else() -> None:
    seen: list[dict[str, Any]] = []

    class Denoiser(torch.nn.Module):
        def forward(self, sample: Any, timestep: Any, **more: Any) -> Any:
            seen.append({"sample": sample, "timestep": timestep, **more})
            return [sample], {"residual": sample}, None

    module = Denoiser()
    undo = applied(SPLIT, module, {})
    folded = torch.arange(8).reshape(8, 1)  # two frames each
    (sample,), residual, nothing = module(
        torch.zeros(4, 1, 1),
        torch.tensor([5]),
        encoder_hidden_states=folded,
        positions=folded,
        added={"ids": torch.arange(4)},
        residuals=(torch.arange(4), [torch.arange(3)]),
    )
    undo()
    assert sample.shape == residual["residual"].shape == (4, 1, 1)
    assert nothing is None
    second = seen[1]
    assert second["sample"].shape == (2, 1, 1)
    assert second["encoder_hidden_states"].flatten().tolist() == [4, 5, 6, 7]
    assert second["positions"] is folded
    assert second["added"]["ids"].tolist() == second["residuals"][0].tolist() == [2, 3]
    assert second["residuals"][1][0].tolist() == [0, 1, 2]
    assert second["timestep"].tolist() == [5]


@torch.no_grad()
def test_embeddings_whose_batch_comes_second_are_not_given_to_both_halves() -> None:
    module = unet().eval()
    undo = applied(SPLIT, module, {})
    stacked = {**arguments(2), "encoder_hidden_states": torch.zeros(5, 2, 7, 32)}
    with pytest.raises(ValueError, match=r"encoder_hidden_states .* has its batch elsewhere"):
        module(**stacked)
    undo()


@torch.no_grad()
def test_a_copy_of_a_split_denoiser_computes_with_its_own_weights() -> None:
    module = unet().eval()
    undo = applied(SPLIT, module, {})
    twin = copy.deepcopy(module)
    for parameter in twin.parameters():
        parameter.zero_()
    undo()
    assert not twin(**arguments(2)).sample.any()
    assert module(**arguments(2)).sample.any()


# -- decode_chunks


def test_how_frames_can_be_decoded_apart_is_read_off_the_class() -> None:
    with torch.device("meta"):
        others = [
            diffusers.AutoencoderKL(block_out_channels=(32,)),
            diffusers.AutoencoderKLMochi(),
            diffusers.AutoencoderKLHunyuanVideo(),
            diffusers.AutoencoderKLCosmos(),
            diffusers.AutoencoderKLMagvit(),
        ]
    found = {
        type(vae).__name__: described(vae).traits["decodes_frames_by"]
        for vae in (frames_vae(), ltx_vae(), *others)
    }
    assert found == {
        "AutoencoderKLTemporalDecoder": "batch",
        "AutoencoderKLLTXVideo": "switch",
        "AutoencoderKL": None,
        "AutoencoderKLMochi": None,
        "AutoencoderKLHunyuanVideo": None,
        "AutoencoderKLCosmos": None,
        "AutoencoderKLMagvit": None,
    }


def test_fewer_frames_than_the_batch_are_offered() -> None:
    component = described(frames_vae())
    offered = {
        batch: DECODING.options(component, decoding(component, batch=batch), ADA)
        for batch in (2, 8, 25)
    }
    assert offered == {
        2: (),
        8: ({"num_frames": 2},),
        25: ({"num_frames": 2}, {"num_frames": 8}),
    }


@pytest.mark.parametrize(
    ("build", "parameters", "message"),
    [
        (unet, {}, "cannot decode other parts"),
        (frames_vae, {}, "num_frames is missing"),
        (frames_vae, {"num_frames": 0}, "number from 1 up"),
        (frames_vae, {"tile_sample_min_num_frames": 8}, "no parameter"),
        (ltx_vae, {"num_frames": 16}, "no parameter"),
        (ltx_vae, {"tile_sample_min_num_frames": 8}, "number from 16 up"),
        (ltx_vae, {"tile_sample_min_num_frames": 20}, "multiple of 8 frames"),
    ],
)
def test_parts_that_cannot_be_decoded_are_refused(
    build: Any, parameters: dict[str, Any], message: str
) -> None:
    assert message in str(DECODING.refusal(described(build()), parameters))


@torch.no_grad()
@pytest.mark.parametrize("num_frames", [2, 3, 8])
def test_frames_come_out_as_from_the_pipeline_s_own_argument(num_frames: int) -> None:
    vae = frames_vae()
    z = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe = SimpleNamespace(vae=vae)
    decode = diffusers.StableVideoDiffusionPipeline.decode_latents
    expected = decode(pipe, z[None], 5, num_frames)
    undo = DECODING.apply(pipe, "vae", {"num_frames": num_frames}, "cpu")
    assert torch.equal(decode(pipe, z[None], 5, 5), expected)
    undo()
    assert "decode" not in vars(vae)


@torch.no_grad()
def test_the_switch_keeps_the_video_s_length_and_is_turned_back() -> None:
    vae = ltx_vae()
    before = {k: v for k, v in vars(vae).items() if k.startswith(("use_", "tile_"))}
    z = torch.randn(1, 8, 6, 2, 2, generator=torch.Generator().manual_seed(0))
    whole = vae.decode(z).sample
    for parameters in ({}, {"tile_sample_min_num_frames": 24}):
        undo = applied(DECODING, vae, parameters)
        assert vae.use_framewise_decoding
        assert vae.tile_sample_min_num_frames - vae.tile_sample_stride_num_frames == 8
        assert vae.decode(z).sample.shape == whole.shape
        undo()
        assert {k: v for k, v in vars(vae).items() if k.startswith(("use_", "tile_"))} == before
    assert torch.equal(vae.decode(z).sample, whole)


@torch.no_grad()
def test_the_switch_shows_what_follows_its_first_part_a_frame_late() -> None:
    """Why it is of the lowest quality; once diffusers is right, it may be of a better one."""
    vae = ltx_vae()
    z = torch.randn(1, 8, 17, 2, 2, generator=torch.Generator().manual_seed(0))
    whole = vae.decode(z).sample
    undo = applied(DECODING, vae, {"tile_sample_min_num_frames": 64})
    parts = vae.decode(z).sample
    undo()

    def off(frame: int, shift: int) -> float:
        return float((parts[:, :, frame] - whole[:, :, frame + shift]).square().mean().sqrt())

    assert off(8, 0) < 0.5 * off(8, -1)  # in the first part, far from its end
    assert off(88, -1) < 0.5 * off(88, 0)  # in the second, far from its beginning
    assert quality_of(Option(strategy="decode_chunks")) is Quality.LOW
    assert quality_of(Option(strategy="decode_chunks", parameters={"num_frames": 2})) is (
        Quality.HIGH
    )
