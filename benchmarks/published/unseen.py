"""Peaks of other people that no rule was chosen by: they were asked for when all rules stood.

In the form of the records, so that the same code asks for them. All are what
``torch.cuda.max_memory_allocated`` counts, over 1024**3, as the scripts behind them do; one, SD3's,
is in a note of the records' file, too. What comes out wrong stays here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.published.records import Record

FIELDS = (
    "batch_size", "cpu_ram_gib", "date", "flags", "frames", "guidance_scale", "height",
    "max_sequence_length", "metric", "metric_scope", "model_id", "peak_reserved_gib", "steps",
    "weights_gib", "width",
)  # fmt: skip
LEVERS = (
    "attention", "compile", "fuse_qkv", "layerwise_casting", "offload", "offload_params", "other",
    "quantization", "vae_slicing", "vae_tiling",
)  # fmt: skip

INT8 = {"quantization": "bitsandbytes 8-bit (transformer)"}
NF4 = {"quantization": "bnb nf4 (transformer)"}
FP8 = {"layerwise_casting": "transformer fp8_e4m3 storage"}
TILED = {"vae_tiling": True}
OFFLOADED = {"offload": "model"}
BY_GROUPS = {"offload": "group", "offload_params": "of components and on streams not stated"}
UNMOVABLE = {"other": "8-bit layers that could not leave the GPU"}

HUNYUAN_VIDEO: tuple[tuple[str, float, dict[str, Any]], ...] = (
    ("bf16", 60.10, {}),
    ("bf16-offload", 28.87, OFFLOADED),
    ("bf16-tiling", 43.58, TILED),
    ("8bit", 49.90, INT8),
    ("8bit-offload", 35.66, INT8 | OFFLOADED | UNMOVABLE),
    ("8bit-tiling", 36.92, INT8 | TILED),
    ("8bit-offload-tiling", 26.18, INT8 | OFFLOADED | TILED | UNMOVABLE),
    ("4bit", 42.96, NF4),
    ("4bit-offload", 21.99, NF4 | OFFLOADED),
    ("4bit-tiling", 26.42, NF4 | TILED),
    ("4bit-offload-tiling", 14.15, NF4 | OFFLOADED | TILED),
    ("fp8", 51.70, FP8),
    ("fp8-offload", 21.99, FP8 | OFFLOADED),
    ("fp8-tiling", 35.17, FP8 | TILED),
    ("fp8-offload-tiling", 20.44, FP8 | OFFLOADED | TILED),
    ("bf16-groups-of-8-tiling", 15.67, BY_GROUPS | TILED),
    ("bf16-groups-of-1-tiling", 7.72, BY_GROUPS | TILED),
    ("bf16-leaves-tiling", 6.66, BY_GROUPS | TILED),
    ("fp8-leaves-tiling", 6.56, FP8 | BY_GROUPS | TILED),
)
"""What was done, the peak in GiB, and levers. That 8-bit layers stayed is the source's footnote."""

QWEN_DECODED = (
    (512, 512, 1.274, 1.311), (768, 768, 2.563, 2.992), (832, 1248, 4.331, 5.211),
    (1024, 1024, 4.369, 5.254), (1088, 1920, 8.468, 10.408), (1280, 1280, 6.693, 8.188),
    (1536, 1024, 6.434, 7.857), (2048, 2048, 16.754, 20.799),
)  # fmt: skip
"""Height, width, GiB allocated, GiB by which what is reserved grew; two more sizes are records."""

QWEN_ENCODED = (
    (512, 512, 0.900, 0.711), (768, 768, 1.724, 1.594), (832, 1248, 2.854, 2.824),
    (1088, 1920, 5.498, 5.672), (1280, 1280, 4.364, 4.459),
)  # fmt: skip
"""The same; three more sizes are records."""


def unseen() -> Iterator[Record]:
    """Yield the peaks, each with its source."""
    blog = {
        "source": "https://huggingface.co/blog/video_gen",
        "date": "2025-01",
        "gpu": "A100 80GB",
        "height": 512,
        "width": 768,
        "frames": 121,
        "steps": 50,
        "max_sequence_length": 128,
    }
    yield _record("video-blog-ltx", "LTX-Video-0.9.0", 17.75, **blog)
    yield _record("video-blog-cogvideox1.5", "CogVideoX1.5-5B", 36.51, **blog)
    for name, peak, levers in HUNYUAN_VIDEO:
        yield _record(f"video-blog-hunyuan-{name}", "HunyuanVideo", peak, levers=levers, **blog)
    yield _record(  # the tables of this one state what is in use after the call
        "quanto-blog-sd3",
        "SD3-medium",
        18.765,
        source="https://huggingface.co/blog/quanto-diffusers",
        date="2024-07",
        gpu="H100",
        dtypes={"core": "float16"},
        software={"torch": "2.4.0", "diffusers": ""},
    )
    invoke = {
        "date": "2026-06",
        "source": "https://github.com/invoke-ai/InvokeAI/pull/9305",
        "pipeline_class": "AutoencoderKLQwenImage",
        "metric": "peak allocated, and growth of reserved",
        "gpu": "RTX 4090",
        "software": {"torch": "2.7.1"},
        "dtypes": {"core": None, "vae": "float16"},
        "frames": 1,
    }
    for kind, sizes in (("decode", QWEN_DECODED), ("encode", QWEN_ENCODED)):
        for height, width, peak, reserved in sizes:
            yield _record(
                f"invoke-qwenvae-{kind}-{height}x{width}",
                "Qwen-Image VAE",
                peak,
                kind=f"vae_{kind}",
                height=height,
                width=width,
                peak_reserved_gib=reserved,
                **invoke,
            )


def _record(name: str, pipeline: str, peak_gib: float, **given: Any) -> Record:
    levers = dict.fromkeys(LEVERS) | given.pop("levers", {})
    return dict.fromkeys(FIELDS) | {
        "id": name,
        "kind": "pipeline_peak",
        "pipeline": pipeline,
        "pipeline_class": "",
        "peak_kind": "allocated",
        "peak_memory_gib": peak_gib,
        "dtypes": {"core": "bfloat16"},
        "software": {"torch": None, "diffusers": ""},
        "quality": "A",
        "use_for_peak_check": True,
        "levers": levers,
        **given,
    }
