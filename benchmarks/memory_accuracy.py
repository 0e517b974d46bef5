"""Predicts published memory peaks and writes down how far off the predictions are.

    python -m benchmarks.memory_accuracy            # prints the tables
    python -m benchmarks.memory_accuracy --write    # and writes docs/accuracy.md

Nothing is measured here: each record becomes a question to pipefit (benchmarks/published/), which
traces the pipeline without weights and replays the call on a catalogue GPU. The published figures
are other people's and not part of the project; ``--records`` names their file. Minutes on two cores
with empty caches, less with warm ones.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, TypeVar

from benchmarks.published import held_out
from benchmarks.published.older_versions import torch_version
from benchmarks.published.records import (
    RECORDS,
    Record,
    Setup,
    Unusable,
    counts_inputs,
    explanation,
    is_compiled_where_it_peaks,
    is_of_whole_process,
    load,
    outside_bytes,
    phases_of,
    setup_of,
    subject_of,
    usable,
    weights_are_published,
)
from pipefit.cost_models.prediction import PhasePrediction
from pipefit.cost_models.units import GIB
from pipefit.planner.catalog import find_gpu, reference_machine

Task = TypeVar("Task")
Result = TypeVar("Result")

DOC = Path(__file__).parent.parent / "docs" / "accuracy.md"

OUTLIER = 0.02
"""Errors above this share of the published figure are explained, or marked unexplained."""

Kind = Literal["allocated", "reserved", "process"]
KINDS: tuple[Kind, ...] = ("allocated", "reserved", "process")


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What pipefit says about one setup."""

    phases: tuple[PhasePrediction, ...]
    host_ram_bytes: int

    @property
    def loaded_bytes(self) -> int:
        """Weights on the GPU in the first phase: what a resident pipeline holds once loaded."""
        return self.phases[0].weights_bytes

    def peak(self, kind: Kind, counts: Callable[[str], bool] = lambda phase: True) -> int:
        """Return the highest of the phases that count, in bytes."""
        return max(getattr(p, f"{kind}_bytes") for p in self.phases if counts(p.name))

    def peak_phase(self) -> str:
        """Return the name of the phase in which most is allocated."""
        return max(self.phases, key=lambda p: p.allocated_bytes).name


@dataclass(frozen=True, kw_only=True)
class Row:
    """One record with its prediction, or with the reason why there is none."""

    record: Record
    kind: Kind
    published_gib: float
    predicted_gib: float | None = None
    setup: Setup | None = None
    has_published_weights: bool = False
    """The record's own weights and the predicted growth: its storage format is not modelled."""
    is_compiled: bool = False
    """``torch.compile`` had the component that peaks, which pipefit does not model."""
    ram_gib: float | None = None
    """Predicted host RAM, where the record's is of the whole process."""
    note: str = ""

    @property
    def error(self) -> float:
        """Predicted over published, less one."""
        assert self.predicted_gib is not None
        return self.predicted_gib / self.published_gib - 1

    @property
    def counts(self) -> bool:
        """Whether the row is part of the summary."""
        return self.predicted_gib is not None and not self.is_compiled


def predict_setup(setup: Setup, subject: Any = None) -> Predicted:
    """Ask pipefit; seconds where the trace is not in the cache.

    *subject* is what ``subject_of`` made of the setup, where that is at hand.
    """
    from pipefit import predict

    subject = subject_of(setup) if subject is None else subject
    with torch_version(setup.torch):
        found = predict(
            subject,
            setup.strategies,
            call=setup.call,
            machine=reference_machine([setup.gpu]),
            dtype=setup.dtype if isinstance(subject, str) else None,
        )
    return Predicted(phases=found.phases, host_ram_bytes=found.host_ram_bytes)


def rows_of(records: Iterable[Record], *, num_workers: int) -> list[Row]:
    """Return a row for every usable record, each distinct setup predicted once."""
    chosen = [record for record in records if usable(record)]
    setups: dict[str, Setup] = {}
    asked: list[tuple[Record, Setup | str]] = []
    for record in chosen:
        try:
            setup = setup_of(record)
        except Unusable as reason:
            asked.append((record, str(reason)))
        else:
            setups[setup.key] = setup
            asked.append((record, setup))
    predicted = _in_pool(_predict_or_say, setups, num_workers, "predicted")
    return [
        _row(record, setup, None if isinstance(setup, str) else predicted[setup.key])
        for record, setup in asked
    ]


def _in_pool(
    work: Callable[[Task], Result], tasks: Mapping[str, Task], num_workers: int, what: str
) -> dict[str, Result]:
    """Do *work* for each of *tasks* in processes of their own; says how far it is."""
    found: dict[str, Result] = {}
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        for key, result in zip(tasks, pool.map(work, tasks.values()), strict=True):
            found[key] = result
            print(f"\r{what}: {len(found)} of {len(tasks)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def _predict_or_say(setup: Setup) -> Predicted | str:
    from pipefit.errors import PipefitError

    try:
        return predict_setup(setup)
    except PipefitError as error:
        return str(error)


def _row(record: Record, setup: Setup | str, predicted: Predicted | str | None) -> Row:
    kind: Kind = record["peak_kind"].removesuffix("_presumed")
    published: float = record["peak_memory_gib"]
    if isinstance(setup, str) or isinstance(predicted, str) or predicted is None:
        reason = setup if isinstance(setup, str) else str(predicted)
        return Row(record=record, kind=kind, published_gib=published, note=reason)
    num_bytes = predicted.peak(kind, phases_of(record))
    if not counts_inputs(record):
        num_bytes -= max(phase.carried_bytes for phase in predicted.phases)
    if kind == "process":
        num_bytes -= outside_bytes(record, find_gpu(setup.gpu))
    predicted_gib = num_bytes / GIB
    has_published_weights = weights_are_published(record) and bool(record["weights_gib"])
    if has_published_weights:
        predicted_gib += record["weights_gib"] - predicted.loaded_bytes / GIB
    row = Row(
        record=record,
        kind=kind,
        published_gib=published,
        predicted_gib=predicted_gib,
        setup=setup,
        has_published_weights=has_published_weights,
        is_compiled=is_compiled_where_it_peaks(record, predicted.peak_phase()),
        ram_gib=predicted.host_ram_bytes / GIB if is_of_whole_process(record) else None,
    )
    notes = [explanation(record)] if abs(row.error) > OUTLIER else []
    notes += [f"run with {change}" for change in setup.changes if change == "diffusers 0.30"]
    return Row(**{**vars(row), "note": "; ".join(note for note in notes if note)})


# -- leave one pipeline out


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A pipeline predicted by rules that were found without it."""

    pipeline: str
    num_rows: int
    rules: held_out.Choice
    """Of the kinds of convolutions that it meets."""
    error: float
    """Median absolute error."""
    lowest: float
    """The most that a row is under-predicted."""


def leave_one_out(rows: Sequence[Row], *, num_workers: int) -> list[LeftOut]:
    """Return each pipeline with resident weights and an allocated peak, left out of the rules."""
    chosen = [
        row
        for row in rows
        if row.counts and row.kind == "allocated" and row.setup and not _is_offloaded(row.setup)
    ]
    setups = {row.setup.key: row.setup for row in chosen if row.setup}
    asked = {key: (setup, _alternatives()) for key, setup in setups.items()}
    under = _in_pool(_allocated_under, asked, num_workers, "rules")
    errors: dict[str, dict[str, list[tuple[str, float]]]] = {
        regime: {rule: [] for rule in held_out.RULES} for regime in held_out.OURS
    }
    for row in chosen:
        assert row.setup is not None
        ours_bytes, met, *by_choice = under[row.setup.key]
        for choice, num_bytes in zip(_alternatives(), by_choice, strict=True):
            ((regime, (rule,)),) = choice.items()
            if regime in met:
                error = _moved(row, num_bytes - ours_bytes)
                errors[regime][rule].append((row.record["pipeline"], error))
    best = {
        pipeline: held_out.best_rules(errors, pipeline)
        for pipeline in sorted({row.record["pipeline"] for row in chosen})
    }
    asked = {
        row.setup.key: (row.setup, [best[row.record["pipeline"]]]) for row in chosen if row.setup
    }
    without = _in_pool(_allocated_under, asked, num_workers, "left out")
    found = []
    for pipeline, rules in best.items():
        moved, met = [], set()
        for row in chosen:
            if row.setup is not None and row.record["pipeline"] == pipeline:
                ours_bytes, here, num_bytes = without[row.setup.key]
                moved.append(_moved(row, num_bytes - ours_bytes))
                met |= here
        found.append(
            LeftOut(
                pipeline=pipeline,
                num_rows=len(moved),
                rules={regime: rules[regime] for regime in sorted(met)},
                error=statistics.median(map(abs, moved)),
                lowest=min(moved),
            )
        )
    return found


def _alternatives() -> list[held_out.Choice]:
    """Return every rule of every kind of convolution, one at a time."""
    return [{regime: (rule,)} for regime in held_out.OURS for rule in held_out.RULES]


def _is_offloaded(setup: Setup) -> bool:
    return any("offload" in strategy for strategy in setup.strategies)


def _moved(row: Row, delta_bytes: int) -> float:
    """Return the error of *row* if its peak were *delta_bytes* higher."""
    assert row.predicted_gib is not None
    return (row.predicted_gib + delta_bytes / GIB) / row.published_gib - 1


def _allocated_under(asked: tuple[Setup, Sequence[held_out.Choice]]) -> tuple[Any, ...]:
    """Return the allocated peak by our rules, the kinds met, and the peak by each choice."""
    setup, choices = asked
    subject = subject_of(setup)
    with held_out.ruled_by({}) as met:
        ours_bytes = predict_setup(setup, subject).peak("allocated")

    def peak(choice: held_out.Choice) -> int:
        if not met & choice.keys():
            return ours_bytes
        with held_out.ruled_by(choice):
            return predict_setup(setup, subject).peak("allocated")

    return ours_bytes, set(met), *map(peak, choices)


# -- figures


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Errors of one peak kind, every pipeline weighing the same."""

    num_rows: int
    num_pipelines: int
    median: float
    """Of the pipelines' median absolute errors."""
    ninetieth: float
    """The same at the ninetieth percentile: nine of ten pipelines are at most this far off."""
    worst: float
    """The largest absolute error of any row."""
    lowest: float
    """The most that any row is under-predicted: negative where one is."""
    share_under: float
    """Share of rows that are under-predicted, every pipeline weighing the same."""


def summary(rows: Sequence[Row]) -> Summary:
    """Return the figures of *rows*, of which there is at least one."""
    errors: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        errors[row.record["pipeline"]].append(row.error)
    medians = sorted(statistics.median(map(abs, found)) for found in errors.values())
    return Summary(
        num_rows=len(rows),
        num_pipelines=len(errors),
        median=statistics.median(medians),
        ninetieth=medians[max(0, -(-len(medians) * 9 // 10) - 1)],
        worst=max(abs(row.error) for row in rows),
        lowest=min(row.error for row in rows),
        share_under=statistics.mean(
            sum(e < 0 for e in found) / len(found) for found in errors.values()
        ),
    )


# -- the page


def page(rows: Sequence[Row], left_out: Sequence[LeftOut], seconds: float) -> str:
    """Return docs/accuracy.md."""
    import diffusers
    import torch

    compiled = [row for row in rows if row.is_compiled and row.predicted_gib is not None]
    missing = [row for row in rows if row.predicted_gib is None]
    within = sum(abs(row.error) <= OUTLIER for row in compiled)
    lines = [
        "# How well memory is predicted",
        "",
        f"Written by `python -m benchmarks.memory_accuracy --write` with torch {torch.__version__}"
        " and",
        f"diffusers {diffusers.__version__}, in {seconds / 60:.0f} minutes. Nothing here was "
        "measured by this project: pipelines are",
        "traced without weights, and the published figures (GiB) are other people's.",
        "",
        *_summary_table(rows),
        "",
        "Every pipeline weighs the same: *median* and *90 %* are over pipelines, each with the",
        "median of its absolute errors. *Worst* and *most under* are single records; *under* is "
        "the share",
        "of records that are predicted too low.",
        "",
        f"Not in these figures: {len(missing)} records that cannot be asked, each with the reason, "
        f"and {len(compiled)} whose",
        "peak is that of a component under `torch.compile` (‡), which pipefit does not predict; "
        f"{within} of them",
        f"are within {OUTLIER:.0%} of the eager prediction all the same.",
        "",
        "† the record's own weights and the predicted growth, because how they are stored is not "
        "modelled.",
        "",
        "How much of it is in-sample: most of these records were known when the rules were found. "
        "What was",
        "read off them is which scratch a convolution takes (found again below without each "
        "pipeline) and",
        "what a source ran besides: its version of diffusers, a safety checker, how it quantised. "
        "Not read",
        "off them: tensors, allocator, cuBLAS, attention, storage formats, hooks, context. No rule "
        "was",
        "chosen by the records of SSD-1B, Latte and Krea-2; ERNIE-Image-Turbo's settled that an "
        "embedding",
        "in its configuration is tied. How memory is predicted, and which records stay "
        "unexplained, is",
        "in [memory.md](memory.md).",
        "",
        "## Leave one pipeline out",
        "",
        "Each pipeline with resident weights, predicted by rules that the records of all others "
        "choose",
        "(benchmarks/published/held_out.py).",
        "",
        *_left_out_table(left_out),
    ]
    for kind in KINDS:
        lines += ["", f"## {kind.capitalize()}", "", *_pipeline_table(rows, kind)]
        lines += ["", *_row_table([r for r in rows if r.kind == kind])]
    lines += [
        "",
        "## Host RAM",
        "",
        "Resident set of the whole process, loading included (GiB).",
        "",
        *_ram_table(rows),
    ]
    return "\n".join(lines) + "\n"


def _ram_table(rows: Sequence[Row]) -> list[str]:
    lines = ["| record | published | predicted | error |", "|---|---:|---:|---:|"]
    for row in rows:
        published = row.record["cpu_ram_gib"]
        if published and row.ram_gib is not None:
            error = row.ram_gib / published - 1
            lines.append(
                f"| {row.record['id']} | {published:.2f} | {row.ram_gib:.2f} | {error:+.0%} |"
            )
    return lines


def _summary_table(rows: Sequence[Row]) -> list[str]:
    """Return a line for each peak kind, and one more where compiled rows would change it."""
    lines = [
        "| peak | pipelines | records | median | 90 % of pipelines | worst | most under | under |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for kind, with_compiled in itertools.product(KINDS, (False, True)):
        asked = [row for row in rows if row.kind == kind and row.predicted_gib is not None]
        found = [row for row in asked if row.counts or with_compiled]
        if not found or (with_compiled and all(row.counts for row in found)):
            continue
        s = summary(found)
        lines.append(
            f"| {kind}{', ‡ too' if with_compiled else ''} | {s.num_pipelines} | {s.num_rows} | "
            f"{s.median:.2%} | {s.ninetieth:.2%} | {s.worst:.1%} | {min(0.0, s.lowest):+.1%} | "
            f"{s.share_under:.0%} |"
        )
    return lines


def _left_out_table(left_out: Sequence[LeftOut]) -> list[str]:
    lines = ["| pipeline | records | rules found without it | median error | most under |"]
    lines.append("|---|---:|---|---:|---:|")
    for one in left_out:
        rules = "; ".join(_rule_in_words(regime, found) for regime, found in one.rules.items())
        lines.append(
            f"| {one.pipeline} | {one.num_rows} | {rules or '–'} | {one.error:.2%} | "
            f"{min(0.0, one.lowest):+.2%} |"
        )
    return lines


def _rule_in_words(regime: str, rules: Sequence[str]) -> str:
    if len(rules) == len(held_out.RULES):
        return f"{regime}: no other evidence, the largest"
    marked = "" if held_out.OURS[regime] in rules else " **(not ours)**"
    return f"{regime}: {' or '.join(rules)}{marked}"


def _pipeline_table(rows: Sequence[Row], kind: Kind) -> list[str]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.kind == kind and row.counts:
            found[row.record["pipeline"]].append(row)
    lines = [
        "| pipeline | records | median error | lowest | highest |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, these in sorted(found.items()):
        errors = [row.error for row in these]
        lines.append(
            f"| {name} | {len(these)} | {statistics.median(map(abs, errors)):.2%} | "
            f"{min(errors):+.2%} | {max(errors):+.2%} |"
        )
    return lines


def _row_table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| record | GPU | published | predicted | error | |",
        "|---|---|---:|---:|---:|---|",
    ]
    for row in rows:
        name = row.record["id"]
        if row.predicted_gib is None:
            lines.append(f"| {name} | | {row.published_gib:.3f} | – | – | {row.note} |")
            continue
        assert row.setup is not None
        marks = "†" * row.has_published_weights + "‡" * row.is_compiled
        lines.append(
            f"| {name} | {row.setup.gpu} | {row.published_gib:.3f} | {row.predicted_gib:.3f}{marks}"
            f" | {row.error:+.2%} | {row.note} |"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, default=RECORDS, help="the published records")
    parser.add_argument("--write", action="store_true", help=f"write {DOC.name}")
    parser.add_argument("--only", default="", help="pipelines whose name contains this")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    given = parser.parse_args(arguments)
    if not given.records.exists():
        sys.exit(f"There are no records at {given.records}: name their file with --records.")
    records = [r for r in load(given.records) if given.only.lower() in r["pipeline"].lower()]
    started = time.perf_counter()
    rows = rows_of(records, num_workers=given.workers)
    left_out = leave_one_out(rows, num_workers=given.workers)
    text = page(rows, left_out, time.perf_counter() - started)
    if given.write:
        DOC.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
