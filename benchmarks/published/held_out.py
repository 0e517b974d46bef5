"""Would the workspace rules have been found without the pipeline that they are tested on?

What a library asks for around a convolution is the one part of a prediction that was read off
published peaks. Here it is found again: for each kind of convolution (:data:`OURS`) the rule is
whichever of :data:`RULES` puts the records of all *other* pipelines least off, and with it the
left-out pipeline is predicted. Where the others do not tell two rules apart, the larger is taken.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from unittest.mock import patch

from pipefit.cost_models import replay, timeline, workspace
from pipefit.cost_models.machine import Gpu
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

Choice = Mapping[str, tuple[str, ...]]
"""Kind of convolution -> rules, of which each convolution is charged the one that gives most."""


def regime_of(kernel: Kernel, gpu: Gpu) -> str | None:
    """Return the regime that a kernel belongs to; None: its scratch was not read off records."""
    if kernel.kind != "conv" or gpu.architecture == "cpu":
        return None
    channels, groups = kernel.shape[1], kernel.shape[3]
    if groups == channels > 1:
        return None
    if kernel.channels_last:
        return "channels_last"
    if workspace.DTYPE_BYTES.get(kernel.dtype) != 2:
        return "NCHW, 32 bits"
    if max(kernel.input_bytes, kernel.output_bytes) > 2 * workspace.INT32_INDEXED_ELEMENTS:
        return None
    capability = gpu.compute_capability or (8, 0)
    return "NCHW, 16 bits, sm80 on" if capability >= (8, 0) else "NCHW, 16 bits, before sm80"


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

    *errors* is kind -> rule -> (pipeline, error) of every record that meets the kind.
    """
    found: dict[str, tuple[str, ...]] = {}
    for regime, by_rule in errors.items():
        scores = {rule: _score(rows, left_out) for rule, rows in by_rule.items()}
        known = {rule: score for rule, score in scores.items() if score is not None}
        least = min(known.values(), default=0.0)
        found[regime] = tuple(
            rule for rule in by_rule if known.get(rule, least) <= least + INDIFFERENT
        )
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
