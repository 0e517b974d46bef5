"""CPU seconds of rehearsals against the kernels that they launch, a process for each pipeline.

What is in the number: building the weightless pipeline, applying the plan for an 8 GB card and
executing the shortened call, imports of the pipeline's own modules included. What is not: importing
torch and diffusers, and the plan. The slope and the start that ``planner/rehearsals.py`` estimates
with are chosen from its table.

    python -m benchmarks.rehearsal_speed [NAME ...]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CARD = "rtx-4060"
BUDGET = "8GB"

NAMES = (
    "stable-diffusion-v1-5", "stable-diffusion-xl-base-1.0", "stable-diffusion-3-medium",
    "flux.1-dev", "sana-1600m-1024px", "pixart-sigma-xl-2-1024-ms", "stable-cascade",
    "qwen-image", "z-image-turbo", "ltx-video-0.9.0", "cogvideox-2b", "wan2.1-t2v-1.3b",
)  # fmt: skip
"""UNets, transformers and video autoencoders; among them tiled decoders, which launch most."""


def measure(name: str) -> dict[str, Any]:
    """Plan for one catalogue pipeline and rehearse what was chosen, in this process."""
    import diffusers  # noqa: F401  its import is not part of the figure
    import torch
    import transformers  # noqa: F401

    from pipefit.planner import api
    from pipefit.planner.catalog import reference_machine
    from pipefit.planner.rehearsals import Rehearser, estimated_s, rehearsed_kernels

    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []

    class Timed(Rehearser):
        def _execute(self, found: Any, *more: Any) -> Any:
            start_s = time.process_time()
            rehearsed = super()._execute(found, *more)
            rows.append(
                {
                    "rehearsal_s": time.process_time() - start_s,
                    "estimated_s": estimated_s(found),
                    "kernels": rehearsed_kernels(found),
                }
            )
            return rehearsed

    api.Rehearser = Timed
    plan = api.plan(name, BUDGET, machine=reference_machine([CARD]), rehearse=True)
    assert plan.rehearsal is not None
    return {
        "name": name,
        **rows[-1],
        "refuted": len(rows) - 1,
        "predicted_bytes": plan.prediction.peak_vram[0].process_bytes,
        "rehearsed_bytes": plan.rehearsal.peak.process_bytes,
    }


def main(names: list[str], *, child: bool) -> None:
    """Print a table, fewest kernels first."""
    if child:
        print(json.dumps(measure(names[0])))
        return
    rows = []
    for name in names or NAMES:
        command = [sys.executable, "-m", "benchmarks.rehearsal_speed", "--child", name]
        with tempfile.TemporaryDirectory() as cache:  # nothing remembered
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                cwd=Path(__file__).parents[1],
                env={**os.environ, "PIPEFIT_CACHE": cache},
                check=False,
            )
        if done.returncode:
            print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{name}: {rows[-1]['rehearsal_s']:.1f} s", file=sys.stderr)
    print(
        f"{'pipeline':30} {'kernels':>8} {'seconds':>8} {'us/kernel':>9} {'estimate':>8}"
        f" {'predicted':>10} {'rehearsed':>10} refuted"
    )
    for row in sorted(rows, key=lambda r: r["kernels"]):
        per_us = row["rehearsal_s"] / row["kernels"] * 1e6
        print(
            f"{row['name']:30} {row['kernels']:8} {row['rehearsal_s']:8.2f} {per_us:9.0f}"
            f" {row['estimated_s']:8.2f} {row['predicted_bytes'] / 2**30:6.2f} GiB"
            f" {row['rehearsed_bytes'] / 2**30:6.2f} GiB {row['refuted']:7}"
        )


if __name__ == "__main__":
    main([a for a in sys.argv[1:] if a != "--child"], child="--child" in sys.argv)
