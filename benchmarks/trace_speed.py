"""CPU seconds from a catalogue name to a workload, each pipeline in a process of its own.

What is in the number: building the weightless pipeline and executing its default call symbolically,
imports of the pipeline's own modules included. What is not: importing torch and diffusers, and the
variants that the planner traces afterwards. The first operators in a process are slower than later
ones (torch imports its Python meta kernels), and that is in the number too: hence the processes.

    python -m benchmarks.trace_speed [NAME ...]
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path


def measure(name: str) -> dict[str, object]:
    """Trace one catalogue pipeline at its default call in this process."""
    import diffusers  # noqa: F401  its import is not part of the figure
    import torch
    import transformers  # noqa: F401

    from pipefit.planner.build import build_pipeline
    from pipefit.planner.call import default_inputs
    from pipefit.planner.trace import trace

    torch.set_num_threads(1)
    start_s = time.process_time()
    pipe, info = build_pipeline(name)
    built_s = time.process_time()
    arguments = default_inputs(pipe, info.entry, {})
    workload = trace(pipe, arguments, name=name, in_place=True)
    end_s = time.process_time()
    return {
        "name": name,
        "build_s": built_s - start_s,
        "trace_s": end_s - built_s,
        "routines": len(workload.routines),
        "kernels": len(workload.kernels),
        "events": len(workload.root) + sum(len(r.events) for r in workload.routines),
        "assumptions": len(workload.assumptions),
    }


def main(names: list[str], *, child: bool) -> None:
    """Print a table; one line a pipeline, slowest last."""
    if child:
        print(json.dumps(measure(names[0])))
        return
    from pipefit.planner.catalog import pipeline_names

    rows = []
    for name in names or pipeline_names():
        command = [sys.executable, "-m", "benchmarks.trace_speed", "--child", name]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False
        )
        if done.returncode:
            print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{name}: {rows[-1]['build_s'] + rows[-1]['trace_s']:.1f} s", file=sys.stderr)
    print(
        f"{'pipeline':36} {' total s':>8} {' build s':>8} {' trace s':>8}"
        f" {'routines':>8} {'events':>8}"
    )
    for row in sorted(rows, key=lambda r: r["build_s"] + r["trace_s"]):
        print(
            f"{row['name']:36} {row['build_s'] + row['trace_s']:8.2f} {row['build_s']:8.2f} "
            f"{row['trace_s']:8.2f} {row['routines']:8} {row['events']:8}"
        )


if __name__ == "__main__":
    main([a for a in sys.argv[1:] if a != "--child"], child="--child" in sys.argv)
