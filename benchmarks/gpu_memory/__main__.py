"""The command line of the instrument; ``--help`` says what there is."""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_memory.cases import Case, all_cases
from benchmarks.gpu_memory.report import predict_again, write_report
from benchmarks.gpu_memory.session import RowFile, check_same, run
from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.serial import from_json, to_json
from pipefit.cost_models.units import GIB, MIB, format_bytes
from pipefit.errors import InvalidRequest, PipefitError
from pipefit.planner.catalog import find_gpu
from pipefit.planner.nvidia import read_nvidia
from pipefit.planner.probe import ALLOCATOR_VARIABLES, cpu_machine, probe

DEFAULT_MINUTES = 8.0
DRY_RUN_GPU = "h200"
"""Predicted for in a dry run where there is no GPU: all rows fit there."""

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate")
"""Whose versions decide about a trace."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what *arguments* ask for; return the exit code."""
    asked = _parser().parse_args(arguments)
    cases = [c for c in all_cases() if fnmatch.fnmatch(c.key, asked.only)]
    try:
        if not cases:
            raise InvalidRequest(f"No row is called like {asked.only!r}: --dry-run lists them.")
        if asked.dry_run:
            return _dry_run(cases, asked.gpu)
        if asked.out is None:
            raise InvalidRequest("Say with --out where the rows go.")
        if asked.report:
            return _report(asked.out)
        return _measure(cases, asked)
    except PipefitError as error:
        print(error, file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_memory",
        description="Measures on this GPU what pipefit predicts; a second run goes on.",
    )
    parser.add_argument("--minutes", type=float, default=DEFAULT_MINUTES, help="time for all of it")
    parser.add_argument("--out", type=Path, help="folder of rows.jsonl and the two reports")
    parser.add_argument("--only", default="*", help='rows by name, such as "pipeline flux*"')
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu to try it out")
    parser.add_argument(
        "--dry-run", action="store_true", help="predict and list the rows; needs no GPU"
    )
    parser.add_argument("--gpu", help="catalogue GPU to predict for in a dry run")
    parser.add_argument(
        "--report",
        action="store_true",
        help="predict the rows in --out again by today's rules and report; needs no GPU",
    )
    return parser


def _measure(cases: Sequence[Case], asked: argparse.Namespace) -> int:
    asked.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PIPEFIT_CACHE", str(asked.out.resolve() / "traces"))
    gpu, machine = this_machine(asked.device, "benchmarks.gpu_memory")
    rows = RowFile(asked.out / "rows.jsonl")
    with (asked.out / "worker.log").open("a", encoding="utf-8") as log:
        left = run(
            cases,
            rows,
            gpu=gpu,
            device=asked.device,
            limit_s=60 * asked.minutes,
            log=log,
            say=lambda text: print(text, flush=True),
            started=lambda software: check_same(asked.out, {**machine, "software": software}),
        )
    if (asked.out / "machine.json").exists():
        write_report(asked.out, machine_in(asked.out), rows.rows)
    print(f"{len(rows.rows)} rows in {asked.out}, {len(left)} left; the same command goes on.")
    return 0


def this_machine(device: str, module: str) -> tuple[Gpu, dict[str, Any]]:
    """Return the GPU that rows are measured on, and what their file says of it and of the command.

    Raises:
        InvalidRequest: if there is no such GPU.
    """
    gpu, driver = _this_gpu(device)
    return gpu, {
        "gpu_name": gpu.name,
        "driver": driver,
        "gpu": to_json(gpu),
        "allocator": next((os.environ[n] for n in ALLOCATOR_VARIABLES if n in os.environ), ""),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
    }


def _this_gpu(device: str) -> tuple[Gpu, str]:
    if device == "cpu":
        return cpu_machine().gpus[0], "none"
    index = int(device.partition(":")[2] or 0)
    driver = read_nvidia(os.environ).driver_version
    gpus = {gpu.index: gpu for gpu in probe().gpus}
    if index not in gpus or not driver:
        raise InvalidRequest(
            f"There is no NVIDIA GPU {device} here: --dry-run needs none, --device cpu tries the "
            "instrument out."
        )
    return gpus[index], driver


def machine_in(folder: Path) -> dict[str, Any]:
    """Return what the rows in *folder* were measured on."""
    path = folder / "machine.json"
    if not path.exists():
        raise InvalidRequest(f"There are no rows in {folder}: measure some first.")
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def _report(folder: Path) -> int:
    from benchmarks.gpu_memory.worker import predicted, prepare, software

    machine = machine_in(folder)
    for name, version in software().items():
        if name in LIBRARIES and version != machine["software"][name]:
            print(
                f"Predicted with {name} {version}, measured with {machine['software'][name]}.",
                file=sys.stderr,
            )
    gpu = from_json(Gpu, machine["gpu"])

    def predict(case: Case, measured: Mapping[str, Any] | None) -> tuple[Any, Any]:
        print(case.key, file=sys.stderr)
        return predicted(prepare(case, gpu), measured)

    rows = predict_again(RowFile(folder / "rows.jsonl").rows, predict)
    write_report(folder, machine, rows)
    print(f"{len(rows)} rows predicted again, in {folder / 'gpu_memory.md'}.")
    return 0


def _dry_run(cases: Sequence[Case], gpu_name: str | None) -> int:
    """Print every row with its prediction and the second at which it would end."""
    from benchmarks.gpu_memory.worker import estimate_s, predicted, prepare
    from pipefit.planner.build import quietly

    gpus = () if gpu_name else probe().gpus
    gpu = gpus[0] if gpus else find_gpu(gpu_name or DRY_RUN_GPU)
    print(f"{len(cases)} rows, predicted for {gpu.name}; seconds of GPU time, preparation beside.")
    end_s = 0.0
    for case in cases:
        with quietly():
            prediction, error = predicted(prepare(case, gpu), None)
        seconds = estimate_s(case, prediction)
        end_s += seconds
        said = error or (_in_short(case, prediction) if prediction else "replays what is measured")
        print(f"{end_s:7.1f} s  {case.key}: {said}", flush=True)
    return 0


def _in_short(case: Case, prediction: Mapping[str, Any]) -> str:
    if case.kind == "pipeline":
        phases = ", ".join(
            f"{p['name']} {p['allocated_bytes'] / GIB:.2f}/{p['reserved_bytes'] / GIB:.2f}"
            for p in prediction["phases"]
        )
        fits = [card for card, verdict in prediction["cards"].items() if verdict["fits"]]
        return f"{phases} GiB allocated/reserved; fits {', '.join(fits) or 'none of the cards'}"
    if case.kind == "kernel":
        return (
            f"grows by {prediction['growth_bytes'] / MIB:.2f} MiB, "
            f"{prediction['workspace_bytes'] / MIB:.2f} of it workspace"
        )
    if case.kind == "context":
        return f"{format_bytes(prediction['context_bytes'])} after a whole call"
    rates = ((name, rate) for name, rate in prediction.items())
    return ", ".join(f"{name} {rate / 1e9:.1f}e9" for name, rate in rates)


if __name__ == "__main__":
    sys.exit(main())
