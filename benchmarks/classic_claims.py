"""Asks the planner for what diffusers' guides have always claimed, and writes down how it answers.

    python -m benchmarks.classic_claims            # prints the tables
    python -m benchmarks.classic_claims --write    # and writes docs/claims.md

Nothing is measured here: Stable Diffusion 1.5 is traced without weights and predicted for the GPU
of each claim. Half a minute on two cores.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch

from pipefit import predict
from pipefit.planner.build import build_pipeline
from pipefit.planner.catalog import reference_machine
from pipefit.strategies import BUILT_IN

DOC = Path(__file__).parent.parent / "docs" / "claims.md"

PIPELINE = "stable-diffusion-v1-5"
FP16_DOC = "diffusers v0.12 docs, optimization/fp16"
MEMORY_DOC = "diffusers v0.21 docs, optimization/memory"

TOLERANCE = 0.2
"""How far a predicted time may be from the published one: our claim."""
ABOUT = 0.05
"""How far "about 3.2 GB" may be off: two digits are stated."""


@dataclass(frozen=True, kw_only=True)
class TimeClaim:
    """A published time of a call: 50 DDIM steps, 512x512, one picture, a TITAN RTX."""

    name: str
    published_s: float
    dtype: str
    strategies: tuple[str, ...]


CLASSIC = "attention:backend=math"
"""Attention as the diffusers of 2022 computed it: products with the scores in memory between."""

TIMES = (
    TimeClaim(name="original", published_s=9.50, dtype="float32", strategies=(CLASSIC,)),
    TimeClaim(
        name="cuDNN auto-tuner",
        published_s=9.37,
        dtype="float32",
        strategies=(CLASSIC, "cudnn_benchmark"),
    ),
    TimeClaim(name="fp16", published_s=3.61, dtype="float16", strategies=(CLASSIC,)),
    TimeClaim(
        name="channels last",
        published_s=3.30,
        dtype="float16",
        strategies=(CLASSIC, "channels_last"),
    ),
    TimeClaim(
        name="traced UNet",
        published_s=3.21,
        dtype="float16",
        strategies=(CLASSIC, "channels_last", "jit_trace@unet"),
    ),
    TimeClaim(
        name="memory efficient attention",
        published_s=2.63,
        dtype="float16",
        strategies=("channels_last",),
    ),
)
"""In the order of the table that they are from, slowest first."""

Kind = Literal["allocated", "process"]


@dataclass(frozen=True, kw_only=True)
class MemoryClaim:
    """A published bound on the memory of a call in float16, or (``is_about``) a figure."""

    name: str
    published: str
    published_bytes: int
    kind: Kind
    """Which peak is held to it."""
    source: str
    gpu: str
    strategies: tuple[str, ...]
    call: tuple[tuple[str, int], ...] = ()
    is_about: bool = False
    otherwise: tuple[str, ...] | None = None
    """The strategies with which it must not hold; None where the claim says nothing of that."""


GB = 10**9

MEMORY = (
    MemoryClaim(
        name="sequential offload",
        published="less than 3 GB",
        published_bytes=3 * GB,
        kind="process",
        source=MEMORY_DOC,
        gpu="titan-rtx",
        strategies=("sequential_offload", CLASSIC),
    ),
    MemoryClaim(
        name="sequential offload and attention slicing",
        published="less than 2 GB",
        published_bytes=2 * GB,
        kind="process",
        source="diffusers#1024, docs/source/optimization/fp16.mdx",
        gpu="titan-rtx",
        strategies=("sequential_offload", "attention:slicing=auto"),
    ),
    MemoryClaim(
        name="attention slicing",
        published="as little as 3.2 GB",
        published_bytes=3_200_000_000,
        kind="allocated",
        source=FP16_DOC,
        gpu="titan-rtx",
        strategies=("attention:slicing=auto",),
        is_about=True,
        otherwise=(CLASSIC,),
    ),
    MemoryClaim(
        name="3840x2224 with VAE tiling",
        published="on 8 GB of VRAM",
        published_bytes=8 * GB,
        kind="process",
        source=MEMORY_DOC,
        gpu="rtx-3070",
        strategies=("vae_tiling:tile_px=512@vae",),
        call=(("height", 2224), ("width", 3840)),
        otherwise=(),
    ),
    MemoryClaim(
        name="32 pictures of 512x512 with VAE slicing",
        published="batches of 32 or more with limited VRAM; here 16 GB",
        published_bytes=16 * GB,
        kind="process",
        source=MEMORY_DOC,
        gpu="t4",
        strategies=("vae_slicing@vae",),
        call=(("num_images_per_prompt", 32),),
        otherwise=(),
    ),
)


@functools.cache
def pipeline(dtype: str) -> Any:
    """Return the weightless pipeline with the scheduler of the claims."""
    pipe, _ = build_pipeline(PIPELINE, dtype=dtype)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


def can_be_asked(claim: TimeClaim) -> bool:
    """Whether pipefit has all strategies of *claim*."""
    names = {one.name for one in BUILT_IN}
    return all(spec.split(":")[0].split("@")[0] in names for spec in claim.strategies)


@functools.cache
def predicted_s(claim: TimeClaim) -> float:
    """Return the predicted time of a later call."""
    call = {"prompt": "a photo of an astronaut riding a horse on mars", "num_inference_steps": 50}
    found = predict(
        pipeline(claim.dtype),
        list(claim.strategies),
        call=call,
        machine=reference_machine(["titan-rtx"]),
    )
    return found.latency.call_s


@functools.cache
def predicted_bytes(claim: MemoryClaim, strategies: tuple[str, ...]) -> int:
    """Return the peak of *claim*'s kind under *strategies*.

    Memory is taken to be plenty, so that what the allocator keeps is in a process's peak.
    """
    found = predict(
        pipeline("float16"),
        list(strategies),
        call={"prompt": "a photo of an astronaut riding a horse on mars", **dict(claim.call)},
        machine=reference_machine([claim.gpu]),
    ).peak_vram[0]
    return found.allocated_bytes if claim.kind == "allocated" else found.process_bytes


def holds(claim: MemoryClaim, num_bytes: int) -> bool:
    """Whether *num_bytes* is what *claim* says."""
    if claim.is_about:
        return abs(num_bytes / claim.published_bytes - 1) <= ABOUT
    return num_bytes <= claim.published_bytes


# -- the report


def _shown(spec: str) -> str:
    return f"`{spec}`"


def _time_table() -> list[str]:
    lines = [
        "| row | published | predicted | error | asked as |",
        "|---|---:|---:|---:|---|",
    ]
    for claim in TIMES:
        asked = " ".join(["dtype " + claim.dtype, *map(_shown, claim.strategies)])
        if can_be_asked(claim):
            seconds = predicted_s(claim)
            found = f"{seconds:.2f} s | {seconds / claim.published_s - 1:+.0%}"
        else:
            found = "– | –"
        lines.append(f"| {claim.name} | {claim.published_s:.2f} s | {found} | {asked} |")
    return lines


def _memory_table() -> list[str]:
    lines = [
        "| claim | published | predicted | peak | GPU | without it | asked as | source |",
        "|---|---|---:|---|---|---:|---|---|",
    ]
    for claim in MEMORY:
        otherwise = "–"
        if claim.otherwise is not None:
            otherwise = f"{predicted_bytes(claim, claim.otherwise) / GB:.2f} GB"
        cells = [
            claim.name,
            claim.published,
            f"{predicted_bytes(claim, claim.strategies) / GB:.2f} GB",
            claim.kind,
            claim.gpu,
            otherwise,
            " ".join(map(_shown, claim.strategies)),
            claim.source,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def report() -> str:
    """Return docs/claims.md."""
    return "\n".join([INTRODUCTION, *_time_table(), NOTES, *_memory_table(), MEMORY_NOTES])


INTRODUCTION = f"""\
# The classic claims, predicted

Written by `python -m benchmarks.classic_claims --write` with torch {torch.__version__} and
diffusers {diffusers.__version__}. Nothing here was measured by this project: Stable Diffusion 1.5
is traced without weights, and the published figures are those of diffusers' own guides.

## Time

One picture of 512x512 with 50 DDIM steps on a TITAN RTX, safety checker included, a later call
(https://huggingface.co/docs/diffusers/v0.12.0/optimization/fp16).
"""

NOTES = """
How the rows are asked:

- The diffusers of 2022 computed attention by matrix products. torch's own attention, the default
  today, takes the memory-efficient kernel on a TITAN RTX, so the rows before the last ask for
  `attention:backend=math`, and the last, which was run with xformers' kernel of that kind, asks
  for nothing.
- The guide does not say which rows build on each other. From fp16 on they are taken to: with
  xformers it states 18.22 iterations a second on the same card elsewhere, which is 2.74 s for 50
  steps alone, more than the 2.63 s of the last row; channels last makes the difference.
- The row of the cuDNN auto-tuner is the only evidence for what trials gain, so its distance to the
  first row is no prediction; see `CUDNN_TRIAL_GAIN` in `cost_models/roofline.py`. The others are,
  with the constants of the fit: the fp32 rate was assumed, not fitted.

## Memory

In float16; GB are 10⁹ bytes. *Process* is the whole process with its CUDA context, the strictest
of the peaks; *allocated* is what torch's tensors take. The guides do not say which they mean.
"""

MEMORY_NOTES = """
- *Without it*: the strategy that the claim is about left out. For attention slicing that is the
  classic attention, whose scores are the peak; sliced, the peak is in the decoder.
- The weights of the safety checker are in all figures.
- 3840x2224 holds with torch's own attention only: the scores of one sample's attention in slices
  would take hundreds of GB.
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
