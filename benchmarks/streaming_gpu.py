"""How near streaming comes to its limits on a GPU, beside diffusers' group offload and mmgp.

    python -m benchmarks.streaming_gpu --minutes 8 --out DIR

One step of FLUX.1-dev's transformer (random weights, 1024², 512 tokens) is timed resident, streamed
at five levels of residency, under group offload and under mmgp, and each is held to the larger of
two limits: the resident step, and its streamed bytes at the rate of one large copy from page-locked
memory. Not in the figures: text encoders, the VAE, the scheduler, and loading.

Each row is on disk before the next begins, in a process that costs no other row if it fails; the
same command goes on. Sessions, counters and tables are those of ``gpu_memory``; what a row does is
in ``streamed_steps.py``, what rows say together in ``streaming_report.py``.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_memory.__main__ import machine_in, this_machine
from benchmarks.gpu_memory.cases import Case
from benchmarks.gpu_memory.session import RowFile, check_same, run
from benchmarks.streaming_report import GOAL_SLOTS, derived, write_report
from pipefit.cost_models.machine import Gpu
from pipefit.errors import InvalidRequest, PipefitError
from pipefit.planner.catalog import find_gpu
from pipefit.planner.host import read_host

DEFAULT_MINUTES = 8.0

LEVELS = (0, 4, 8, 12, 14)
"""Sixteenths of the blocks that stay: on a PCIe 4 card the link is the limit in the first, the GPU
in the last, and between them lies the corner where both are."""

OTHER_SLOTS = (1, 3)

GROUP_CONFIGURATIONS = (
    "leaf-stream", "block-stream", "leaf-record-stream", "block-record-stream", "leaf", "block",
)  # fmt: skip
"""Names in ``GROUPS`` of gpu_memory/pipelines.py."""

MMGP_LEVELS = (8, 4)
"""Streaming rows whose allocated memory mmgp is given."""

LAYERS, SINGLE_LAYERS, TRANSFORMER_BYTES = 19, 38, 23_802_816_640
"""Blocks of FLUX.1-dev's transformer, and its weights in bfloat16; a test counts them."""

SMALL_LAYERS = 2

HOST_FACTOR = 2.0
"""Host RAM for each byte of weights: page-locked copies that torch rounds up to powers of two take
1.6 (group offload), and the weights that are moved there lie beside them for a while."""

ESTIMATES_S = {
    "link": 3.0,
    "resident": 25.0,
    "streaming": 25.0,
    "group_offload": 35.0,
    "mmgp": 60.0,
}
"""Seconds that rows take, setting up included; guessed, a run learns its own pace."""

DRY_RUN_ESTIMATE_S = 1.0

DRY_RUN_GPU = "rtx-4090"
"""Predicted for in a dry run, whose device has no rates."""

OUT_VARIABLE = "PIPEFIT_STREAMING_OUT"
"""Tells the processes that measure where rows and the resident output are."""

WORKER_COMMAND = (sys.executable, "-c", "from benchmarks.streaming_gpu import work; work()")


def cases_of(model: Mapping[str, Any]) -> list[Case]:
    """Return every row, the most telling first.

    Streaming rows share a process, and with it the weights; every peer has one of its own.
    """

    def case(key: str, kind: Any, batch: str, **parameters: Any) -> Case:
        estimate_s = DRY_RUN_ESTIMATE_S if model["is_small"] else ESTIMATES_S[kind]
        return Case(
            key=key,
            kind=kind,
            parameters={"model": dict(model), **parameters},
            estimate_s=estimate_s,
            batch="dry run" if model["is_small"] else batch,
        )

    def streaming(level: int, num_slots: int, batch: str) -> Case:
        key = _streaming_key(level, num_slots)
        return case(key, "streaming", batch, level=level, num_slots=num_slots)

    def group(configuration: str) -> Case:
        key = f"group_offload {configuration}"
        return case(key, "group_offload", key, configuration=configuration)

    def mmgp(level: int) -> Case:
        like = _streaming_key(level, GOAL_SLOTS)
        return case(f"mmgp like {like}", "mmgp", f"mmgp {level}", like=like)

    first, *others = GROUP_CONFIGURATIONS
    return [
        case("link", "link", "streaming"),
        case("resident", "resident", "streaming"),
        *(streaming(level, GOAL_SLOTS, "streaming") for level in LEVELS),
        group(first),
        mmgp(MMGP_LEVELS[0]),
        *(group(configuration) for configuration in others),
        *(mmgp(level) for level in MMGP_LEVELS[1:]),
        *(streaming(level, slots, "slots") for slots in OTHER_SLOTS for level in LEVELS),
    ]


def _streaming_key(level: int, num_slots: int) -> str:
    return f"streaming {level}/16 slots={num_slots}"


def model_for(host_bytes: int, *, is_small: bool = False) -> dict[str, Any]:
    """Return how many blocks of the transformer *host_bytes* of free RAM are enough for.

    >>> model_for(64 * 10**9)["layers"], model_for(24 * 10**9)["layers"]
    (19, 9)
    """
    if is_small:
        return {"layers": SMALL_LAYERS, "single_layers": 2 * SMALL_LAYERS, "is_small": True}
    share = min(1.0, host_bytes / (HOST_FACTOR * TRANSFORMER_BYTES))
    return {
        "layers": max(1, int(share * LAYERS)),
        "single_layers": max(1, int(share * SINGLE_LAYERS)),
        "is_small": False,
    }


# -- in the processes that measure


def work() -> None:
    """Measure what the session that started this process asks for."""
    from benchmarks.gpu_memory import worker

    worker.main(prepare, lambda case, prediction: case.estimate_s)


def prepare(case: Case, gpu: Gpu) -> Any:
    """Return how to measure and predict *case*; rows of one process share the transformer."""
    from benchmarks import streamed_steps as steps
    from benchmarks.gpu_memory.probes import predict_transfers
    from benchmarks.gpu_memory.worker import Prepared

    folder = Path(os.environ[OUT_VARIABLE])
    reference = folder / "reference.safetensors"
    given = case.parameters
    subject = _subject(json.dumps(given["model"]))
    options = []
    if case.kind in ("streaming", "group_offload"):
        options = [steps.option_of(subject, given)]

    def measure(counter: Any, until_s: float) -> dict[str, Any]:
        if case.kind == "link":
            return steps.measure_link(counter)
        if case.kind == "mmgp":
            target_bytes = _allocated_bytes(folder, given["like"])
            steps.check_mmgp(counter.device)
        steps.make_real(subject, counter.device)
        if case.kind == "resident":
            return steps.measure_resident(subject, counter, reference, until_s=until_s)
        if case.kind == "mmgp":
            return steps.measure_mmgp(subject, target_bytes, counter, reference, until_s=until_s)
        return steps.measure_placed(subject, options[0], counter, reference, until_s=until_s)

    predict: Callable[[Any], dict[str, Any]] = {
        "link": lambda measured: predict_transfers(gpu),
        "mmgp": lambda measured: {},  # not modelled
    }.get(case.kind, lambda measured: steps.predict_step(subject, options, gpu))
    return Prepared(measure=measure, predict=predict, options=tuple(options))


@functools.cache
def _subject(model: str) -> Any:
    import torch

    from benchmarks.streamed_steps import build_subject

    said = json.loads(model)
    if said["is_small"]:
        torch.set_num_threads(1)  # layers this small take longer in two
    return build_subject(said)


def _allocated_bytes(folder: Path, key: str) -> int:
    from benchmarks.gpu_memory.worker import Missing

    rows = {row["key"]: row["measured"] for row in RowFile(folder / "rows.jsonl").rows}
    if not rows.get(key):
        raise Missing(f"Its memory is to be that of {key!r}, which was not measured yet.")
    return int(rows[key]["allocated_bytes"])


# -- the command


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what *arguments* ask for; return the exit code."""
    asked = _parser().parse_args(arguments)
    try:
        if asked.report:
            return _report(asked.out)
        return _measure(asked)
    except PipefitError as error:
        print(error, file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.streaming_gpu",
        description="Measures streamed steps beside their limits and peers; a second run goes on.",
    )
    parser.add_argument("--minutes", type=float, default=DEFAULT_MINUTES, help="time for all of it")
    parser.add_argument("--out", type=Path, required=True, help="folder of rows and reports")
    parser.add_argument("--only", default="*", help='rows by name, such as "streaming*"')
    parser.add_argument("--device", default="cuda", help="cuda or cuda:1")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="all of it on the CPU with a small transformer, in a minute; needs no GPU",
    )
    parser.add_argument(
        "--report", action="store_true", help="write the reports of the rows in --out again"
    )
    return parser


def _measure(asked: argparse.Namespace) -> int:
    device = "cpu" if asked.dry_run else asked.device
    gpu, machine = this_machine(device, "benchmarks.streaming_gpu")
    folder = asked.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PIPEFIT_CACHE", str(folder / "traces"))
    os.environ[OUT_VARIABLE] = str(folder)
    machine["host_available_bytes"] = read_host().available_bytes
    machine["model"] = model_for(machine["host_available_bytes"], is_small=asked.dry_run)
    if (folder / "machine.json").exists():  # rows of one folder are of one model
        machine["model"] = machine_in(folder)["model"]
    if machine["model"]["is_small"] != asked.dry_run:
        raise InvalidRequest(f"{folder} has rows of the other kind of run: give another folder.")
    cases = [c for c in cases_of(machine["model"]) if fnmatch.fnmatchcase(c.key, asked.only)]
    if not cases:
        raise InvalidRequest(f"No row is called like {asked.only!r}.")
    rows = RowFile(folder / "rows.jsonl")
    with (folder / "worker.log").open("a", encoding="utf-8") as log:
        left = run(
            cases,
            rows,
            gpu=find_gpu(DRY_RUN_GPU) if asked.dry_run else gpu,
            device=device,
            limit_s=60 * asked.minutes,
            log=log,
            command=WORKER_COMMAND,
            say=lambda text: print(text, flush=True),
            started=lambda software: check_same(folder, {**machine, "software": software}),
        )
    if (folder / "machine.json").exists():
        _report(folder)
    print(f"{len(rows.rows)} rows in {asked.out}, {len(left)} left; the same command goes on.")
    return 0


def _report(folder: Path) -> int:
    machine = machine_in(folder)
    rows = RowFile(folder / "rows.jsonl").rows
    cut = None
    if any(row["kind"] == "resident" and row["measured"] for row in rows):
        cut = _subject(json.dumps(machine["model"])).cut
    write_report(folder, machine, derived(rows, cut))
    print(f"{len(rows)} rows in {folder / 'streaming_gpu.md'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
