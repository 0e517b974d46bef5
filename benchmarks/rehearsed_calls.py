"""CPU seconds of a rehearsed call, each pipeline in a process of its own.

What is in the number: a weightless twin, applying the placement, and the catalogue's default call,
cut to its repeating steps, on a virtual RTX 4060 with room for everything, all components included.
What is not: imports, and building the pipeline. ``first`` is in a fresh process, where torch still
imports its Python meta kernels; ``again`` is a rehearsal after that one. ``+tiled`` decodes in the
autoencoder's own tiles besides. A component that refuses group offload stays resident.

    python -m benchmarks.rehearsed_calls [NAME[+tiled] ...]
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

PIPELINES = (
    "stable-diffusion-xl-base-1.0",
    "flux.1-dev",
    "wan2.1-t2v-14b",
    "hunyuan-video",
    "hunyuan-video+tiled",
)
"""Pictures, and the videos with the largest transformer and the largest decode of the catalogue."""

PLACEMENTS: dict[str, dict[str, Any]] = {
    "resident": {},
    "model_offload": {},
    "group_offload": {"offload_type": "leaf_level", "use_stream": True},
}

ROOM_BYTES = 1 << 42
"""More than any pipeline needs: no placement is refused for its size."""


def measure(name: str) -> dict[str, Any]:
    """Rehearse one catalogue pipeline under each placement in this process."""
    import diffusers  # noqa: F401  its import is not part of the figure
    import torch
    import transformers  # noqa: F401

    from pipefit.planner.build import build_pipeline, quietly
    from pipefit.planner.call import default_inputs
    from pipefit.planner.catalog import find_gpu
    from pipefit.planner.rehearse import rehearse
    from pipefit.strategies import strategy, traits_of
    from pipefit.strategies.describe import describe_component
    from pipefit.strategies.live import module_components
    from pipefit.strategies.strategy import Option

    torch.set_num_threads(1)
    gpu = replace(find_gpu("rtx-4060"), total_bytes=ROOM_BYTES, free_bytes=ROOM_BYTES)
    pipeline, _, tiled = name.partition("+")
    pipe, info = build_pipeline(pipeline)
    if tiled:
        pipe.vae.enable_tiling()
    call = default_inputs(pipe, info.entry, {})
    seconds: dict[str, float] = {}
    for placement, parameters in PLACEMENTS.items():
        options = []
        for component, module in module_components(pipe).items():
            described = describe_component(component, module, traits_of(module))
            refused = strategy(placement).refusal(described, parameters)
            chosen = Option(strategy=placement, component=component, parameters=parameters)
            options.append(Option(strategy="resident", component=component) if refused else chosen)
        if placement == "model_offload":
            options = [Option(strategy=placement)]
        for turn in ("first", "again") if not seconds else ("again",):
            start_s = time.process_time()
            with quietly():
                rehearse(pipe, options, call, gpu)
            seconds[f"{placement} {turn}"] = time.process_time() - start_s
    return {"name": name, **seconds}


def main(names: list[str], *, child: bool) -> None:
    """Print the machine and a table; one line a pipeline."""
    if child:
        print(json.dumps(measure(names[0])))
        return
    rows = []
    for name in names or PIPELINES:
        command = [sys.executable, "-m", "benchmarks.rehearsed_calls", "--child", name]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False
        )
        if done.returncode:
            print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    versions = ", ".join(f"{n} {version(n)}" for n in ("torch", "diffusers", "transformers"))
    print(f"{platform.machine()}, Python {platform.python_version()}, {versions}\n")
    columns = [c for c in (rows[0] if rows else ()) if c != "name"]
    print("| CPU seconds | " + " | ".join(columns) + " |")
    print("|---|" + "---:|" * len(columns))
    for row in rows:
        print(f"| {row['name']} | " + " | ".join(f"{row[c]:.1f}" for c in columns) + " |")


if __name__ == "__main__":
    main([a for a in sys.argv[1:] if a != "--child"], child="--child" in sys.argv)
