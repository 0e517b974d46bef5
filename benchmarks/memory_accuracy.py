"""Predicts published memory peaks and writes down how far off the predictions are.

    python -m benchmarks.memory_accuracy            # prints the tables
    python -m benchmarks.memory_accuracy --write    # and writes docs/accuracy.md

Nothing is measured here: each record becomes a question to pipefit (benchmarks/published/), which
traces the pipeline without weights and replays the call on a catalogue GPU. The published figures
are other people's; ``--records`` names their file, which is not part of the project, and what was
looked up afterwards is in benchmarks/published/unseen.py. Minutes on two cores with empty caches,
less with warm ones.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch

from benchmarks.published.held_out import OURS, RULES, LeftOut, leave_one_out
from benchmarks.published.predictions import KINDS, Row, rows_of
from benchmarks.published.records import RECORDS, load
from benchmarks.published.unseen import unseen

DOC = Path(__file__).parent.parent / "docs" / "accuracy.md"


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
        ninetieth=ninetieth(medians),
        worst=max(abs(row.error) for row in rows),
        lowest=min(row.error for row in rows),
        share_under=statistics.mean(
            sum(e < 0 for e in found) / len(found) for found in errors.values()
        ),
    )


def ninetieth(errors: Sequence[float]) -> float:
    """Return the error that nine in ten of *errors*, of which there is at least one, keep to."""
    return sorted(errors)[-(-len(errors) * 9 // 10) - 1]


def page(
    rows: Sequence[Row], left_out: Sequence[LeftOut], unseen_rows: Sequence[Row], seconds: float
) -> str:
    """Return docs/accuracy.md."""
    num_missing = sum(row.predicted_gib is None for row in rows)
    return f"""\
# How well memory is predicted

Written by `python -m benchmarks.memory_accuracy --write` with torch {torch.__version__} and
diffusers {diffusers.__version__}, in {seconds / 60:.0f} minutes. Nothing here was measured by this project: pipelines are
traced without weights, and the published figures (GiB) are other people's.

{_lines(_summary_table(rows))}

Every pipeline weighs the same: *median* and *90 %* are over pipelines, each with the
median of its absolute errors. *Worst* and *most under* are single records; *under* is the share
of records that are predicted too low.

Qwen-Image's autoencoder: its reserved figures are of the growth in the call, the others' of all.

Not in these figures: {num_missing} records that cannot be asked, each with the reason.

† the record's own weights and the predicted growth, because how they are stored is not modelled.

How much of it is in-sample: most of these records were known when the rules were found. What was
read off them is which scratch a convolution takes (found again below without each pipeline, except
for those of more than 2³¹ elements, which one pipeline alone has) and what a source ran besides: its version of diffusers, a safety checker, how it quantised. Not read
off them: tensors, allocator, cuBLAS, attention, storage formats, hooks, context. What compiling takes
was read from torch's source, where these records made us look ([compile.md](compile.md)). No rule was
chosen by the records of SSD-1B, Latte and Krea-2; ERNIE-Image-Turbo's settled that an embedding
in its configuration is tied. How memory is predicted, and which records stay unexplained, is
in [memory.md](memory.md).

## Leave one pipeline out

Each pipeline with resident weights, predicted by rules that the records of all others choose
(benchmarks/published/held_out.py). Of rules that they do not tell apart the documented one is taken,
which there is in channels_last alone; otherwise the one that gives most.

{_lines(_left_out_table(left_out))}

## Looked up afterwards

Peaks that were asked for when all rules stood (benchmarks/published/unseen.py): of pipelines that no
record is of, and of sizes of an autoencoder of which others are records. No rule was chosen by them,
and what is off stays off. One thing was learned: how much that autoencoder reserves made us look for
the diffusers that its source had, 0.37.

{_lines(_tables_by_kind(unseen_rows, "###"))}

{_lines(_tables(rows))}
"""  # noqa: E501  (the lines of the page, which do not break at a number)


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(lines)


def _tables(rows: Sequence[Row]) -> Iterator[str]:
    """Yield every record with its prediction, by peak kind, and the host RAM of some."""
    yield from _tables_by_kind(rows, "##")
    if these := [row for row in rows if row.ram_gib is not None and row.record["cpu_ram_gib"]]:
        yield from ("## Host RAM", "", "Resident set of the whole process, loading included.", "")
        yield from _ram_table(these)


def _tables_by_kind(rows: Sequence[Row], heading: str) -> Iterator[str]:
    for kind in KINDS:
        if these := [row for row in rows if row.kind == kind]:
            yield from (f"{heading} {kind.capitalize()}", "", *_pipeline_table(these), "")
            yield from (*_row_table(these), "")


def _ram_table(rows: Sequence[Row]) -> Iterator[str]:
    yield from ("| record | published, GiB | predicted, GiB | error |", "|---|---:|---:|---:|")
    for row in rows:
        published, predicted = row.record["cpu_ram_gib"], row.ram_gib
        yield (
            f"| {row.record['id']} | {published:.2f} | {predicted:.2f} | "
            f"{predicted / published - 1:+.0%} |"
        )


def _summary_table(rows: Sequence[Row]) -> list[str]:
    """Return a line for each peak kind."""
    lines = [
        "| peak | pipelines | records | median | 90 % of pipelines | worst | most under | under |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for kind in KINDS:
        found = [row for row in rows if row.kind == kind and row.predicted_gib is not None]
        if not found:
            continue
        s = summary(found)
        lines.append(
            f"| {kind} | {s.num_pipelines} | {s.num_rows} | {s.median:.2%} | {s.ninetieth:.2%} | "
            f"{s.worst:.1%} | {min(0.0, s.lowest):+.1%} | {s.share_under:.0%} |"
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
    if left_out:
        errors = [one.error for one in left_out]
        num_rows = sum(one.num_rows for one in left_out)
        lowest = min(0.0, *(one.lowest for one in left_out))
        lines.append(
            f"| all: median {statistics.median(errors):.2%} | {num_rows} | "
            f"| 90 %: {ninetieth(errors):.2%} | {lowest:+.2%} |"
        )
    return lines


def _rule_in_words(regime: str, rules: Sequence[str]) -> str:
    if len(rules) == len(RULES):
        return f"{regime}: no other evidence, the largest"
    marked = "" if OURS[regime] in rules else " **(not ours)**"
    return f"{regime}: {' or '.join(rules)}{marked}"


def _pipeline_table(rows: Sequence[Row]) -> list[str]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.predicted_gib is not None:
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
        mark = "†" * row.has_published_weights
        lines.append(
            f"| {name} | {row.setup.gpu} | {row.published_gib:.3f} | {row.predicted_gib:.3f}{mark}"
            f" | {row.error:+.2%} | {row.note} |"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, default=RECORDS, help="the published records")
    parser.add_argument("--write", action="store_true", help=f"write {DOC.name}")
    parser.add_argument("--only", default="", help="tables of pipelines whose name contains this")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    given = parser.parse_args(arguments)
    if not given.records.exists():
        sys.exit(f"There are no records at {given.records}: name their file with --records.")
    if given.only and given.write:
        parser.error("--write is for the whole page: leave --only out.")
    records = [r for r in load(given.records) if given.only.lower() in r["pipeline"].lower()]
    if not records:
        parser.error(f"No record is of a pipeline with {given.only} in its name.")
    started = time.perf_counter()
    rows = rows_of(records, num_workers=given.workers)
    if given.only:  # what is left out of so few would leave no rule to find
        print(_lines([*_summary_table(rows), "", *_tables(rows)]))
        return
    left_out = leave_one_out(rows, num_workers=given.workers)
    unseen_rows = rows_of(unseen(), num_workers=given.workers)
    text = page(rows, left_out, unseen_rows, time.perf_counter() - started)
    if given.write:
        DOC.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
