"""Real pipelines, small and with seeded random weights, that run on a CPU in about a second.

Every class is the library's own; only widths, depths and vocabularies are small.
``SMALL_PIPELINES`` maps a name to its builder, ``CALLS`` the same name to the arguments of a quick
call. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image

from pipefit.planner.standins import stand_in_tokenizer
from pipefit.strategies.latent_output import Undecoded

VOCABULARY = 1000
"""Tokens that the small text encoders know; the stand-in tokenizers stay below."""

TEXT_WIDTH = 32
PICTURE_PX = 64


def stable_diffusion() -> Any:
    """SD 1.x: one CLIP encoder, a UNet with cross attention."""
    torch.manual_seed(0)
    return diffusers.StableDiffusionPipeline(
        vae=_image_vae(),
        text_encoder=_clip(transformers.CLIPTextModel),
        tokenizer=_clip_tokenizer(),
        unet=_unet(),
        scheduler=diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> Any:
    """SDXL: two CLIP encoders, size embeddings, an autoencoder that asks for float32."""
    torch.manual_seed(0)
    return diffusers.StableDiffusionXLPipeline(**_xl_components())


def stable_diffusion_xl_img2img() -> Any:
    """SDXL from a picture: the autoencoder runs before and after denoising."""
    torch.manual_seed(0)
    return diffusers.StableDiffusionXLImg2ImgPipeline(**_xl_components())


def stable_diffusion_xl_controlnet() -> Any:
    """SDXL with a ControlNet, which takes turns with the UNet in every step."""
    torch.manual_seed(0)
    controlnet = diffusers.ControlNetModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        conditioning_embedding_out_channels=(16, 32),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=6 * 8 + TEXT_WIDTH,
        cross_attention_dim=2 * TEXT_WIDTH,
    )
    # A fresh ControlNet ends in zero convolutions and would add nothing at all.
    for parameter in controlnet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return diffusers.StableDiffusionXLControlNetPipeline(**_xl_components(), controlnet=controlnet)


def stable_diffusion_3() -> Any:
    """SD3: two CLIP encoders and T5, a transformer over both kinds of tokens."""
    torch.manual_seed(0)
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=32,
            patch_size=1,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=2 * TEXT_WIDTH,
            out_channels=4,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=_image_vae(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=_clip(transformers.CLIPTextModelWithProjection),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_clip(transformers.CLIPTextModelWithProjection),
        tokenizer_2=_clip_tokenizer(),
        text_encoder_3=_t5(),
        tokenizer_3=_t5_tokenizer(),
    )


def flux() -> Any:
    """FLUX.1: CLIP and T5, double and single stream blocks."""
    torch.manual_seed(0)
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=_image_vae(latent_channels=1, shift_factor=0.06, scaling_factor=1.5),
        text_encoder=_clip(transformers.CLIPTextModel),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_t5(),
        tokenizer_2=_t5_tokenizer(),
        transformer=diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=TEXT_WIDTH,
            axes_dims_rope=(4, 4, 8),
        ),
    )


def pixart_sigma() -> Any:
    """PixArt-Σ: T5 alone, a transformer with cross attention."""
    torch.manual_seed(0)
    return diffusers.PixArtSigmaPipeline(
        tokenizer=_t5_tokenizer(),
        text_encoder=_t5(),
        vae=_image_vae(),
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=32,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            caption_channels=32,
            in_channels=4,
            cross_attention_dim=24,
            out_channels=8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            use_additional_conditions=False,
        ),
        scheduler=diffusers.DDIMScheduler(),
    )


def sana() -> Any:
    """Sana: a Gemma-2 language model as text encoder, a deep-compression autoencoder."""
    torch.manual_seed(0)
    gemma = transformers.Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        attn_implementation="eager",
    )
    return diffusers.SanaPipeline(
        tokenizer=stand_in_tokenizer(
            transformers.GemmaTokenizerFast, {"model_max_length": 300, "padding_side": "right"}
        ),
        text_encoder=transformers.Gemma2Model(gemma).eval(),
        vae=diffusers.AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        ).eval(),
        transformer=diffusers.SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=16,
            sample_size=32,
        ).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def cogvideox() -> Any:
    """CogVideoX: T5, a video transformer, an autoencoder that decodes frames in batches."""
    torch.manual_seed(0)
    return diffusers.CogVideoXPipeline(
        tokenizer=_t5_tokenizer(),
        text_encoder=_t5(),
        vae=diffusers.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
            sample_height=96,
            sample_width=160,
        ).eval(),
        transformer=diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            time_embed_dim=2,
            text_embed_dim=32,
            num_layers=2,
            sample_width=12,
            sample_height=8,
            sample_frames=9,
            patch_size=2,
            temporal_compression_ratio=4,
            max_text_seq_length=16,
        ).eval(),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )


def wan() -> Any:
    """Wan 2.1: UMT5, a video transformer, an autoencoder with cached features."""
    torch.manual_seed(0)
    return diffusers.WanPipeline(**_wan_components())


def wan_two_experts() -> Any:
    """Wan 2.2: as 2.1 with two transformers, one for the noisy steps and one for the rest."""
    torch.manual_seed(0)
    components = _wan_components()
    return diffusers.WanPipeline(
        **components, transformer_2=_wan_transformer(), boundary_ratio=0.875
    )


def stable_video_diffusion() -> Any:
    """SVD: a picture's embedding in the place of a prompt, frames as a batch."""
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=224,
        intermediate_size=37,
        patch_size=32,
    )
    return diffusers.StableVideoDiffusionPipeline(
        vae=diffusers.AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            latent_channels=4,
        ).eval(),
        image_encoder=transformers.CLIPVisionModelWithProjection(vision).eval(),
        unet=diffusers.UNetSpatioTemporalConditionModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            sample_size=32,
            in_channels=8,
            out_channels=4,
            down_block_types=(
                "CrossAttnDownBlockSpatioTemporal",
                "DownBlockSpatioTemporal",
            ),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            cross_attention_dim=32,
            num_attention_heads=(2, 4),
            projection_class_embeddings_input_dim=96,
            addition_time_embed_dim=32,
        ).eval(),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            prediction_type="v_prediction",
            use_karras_sigmas=True,
        ),
        feature_extractor=transformers.CLIPImageProcessor(),
    )


def ltx() -> Any:
    """LTX: T5, a video transformer, an autoencoder that decodes all frames at once."""
    torch.manual_seed(0)
    return diffusers.LTXPipeline(
        tokenizer=_t5_tokenizer(),
        text_encoder=_t5(),
        vae=diffusers.AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(64, 64, 64, 64),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            encoder_causal=True,
            decoder_causal=False,
        ).eval(),
        transformer=diffusers.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=32,
        ).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


SMALL_PIPELINES: Mapping[str, Callable[[], Any]] = {
    builder.__name__: builder
    for builder in (
        stable_diffusion,
        stable_diffusion_xl,
        stable_diffusion_xl_img2img,
        stable_diffusion_xl_controlnet,
        stable_diffusion_3,
        flux,
        pixart_sigma,
        sana,
        cogvideox,
        wan,
        wan_two_experts,
    )
}

FURTHER_PIPELINES: Mapping[str, Callable[[], Any]] = {
    builder.__name__: builder for builder in (stable_video_diffusion, ltx)
}
"""Of interest to strategies that few others can have; no test goes over all of them."""

_PICTURE = {"height": PICTURE_PX, "width": PICTURE_PX}
_VIDEO = {"height": 48, "width": 64, "num_frames": 9, "max_sequence_length": 16}

_CALLS: Mapping[str, Mapping[str, Any]] = {
    "stable_diffusion": _PICTURE,
    "stable_diffusion_xl": _PICTURE,
    "stable_diffusion_xl_img2img": {"strength": 1.0},
    "stable_diffusion_xl_controlnet": _PICTURE,
    "stable_diffusion_3": {**_PICTURE, "max_sequence_length": 16},
    "flux": {**_PICTURE, "max_sequence_length": 16},
    "pixart_sigma": {
        **_PICTURE,
        "max_sequence_length": 16,
        "use_resolution_binning": False,
        "clean_caption": False,
    },
    "sana": {
        "height": 32,
        "width": 32,
        "max_sequence_length": 16,
        "use_resolution_binning": False,
        "clean_caption": False,
        "complex_human_instruction": None,
    },
    "cogvideox": _VIDEO,
    "wan": _VIDEO,
    "wan_two_experts": _VIDEO,
    "stable_video_diffusion": {**_PICTURE, "num_frames": 5},
    "ltx": {"height": 64, "width": 64, "num_frames": 33, "max_sequence_length": 16},
}

_PICTURE_ARGUMENTS = {
    "stable_diffusion_xl_img2img": "image",
    "stable_diffusion_xl_controlnet": "image",
}
"""Which argument of the call wants a picture."""


def small_call(name: str) -> dict[str, Any]:
    """Return arguments of a two-step call of the pipeline *name*; the seed is part of them."""
    call = {
        "prompt": "a red cube on a blue sphere",
        "num_inference_steps": 2,
        "output_type": "np",
        "generator": torch.Generator().manual_seed(0),
        **_CALLS[name],
    }
    if name in _PICTURE_ARGUMENTS:
        generator = torch.Generator().manual_seed(1)
        call[_PICTURE_ARGUMENTS[name]] = torch.rand(
            1, 3, PICTURE_PX, PICTURE_PX, generator=generator
        )
    if name == "stable_video_diffusion":  # it reads the picture with numpy
        del call["prompt"]
        call["image"] = Image.linear_gradient("L").convert("RGB")
    return call


def picture(pipe: Any, name: str, **changed: Any) -> torch.Tensor:
    """Call *pipe* with the small call of *name* and return its pictures or frames."""
    output = pipe(**{**small_call(name), **changed})
    if isinstance(output, Undecoded):
        output = output.decode(pipe)
    pictures = output.frames if hasattr(output, "frames") else output.images
    return torch.as_tensor(pictures)


def _xl_components() -> dict[str, Any]:
    return {
        "vae": _image_vae(force_upcast=True),
        "text_encoder": _clip(transformers.CLIPTextModel),
        "tokenizer": _clip_tokenizer(),
        "text_encoder_2": _clip(transformers.CLIPTextModelWithProjection),
        "tokenizer_2": _clip_tokenizer(),
        "unet": _unet(
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 1),
            projection_class_embeddings_input_dim=6 * 8 + TEXT_WIDTH,
            cross_attention_dim=2 * TEXT_WIDTH,
        ),
        "scheduler": diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear"),
    }


def _wan_components() -> dict[str, Any]:
    return {
        "tokenizer": _t5_tokenizer(),
        "text_encoder": _t5(transformers.UMT5EncoderModel, transformers.UMT5Config),
        "vae": diffusers.AutoencoderKLWan(
            base_dim=3,
            z_dim=16,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
        ).eval(),
        "transformer": _wan_transformer(),
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }


def _wan_transformer() -> Any:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval()


def _unet(**changed: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        **{
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "sample_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (2, 4),
            "use_linear_projection": True,
            "cross_attention_dim": TEXT_WIDTH,
            **changed,
        }
    ).eval()


def _image_vae(**changed: Any) -> Any:
    return diffusers.AutoencoderKL(
        **{
            "block_out_channels": (32, 64),
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
            "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
            "latent_channels": 4,
            "sample_size": PICTURE_PX,
            "force_upcast": False,
            **changed,
        }
    ).eval()


def _clip(cls: Any) -> Any:
    return cls(
        transformers.CLIPTextConfig(
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            hidden_size=TEXT_WIDTH,
            intermediate_size=37,
            num_attention_heads=4,
            num_hidden_layers=3,
            vocab_size=VOCABULARY,
            projection_dim=TEXT_WIDTH,
        )
    ).eval()


def _t5(cls: Any = transformers.T5EncoderModel, config: Any = transformers.T5Config) -> Any:
    return cls(
        config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=37,
            num_layers=2,
            num_heads=4,
            pad_token_id=0,
            eos_token_id=1,
        )
    ).eval()


def _clip_tokenizer() -> Any:
    return stand_in_tokenizer(transformers.CLIPTokenizer, {"model_max_length": 77})


def _t5_tokenizer() -> Any:
    return stand_in_tokenizer(transformers.T5TokenizerFast, {"model_max_length": 512})
