"""The process that measures: prepares its cases, then waits to be told that the GPU is free.

Preparing (imports, the weightless pipeline, the prediction) does not touch CUDA, so several
processes prepare while one measures. What is said on standard input and output is a JSON object a
line; whatever libraries print goes to standard error.

    ← {"cases": [...], "gpu": {...}, "device": "cuda"}
    → {"prepared": key, "estimate_s": …, "predicted": …, "prediction_error": …}    for each case
    → {"ready": {"torch": …}}
    ← {"measure": key, "limit_s": …}
    → {"row": key, "outcome": …, "measured": …, "error": …, "is_broken": …}      for each asked
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

import torch

from benchmarks.gpu_memory.cases import (
    CARDS,
    FILL_BYTES_PER_S,
    START_S,
    Case,
    card_bytes,
    weight_bytes,
)
from benchmarks.gpu_memory.counters import Counter, counter_of
from benchmarks.gpu_memory.kernels import measure_kernel, predict_kernel
from benchmarks.gpu_memory.pipelines import (
    in_words,
    is_out_of_memory,
    measure_pipeline,
    options_of,
    predict_pipeline,
)
from benchmarks.gpu_memory.probes import (
    measure_allocator,
    measure_context,
    measure_transfers,
    predict_allocator,
    predict_context,
    predict_transfers,
)
from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.serial import from_json, to_json
from pipefit.planner.build import build_pipeline, quietly
from pipefit.planner.call import DEFAULT_PICTURE_PX, default_inputs, resolve_call_defaults

Measured = Mapping[str, Any]

BROKEN_CONTEXT = ("CUDA error", "CUDNN_STATUS_EXECUTION_FAILED", "CUBLAS_STATUS_EXECUTION_FAILED")
"""What an error says after which nothing works on the device in this process any more."""


class Missing(Exception):
    """What a row needs is not there yet: a package, or what another row measures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A case that can be measured at once."""

    measure: Callable[[Counter, float], dict[str, Any]]
    """Takes the counter and the moment (``time.monotonic``) by which to be done."""
    predict: Callable[[Measured], dict[str, Any]]
    """Takes what was measured, or {} before that."""
    needs_measurement: bool = False
    """Whether the prediction starts from what was measured."""
    options: tuple[Any, ...] = ()


def prepare(case: Case, gpu: Gpu) -> Prepared:
    """Return how to measure and predict *case*; nothing touches a GPU yet."""
    given = case.parameters
    if case.kind == "kernel":
        return Prepared(
            measure=lambda counter, until_s: measure_kernel(given, counter),
            predict=lambda measured: predict_kernel(given, gpu),
        )
    if case.kind == "allocator":
        return Prepared(
            measure=lambda counter, until_s: measure_allocator(given, counter),
            predict=lambda measured: predict_allocator(given, measured),
            needs_measurement=True,
        )
    if case.kind == "context":
        return Prepared(
            measure=lambda counter, until_s: measure_context(counter),
            predict=lambda measured: predict_context(gpu),
        )
    if case.kind == "transfer":
        return Prepared(
            measure=lambda counter, until_s: measure_transfers(counter),
            predict=lambda measured: predict_transfers(gpu),
        )
    return _prepare_pipeline(case, gpu)


def _prepare_pipeline(case: Case, gpu: Gpu) -> Prepared:
    name, call = case.parameters["pipeline"], case.parameters["call"]
    pipe, info = build_pipeline(name)
    arguments = default_inputs(pipe, info.entry, call)
    shown = resolve_call_defaults(pipe, arguments)
    picture_px = max(shown.get(side) or DEFAULT_PICTURE_PX for side in ("height", "width"))
    options = options_of(case.parameters["configuration"], pipe, picture_px)
    cards = {card: card_bytes(card) for card in CARDS if card_bytes(card) < gpu.total_bytes}
    return Prepared(
        measure=lambda counter, until_s: measure_pipeline(
            pipe,
            arguments,
            options,
            counter,
            cards=cards,
            until_s=until_s,
        ),
        predict=lambda measured: predict_pipeline(name, call, options, gpu, cards=cards),
        options=tuple(options),
    )


def predicted(
    prepared: Prepared, measured: Measured | None
) -> tuple[dict[str, Any] | None, str | None]:
    """Return the prediction, or what went wrong with it."""
    if prepared.needs_measurement and not measured:
        return None, None
    try:
        return prepared.predict(measured or {}), None
    except Exception as error:  # one row's failure is not the run's
        traceback.print_exc()
        return None, in_words(error)


def estimate_s(case: Case, prediction: Mapping[str, Any] | None) -> float:
    """Return the seconds that a case takes: of a pipeline, two calls as predicted and its weights.

    *prediction* is what was predicted of it; without one, what the case itself says.
    """
    if case.kind != "pipeline" or prediction is None:
        return case.estimate_s
    filled_s = weight_bytes(case.parameters["pipeline"]) / FILL_BYTES_PER_S
    moves = case.parameters["configuration"] not in ("resident", "tiling", "channels-last")
    calls_s = float(prediction["first_call_s"] + prediction["call_s"])
    return START_S + moves * filled_s + calls_s


def software() -> dict[str, str]:
    """Return the versions that decide about memory; nothing here starts CUDA."""
    found = {name: _version(name) for name in ("torch", "diffusers", "transformers", "accelerate")}
    return {
        **found,
        "torch_build": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version() if torch.version.cuda else None),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def measured_row(prepared: Prepared, counter: Counter, limit_s: float) -> dict[str, Any]:
    """Measure one case; whatever happens is a row. Out of memory is a result."""
    start_s = time.monotonic()
    row: dict[str, Any] = {"outcome": "measured", "measured": None, "error": None}
    try:
        measured = prepared.measure(counter, start_s + limit_s)
    except Missing as error:
        row |= {"outcome": "missing", "error": str(error)}
    except Exception as error:  # one row's failure is not the run's
        traceback.print_exc()
        outcome = "out of memory" if is_out_of_memory(error) else "error"
        row |= {"outcome": outcome, "error": in_words(error)}
    else:
        row["measured"] = measured
        first = (measured.get("calls") or [{}])[0]
        if first.get("error"):
            row |= {"outcome": first["outcome"], "error": first["error"]}
    return {**row, "took_s": time.monotonic() - start_s}


def serve(
    lines: Iterator[str],
    say: Callable[[Mapping[str, Any]], None],
    prepare: Callable[[Case, Gpu], Prepared] = prepare,
    estimate_s: Callable[[Case, Mapping[str, Any] | None], float] = estimate_s,
) -> None:
    """Prepare what the first line of *lines* names, then measure what each further one asks for."""
    request = json.loads(next(lines))
    gpu = from_json(Gpu, request["gpu"])
    cases = {given["key"]: Case(**given) for given in request["cases"]}
    ready: dict[str, Prepared] = {}
    for key, case in cases.items():
        try:
            with quietly():
                ready[key] = prepare(case, gpu)
                prediction, error = predicted(ready[key], None)
        except Exception as failure:  # one row's failure is not the run's
            traceback.print_exc()
            say({"prepared": key, "failed": in_words(failure)})
            continue
        said = {"predicted": prediction, "prediction_error": error}
        seconds = estimate_s(case, prediction)
        options = to_json(ready[key].options)
        say({"prepared": key, "estimate_s": seconds, "options": options, **said})
    say({"ready": software()})
    with contextlib.ExitStack() as stack:
        counter: Counter | None = None
        for line in lines:
            asked = json.loads(line)
            one = ready[asked["measure"]]
            if counter is None:  # from here on the process is on the GPU
                counter = stack.enter_context(counter_of(request["device"]))
            with quietly():
                row = measured_row(one, counter, asked["limit_s"])
                if one.needs_measurement and row["measured"]:
                    prediction, error = predicted(one, row["measured"])
                    row |= {"predicted": prediction, "prediction_error": error}
            is_broken = any(words in (row["error"] or "") for words in BROKEN_CONTEXT)
            say({"row": asked["measure"], "is_broken": is_broken, **row})


def main(
    prepare: Callable[[Case, Gpu], Prepared] = prepare,
    estimate_s: Callable[[Case, Mapping[str, Any] | None], float] = estimate_s,
) -> None:
    """Talk to the session that started this process."""
    # Whatever prints to standard output, C libraries included, must not come between the lines.
    channel: IO[str] = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(message: Mapping[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    serve(iter(sys.stdin.readline, ""), say, prepare, estimate_s)
    channel.flush()
    os._exit(0)  # at once: tearing down thirty gigabytes of pinned memory takes seconds


if __name__ == "__main__":
    main()
