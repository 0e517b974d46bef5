"""Write docs/strategies.md: where each strategy goes, which go together, what a picture loses.

Everything in it is asked of the strategies and tried: on each component class of the catalogue,
without weights, and on the small pipelines of the tests on the CPU. It takes some minutes, most of
them to build the catalogue's models. Tests compare the document with what the strategies say now.

    python -m benchmarks.strategy_tables [--write]
"""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from benchmarks.strategy_catalogue import APPLIES, NO_EFFECT, Asked, ask_catalogue
from benchmarks.strategy_pictures import (
    PIPELINES,
    STEPS,
    Measured,
    Pair,
    forms,
    measure,
    pairs,
    subject,
    unmeasured,
)
from pipefit.strategies import BUILT_IN, strategy

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "strategies.md"

YES, NOTHING, APART = "✓", "–", "≠"

MARGIN_DB = 6.0
"""How far below the PSNR of the document a picture may come out on another machine: half as large
an error again as large is 3.5 dB, twice as large is 6."""

INTRODUCTION = """\
# Strategies: where they go, which go together, what a picture loses

Three tables that answer, for every strategy that pipefit has: can it go on this component, can it
be had together with that other one, and what does it do to the picture. Nothing here is written by
hand: `python -m benchmarks.strategy_tables --write` asks the strategies themselves and tries what
they say, and tests hold this page to it. What a strategy gains and costs is not in it; that depends
on the call and the GPU, and `pipefit plan` says it."""

WHERE = """\
## Where each goes

Every component class of the catalogue's {num_pipelines} pipelines, in float32 and without weights.
Classes of which all strategies say the same share a column and are listed below the table.

- {YES}: it applies. The search may choose it, or it is done when asked for (`--with`).
- {NOTHING}: no effect. It can be put on, and everything about the component (tensors, layouts,
  hooks, attributes, processors) and about the process is as before. Where weights lie counts as an
  effect.
- a number: it is refused, for the reason of that number below, in which "it" is the class. Of a
  strategy with several parameters, one that is accepted counts as applying."""

TOGETHER = """\
## Which go together

Of each pair, the row's is applied before the column's, whatever the order in which they were asked
for. Both were looked for on the small pipelines of `tests/small_pipelines.py`. There
`tests/end_to_end/test_strategy_pairs.py` applies, calls and undoes every pair that is possible, and
asks for every pair that is not, to be refused.

- {YES}: both on one component.
- {APART}: only on different components of a pipeline: none of the small pipelines' takes both or,
  with a number, they exclude each other on one component for the reason of that number.
- a number: they exclude each other, for the reason of that number below.
- {NOTHING}: no small pipeline has components that take both."""

PICTURES = """\
## What a picture loses

Each strategy on every component that takes it, on the CPU, against the picture of the untouched
pipeline with the same seed. `exact` has to be the same in every bit. For the others the table has
the largest difference of a pixel (from 0 to 1) and the peak signal-to-noise ratio (PSNR; more is
better, 6 dB are half the error), each of the pipeline where it is worst.

Read the figures as an order, not as what you will see. The pipelines are made of the libraries' own
classes, with a few narrow layers and random weights (seed 0), computed in float32 and called for
{steps} steps at 32 to 64 pixels: {pipelines}.
Trained weights make less of a rounding error, and a tile's seam shows less in a picture of a
thousand pixels than here, where four tiles make a picture. And against float32 bfloat16 is a large
step, which a pipeline that is loaded in bfloat16 has taken already.

A test holds each figure: no picture may fall more than {margin:.0f} dB (twice the error) below its
row. LTX decoded in parts (`decode_chunks`) is no nearer to the untouched video than one of another
seed: diffusers 0.42.1 shows every part but the first a frame late, so it is labelled low."""

T = TypeVar("T")


def main(arguments: Sequence[str]) -> None:
    """Print the document, or write it where it belongs."""
    text = document(
        ask_catalogue(say=lambda said: print(said, file=sys.stderr)), pairs(), measured()
    )
    if "--write" in arguments:
        DOCUMENT.write_text(text, encoding="utf-8")
    else:
        print(text)


def measured() -> list[Measured]:
    """Measure every strategy on every small pipeline."""
    return [row for one in BUILT_IN for name in PIPELINES for row in measure(one.name, name)]


def document(asked: Sequence[Asked], paired: Sequence[Pair], rows: Sequence[Measured]) -> str:
    """Return the whole page."""
    return "\n\n".join([INTRODUCTION, where(asked), together(paired), pictures(rows)]) + "\n"


# -- where each goes


def where(asked: Sequence[Asked]) -> str:
    """Return the section strategy × component class."""
    groups: dict[tuple[str, ...], list[Asked]] = {}
    for one in asked:
        groups.setdefault(one.outcomes, []).append(one)
    names = {outcomes: _class_names(group, asked) for outcomes, group in groups.items()}
    ordered = sorted(groups, key=lambda outcomes: (-len(names[outcomes]), names[outcomes]))
    reasons: list[str] = []
    lines = [
        "| strategy | quality | " + " | ".join(map(letter, range(len(ordered)))) + " |",
        "|---|---|" + ":-:|" * len(ordered),
    ]
    for i, one in enumerate(BUILT_IN):
        cells = [_cell(outcomes[i], reasons) for outcomes in ordered]
        lines.append(f"| `{one.name}` | {one.quality.value} | " + " | ".join(cells) + " |")
    listed = [
        f"- **{letter(i)}**: {', '.join(names[outcomes])}" for i, outcomes in enumerate(ordered)
    ]
    from pipefit.planner.catalog import pipeline_names

    head = WHERE.format(num_pipelines=len(pipeline_names()), YES=YES, NOTHING=NOTHING)
    return "\n\n".join([head, "\n".join(lines), "\n".join(listed), _numbered(reasons)])


def letter(index: int) -> str:
    """Return the name of column *index*.

    >>> letter(0), letter(25), letter(26)
    ('A', 'Z', 'AA')
    """
    more, last = divmod(index, 26)
    return (letter(more - 1) if more else "") + chr(ord("A") + last)


def _class_names(group: Sequence[Asked], asked: Sequence[Asked]) -> list[str]:
    """Return the classes of *group*; of one that is in others too, the pipelines."""
    found = []
    for name in sorted({one.class_name for one in group}):
        own = [one for one in group if one.class_name == name]
        if len(own) < sum(one.class_name == name for one in asked):
            pipelines = ", ".join(dict.fromkeys(one.pipeline for one in own))
            name = f"{name} (as in {pipelines})"
        found.append(name)
    return found


def _cell(outcome: str, reasons: list[str]) -> str:
    if outcome in (APPLIES, NO_EFFECT):
        return YES if outcome == APPLIES else NOTHING
    return _number(outcome, reasons)


def _number(reason: str, reasons: list[str]) -> str:
    if reason not in reasons:
        reasons.append(reason)
    return str(reasons.index(reason) + 1)


def _numbered(reasons: Sequence[str]) -> str:
    return "\n".join(f"{i}. {reason}" for i, reason in enumerate(reasons, start=1))


# -- which go together


def together(paired: Sequence[Pair]) -> str:
    """Return the section strategy × strategy."""
    names = [one.name for one in BUILT_IN]
    of = {(pair.first, pair.second): pair for pair in paired}
    reasons: list[str] = []
    lines = [
        "| | applied first | " + " | ".join(str(i) for i in range(2, len(names) + 1)) + " |",
        "|--:|---|" + ":-:|" * (len(names) - 1),
    ]
    for i, first in enumerate(names):
        cells = [
            _pair_cell(of[first, second], reasons) if j > i else ""
            for j, second in enumerate(names)
            if j
        ]
        lines.append(f"| {i + 1} | `{first}` | " + " | ".join(cells) + " |")
    head = TOGETHER.format(YES=YES, APART=APART, NOTHING=NOTHING)
    return "\n\n".join([head, "\n".join(lines), _numbered(reasons)])


def _pair_cell(pair: Pair, reasons: list[str]) -> str:
    if pair.shares_component:
        return YES
    reason = _number(sentence(pair.excluded), reasons) if pair.excluded else ""
    if pair.together is None:
        return reason or NOTHING
    return f"{APART} {reason}".strip()


def sentence(reason: str) -> str:
    """Return *reason* as it begins a line: a strategy's name as code, or a capital.

    >>> sentence("attention cannot be had.")
    '`attention` cannot be had.'
    """
    first, _, rest = reason.partition(" ")
    if any(one.name == first for one in BUILT_IN):
        return f"`{first}` {rest}"
    return reason[0].upper() + reason[1:]


# -- what a picture loses


def pictures(rows: Sequence[Measured]) -> str:
    """Return the section strategy × difference of the picture."""
    lines = [
        "| strategy | quality | pipelines | largest difference | PSNR, dB |",
        "|---|---|--:|---|---|",
    ]
    failures: dict[tuple[str, str], list[str]] = {}
    for text, group in _grouped((row.label, row) for row in rows).items():
        made = [row for row in group if not row.fails]
        for row in group:
            if row.fails:
                failures.setdefault((text, row.fails), []).append(row.pipeline)
        if made:
            lines.append(_picture_row(text, made))
    notes = [
        f"- `{text}` makes no picture of {', '.join(names)}: {fails}"
        for (text, fails), names in failures.items()
    ]
    seen = {row.strategy for row in rows}
    notes += [
        f"- `{one.name}` is not measurable on a CPU: {why_not(one.name)}"
        for one in BUILT_IN
        if one.name not in seen
    ]
    head = PICTURES.format(pipelines=", ".join(PIPELINES), steps=STEPS, margin=MARGIN_DB)
    versions = ", ".join(f"{n} {version(n)}" for n in ("torch", "diffusers", "transformers"))
    foot = f"Measured with {versions} on {platform.machine()}."
    return "\n\n".join(filter(None, [head, "\n".join(lines), "\n".join(notes), foot]))


def _picture_row(text: str, group: Sequence[Measured]) -> str:
    quality = max((row.quality for row in group), key=lambda one: one.rank).value
    worst = min(group, key=lambda row: row.psnr_db)
    largest = max(group, key=lambda row: row.largest)
    if math.isinf(worst.psnr_db):
        return f"| `{text}` | {quality} | {len(group)} | none | identical |"
    return (
        f"| `{text}` | {quality} | {len(group)} | {largest.largest:.1e} ({largest.pipeline}) "
        f"| {worst.psnr_db:.1f} ({worst.pipeline}) |"
    )


def why_not(name: str) -> str:
    """Say why the strategy *name* has no picture: of itself, or by the refusal of a component."""
    reason = unmeasured(name)
    if reason:
        return f"{reason}."
    for pipeline in PIPELINES:
        about = subject(pipeline)
        for component in about.components.values():
            if not forms(name, component, about.workload):
                return str(strategy(name).refusal(component, {}))
    return "no small pipeline takes it."


def _grouped(pairs_: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    found: dict[str, list[T]] = {}
    for key, value in pairs_:
        found.setdefault(key, []).append(value)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
