"""Published peak measurements, and what pipefit is asked to predict each of them.

A record says in words what somebody ran. :func:`setup_of` turns it into a catalogue pipeline, a
call, a GPU and strategies by rules that look at the record's fields, never at its figure or its
name. What a source did besides (no safety checker, an older diffusers) is in changes.py.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.published.changes import CHANGES
from benchmarks.published.component_calls import (
    ATTENTION,
    BF16,
    OF_ONE_COMPONENT,
    component_call,
)
from benchmarks.published.partial_calls import AttentionCall, OneComponent
from pipefit.cost_models.context import bare_context_bytes
from pipefit.cost_models.machine import Gpu
from pipefit.strategies.compile import MODES

Record = Mapping[str, Any]

RECORDS = Path(__file__).parents[3] / "shared" / "data" / "published_measurements.json"
"""Where the records lie beside a checkout of the project; ``--records`` says otherwise."""

PIPELINES: Mapping[str, str] = {
    "AnimateDiff": "animatediff-sd15-v1-5-2",
    "CogVideoX VAE": "cogvideox-5b",
    "CogVideoX-2b": "cogvideox-2b",
    "CogVideoX-5b": "cogvideox-5b",
    "CogVideoX1.5-5B": "cogvideox1.5-5b",
    "ERNIE-Image-Turbo": "ernie-image-turbo",
    "FLUX.1-dev": "flux.1-dev",
    "HunyuanVideo": "hunyuan-video",
    "Krea-2": "krea-2-turbo",
    "LTX-2.3": "ltx-2.3",
    "LTX-Video-0.9.0": "ltx-video-0.9.0",
    "LTX-Video-0.9.7 13B": "ltx-video-0.9.7-13b",
    "Latte": "latte-1",
    "Qwen-Image VAE": "qwen-image",
    "SD1.4": "stable-diffusion-v1-5",
    "SD1.5": "stable-diffusion-v1-5",
    "SD1.5 (DreamShaper)": "stable-diffusion-v1-5",
    "SD1.5 ControlNet": "sd15-controlnet-canny",
    "SD1.5 img2img": "stable-diffusion-v1-5-img2img",
    "SD1.5 inpaint": "stable-diffusion-v1-5-inpaint",
    "SD3-medium": "stable-diffusion-3-medium",
    "SDXL": "stable-diffusion-xl-base-1.0",
    "SDXL ControlNet": "sdxl-controlnet-canny",
    "SDXL T2I-Adapter": "sdxl-t2i-adapter-canny",
    "SDXL VAE": "stable-diffusion-xl-base-1.0",
    "SSD-1B": "ssd-1b",
    "Z-Image-Turbo": "z-image-turbo",
}
"""A record's ``pipeline`` -> catalogue name."""

GPUS: tuple[tuple[str, str], ...] = (
    ("H100", "h100-sxm"),
    ("A100 80GB", "a100-80gb"),
    ("A10G", "a10g"),
    ("L40 ", "l40"),
    ("RTX 4090", "rtx-4090"),
    ("RTX 5090", "rtx-5090"),
    ("RTX 6000 Ada", "rtx-6000-ada"),
    ("T4", "t4"),
)
"""What a record's ``gpu`` contains -> catalogue name, the first that fits."""

UNSTATED_GPU = "a100-80gb"
"""Taken where a source names no GPU: what most of the sources with such rows ran on."""

RELEASES = (("2024-10", "2.5"), ("2025-01", "2.6"), ("2025-04", "2.7"))
"""Month and version of releases of torch; a nightly counts as the next of them."""

DTYPES = ("bfloat16", "float16", "float32")

OTHERS = ("IP-Adapter", "LoRA", "use_pe=False")
"""What ``levers.other`` may contain: done to the pipeline, too small to be seen, or the default."""

CLIP_TOKENS = 77
"""A prompt's length that is no argument of the call: CLIP has no other."""

CHECKERLESS = "diffusion-fast"
"""Sources, by a part of their ``source``, whose pipelines have no safety checker."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One question to pipefit."""

    pipeline: str
    """Catalogue name."""
    gpu: str
    dtype: Mapping[str, str] | None = None
    """Load dtype by component, ``default`` for the rest; None: the catalogue's."""
    call: Mapping[str, Any] = field(default_factory=dict)
    strategies: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    """Names in :data:`CHANGES`, in order."""
    component: str = ""
    """Only this component is called, by ``call``; empty: the pipeline is."""
    torch: str = ""
    """Its version where the record states one; empty: the installed one's."""

    @property
    def key(self) -> str:
        """Equal for equal questions."""
        return json.dumps([vars(self)], sort_keys=True, default=str)


class Unusable(Exception):
    """Why a record cannot be asked, one sentence."""


def usable(record: Record) -> bool:
    """Whether the record's metric and conditions are known well enough to compare a peak with."""
    return bool(record["use_for_peak_check"]) and record["quality"] in ("A", "B")


def load(path: Path = RECORDS) -> list[Record]:
    """Return all records of the file."""
    found: list[Record] = json.loads(path.read_text(encoding="utf-8"))
    return found


def setup_of(record: Record) -> Setup:
    """Return what to ask for *record*.

    Raises:
        Unusable: if its pipeline is not in the catalogue, or a part of it cannot be asked for.
    """
    name = PIPELINES.get(record["pipeline"])
    if name is None:
        raise Unusable(f"{record['pipeline']} is not a pipeline of diffusers 0.42.1")
    _refuse_what_is_not_ours(record["levers"])
    dtype = _dtype(record)
    common: dict[str, Any] = {"pipeline": name, "gpu": _gpu(record), "dtype": dtype}
    common["torch"] = _torch(record)
    if record["pipeline_class"] == "LTX2Pipeline":
        return Setup(**common, **_ltx2_stage(record), strategies=_strategies(record))
    if record["kind"] in OF_ONE_COMPONENT:
        found = component_call(record, dtype or {})
        if found is None:
            raise Unusable(f"the inputs of its {record['pipeline_class']} are not known")
        component, call = found
        return Setup(
            **common,
            component=component,
            call=call,
            strategies=_strategies(record),
            changes=_changes(record),
        )
    return Setup(
        **common, call=_call(record), strategies=_strategies(record), changes=_changes(record)
    )


def phases_of(record: Record) -> Callable[[str], bool]:
    """Return which phases of the call the record's figure is of."""
    if str(record["metric_scope"]).startswith("denoising"):
        return lambda phase: phase not in ("load", "decode")
    return lambda phase: True


def is_of_whole_process(record: Record) -> bool:
    """Whether the record's host RAM is that of a process which loaded the pipeline itself."""
    return str(record["metric_scope"]).startswith("whole process")


def counts_inputs(record: Record) -> bool:
    """Whether the record's figure holds what the call was given."""
    return not str(record["metric"]).startswith("extra memory")


def states_growth(record: Record) -> bool:
    """Whether the record's reserved figure is how much was added to what was reserved before."""
    return "growth of reserved" in str(record["metric"])


def outside_bytes(record: Record, gpu: Gpu) -> int:
    """Return what the record's process memory leaves out: what was in use before it started."""
    if "baseline_subtracted" in (record["flags"] or ()):
        return bare_context_bytes(gpu)
    return 0


def weights_are_published(record: Record) -> bool:
    """Whether a format is in play that pipefit does not know, so that the weights are the record's.

    The growth above them is predicted all the same.
    """
    quantised = record["levers"]["quantization"]
    return bool(quantised) and not quantization_options(record)


LOADING = "of loading: bitsandbytes quantises on the GPU, all such weights together before offload"
RUN_AHEAD = "run-ahead: launch, copy and compute times are known to 20 % at best"
EXPLANATIONS: tuple[tuple[str, str], ...] = (
    (
        "quanto-fp8-gpu",
        "weights fit if T5's wo was quantised too, which the loader's source says is left out",
    ),
    (
        "quanto-int4-gpu",
        "weights fit if T5's wo was in float32, which the loader's source says is in 16 bits",
    ),
    (
        "torchao-float8_weight_only",
        "layers unpacked in float32 as torchao 0.18 does; in 16 bits they would fit",
    ),
    (
        "hunyuan-8bit",
        "until 0.45 bitsandbytes kept columns with outliers in 16 bits; how many is in the weights",
    ),
    ("ltx23", "read from the whole GPU; two runs of one encode differ by 9 %"),
    (
        "ssd-1b-a100-bf16-sdpa-compile",
        "what inductor times was cached: it grew by what torch 2.2's plans, to the digit",
    ),
)
"""Part of a record's id -> why its prediction is off, where its fields do not tell."""


def explanation(record: Record) -> str:
    """Return why the prediction of *record* is off, or that nobody knows."""
    found = next((why for part, why in EXPLANATIONS if part in record["id"]), "")
    if not found and "record_stream" in (record["levers"]["offload_params"] or ""):
        found = RUN_AHEAD
    return found or "unexplained"


# -- the rules


def _gpu(record: Record) -> str:
    said = record["gpu"] or ""
    return next((name for part, name in GPUS if part in said), UNSTATED_GPU)


def _torch(record: Record) -> str:
    """Return torch's version, the least that the record allows; empty where it says nothing."""
    said = str((record["software"] or {}).get("torch"))
    stated = re.search(r"\b2\.\d+(\.\d+)?", said)
    if stated:
        return stated[0]
    month = re.search(r"nightly.*(20\d\d-\d\d)", said)
    return next((release for date, release in RELEASES if month and month[1] < date), "")


def _dtype(record: Record) -> Mapping[str, str] | None:
    """Return the dtypes that the record states; quantised weights are loaded from 16 bits."""
    stated = record["dtypes"] or {}
    words = {part: str(stated.get(part) or "").split(" ")[0] for part in ("core", "vae")}
    default = words["core"] if words["core"] in DTYPES else "bfloat16"
    if words["vae"] in DTYPES and words["vae"] != default:
        return {"default": default, "vae": words["vae"]}
    return {"default": default}


def _call(record: Record) -> dict[str, Any]:
    call: dict[str, Any] = {}
    for argument, value in (
        ("height", record["height"]),
        ("width", record["width"]),
        ("num_frames", record["frames"]),
        ("num_inference_steps", record["steps"]),
        ("guidance_scale", record["guidance_scale"]),
    ):
        if value is not None:
            call[argument] = value
    if record["max_sequence_length"] not in (None, CLIP_TOKENS):
        call["max_sequence_length"] = record["max_sequence_length"]
    if record["pipeline"] == "Latte":
        call["video_length"] = call.pop("num_frames")
    if "IP-Adapter" in (record["levers"]["other"] or ""):
        call["ip_adapter_image"] = Image.new("RGB", (224, 224))
    if (record["batch_size"] or 1) > 1:
        call["num_images_per_prompt"] = record["batch_size"]
    return call


def _changes(record: Record) -> tuple[str, ...]:
    found = []
    if CHECKERLESS in record["source"] and record["pipeline"].startswith("SD1"):
        found.append("no safety checker")
    if "no upcast" in str((record["dtypes"] or {}).get("vae")):
        found.append("VAE without upcast")
    if "AttnProcessor" in str(record["levers"]["attention"]):
        found.append("attention without SDPA")
    if "CogVideoX" in record["pipeline"] and record["dtypes"]["core"] == "float16":
        found.append("T5 wholly in 16 bits")
    others = record["levers"]["other"] or ""
    if "IP-Adapter" in others:
        found.append("IP-Adapter")
    if record["pipeline"] == "AnimateDiff" and "+" in record["model_id"]:
        found.append("first UNet beside")
    if _is_before_0_31(record):
        found.append("diffusers 0.30")
    if record["pipeline"].startswith("Z-Image") and "Dec 2025" in record["software"]["diffusers"]:
        found.append("diffusers 0.36")
    if record["pipeline"] == "Qwen-Image VAE" and "InvokeAI" in record["source"]:
        found.append("diffusers 0.37")  # what it had then: invoke-ai/InvokeAI#9147
    if record["levers"]["fuse_qkv"]:
        found.append("fused QKV")
    return tuple(found)


def _is_before_0_31(record: Record) -> bool:
    """diffusers 0.31 came on 2024-10-22; both changes of it were made in the last days before."""
    return bool(record["date"]) and record["date"] < "2024-10"


def _strategies(record: Record) -> tuple[str, ...]:
    levers = record["levers"]
    found = [*quantization_options(record), *_compiled(record)]
    found += [name for name in ("vae_tiling", "vae_slicing") if levers[name]]
    if levers["layerwise_casting"]:
        component = levers["layerwise_casting"].split(" ")[0]
        found.append(f"layerwise_casting:storage_dtype=float8_e4m3fn@{component}")
    offload = levers["offload"] or "none"
    if offload == "none":
        return tuple(found)
    if offload == "model":
        return (*found, "model_offload")
    if offload == "sequential":
        return (*found, "sequential_offload")
    if offload == "group":
        return (*found, _group_offload(levers["offload_params"] or ""))
    raise Unusable(f"{offload} is not an offload of diffusers' pipelines")


def _compiled(record: Record) -> Iterator[str]:
    """Yield the strategies of what was compiled; who compiles a whole pipeline's convolutions lays
    them out in channels_last, as the scripts of diffusion-fast, diffusers-torchao and diffusers'
    own pipeline benchmarks (base_classes.py) do."""
    said = record["levers"]["compile"] or ""
    if not said:
        return
    mode = max((mode for mode in MODES if mode in said), key=len, default=MODES[0])
    if record["kind"] in OF_ONE_COMPONENT:
        yield f"compile:scope=component,mode={mode}@component"
        return
    has_unet = record["pipeline"].startswith(("SD", "SSD"))
    for component in ("unet" if has_unet else "transformer", *(["vae"] if "vae" in said else [])):
        if component != "transformer":
            yield f"channels_last@{component}"
        yield f"compile:scope=component,mode={mode}@{component}"


def _refuse_what_is_not_ours(levers: Mapping[str, Any]) -> None:
    others, tiling = levers["other"] or "", str(levers["vae_tiling"] or "")
    if others and not any(known in others for known in OTHERS):
        raise Unusable(f"it ran with {others}, which pipefit does not have")
    if "own function" in tiling:
        raise Unusable(f"it ran with {tiling}")


def _group_offload(parameters: str) -> str:
    level = re.search(r"(leaf|block)_level", parameters)
    if level is None:
        raise Unusable("the parameters of its group offloading are not known")
    given = [f"offload_type={level[0]}"]
    blocks = re.search(r"num_blocks_per_group=(\d+)", parameters)
    if blocks:
        given.append(f"num_blocks_per_group={blocks[1]}")
    given += [
        f"{flag}=true"
        for flag in ("use_stream", "record_stream", "low_cpu_mem_usage")
        if flag in parameters
    ]
    if "offload_to_disk" in parameters:
        given.append("offload_to_disk_path=.")
    return f"group_offload:{','.join(given)}"


FORMATS: tuple[tuple[str, str], ...] = (
    (r"torchao int8(wo|_weight_only)", "backend=torchao,type=int8_weight_only"),
    (r"torchao int8dq", "backend=torchao,type=int8_dynamic_activation_int8_weight"),
    (
        r"torchao fp8dqrow",
        "backend=torchao,type=float8_dynamic_activation_float8_weight,per_row=true",
    ),
    (r"torchao fp8(wo)?|torchao float8_weight_only", "backend=torchao,type=float8_weight_only"),
    (
        r"torchao fp8dq|torchao float8 dynamic",
        "backend=torchao,type=float8_dynamic_activation_float8_weight",
    ),
    (r"torchao (fpx|fp6)", "backend=torchao,type=float6_e3m2_weight_only"),
    (r"torchao int4wo", "backend=torchao,type=int4_weight_only"),
    (r"torchao int4dq", "backend=torchao,type=int8_dynamic_activation_int4_weight"),
    (r"bitsandbytes 8-bit", "backend=bitsandbytes,type=int8"),
    (r"bnb (nf4|4-bit)", "backend=bitsandbytes,type=nf4"),
    (r"quanto INT4", "backend=quanto,type=int4"),
    (r"quanto INT8", "backend=quanto,type=int8"),
    (r"quanto FP8", "backend=quanto,type=float8"),
)
"""What a part of ``levers.quantization`` says -> parameters of the strategy."""

T5 = {"FLUX.1": "text_encoder_2", "CogVideoX": "text_encoder"}
"""How a pipeline's name begins -> its component that is a T5."""

DIRECTLY = "diffusers-torchao"
"""Sources, by a part of their ``source``, that call torchao's ``quantize_`` on a loaded component,
which leaves no linear layer out."""


def quantization_options(record: Record) -> tuple[str, ...]:
    """Return the quantisation strategies of the record; none if a format of it is not known.

    Raises:
        Unusable: if the run chose formats by itself.
    """
    said = record["levers"]["quantization"] or ""
    if not said:
        return ()
    if "autoquant" in said:
        raise Unusable("autoquant chose a format for each layer, and its weights are not stated")
    found = []
    for part in said.split(" + ") if said.count("(") > 1 else [said]:
        words, _, where = part.partition(" (")
        parameters = _format(words.strip())
        if parameters is None and record["weights_gib"] is None:
            raise Unusable(f"how {words} stores weights is not known, and their size not stated")
        if parameters is None:
            return ()
        if DIRECTLY in record["source"]:
            parameters += ",all_linear=true"
        for name in _components(record, where.rstrip(")")):
            # transformers 4 loads T5's wo in float32 beside bitsandbytes' layers:
            # use_keep_in_fp32_modules in its quantizers/quantizer_bnb_4bit.py and _8bit.py, 4.52.
            is_kept = "bitsandbytes" in parameters and name in T5.values()
            kept = ",kept_dtype=float32" if is_kept else ""
            found.append(f"quantization:{parameters}{kept}@{name}")
    return tuple(found)


def _format(words: str) -> str | None:
    gguf = re.fullmatch(r"GGUF (\w+)", words)
    if gguf:
        return f"backend=gguf,type={gguf[1].upper()}"
    return next((value for pattern, value in FORMATS if re.fullmatch(pattern, words)), None)


def _components(record: Record, where: str) -> Iterator[str]:
    """Yield the components that *where* names: ``transformer + T5``."""
    for word in re.split(r" \+ |, ", where):
        if word.startswith("T5"):
            yield T5[record["pipeline"].split("-")[0]]
        elif word != "VAE" or not record["pipeline"].startswith("CogVideoX"):
            # CogVideoX's autoencoder has no linear layer, and only those are quantised.
            yield {"text encoder": "text_encoder", "VAE": "vae"}.get(word, word)


def _ltx2_stage(record: Record) -> dict[str, Any]:
    """Return changes and call of one stage of the scripts in asomoza/diffusers-recipes, ltx2_3.

    Prompts are encoded by a pipeline of their own; the others are given embeddings, (batch, tokens,
    49 states of width 3840), and end at the latents. Without guidance nothing is run twice.
    """
    if record["kind"] == "component_forward":
        return {"changes": ("prompt only",)}
    embeddings = (BF16, (1, 1024, 188_160))
    mask = ("int64", (1, 1024))
    call = {**_call(record), "output_type": "latent"}
    call |= {"prompt_embeds": embeddings, "prompt_attention_mask": mask}
    if record["guidance_scale"] > 1:
        call |= {"negative_prompt_embeds": embeddings, "negative_prompt_attention_mask": mask}
    else:
        call |= dict.fromkeys(("audio_guidance_scale", "modality_scale"), 1.0)
        call |= dict.fromkeys(("stg_scale", "audio_stg_scale"), 0.0)
        call["audio_modality_scale"] = 1.0
    return {"changes": ("embeddings given",), "call": call}


def subject_of(setup: Setup) -> Any:
    """Return what to hand to pipefit: a name where it suffices, else a weightless pipeline."""
    if not setup.changes and not setup.component:
        return setup.pipeline
    if setup.component == ATTENTION:
        return OneComponent(AttentionCall())
    dtype = None if setup.dtype is None else tuple(setup.dtype.items())
    pipe = _built(setup.pipeline, dtype, setup.changes)
    return OneComponent(getattr(pipe, setup.component)) if setup.component else pipe


@functools.lru_cache(maxsize=2)
def _built(name: str, dtype: tuple[tuple[str, str], ...] | None, changes: tuple[str, ...]) -> Any:
    """Return a weightless pipeline, the same for records in a row: making it takes two seconds."""
    from pipefit.planner.build import build_pipeline

    pipe, _ = build_pipeline(name, dtype=None if dtype is None else dict(dtype))
    for change in changes:
        CHANGES[change](pipe)
    return pipe
