"""What measurements of one component called it with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Record = Mapping[str, Any]
ComponentCall = tuple[str, dict[str, Any]]
"""A component, and the call of :class:`benchmarks.published.partial_calls.OneComponent`."""

BF16 = "bfloat16"
ATTENTION = "one attention call"
"""Stands for a component where only torch's attention was called."""
FORWARD_INPUTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "FluxTransformer2DModel": (
        "transformer",
        {
            "hidden_states": (BF16, (1, 4096, 64)),
            "encoder_hidden_states": (BF16, (1, 512, 4096)),
            "pooled_projections": (BF16, (1, 768)),
            "timestep": (BF16, (1,)),
            "img_ids": (BF16, (4096, 3)),
            "txt_ids": (BF16, (512, 3)),
            "guidance": (BF16, (1,)),
        },
    ),
    "LTXVideoTransformer3DModel": (
        "transformer",
        {
            "hidden_states": (BF16, (1, 7392, 128)),
            "encoder_hidden_states": (BF16, (1, 256, 4096)),
            "encoder_attention_mask": (BF16, (1, 256)),
            "timestep": (BF16, (1,)),
            "video_coords": (BF16, (1, 3, 7392)),
        },
    ),
    # 4096 + 512 tokens, 48 query and 12 key heads of 128 (Krea2Transformer2DModel's defaults).
    "Krea2 transformer, one attention call": (
        ATTENTION,
        {
            "query": (BF16, (1, 48, 4608, 128)),
            "key": (BF16, (1, 12, 4608, 128)),
            "value": (BF16, (1, 12, 4608, 128)),
            "attn_mask": ("bool", (1, 1, 1, 4608)),
            "enable_gqa": True,
        },
    ),
    "UNet2DConditionModel": (
        "unet",
        {
            "sample": (BF16, (1, 4, 128, 128)),
            "encoder_hidden_states": (BF16, (1, 77, 2048)),
            "timestep": (BF16, (1,)),
            "added_cond_kwargs": {
                "text_embeds": (BF16, (1, 1280)),
                "time_ids": (BF16, (1, 6)),
            },
        },
    ),
}
"""Class -> component and what diffusers' own benchmarks call it with
(benchmarks/benchmarking_*.py in huggingface/diffusers)."""


def component_call(record: Record, dtype: Mapping[str, str]) -> ComponentCall | None:
    """Return what *record*, one of OF_ONE_COMPONENT, measured; None if its inputs are not known."""
    return OF_ONE_COMPONENT[record["kind"]](record, dtype)


def _vae_decode(record: Record, dtype: Mapping[str, str]) -> ComponentCall:
    shape = (1, *_latent_channels(record), record["height"] // 8, record["width"] // 8)
    return "vae", {"entry": "decode", "inputs": {"z": (_vae_dtype(dtype), shape)}}


def _vae_encode(record: Record, dtype: Mapping[str, str]) -> ComponentCall:
    frames = (record["frames"],) if record["frames"] else ()
    shape = (1, 3, *frames, record["height"], record["width"])
    return "vae", {"entry": "encode", "inputs": {"x": (_vae_dtype(dtype), shape)}}


def _latent_channels(record: Record) -> tuple[int, ...]:
    if record["pipeline_class"] == "AutoencoderKLQwenImage":
        return (16, record["frames"])
    return (4,)


def _vae_dtype(dtype: Mapping[str, str]) -> str:
    return dtype.get("vae", dtype.get("default", "bfloat16"))


def _forward(record: Record, dtype: Mapping[str, str]) -> ComponentCall | None:
    found = FORWARD_INPUTS.get(record["pipeline_class"])
    return None if found is None else (found[0], {"inputs": found[1]})


OF_ONE_COMPONENT: Mapping[str, Callable[[Record, Mapping[str, str]], ComponentCall | None]] = {
    "vae_decode": _vae_decode,
    "vae_encode": _vae_encode,
    "component_forward": _forward,
}
"""A record's ``kind`` -> its call."""
