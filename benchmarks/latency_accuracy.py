"""Predicts published timings and writes down how far off the predictions are.

    python -m benchmarks.latency_accuracy            # prints the table
    python -m benchmarks.latency_accuracy --write    # and writes docs/latency.md

Nothing is measured here: each row traces a catalogue pipeline without weights, asks the latency
model for a catalogue GPU, and compares with what others published. About two minutes on two cores.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch

from pipefit.cost_models.latency import LatencyModel
from pipefit.cost_models.placement import (
    GroupOffload,
    ModelOffload,
    Placement,
    Resident,
    SequentialOffload,
)
from pipefit.cost_models.residency import model_offload_residency
from pipefit.cost_models.roofline import Attention
from pipefit.cost_models.workload import Event, Kernel, Workload
from pipefit.errors import TraceError
from pipefit.planner.build import build_pipeline
from pipefit.planner.catalog import reference_machine
from pipefit.planner.trace import trace

DOC = Path(__file__).parent.parent / "docs" / "latency.md"

FP16_DOC = "diffusers v0.14 docs/source/en/optimization/fp16.mdx"
TORCH2_DOC = "diffusers docs/source/en/optimization/torch2.0.md @19edca82f1"
VAE_DOC = "diffusers docs/source/en/hybrid_inference/overview.md @58eb52c0"
TORCHAO = "github.com/sayakpaul/diffusers-torchao @9b9f2383"
FAST = "github.com/huggingface/diffusion-fast"
HF_BENCH = "hf.co/datasets/diffusers/benchmarks"
Z_IMAGE = "github.com/asomoza/diffusers-recipes @46df7a9"

What = Literal["call", "denoise", "forward", "decode", "encode"]
"""A whole call, its denoising loop, one forward of the denoiser, one decode, one encode."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published timing."""

    name: str
    gpu: str
    published_s: float
    source: str
    pipeline: str
    what: What = "call"
    call: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"
    attention: Attention = "native"
    fused_rms_norm: bool = True
    """torch computes RMS norm in one launch since 2.8; older rows took eight."""
    placement: Placement = Resident()  # noqa: RUF009  (a frozen value)
    fit_error: float | None = None
    """Error of the fit that the constants come from; None: not among its rows."""


SD15 = "stable-diffusion-v1-5"
TORCH2_NATIVE = ("rtx-4090",)
"""GPUs on which torch 2.0's SDPA is taken to run flash attention: an inference from the rows."""
SD15_RATES = (
    ("t4", 5.5, -0.08),
    ("rtx-3060-12gb", 7.8, 0.14),
    ("a10g", 15.6, 0.0),
    ("titan-rtx", 18.22, 0.01),
    ("rtx-a6000", 21.09, 0.0),
    ("a100-40gb", 29.0, 0.21),
    ("a100-80gb", 29.5, 0.23),
)
"""Iterations per second with memory-efficient attention, slowest first."""


def _resident_rows() -> list[Row]:
    sd15: dict[str, Any] = {"pipeline": SD15, "dtype": "float16", "attention": "efficient"}
    rows = [
        Row(
            name="SD 1.5 step, memory-efficient attention",
            gpu=gpu,
            published_s=1 / rate,
            source=FP16_DOC,
            what="forward",
            fit_error=error,
            **sd15,
        )
        for gpu, rate, error in SD15_RATES
    ]
    rows += [
        Row(
            name=f"SD 1.5 step, torch 2.0, batch {batch}",
            gpu=gpu,
            published_s=seconds,
            source=TORCH2_DOC,
            what="forward",
            call={"num_images_per_prompt": batch},
            fit_error=error,
            pipeline=SD15,
            dtype="float16",
            attention="native" if gpu in TORCH2_NATIVE else "efficient",
        )
        for gpu, batch, seconds, error in (
            ("a100-80gb", 1, 0.04617, -0.10),
            ("a100-80gb", 4, 0.08621, -0.16),
            ("a100-80gb", 16, 0.32895, -0.15),
            ("v100-16gb", 1, 0.05266, -0.11),
            ("v100-16gb", 16, 0.60241, 0.06),
            ("t4", 1, 0.14493, 0.05),
            ("t4", 4, 0.55866, 0.04),
            ("rtx-4090", 1, 0.02469, -0.01),
            ("rtx-4090", 4, 0.07924, -0.09),
            ("rtx-4090", 16, 0.31546, -0.08),
        )
    ]
    vae: tuple[tuple[What, str, int, float, float], ...] = (
        ("encode", "rtx-4090", 2048, 0.402, -0.03),
        ("encode", "rtx-4080-super", 2048, 0.574, 0.03),
        ("encode", "rtx-3080-10gb", 2048, 0.863, 0.01),
        ("encode", "rtx-3070", 2048, 1.217, 0.09),
        ("decode", "rtx-4070-ti", 1024, 0.284, 0.07),
        ("decode", "rtx-3080-10gb", 1024, 0.286, 0.11),
        ("decode", "rtx-3070", 1024, 0.421, 0.15),
    )
    rows += [
        Row(
            name=f"SD 1.5 VAE {what} {pixels}²",
            gpu=gpu,
            published_s=seconds,
            source=VAE_DOC,
            pipeline=SD15,
            what=what,
            call={"height": pixels, "width": pixels},
            dtype="float16",
            fit_error=error,
        )
        for what, gpu, pixels, seconds, error in vae
    ]
    flux: dict[str, Any] = {"pipeline": "flux.1-dev", "fused_rms_norm": False}
    steps_28 = {"num_inference_steps": 28, "height": 1024, "width": 1024}
    steps_30 = {"num_inference_steps": 30}
    rows += [
        Row(
            name="SDXL call, 30 steps",
            gpu="a100-80gb",
            published_s=3.315,
            source=FAST,
            pipeline="stable-diffusion-xl-base-1.0",
            call=steps_30,
            fit_error=-0.04,
        ),
        Row(
            name="SD 1.5 call, 30 steps",
            gpu="a100-80gb",
            published_s=1.178,
            source=FAST,
            pipeline=SD15,
            call=steps_30,
            fit_error=0.10,
        ),
        Row(
            name="FLUX.1-dev call, 28 steps",
            gpu="h100-sxm",
            published_s=6.573,
            source=TORCHAO,
            call=steps_28,
            fit_error=-0.02,
            **flux,
        ),
        Row(
            name="FLUX.1-dev call, 28 steps",
            gpu="l20",
            published_s=26.36,
            source="diffusers docs/source/en/optimization/para_attn.md",
            call=steps_28,
            fit_error=0.06,
            **flux,
        ),
        Row(
            name="FLUX.1-dev forward",
            gpu="l40s",
            published_s=0.493,
            source=HF_BENCH,
            what="forward",
            call=steps_28,
            fit_error=0.18,
            **flux,
        ),
        Row(
            name="CogVideoX-5b call, 50 steps",
            gpu="a100-80gb",
            published_s=258.962,
            source=TORCHAO,
            pipeline="cogvideox-5b",
            fit_error=-0.07,
        ),
        Row(
            name="CogVideoX-5b call, 50 steps",
            gpu="h100-sxm",
            published_s=112.398,
            source=TORCHAO,
            pipeline="cogvideox-5b",
            fit_error=-0.09,
        ),
        Row(
            name="Wan 2.1 14B forward, 480x832x81",
            gpu="h100-sxm",
            published_s=4.602,
            source="diffusers#11605",
            pipeline="wan2.1-t2v-14b",
            what="forward",
            fused_rms_norm=False,
            fit_error=0.06,
        ),
        Row(
            name="PixArt-Sigma call, 20 steps",
            gpu="h100-sxm",
            published_s=1.20,
            source="huggingface/blog quanto-diffusers.md",
            pipeline="pixart-sigma-xl-2-1024-ms",
            dtype="float16",
            fit_error=-0.12,
        ),
        Row(
            name="SD 1.5 call, 50 steps, torch 2.1",
            gpu="a100-80gb",
            published_s=1.604,
            source="github.com/fal-ai/stable-diffusion-benchmarks",
            pipeline=SD15,
            dtype="float16",
        ),
    ]
    return rows


def _offload_rows() -> list[Row]:
    flux: dict[str, Any] = {
        "pipeline": "flux.1-dev",
        "fused_rms_norm": False,
        "call": {"num_inference_steps": 28, "height": 1024, "width": 1024},
    }
    z_image: dict[str, Any] = {
        "gpu": "rtx-5090",
        "source": Z_IMAGE,
        "pipeline": "z-image-turbo",
        "what": "denoise",
        "call": {"num_inference_steps": 9, "height": 1024, "width": 1024, "guidance_scale": 0.0},
    }
    leaf = GroupOffload(offload_type="leaf_level")
    leaf_stream = replace(leaf, use_stream=True)
    block_stream = GroupOffload(offload_type="block_level", use_stream=True, record_stream=True)
    return [
        Row(
            name="FLUX.1-dev call, model offload",
            gpu="h100-sxm",
            published_s=21.682,
            source="diffusers#11682",
            placement=ModelOffload(),
            **flux,
        ),
        Row(
            name="FLUX.1-dev call, model offload, a LoRA loaded",
            gpu="rtx-4090",
            published_s=35.403,
            source="huggingface/blog lora-fast.md",
            placement=ModelOffload(),
            **flux,
        ),
        Row(
            name="FLUX.1-dev call, sequential offload",
            gpu="h100-sxm",
            published_s=68.406,
            source="diffusers#11682",
            placement=SequentialOffload(),
            **flux,
        ),
        Row(
            name="Z-Image-Turbo 9 steps, leaf, no stream",
            published_s=16.0,
            placement=leaf,
            **z_image,
        ),
        Row(
            name="Z-Image-Turbo 9 steps, leaf, recorded stream",
            published_s=3.0,
            placement=replace(leaf_stream, record_stream=True),
            **z_image,
        ),
        Row(
            name="Z-Image-Turbo 9 steps, block, recorded stream",
            published_s=3.0,
            placement=block_stream,
            **z_image,
        ),
        Row(
            name="Wan 2.1 14B forward, group offload (leaf, stream assumed)",
            gpu="h100-sxm",
            published_s=4.918,
            source="diffusers#11605",
            pipeline="wan2.1-t2v-14b",
            what="forward",
            fused_rms_norm=False,
            placement=leaf_stream,
        ),
        Row(
            name="Wan 2.1 14B forward, group offload (leaf, stream assumed)",
            gpu="rtx-4090",
            published_s=13.658,
            source="diffusers#11605",
            pipeline="wan2.1-t2v-14b",
            what="forward",
            fused_rms_norm=False,
            placement=leaf_stream,
        ),
        Row(
            name="LTX-Video 0.9.7 13B forward, leaf, stream",
            gpu="l40s",
            published_s=2.573,
            source=HF_BENCH,
            pipeline="ltx-video-0.9.7-13b",
            what="forward",
            call={"height": 512, "width": 704, "num_frames": 161, "guidance_scale": 1.0},
            fused_rms_norm=False,
            placement=leaf_stream,
        ),
    ]


# -- tracing


class EncodeOnly(diffusers.DiffusionPipeline):
    """An autoencoder's ``encode`` as a pipeline of its own; no text-to-image call has it."""

    def __init__(self, vae: torch.nn.Module) -> None:
        super().__init__()
        self.register_modules(vae=vae)

    @torch.no_grad()
    def __call__(self, height: int, width: int) -> Any:
        """Encode one picture."""
        picture = torch.zeros((1, 3, height, width), dtype=self.vae.dtype, device="cuda")
        return self.vae.encode(picture)


def traced(row: Row) -> Workload:
    """Return the workload of *row*; rows that differ only in GPU or placement share it."""
    call = {"prompt": "an astronaut riding a horse on mars", **row.call}
    if row.what == "forward":
        call["num_inference_steps"] = 1
    if row.what == "encode":
        call = dict(row.call)
    workload = _trace(row.pipeline, row.dtype, row.what == "encode", tuple(sorted(call.items())))
    return workload if row.fused_rms_norm else with_eight_launch_rms_norm(workload)


@functools.cache
def _trace(pipeline: str, dtype: str, encode: bool, call: tuple[tuple[str, Any], ...]) -> Workload:
    pipe, _ = build_pipeline(pipeline, dtype=dtype)
    return trace(EncodeOnly(pipe.vae) if encode else pipe, dict(call), in_place=True)


def with_eight_launch_rms_norm(workload: Workload) -> Workload:
    """Return *workload* with RMS norm as torch before 2.8 ran it.

    To fp32, square, mean, add, reciprocal root, two products, back.
    """
    kernels = list(workload.kernels)
    parts: dict[int, tuple[int, ...]] = {}
    for index, kernel in enumerate(workload.kernels):
        if kernel.name == "aten._fused_rms_norm":
            steps = _rms_norm_steps(kernel)
            parts[index] = tuple(range(len(kernels), len(kernels) + len(steps)))
            kernels += steps

    def rewritten(events: Sequence[Event]) -> tuple[Event, ...]:
        return tuple(
            new
            for event in events
            for new in (
                [("k", k) for k in parts[event[1]]]
                if event[0] == "k" and event[1] in parts
                else [event]
            )
        )

    return replace(
        workload,
        kernels=tuple(kernels),
        routines=tuple(replace(r, events=rewritten(r.events)) for r in workload.routines),
        root=rewritten(workload.root),
    )


def _rms_norm_steps(kernel: Kernel) -> list[Kernel]:
    num_bytes = kernel.write_bytes  # of the 16-bit output; fp32 is twice that
    passes = ((1, 2), (2, 2), (2, 0), (0, 0), (0, 0), (2, 2), (2, 2), (2, 1))
    return [
        Kernel(
            kind="elementwise",
            name="aten.rms_norm",
            dtype="float32",
            read_bytes=read * num_bytes,
            write_bytes=write * num_bytes,
        )
        for read, write in passes
    ]


# -- predicting


def predicted_s(row: Row) -> float:
    """Return the model's time for *row*."""
    workload = traced(row)
    model = LatencyModel(workload, reference_machine([row.gpu]).gpus[0])
    calls = [e for e in workload.root if e[0] == "c"]
    if row.what != "call":
        phase = next(p for p in workload.phases if p.name == _phase_of(row.what))
        wanted = phase.calls[:1] if row.what == "forward" else phase.calls
        calls = [calls[i] for i in wanted]
    moves = model_offload_residency(workload)
    by_component: dict[str, Counter[int]] = {}
    for _, routine, path, *_ in calls:
        by_component.setdefault(path[1:].split(".")[0], Counter())[routine] += 1
    seconds = sum(
        model.placement_seconds(
            workload.component(name),
            list(counts.items()),
            row.placement,
            attention=row.attention,
            num_onloads=moves.onloads.get(name, 0),
            num_offloads=moves.offloads.get(name, 0),
        ).call_s
        for name, counts in by_component.items()
    )
    return seconds + (model.own_seconds() if row.what == "call" else 0.0)


def _phase_of(what: What) -> str:
    return {"encode": "encode_image", "decode": "decode"}.get(what, "denoise")


# -- the report


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which *share* of *values* lie, linearly between neighbours."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _figure(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _table(rows: Sequence[tuple[Row, float]], with_fit: bool) -> list[str]:
    head = ["timing", "GPU", "published", "predicted", "error"] + (["fit"] if with_fit else [])
    lines = ["| " + " | ".join([*head, "source"]) + " |", "|---" * 2 + "|---:" * (len(head) - 2)]
    lines[1] += "|---|"
    for row, seconds in rows:
        cells = [
            row.name,
            row.gpu,
            _figure(row.published_s),
            _figure(seconds),
            f"{seconds / row.published_s - 1:+.0%}",
        ]
        if with_fit:
            cells.append("–" if row.fit_error is None else f"{row.fit_error:+.0%}")
        lines.append("| " + " | ".join([*cells, row.source]) + " |")
    return lines


def _order() -> list[str]:
    """GPUs by predicted SD 1.5 rate, slowest first."""
    rows = [r for r in _resident_rows() if r.source == FP16_DOC]
    return [r.gpu for r in sorted(rows, key=predicted_s, reverse=True)]


def _torch2_with_efficient_attention() -> list[float]:
    rows = [r for r in _resident_rows() if r.source == TORCH2_DOC and r.gpu in TORCH2_NATIVE]
    return [predicted_s(replace(r, attention="efficient")) / r.published_s - 1 for r in rows]


def _predicted(rows: Sequence[Row], untraced: dict[str, str]) -> list[tuple[Row, float]]:
    """Predict *rows*; note in *untraced* which pipelines could not be traced, and why."""
    done = []
    for row in rows:
        try:
            done.append((row, predicted_s(row)))
        except TraceError as error:
            untraced[row.pipeline] = str(error)
    return done


def report() -> str:
    """Return docs/latency.md."""
    untraced: dict[str, str] = {}
    resident = _predicted(_resident_rows(), untraced)
    offload = _predicted(_offload_rows(), untraced)
    fitted = [(r, s) for r, s in resident if r.fit_error is not None]
    ours = [abs(s / r.published_s - 1) for r, s in fitted]
    theirs = [abs(r.fit_error) for r, _ in fitted if r.fit_error is not None]
    moved = [abs(s / r.published_s - 1) for r, s in offload]
    published_order = [gpu for gpu, _, _ in SD15_RATES]
    return "\n".join(
        [
            INTRODUCTION,
            "## Weights on the GPU",
            "",
            "*fit* is the error that the fit behind the constants has on the row, with traces of"
            " its own.",
            "",
            *_table(resident, with_fit=True),
            "",
            f"{len(fitted)} fitted rows: median error {statistics.median(ours):.1%}, ninetieth"
            f" percentile {percentile(ours, 0.9):.1%}; of the fit on the same rows"
            f" {statistics.median(theirs):.1%} and {percentile(theirs, 0.9):.1%}.",
            "",
            f"With memory-efficient attention in the torch 2.0 rows of the {TORCH2_NATIVE[0]} too,"
            " which the table leaves to flash because that fits better, their errors are"
            f" {', '.join(f'{e:+.0%}' for e in _torch2_with_efficient_attention())}.",
            "",
            f"SD 1.5 rates, slowest first, published: {', '.join(published_order)}.  ",
            f"Predicted: {', '.join(_order())}; the two A100 come out equal, bound by the host.",
            "",
            "## Weights that move",
            "",
            "The constants of `cost_models/transfers.py` were read off diffusers#11682 and the"
            " LTX-Video row, and the others had been seen when they were chosen: none is held out.",
            "",
            *_table(offload, with_fit=False),
            "",
            f"{len(offload)} rows: median error {statistics.median(moved):.1%}, largest"
            f" {max(moved):.0%}.",
            "",
            *(f"Not traced, so not in the tables: {n} ({e})\n" for n, e in untraced.items()),
            LIMITS,
        ]
    )


INTRODUCTION = f"""\
# How well latency is predicted

Written by `python -m benchmarks.latency_accuracy --write` with torch {torch.__version__} and
diffusers {diffusers.__version__}. Nothing here was measured by this project: pipelines are traced
without weights, GPUs are catalogue figures, and the published timings are other people's.

A prediction's range (`low_s`, `high_s`) is meant to hold nine of ten later calls: the arithmetic
divided by 1.3 and by 0.7, which is the ninetieth percentile of the fit on sources that it had not
seen, and transfers divided and multiplied by 1.6.

How a time comes about, and where each constant is from, is in `cost_models/roofline.py`,
`cost_models/latency.py` and `cost_models/transfers.py`.
"""

LIMITS = """\
## What is not predicted

- A GPU whose rates, bandwidth, SMs or clock are unknown is refused, not guessed.
- Host time per launch is 53 µs beside server GPUs and 31 µs beside others, but sources differ: the
  same 789 launches take 32 to 46 ms on an A100. Small models at batch 1 on fast GPUs are bound by
  it, and there the error is largest; the fal.ai row is outside the range for that reason.
- cuDNN attention, flash attention 3 and xformers on Ampere and later are counted as flash 2 or as
  the memory-efficient kernel: no published row isolates them.
- GPUs of AMD, Intel and Apple go through the same rules; no constant was fitted on them.
- When the CPU stands for a GPU, the time is a rough count of cores.
- The first call leaves out loading libraries and kernels and cuDNN's own warm-up: seconds.
- Streaming is taken as the larger of arithmetic and copies over the whole forward. By leaves,
  layers with much arithmetic and few weights, attention above all, overlap worse (LTX-Video).
- The power cap of small cards is known from the T4 only and applied up to 75 W.
- Quantised arithmetic is not modelled yet, and `torch.compile` as far as docs/compile.md says.
"""


def main() -> None:
    """Print the report; with ``--write``, also write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {DOC.name}")
    text = report()
    print(text)
    if parser.parse_args().write:
        DOC.write_text(text)


if __name__ == "__main__":
    main()
