"""What rows of ``streaming_gpu`` say together: distance to the link and the GPU, and to the peers.

No row knows another while it is measured; here each step is held to the larger of two limits, the
resident step and what its bytes take at the rate of the link, and its output to the resident one's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_memory.report import heading, table, write_json
from pipefit.cost_models.blocks import Blocks
from pipefit.cost_models.clock import steps_of
from pipefit.cost_models.latency import DESKTOP_LAUNCH_S
from pipefit.cost_models.placement import Streaming
from pipefit.cost_models.streaming import CallTimes, Window
from pipefit.cost_models.units import GIB

SCHEMA = "pipefit.streaming_gpu/1"

GOAL_RATIO = 1.10
"""What a step may take of the larger limit at every level of residency; the project's goal."""

GOAL_SLOTS, GOAL_LEVELS = 2, 5
"""With how many slots, and at how many levels."""

Row = Mapping[str, Any]


def derived(rows: Sequence[Row], cut: Blocks | None) -> list[dict[str, Any]]:
    """Return *rows*, each with what follows from the others under ``derived``.

    *cut* are the blocks that the windows of the resident row belong to; without it, nothing is
    predicted from measured windows.
    """
    by_kind = {row["kind"]: row["measured"] for row in rows if row["measured"]}
    link, resident = by_kind.get("link"), by_kind.get("resident")
    found = []
    for row in rows:
        one: dict[str, Any] = {}
        measured = row["measured"]
        if measured and "step_s" in measured:
            if resident:
                one["is_equal"] = measured["output_sha256"] == resident["output_sha256"]
            if row["kind"] == "streaming" and link and resident:
                one |= _held_to_limits(measured, resident["compute_s"], rate_of(link))
                if cut is not None:
                    one["from_measured_s"] = from_measured(row, cut, resident, link)
            if row["kind"] in ("group_offload", "mmgp"):
                one |= beside(measured, rows)
        found.append({**row, "derived": one})
    return found


def rate_of(link: Mapping[str, Any]) -> float:
    """Return the rate that a large copy reached from the better kind of page-locked memory.

    >>> rate_of({"registered_bytes_per_s": None, "torch_pinned_bytes_per_s": 25e9})
    25000000000.0
    """
    return max(link["registered_bytes_per_s"] or 0.0, link["torch_pinned_bytes_per_s"])


def _held_to_limits(
    measured: Mapping[str, Any], compute_s: float, bytes_per_s: float
) -> dict[str, float]:
    bound_s = max(compute_s, measured["streamed_bytes"] / bytes_per_s)
    return {"bound_s": bound_s, "ratio": measured["step_s"] / bound_s}


def from_measured(
    row: Row, cut: Blocks, resident: Mapping[str, Any], link: Mapping[str, Any]
) -> float:
    """Return the step's time that the model of streaming gives for measured windows and link."""
    numbers = {block.path: number for number, block in enumerate(cut.blocks)}
    windows = [
        Window(
            None if path is None else numbers[path],
            steps_of([(max(1, round(host_s / DESKTOP_LAUNCH_S)), gpu_s)], DESKTOP_LAUNCH_S),
        )
        for path, gpu_s, host_s in resident["windows"]
    ]
    num_slots = row["parameters"]["num_slots"]
    placement = Streaming(
        resident_blocks=row["measured"]["resident_blocks"],
        num_slots=num_slots,
        look_ahead=num_slots,
    )
    return CallTimes(windows, cut, placement, rate_of(link)).later_s


def beside(measured: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Return the fastest streaming row that allocates no more, and how much faster it is."""
    smaller = [
        row
        for row in rows
        if row["kind"] == "streaming"
        and row["measured"]
        and row["measured"]["allocated_bytes"] <= measured["allocated_bytes"]
    ]
    if not smaller:
        return {"beside": None, "speedup": None}
    fastest = min(smaller, key=lambda row: row["measured"]["step_s"])
    return {
        "beside": fastest["key"],
        "speedup": measured["step_s"] / fastest["measured"]["step_s"],
    }


def write_report(folder: Path, machine: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write ``streaming_gpu.json`` and ``streaming_gpu.md``; *rows* are derived ones."""
    write_json(folder / "streaming_gpu.json", SCHEMA, machine, rows)
    (folder / "streaming_gpu.md").write_text("\n".join(_lines(machine, rows)) + "\n", "utf-8")


def verdict(rows: Sequence[Row]) -> str:
    """Return whether the goal is met, in one line."""
    ratios = {
        row["parameters"]["level"]: row["derived"]["ratio"]
        for row in rows
        if row["kind"] == "streaming"
        and row["parameters"]["num_slots"] == GOAL_SLOTS
        and "ratio" in row["derived"]
    }
    if not ratios:
        return f"No ratio was measured with {GOAL_SLOTS} slots."
    worst = max(ratios, key=lambda level: ratios[level])
    is_met = ratios[worst] <= GOAL_RATIO
    said = "MISSED" if not is_met else "met" if len(ratios) >= GOAL_LEVELS else "open"
    return (
        f"With {GOAL_SLOTS} slots a step takes at most {ratios[worst]:.3f} of the larger limit, at "
        f"{worst}/16 resident; {len(ratios)} of {GOAL_LEVELS} levels are measured, and the goal of "
        f"{GOAL_RATIO:.2f} is {said}."
    )


def _lines(machine: Mapping[str, Any], rows: Sequence[Row]) -> Iterable[str]:
    yield from heading("Steps with streamed weights", machine, rows)
    model = machine["model"]
    if model["is_small"]:
        yield from (
            "**A dry run on the CPU, of a small transformer: no figure means anything.**",
            "",
        )
    yield (
        f"FLUX.1-dev's transformer with {model['layers']} double and {model['single_layers']} "
        "single blocks (of 19 and 38), random weights."
    )
    yield ""
    if not model["is_small"]:
        yield from (verdict(rows), "")
    for row in rows:
        measured = row["measured"]
        if not measured:
            continue
        if row["kind"] == "link":
            rates = ("registered_bytes_per_s", "torch_pinned_bytes_per_s")
            said = [f"{measured[r] / 1e9:.2f}" if measured[r] else "refused" for r in rates]
            yield f"One large copy: {said[0]} GB/s from registered, {said[1]} from torch's memory."
            yield ""
        if row["kind"] == "resident":
            how = "resident" if measured["is_resident"] else "sum of blocks brought one by one"
            yield f"A step computes for {_ms(measured['compute_s'])} ms ({how})."
            yield ""
    yield from _streaming(rows)
    yield from _peers(rows)
    unmeasured = [row for row in rows if row["error"] or row.get("prediction_error")]
    if unmeasured:
        yield from ("## Not measured or not predicted", "")
        for row in unmeasured:
            yield f"- {row['key']}: {row['error'] or row['prediction_error']}"
    warned = {w for row in rows for w in (row["measured"] or {}).get("warnings", ())}
    if warned:
        yield from ("", "## Warnings", "", *(f"- {warning}" for warning in sorted(warned)))


def _streaming(rows: Sequence[Row]) -> Iterable[str]:
    def lines() -> Iterable[list[str]]:
        for row in rows:
            measured, said = row["measured"], row.get("predicted") or {}
            if row["kind"] != "streaming" or not measured:
                continue
            seen = row["derived"]
            yield [
                row["key"].removeprefix("streaming "),
                f"{measured['streamed_blocks']}: {_gib(measured['streamed_bytes'])}",
                *_memory(measured),
                _gib(said.get("allocated_bytes")),
                _ms(measured["step_s"]),
                _ms(seen.get("bound_s")),
                f"{seen['ratio']:.3f}" if "ratio" in seen else "–",
                _ms(seen.get("from_measured_s")),
                _ms(said.get("step_s")),
                _output(row),
            ]

    head = (
        "streaming", "streamed blocks: GiB", "allocated, GiB", "reserved", "process",
        "allocated, predicted", "step, ms", "larger limit", "ratio", "model on measured windows",
        "predicted", "output",
    )  # fmt: skip
    yield from table("Streaming", head, lines())


def _peers(rows: Sequence[Row]) -> Iterable[str]:
    def lines() -> Iterable[list[str]]:
        for row in rows:
            measured, said = row["measured"], row.get("predicted") or {}
            if row["kind"] not in ("resident", "group_offload", "mmgp"):
                continue
            if not measured or "step_s" not in measured:
                continue
            seen = row["derived"]
            speedup = seen.get("speedup")
            yield [
                row["key"],
                *_memory(measured),
                _ms(measured["step_s"]),
                _ms(said.get("step_s")),
                _output(row),
                seen.get("beside") or "–",
                f"{speedup:.2f}" if speedup else "–",
            ]

    head = (
        "row", "allocated, GiB", "reserved", "process", "step, ms", "predicted", "output",
        "fastest streaming row with no more allocated", "times as fast",
    )  # fmt: skip
    yield from table("Side by side", head, lines())


def _memory(measured: Mapping[str, Any]) -> list[str]:
    return [_gib(measured[f"{peak}_bytes"]) for peak in ("allocated", "reserved", "process")]


def _output(row: Row) -> str:
    measured, is_equal = row["measured"], row["derived"].get("is_equal")
    if is_equal is None:
        return "–"
    if is_equal:
        return "equal" if measured["is_finite"] else "equal, not finite"
    difference = measured["largest_difference"]
    if difference is None:
        return "differs"
    return f"differs by {difference:.3g} of {measured['largest_reference']:.3g}"


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e3:.2f}"


def _gib(num_bytes: float | None) -> str:
    return "–" if num_bytes is None else f"{num_bytes / GIB:.2f}"
