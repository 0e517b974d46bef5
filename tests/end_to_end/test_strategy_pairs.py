"""What strategies, alone and in pairs, do to real small pipelines on the CPU, and how they leave.

Which strategies, parameters and pairs there are, the strategies say; see
``benchmarks/strategy_pictures.py``, which makes the tables of docs/strategies.md of the same.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from benchmarks.strategy_catalogue import ON_THE_CPU
from benchmarks.strategy_pictures import (
    BOTH_PLACE,
    PIPELINES,
    Pair,
    Subject,
    apart,
    measure,
    pair,
    spread,
    subject,
    unmeasured,
)
from benchmarks.strategy_tables import DOCUMENT, MARGIN_DB

from pipefit.errors import InvalidRequest
from pipefit.planner.apply import apply_options
from pipefit.planner.catalog import reference_machine
from pipefit.planner.snapshot import differences, snapshot
from pipefit.strategies import BUILT_IN, quality_of
from pipefit.strategies.strategy import Option, Quality

NAMES = [one.name for one in BUILT_IN]

MACHINE = replace(reference_machine(["rtx-4060"]), gpus=(ON_THE_CPU,))

ROW = re.compile(r"^\| `([^`]+)` \| (\w+) \| (\d+) \| [^|]+ \| (identical|[\d.]+)", re.MULTILINE)
FAILURE = re.compile(r"^- `([^`]+)` makes no picture of ([\w, ]+): ", re.MULTILINE)

TEXT = DOCUMENT.read_text(encoding="utf-8")

FLOOR_DB = {"identical": math.inf} | {
    label: math.inf if psnr_db == "identical" else float(psnr_db) - MARGIN_DB
    for label, _, _, psnr_db in ROW.findall(TEXT, TEXT.index("\n## What a picture loses\n"))
}
"""Label -> the least PSNR of a picture under it."""

QUICK_PIPELINES = ("flux",)
"""In which every strategy is measured in the fast suite."""

QUICK_PAIRS = {
    ("precision", "group_offload"),
    ("layerwise_casting", "model_offload"),
    ("channels_last", "vae_tiling"),
    ("attention", "streaming"),
    ("group_offload", "resident"),
}
"""Pairs of the fast suite, which looks for them in one pipeline."""


def marks(is_quick: bool) -> tuple[pytest.MarkDecorator, ...]:
    return () if is_quick else (pytest.mark.slow,)


# -- quality


def test_every_strategy_has_a_row_or_a_reason_for_having_none() -> None:
    labels = {label.split(":")[0] for label in FLOOR_DB}
    said = set(re.findall(r"^- `(\w+)` is not measurable on a CPU: ", TEXT, re.MULTILINE))
    assert (labels - {"identical"}) | said == set(NAMES)
    assert not labels & said


NOT_EARNED = {
    ("decode_chunks", "ltx"): "diffusers shows what follows the first part a frame late, and of "
    "random weights a frame is no nearer to the one before than to that of another seed (15.4 dB)"
}
"""Where a picture is no nearer than an unrelated one -> what is known of it."""


def labelled(name: str, pipeline: str) -> tuple[pytest.MarkDecorator, ...]:
    reason = NOT_EARNED.get((name, pipeline))
    own = () if reason is None else (pytest.mark.xfail(strict=True, reason=reason),)
    return (*marks(pipeline in QUICK_PIPELINES), *own)


@pytest.mark.parametrize(
    ("name", "pipeline"),
    [
        pytest.param(name, pipeline, marks=labelled(name, pipeline))
        for pipeline in PIPELINES
        for name in NAMES
    ],
)
def test_a_strategy_earns_its_quality(name: str, pipeline: str) -> None:
    if unmeasured(name):
        pytest.skip(unmeasured(name))
    failing = {(label, one) for label, names in FAILURE.findall(TEXT) for one in names.split(", ")}
    about = subject(pipeline)
    with_another_seed = about.picture(generator=torch.Generator().manual_seed(1))
    unrelated_db = apart(with_another_seed, about.expected)[1]
    before = snapshot(about.pipe, with_values=True)
    for row in measure(name, pipeline):
        if row.fails:
            assert (row.label, pipeline) in failing, row.fails
        elif row.quality is Quality.EXACT:
            assert row.largest == 0
        else:
            assert row.psnr_db >= FLOOR_DB[row.label]
            assert row.psnr_db > unrelated_db
    assert differences(before, snapshot(about.pipe, with_values=True)) == ()
    assert torch.equal(about.picture(), about.expected)


# -- pairs

ROUNDING_DB = 100.0
"""PSNR of two pictures that differ by float32 rounding; seen with channels_last: above 110."""


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(first, second, marks=marks((first, second) in QUICK_PAIRS))
        for first, second in itertools.combinations(NAMES, 2)
    ],
)
def test_a_pair_goes_together_or_says_why_not(first: str, second: str) -> None:
    is_quick = (first, second) in QUICK_PAIRS
    found = pair(first, second, ["stable_diffusion"] if is_quick else PIPELINES)
    if found.refused is not None:
        _is_refused(found)
    if found.together is None:
        if found.refused is None:
            pytest.skip("no small pipeline has components that take both")
        return
    name, options = found.together
    parts = [spread(o, name) if found.shares_component else [o] for o in options]
    _is_applied_and_undone(name, parts)


def _is_refused(found: Pair) -> None:
    """What excludes each other is refused in one sentence, before anything is touched."""
    assert found.refused is not None
    name, options = found.refused
    pipe = subject(name).pipe
    before = snapshot(pipe)
    with pytest.raises(InvalidRequest) as refusal:
        apply_options(pipe, options, "cpu")
    said = str(refusal.value)
    # What one would say of any component is "it" in the table: the rest of the sentence remains.
    reason = "choose one." if found.excluded == BOTH_PLACE else found.excluded.removeprefix("It ")
    assert said.endswith(reason)
    assert re.search(r"\w\. [A-Z]", said) is None
    assert differences(before, snapshot(pipe)) == ()


def _is_applied_and_undone(name: str, parts: Sequence[Sequence[Option]]) -> None:
    about = subject(name)
    # The order is the strategies', whatever the order of asking.
    options = [option for part in reversed(parts) for option in part]
    before = snapshot(about.pipe, with_values=True)
    if any(unmeasured(option.strategy) for option in options):
        with apply_options(about.pipe, options, "cpu"):
            pass
    else:
        _is_as_promised(about, parts, about.picture_with(options))
    assert differences(before, snapshot(about.pipe, with_values=True)) == ()
    assert torch.equal(about.picture(), about.expected)


def _is_as_promised(about: Subject, parts: Sequence[Sequence[Option]], under: torch.Tensor) -> None:
    """An exact strategy changes no bit of the other's picture; what two lose adds up at most."""
    rounding = [part for part in parts if quality_of(part[0]) is not Quality.EXACT]
    alone = [about.picture_with(part) for part in rounding]
    if len(rounding) < len(parts):
        assert torch.equal(under, alone[0] if alone else about.expected)
        return
    errors = (10 ** (-apart(picture, about.expected)[1] / 20) for picture in alone)
    added_db = -20 * math.log10(max(sum(errors), 10 ** (-ROUNDING_DB / 20)))
    assert apart(under, about.expected)[1] >= added_db - MARGIN_DB
