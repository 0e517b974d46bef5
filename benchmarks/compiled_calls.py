"""Predicts published times of compiled pipelines, and prints the table of docs/compile.md.

    python -m benchmarks.compiled_calls

Nothing is measured here. The figures are other people's, from ``--records``; a minute on two cores.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.published.predictions import Predicted, predict_setup
from benchmarks.published.records import RECORDS, Record, Setup, load, setup_of

SOURCES = ("torchao-", "diffusionfast-")
"""Beginnings of the ids of records whose compiled components and mode are stated."""

COMPILING = ("compile:", "channels_last@")
"""Beginnings of the strategies that stand for what a script compiles."""


def is_asked(record: Record) -> bool:
    """Whether *record* is a whole call, compiled, in 16 bits and with nothing else done to it."""
    levers = record["levers"]
    others = {name for name, value in levers.items() if value and value != "none"}
    return (
        record["id"].startswith(SOURCES)
        and record["kind"] == "pipeline_peak"
        and bool(levers["compile"])
        and others <= {"attention", "compile"}
    )


def eager(setup: Setup) -> Setup:
    """Return *setup* without what its script did to compile."""
    strategies = tuple(s for s in setup.strategies if not s.startswith(COMPILING))
    return replace(setup, strategies=strategies)


def seconds(predicted: Predicted) -> float:
    """Return the time of the phases together."""
    return sum(phase.seconds for phase in predicted.phases)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, default=RECORDS, help="the published records")
    given = parser.parse_args()
    if not given.records.exists():
        sys.exit(f"There are no records at {given.records}: name their file with --records.")
    print("| record | published, s | eager | compiled | error |")
    print("|---|---:|---:|---:|---:|")
    for record in filter(is_asked, load(given.records)):
        setup = setup_of(record)
        compiled = predict_setup(setup)
        published_s = record["latency_s"]
        print(
            f"| {record['id']} | {published_s:.2f} | {seconds(predict_setup(eager(setup))):.2f} | "
            f"{seconds(compiled):.2f} | {seconds(compiled) / published_s - 1:+.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
