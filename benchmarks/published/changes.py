"""What published runs did to a pipeline besides loading it, done to the weightless one.

So that it is traced and not estimated: a safety checker left out, projections fused, an adapter
loaded, an older diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from benchmarks.published.older_versions import as_until_0_30, as_until_0_36, as_until_0_37
from benchmarks.published.partial_calls import prompt_only, with_embeddings
from pipefit.planner.build import build_pipeline, quietly

IP_ADAPTER_TOKENS = 4
"""Image tokens of the plain IP-Adapter (h94/IP-Adapter, models/ip-adapter_sd15.bin)."""


def no_safety_checker(pipe: DiffusionPipeline) -> None:
    """Drop the checker, as ``safety_checker=None`` does."""
    pipe.register_modules(safety_checker=None, feature_extractor=None)


def no_vae_upcast(pipe: DiffusionPipeline) -> None:
    """Decode in the dtype that the weights have."""
    pipe.vae.register_to_config(force_upcast=False)


def plain_attention(pipe: DiffusionPipeline) -> None:
    """Scores and softmax as tensors of their own, as without SDPA."""
    for name in ("unet", "vae"):
        getattr(pipe, name).set_attn_processor(AttnProcessor())


def fuse_qkv(pipe: DiffusionPipeline) -> None:
    """Fused projections beside the plain ones, as ``fuse_qkv_projections`` leaves them."""
    for component in pipe.components.values():
        if hasattr(component, "fuse_qkv_projections"):
            component.fuse_qkv_projections()


def t5_in_16_bits(pipe: DiffusionPipeline) -> None:
    """A cast after the load takes along what the load kept in float32."""
    pipe.text_encoder.to(torch.float16)


def ip_adapter(pipe: DiffusionPipeline) -> None:
    """The plain IP-Adapter of SD 1.5 and its image encoder, CLIP ViT-H/14 (632 M parameters)."""
    with torch.device("meta"):
        encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=1280,
                intermediate_size=5120,
                num_hidden_layers=32,
                num_attention_heads=16,
                patch_size=14,
                image_size=224,
                projection_dim=1024,
                hidden_act="gelu",
            )
        )
    pipe.register_modules(image_encoder=encoder.to(pipe.unet.dtype).eval())
    text_width = pipe.unet.config.cross_attention_dim
    width = IP_ADAPTER_TOKENS * text_width
    image_proj = {
        "proj.weight": torch.zeros(width, encoder.config.projection_dim),
        "proj.bias": torch.zeros(width),
        "norm.weight": torch.zeros(text_width),
        "norm.bias": torch.zeros(text_width),
    }
    crossing = [
        processor
        for processor in pipe.unet.attn_processors
        if processor.endswith("attn2.processor") and "motion_modules" not in processor
    ]
    projections: dict[str, Tensor] = {}
    for i, processor in enumerate(crossing):
        module = pipe.unet.get_submodule(processor.removesuffix(".processor"))
        for name in ("to_k_ip", "to_v_ip"):
            shape = (module.to_q.out_features, text_width)
            projections[f"{2 * i + 1}.{name}.weight"] = torch.zeros(shape)
    with quietly():
        pipe.load_ip_adapter(
            {"image_proj": image_proj, "ip_adapter": projections},
            subfolder="",
            weight_name="",
            low_cpu_mem_usage=False,
        )


def first_unet_beside(pipe: DiffusionPipeline) -> None:
    """``from_pipe`` leaves the UNet of the first pipeline where it was, beside the new one."""
    first, _ = build_pipeline("stable-diffusion-v1-5", dtype={"default": "float16"})
    pipe.text_encoder.add_module("unet_of_the_first_pipeline", first.unet)
    pipe.text_encoder.add_module("checker_of_the_first_pipeline", first.safety_checker)


CHANGES: Mapping[str, Callable[[DiffusionPipeline], None]] = {
    "no safety checker": no_safety_checker,
    "VAE without upcast": no_vae_upcast,
    "attention without SDPA": plain_attention,
    "fused QKV": fuse_qkv,
    "T5 wholly in 16 bits": t5_in_16_bits,
    "IP-Adapter": ip_adapter,
    "first UNet beside": first_unet_beside,
    "prompt only": prompt_only,
    "embeddings given": with_embeddings,
    "diffusers 0.30": as_until_0_30,
    "diffusers 0.36": as_until_0_36,
    "diffusers 0.37": as_until_0_37,
}
"""By the name that tables show."""
