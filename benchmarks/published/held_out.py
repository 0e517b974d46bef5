"""Would the workspace rules have been found without the pipeline that they are tested on?

What a library asks for around a convolution is the one part of a prediction that was read off
published peaks. Here it is found again: for each kind of convolution (:data:`OURS`) the rule is
whichever of :data:`RULES` puts the records of all *other* pipelines least off, and with it the
left-out pipeline is predicted. Where the others do not tell rules apart, the documented one is
taken (:data:`DOCUMENTED`), and where none is documented the largest.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from benchmarks.published.predictions import Row, in_pool, predict_setup
from benchmarks.published.records import Setup, subject_of
from pipefit.cost_models import replay, timeline, workspace
from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.units import DTYPE_BYTES, GIB
from pipefit.cost_models.workload import Kernel

Rule = Callable[[Kernel], int]

RULES: Mapping[str, Rule] = {
    "nothing": lambda k: 0,
    "weight": lambda k: 0 if k.weight_channels_last else k.weight_bytes,
    "input": lambda k: k.input_bytes,
    "input + weight": lambda k: k.input_bytes + k.weight_bytes,
    "result + weight": lambda k: k.output_bytes + k.weight_bytes,
    "input + result + weight": lambda k: k.input_bytes + k.output_bytes + k.weight_bytes,
}
"""What may be asked for around a convolution, in bytes; smallest first."""

INDIFFERENT = 1e-3
"""Rules whose errors differ by less than this share of the peak are not told apart by records: they
are stated to three decimals at best, and unnamed buffers of a run come to as much."""

OURS = {
    "NCHW, 16 bits, sm80 on": "input + result + weight",
    "NCHW, 32 bits": "input + weight",
    "NCHW, 16 bits, before sm80": "input + weight",
    "channels_last": "weight",
}
"""The product's rules (cost_models/workspace.py) in these words."""

DOCUMENTED = {"channels_last": "weight"}
"""What needs no record, though records may contradict it; sources: the table of workspace.py."""

Choice = Mapping[str, tuple[str, ...]]
"""Kind of convolution -> rules, of which each convolution is charged the one that gives most."""


def regime_of(kernel: Kernel, gpu: Gpu) -> str | None:
    """Return the regime that a kernel belongs to; None: its scratch was not read off records."""
    if kernel.kind != "conv" or kernel.launcher == "tried" or gpu.architecture == "cpu":
        return None
    channels, groups = kernel.shape[1], kernel.shape[3]
    if groups == channels > 1:
        return None
    is_16_bit = DTYPE_BYTES.get(kernel.dtype) == 2
    is_before_sm80 = (gpu.compute_capability or (8, 0)) < (8, 0)
    if kernel.channels_last:
        return "channels_last" if is_16_bit or not is_before_sm80 else None
    if not is_16_bit:
        return "NCHW, 32 bits"
    if max(kernel.input_bytes, kernel.output_bytes) > 2 * workspace.INT32_INDEXED_ELEMENTS:
        return None
    return f"NCHW, 16 bits, {'before sm80' if is_before_sm80 else 'sm80 on'}"


@contextmanager
def ruled_by(choice: Choice) -> Iterator[set[str]]:
    """Predict by *choice* instead of by the product's rules; yields the kinds that were met."""
    met: set[str] = set()

    def scratch_bytes(kernel: Kernel, gpu: Gpu) -> tuple[int, ...]:
        regime = regime_of(kernel, gpu)
        if regime is not None:
            met.add(regime)
        if regime not in choice:
            return workspace.scratch_bytes(kernel, gpu)
        copied = 0 if kernel.contiguous_input else kernel.input_bytes
        most = max(RULES[rule](kernel) for rule in choice[regime])
        return tuple(n for n in (copied, most) if n)

    with (
        patch.object(replay, "scratch_bytes", scratch_bytes),
        patch.object(timeline, "scratch_bytes", scratch_bytes),
    ):
        yield met


def best_rules(
    errors: Mapping[str, Mapping[str, Iterable[tuple[str, float]]]], left_out: str
) -> dict[str, tuple[str, ...]]:
    """Return the rules of each kind that fit all pipelines but one; all where no other has it.

    A documented rule that is among them stands alone. *errors* is kind -> rule ->
    (pipeline, error) of every record that meets the kind.
    """
    found: dict[str, tuple[str, ...]] = {}
    for regime, by_rule in errors.items():
        scores = {rule: _score(rows, left_out) for rule, rows in by_rule.items()}
        known = {rule: score for rule, score in scores.items() if score is not None}
        least = min(known.values(), default=0.0)
        fitting = tuple(r for r in by_rule if known.get(r, least) <= least + INDIFFERENT)
        documented = DOCUMENTED.get(regime)
        found[regime] = (documented,) if documented in fitting else fitting
    return found


def _score(rows: Iterable[tuple[str, float]], left_out: str) -> float | None:
    """Return the mean over pipelines of their median absolute error."""
    by_pipeline: dict[str, list[float]] = defaultdict(list)
    for pipeline, error in rows:
        if pipeline != left_out:
            by_pipeline[pipeline].append(abs(error))
    if not by_pipeline:
        return None
    return statistics.mean(statistics.median(found) for found in by_pipeline.values())


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A pipeline predicted by rules that were found without it."""

    pipeline: str
    num_rows: int
    rules: Choice
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
        if row.predicted_gib is not None
        and row.kind == "allocated"
        and row.setup
        and not _is_offloaded(row.setup)
    ]
    setups = {row.setup.key: row.setup for row in chosen if row.setup}
    asked = {key: (setup, _alternatives()) for key, setup in setups.items()}
    under = in_pool(_allocated_under, asked, num_workers, "rules")
    errors: dict[str, dict[str, list[tuple[str, float]]]] = {
        regime: {rule: [] for rule in RULES} for regime in OURS
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
        pipeline: best_rules(errors, pipeline)
        for pipeline in sorted({row.record["pipeline"] for row in chosen})
    }
    asked = {
        row.setup.key: (row.setup, [best[row.record["pipeline"]]]) for row in chosen if row.setup
    }
    without = in_pool(_allocated_under, asked, num_workers, "left out")
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


def _alternatives() -> list[Choice]:
    """Return every rule of every kind of convolution, one at a time."""
    return [{regime: (rule,)} for regime in OURS for rule in RULES]


def _is_offloaded(setup: Setup) -> bool:
    return any("offload" in strategy for strategy in setup.strategies)


def _moved(row: Row, delta_bytes: int) -> float:
    """Return the error of *row* if its peak were *delta_bytes* higher."""
    assert row.predicted_gib is not None
    return (row.predicted_gib + delta_bytes / GIB) / row.published_gib - 1


def _allocated_under(asked: tuple[Setup, Sequence[Choice]]) -> tuple[Any, ...]:
    """Return the allocated peak by our rules, the kinds met, and the peak by each choice."""
    setup, choices = asked
    subject = subject_of(setup)
    with ruled_by({}) as met:
        ours_bytes = predict_setup(setup, subject).peak("allocated")

    def peak(choice: Choice) -> int:
        if all(choice[regime] == (OURS[regime],) for regime in met & choice.keys()):
            return ours_bytes
        with ruled_by(choice):
            return predict_setup(setup, subject).peak("allocated")

    return ours_bytes, set(met), *map(peak, choices)
