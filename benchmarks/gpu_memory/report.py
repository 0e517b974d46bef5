"""The rows as one JSON file with all that a reader needs to judge them, and as a table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_memory.cases import UNFINISHED, Case
from pipefit.cost_models.units import GIB, MIB

SCHEMA = "pipefit.gpu_memory/1"

Row = Mapping[str, Any]

CASE_FIELDS = ("key", "kind", "parameters", "environment")


def write_report(folder: Path, machine: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write ``gpu_memory.json`` and ``gpu_memory.md`` into *folder*."""
    write_json(folder / "gpu_memory.json", SCHEMA, machine, rows)
    (folder / "gpu_memory.md").write_text("\n".join(_lines(machine, rows)) + "\n", "utf-8")


def write_json(path: Path, schema: str, machine: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write what the rows were measured on and the rows."""
    head = json.dumps({"schema": schema, **machine}, indent=1).removesuffix("\n}")
    lines = ",\n".join(json.dumps(row) for row in rows)  # one line a row: events are long
    path.write_text(f'{head},\n "rows": [\n{lines}\n]}}\n', "utf-8")


def case_of(row: Row) -> Case:
    """Return the case that *row* was measured for."""
    given = {name: row[name] for name in CASE_FIELDS}
    return Case(**given, estimate_s=row.get("took_s", 0.0), batch=row["key"])


def _lines(machine: Mapping[str, Any], rows: Sequence[Row]) -> Iterable[str]:
    yield from heading("Predicted and measured memory", machine, rows)
    yield from _pipelines([row for row in rows if row["kind"] == "pipeline"])
    yield from _cards([row for row in rows if row["kind"] == "pipeline"])
    yield from _kernels([row for row in rows if row["kind"] == "kernel"])
    yield from _allocators([row for row in rows if row["kind"] == "allocator"])
    yield from _contexts([row for row in rows if row["kind"] == "context"])
    yield from _transfers([row for row in rows if row["kind"] == "transfer"])
    failed = [row for row in rows if row["error"] or row.get("prediction_error")]
    if failed:
        yield from ("## Failures", "")
        for row in failed:
            yield f"- {row['key']}: {row['error'] or row['prediction_error']}"


def heading(title: str, machine: Mapping[str, Any], rows: Sequence[Row]) -> Iterable[str]:
    """Yield the title, what the rows were measured with, and how many there are."""
    software = machine["software"]
    versions = ", ".join(f"{name} {version}" for name, version in software.items())
    yield f"# {title}: {machine['gpu_name']}"
    yield ""
    yield f"Command: `{machine['command']}`. Driver {machine['driver']}; {versions}."
    yield f"Allocator: {machine['allocator'] or 'native, default settings'}."
    yield ""
    yield from _outcomes(rows)


def _outcomes(rows: Sequence[Row]) -> Iterable[str]:
    counts = {
        outcome: sum(row["outcome"] == outcome for row in rows)
        for outcome in ("measured", "out of memory", "error", *UNFINISHED)
    }
    yield f"{len(rows)} rows: {', '.join(f'{n} {outcome}' for outcome, n in counts.items() if n)}."
    yield ""


def table(title: str, head: Sequence[str], lines: Iterable[Sequence[str]]) -> Iterable[str]:
    """Yield a section with a table; nothing if it would have no lines."""
    body = list(lines)
    if not body:
        return
    yield from (f"## {title}", "", "| " + " | ".join(head) + " |")
    yield "|" + "|".join("---" if i < 1 else "---:" for i in range(len(head))) + "|"
    for line in body:
        yield "| " + " | ".join(line) + " |"
    yield ""


PEAKS = ("allocated_bytes", "reserved_bytes", "process_bytes")


def phase_pairs(row: Row) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Return (predicted, measured) of each phase of a free call that both know."""
    measured = ((row["measured"] or {}).get("calls") or [{"phases": []}])[0]["phases"]
    predicted = {
        (p["component"], p["entry"]): p for p in (row.get("predicted") or {}).get("phases", ())
    }
    return [
        (predicted[phase["component"], phase["entry"]], phase)
        for phase in measured
        if (phase["component"], phase["entry"]) in predicted
    ]


def error_of(predicted: float, measured: float) -> float | None:
    """Return the relative error of a prediction; None of nothing.

    >>> error_of(99, 100), error_of(1, 0)
    (-0.01, None)
    """
    return round(predicted / measured - 1, 6) if measured else None


def _percent(error: float | None) -> str:
    return "–" if error is None else f"{error:+.2%}"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.3f}"


def _pipelines(rows: Sequence[Row]) -> Iterable[str]:
    def lines() -> Iterable[list[str]]:
        for row in rows:
            name = f"{row['parameters']['pipeline']}, {row['parameters']['configuration']}"
            for predicted, measured in phase_pairs(row):
                cells = [f"{name}: {predicted['name']} ({measured['component']})"]
                for peak in PEAKS:
                    error = error_of(predicted[peak], measured[peak])
                    cells += [_gib(predicted[peak]), _gib(measured[peak]), _percent(error)]
                yield cells

    head = ["phase"]
    for peak in PEAKS:
        head += [f"{peak.split('_')[0]}, predicted", "measured", "error"]
    yield from table("Pipelines, GiB", head, lines())
    for peak in PEAKS:
        errors = [
            error
            for row in rows
            for predicted, measured in phase_pairs(row)
            if (error := error_of(predicted[peak], measured[peak])) is not None
        ]
        if errors:
            yield _summary(peak.split("_")[0], errors)
            yield ""


def _summary(what: str, errors: Sequence[float]) -> str:
    sizes = sorted(map(abs, errors))
    ninetieth = sizes[-(-len(sizes) * 9 // 10) - 1]
    under = sum(error < 0 for error in errors) / len(errors)
    return (
        f"{what}: {len(errors)} peaks, median error {statistics.median(sizes):.2%}, ninetieth "
        f"percentile {ninetieth:.2%}, worst {max(errors, key=abs):+.2%}, "
        f"under-predicted {under:.0%}."
    )


def _cards(rows: Sequence[Row]) -> Iterable[str]:
    """Where the verdict about a card was tried or predicted."""
    words = {True: "fits", False: "does not", None: "?"}

    def lines() -> Iterable[list[str]]:
        for row in rows:
            measured = (row["measured"] or {}).get("cards", {})
            predicted = (row.get("predicted") or {}).get("cards", {})
            for card in measured:
                if card not in predicted:
                    continue
                said, was = predicted[card]["fits"], measured[card]["fits"]
                agree = "–" if was is None else ("yes" if said == was else "NO")
                yield [
                    f"{row['parameters']['pipeline']}, {row['parameters']['configuration']}",
                    card, words[said], words[was], measured[card]["how"], agree,
                ]  # fmt: skip

    head = ("configuration", "card", "predicted", "measured", "how", "agree")
    yield from table("Cards", head, lines())


def _kernels(rows: Sequence[Row]) -> Iterable[str]:
    def lines() -> Iterable[list[str]]:
        for row in rows:
            calls = (row["measured"] or {}).get("calls")
            if not calls:
                continue
            predicted, first = row.get("predicted") or {}, calls[0]
            growth = predicted.get("growth_bytes")
            yield [
                row["key"].removeprefix("kernel "),
                "–" if growth is None else _mib(growth),
                _mib(first["growth_bytes"]),
                "–" if growth is None else _percent(error_of(growth, first["growth_bytes"])),
                _mib(predicted.get("workspace_bytes", 0)),
                _mib(first["growth_bytes"] - first["output_bytes"]),
                _mib(calls[-1]["growth_bytes"] - calls[-1]["output_bytes"]),
            ]

    head = (
        "kernel", "growth, predicted", "measured", "error",
        "workspace, predicted", "beyond the result, measured", "in a second call",
    )  # fmt: skip
    yield from table("Kernels, MiB", head, lines())


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / MIB:.2f}"


def _allocators(rows: Sequence[Row]) -> Iterable[str]:
    def lines() -> Iterable[list[str]]:
        for row in rows:
            measured, predicted = row["measured"], row.get("predicted")
            if not measured or not predicted:
                continue
            cells = [row["key"].removeprefix("allocator ")]
            for peak in ("peak_allocated", "peak_reserved"):
                error = error_of(predicted[peak], measured[peak])
                cells += [_gib(predicted[peak]), _gib(measured[peak]), _percent(error)]
            yield cells

    head = (
        "decode", "allocated, replayed", "measured", "error",
        "reserved, replayed", "measured", "error",
    )  # fmt: skip
    yield from table("Allocator, GiB", head, lines())


def _contexts(rows: Sequence[Row]) -> Iterable[str]:
    def lines() -> Iterable[list[str]]:
        for row in rows:
            said = row.get("predicted") or {}
            for stage in (row["measured"] or {}).get("stages", ()):
                yield [stage["stage"], _mib(stage["context_bytes"])]
            for name, when in (("bare_bytes", "before the first kernel"),
                               ("context_bytes", "after a whole call")):  # fmt: skip
                if name in said:
                    yield [f"predicted {when}", _mib(said[name])]

    yield from table("Context, MiB", ("after", "context"), lines())


def _transfers(rows: Sequence[Row]) -> Iterable[str]:
    def lines() -> Iterable[list[str]]:
        for row in rows:
            predicted = row.get("predicted") or {}
            for rate in (row["measured"] or {}).get("rates", ()):
                said = predicted.get(f"{rate['direction']}_{rate['kind']}_bytes_per_s")
                yield [
                    f"{rate['direction']}, {rate['kind']}, {rate['num_bytes'] // MIB} MiB",
                    f"{rate['bytes_per_s'] / 1e9:.2f}",
                    "–" if said is None else f"{said / 1e9:.2f}",
                ]

    def pinned() -> Iterable[list[str]]:
        for row in rows:
            for one in (row["measured"] or {}).get("pinning", ()):
                yield [
                    str(one["asked_bytes"]),
                    str(one["taken_bytes"]),
                    f"{one['took_s'] * 1e3:.2f}",
                ]

    yield from table("Transfers, GB/s", ("copy", "measured", "predicted"), lines())
    yield from table("Pinned memory, bytes", ("asked", "taken", "ms"), pinned())


def predict_again(
    rows: Sequence[Row], predict: Callable[[Case, Mapping[str, Any] | None], tuple[Any, Any]]
) -> list[dict[str, Any]]:
    """Return *rows* with the predictions of today's rules in the place of the old ones."""
    found = []
    for row in rows:
        prediction, error = predict(case_of(row), row["measured"])
        found.append({**row, "predicted": prediction, "prediction_error": error})
    return found
