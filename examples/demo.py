"""The main job in three steps, with no GPU, no weights and no network.

1. Plan FLUX.1-dev, 24 GB of weights and more, for an 8 GB card.
2. Plan SDXL at 3840x2160 for the same card.
3. Build a small real pipeline of SDXL's classes with random weights, optimise it, run it on the
   CPU, and compare its picture with the one that it makes untouched.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

import pipefit
from pipefit.planner.catalog import reference_machine

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "demo-output"
STEPS = 4
"""Denoising steps of the small pipeline: enough to see that every step is the same."""


def main() -> int:
    """Run the three steps; 0 if the pictures agree."""
    card = reference_machine(["rtx-4060"])
    print("1. FLUX.1-dev, 1024x1024, on an 8 GB RTX 4060\n", flush=True)
    print(pipefit.plan("flux.1-dev", "8GB", machine=card, progress=_say))
    print("\n2. SDXL, 3840x2160, on the same card\n", flush=True)
    big = {"height": 2160, "width": 3840}
    print(pipefit.plan("sdxl", "8GB", call=big, machine=card, progress=_say))
    print("\n3. A small real SDXL, run on the CPU\n", flush=True)
    return _run_small()


def _run_small() -> int:
    sys.path.insert(0, str(ROOT))
    from tests.small_pipelines import small_call, stable_diffusion_xl

    def call() -> dict[str, Any]:
        """The same call each time: its seed is a generator, which a call uses up."""
        small = small_call("stable_diffusion_xl")
        return {**small, "num_inference_steps": STEPS, "output_type": "pil"}

    pipe = stable_diffusion_xl()
    pipe.set_progress_bar_config(disable=True)
    untouched = pipe(**call()).images[0]

    planned = {"call": call(), "device": "cpu", "quality": "exact"}
    resident = pipefit.auto_optimize(pipe, "8GB", with_=["resident"], dry_run=True, **planned)
    peak = resident.prediction.peak_vram[0]
    resident_bytes = peak.process_bytes + peak.slack_bytes
    try:
        pipefit.auto_optimize(pipe, 2000, dry_run=True, **planned)
    except pipefit.NoPlanFits as error:
        smallest_bytes = error.smallest_budget_bytes["exact"]
    budget_bytes = (resident_bytes + smallest_bytes) // 2
    print(
        f"all resident it needs {resident_bytes:,} bytes, at the least {smallest_bytes:,}: "
        f"given are {budget_bytes:,}\n"
    )
    with pipefit.auto_optimize(pipe, budget_bytes, **planned) as applied:
        print(applied.plan)
        optimised = pipe(**call()).images[0]
    OUTPUT.mkdir(exist_ok=True)
    untouched.save(OUTPUT / "untouched.png")
    optimised.save(OUTPUT / "optimised.png")
    largest = int(np.abs(np.asarray(untouched, int) - np.asarray(optimised, int)).max())
    names = ", ".join(
        str((OUTPUT / n).relative_to(ROOT)) for n in ("untouched.png", "optimised.png")
    )
    print(f"\npictures: {names}; largest difference of a pixel: {largest} of 255")
    return 0 if largest == 0 else 1


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
