"""The fastest selection of candidates that stays within every limit, exactly.

Each component does exactly one of its candidates; bytes, seconds and strategies add up over
components, phase by phase. That is a knapsack with one choice per class and one constraint per
phase, small enough to be solved to the optimum: dominated candidates go first, then branch and
bound over whole arrays of partial selections at a time, with Lagrangian bounds.

What a reader would get wrong: the winner is *not* the fastest selection. Among everything within
2 % of the best time the better quality wins; of that quality, as far as it is not slower than the
best that diffusers offers on its own (and, if that can be had, than what would be chosen if quality
did not count), the lower peak, then fewer strategies, then time. Every rule
is one more exact minimisation inside the box that the rules before it left, so the result equals
brute force and does not depend on the order of the input. Seconds are compared as whole
nanoseconds: sums of integers have no order of summation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pipefit.cost_models.units import format_bytes

Array: TypeAlias = npt.NDArray[np.float64]
"""Whole numbers in float64: bytes and nanoseconds below 2**53 add up exactly."""

TIME_TOLERANCE_PERCENT = 2
"""Times this close to the best count as equal (design section 7: "within 2 %")."""

NANOSECONDS_PER_S = 10**9

MAX_PARTIALS = 1 << 14
"""Partial selections expanded at a time. This and the next four affect speed, never the result;
all were chosen with benchmarks/search_speed.py."""

MAX_ENUMERATED = 1 << 16
"""Selections up to which enumerating is quicker than looking for a better bound."""

DUAL_ITERATIONS = 25
"""Subgradient steps for the multipliers of a bound."""

GOOD_GAP = 1e-4
"""Share of the objective's range between bound and best total at which a bound is good enough."""

PATIENCE = 4
"""Subgradient steps without a better bound after which the step is halved."""

ROUNDING = 1e-9
"""Relative slack of a bound made with real multipliers, so that rounding never prunes."""


Budget: TypeAlias = int | Mapping[int, int] | None
"""Bytes on every GPU, or by its index; None is no limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to run one component."""

    key: str
    """Names the candidate within its component; the last tie-break, so it must be unique there."""
    phase_bytes: tuple[int, ...]
    """What it adds to every phase of the problem, idle phases included."""
    call_s: float
    host_bytes: int = 0
    pinned_bytes: int = 0
    quality_rank: int = 0
    num_strategies: int = 0
    stock: str = ""
    """Which of diffusers' own ways of placing weights this is; empty for what only pipefit does."""
    payload: Any = field(default=None, compare=False)
    """What the planner wants back; the search never looks at it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Components that choose independently of each other, under one way of placing them."""

    name: str
    phases: tuple[str, ...]
    base_bytes: tuple[int, ...]
    """Per phase, what no candidate changes: carried tensors, context."""
    base_s: float = 0.0
    components: Mapping[str, Sequence[Candidate]]
    devices: tuple[int, ...] = ()
    """With several GPUs the one that each of ``phases`` is about: a phase comes once for each."""

    def __post_init__(self) -> None:
        """Refuse shapes that no search could mean."""
        if not self.components:
            raise ValueError(f"The problem {self.name!r} needs at least one component.")
        lengths = {len(c.phase_bytes) for group in self.components.values() for c in group}
        lengths |= {len(self.base_bytes), len(self.devices or self.phases)}
        if lengths - {len(self.phases)}:
            raise ValueError(f"Every candidate of {self.name!r} needs a figure for each phase.")

    def budgets(self, budget: Budget) -> tuple[float, ...]:
        """Return what *budget* leaves to each of the phases; infinite where it says nothing."""
        if isinstance(budget, Mapping):
            return tuple(budget.get(device, math.inf) for device in self.devices)
        return (math.inf if budget is None else budget,) * len(self.phases)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a selection may use; None is no limit."""

    budget_bytes: Budget = None
    ram_bytes: int | None = None
    pinnable_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """One candidate for each component of one problem, and what they come to together."""

    problem: str
    choices: Mapping[str, Candidate]
    phase_bytes: tuple[int, ...]
    call_s: float
    host_bytes: int
    pinned_bytes: int
    quality_rank: int
    num_strategies: int

    @property
    def peak_bytes(self) -> int:
        """The largest phase."""
        return max(self.phase_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A selection that lost, and why, in a few words."""

    selection: Selection
    reason: str


def search(problems: Sequence[Problem], limits: Limits) -> Selection | None:
    """Return the best selection of all *problems* within *limits*; None if there is none.

    Best: among the selections within 2 % of the least time the one with the best quality; of those,
    and not slower than any stock one, that with the lowest peak, then the fewest strategies, the
    least time; what is still equal is settled by the sums of quality ranks and bytes and by the
    names, never by the order of the input. Stock is what diffusers does on its own: one of its ways
    of placing weights wherever that can be had, another of them elsewhere. The better quality costs
    time only where it must: where some of its selections are not slower than what these rules would
    choose without quality, the others are out.

    >>> slow = Candidate(key="offload", phase_bytes=(1,), call_s=3.0)
    >>> fast = Candidate(key="resident", phase_bytes=(8,), call_s=1.0)
    >>> unet = Problem(name="mixed", phases=("denoise",), base_bytes=(1,),
    ...                components={"unet": [slow, fast]})
    >>> [search([unet], Limits(budget_bytes=b)).choices["unet"].key for b in (9, 8)]
    ['resident', 'offload']
    """
    fast = _fastest(_boxes(problems, limits))
    boxes = _best_quality(fast)
    if boxes is not fast:
        lesser = _least_in_turn(_no_slower_than_stock(fast, problems, limits), *_PREFERENCE)
        lesser_ns, _ = _least(lesser, _Columns.time)
        boxes = _no_slower(boxes, lesser_ns) or boxes
    boxes = _no_slower_than_stock(boxes, problems, limits)
    boxes = _least_in_turn(boxes, *_PREFERENCE, _Columns.quality, _Columns.all_bytes)
    return _first_by_name(boxes)


def smallest_budget(problems: Sequence[Problem], limits: Limits) -> int | None:
    """Return the least budget with which :func:`search` finds something.

    The budget in *limits* is not used. None: no selection keeps the limits on host memory.
    """
    boxes = _boxes(problems, replace(limits, budget_bytes=None))
    peak_bytes, _ = _least(boxes, _Columns.phases)
    return None if math.isinf(peak_bytes) else int(peak_bytes)


def select(problem: Problem, choices: Mapping[str, Candidate]) -> Selection:
    """Return what *choices*, one for each component, come to together."""
    chosen = [choices[name] for name in sorted(choices)]
    columns = zip(problem.base_bytes, *(c.phase_bytes for c in chosen), strict=True)
    time_ns = _nanoseconds(problem.base_s) + sum(_nanoseconds(c.call_s) for c in chosen)
    return Selection(
        problem=problem.name,
        choices={name: choices[name] for name in sorted(choices)},
        phase_bytes=tuple(sum(column) for column in columns),
        call_s=time_ns / NANOSECONDS_PER_S,
        host_bytes=sum(c.host_bytes for c in chosen),
        pinned_bytes=sum(c.pinned_bytes for c in chosen),
        quality_rank=max((c.quality_rank for c in chosen), default=0),
        num_strategies=sum(c.num_strategies for c in chosen),
    )


def alternatives(
    problems: Sequence[Problem], limits: Limits, chosen: Selection, *, count: int = 3
) -> list[Rejected]:
    """Return the *count* best selections that lost against *chosen*, each with the reason.

    Asked are the fastest of every problem, with and without the limits, and every selection that
    differs from the chosen one in a single component. Those that break a limit come at most twice,
    so that the list also says what else would have worked.
    """
    by_name = {p.name: p for p in problems}
    pool = {_identity(s): s for s in _contenders(problems, limits, chosen)}
    pool.pop(_identity(chosen), None)
    ranked = sorted(pool.values(), key=lambda s: (s.call_s, s.peak_bytes, _identity(s)))
    over, within = [], []
    for selection in ranked:
        reason = _over_limits(selection, by_name[selection.problem], limits)
        if reason and selection.call_s < chosen.call_s:
            over.append(Rejected(selection=selection, reason=reason))
        elif not reason:
            within.append(Rejected(selection=selection, reason=_worse(selection, chosen)))
    num_over = min(len(over), max(2, count - len(within)))
    return (over[:num_over] + within)[:count]


def _contenders(problems: Sequence[Problem], limits: Limits, chosen: Selection) -> list[Selection]:
    found = []
    for problem in problems:
        found += [search([problem], limits), search([problem], Limits())]
        if problem.name == chosen.problem:
            found += [
                select(problem, {**chosen.choices, name: candidate})
                for name, candidates in problem.components.items()
                for candidate in candidates
            ]
    return [s for s in found if s is not None]


def _over_limits(selection: Selection, problem: Problem, limits: Limits) -> str:
    """Say which limit is broken most visibly; empty when all are kept."""
    budgets = problem.budgets(limits.budget_bytes)
    over = [held - most for held, most in zip(selection.phase_bytes, budgets, strict=True)]
    if max(over) > 0:
        return f"{format_bytes(int(max(over)))} over in {problem.phases[over.index(max(over))]}"
    if limits.ram_bytes is not None and selection.host_bytes > limits.ram_bytes:
        return f"{format_bytes(selection.host_bytes - limits.ram_bytes)} over the host's RAM"
    if limits.pinnable_bytes is not None and selection.pinned_bytes > limits.pinnable_bytes:
        over_bytes = selection.pinned_bytes - limits.pinnable_bytes
        return f"{format_bytes(over_bytes)} more than can be pinned"
    return ""


def _worse(selection: Selection, chosen: Selection) -> str:
    """Say by what rule *selection* lost, in the order of the rules."""
    slower = selection.call_s / chosen.call_s - 1 if chosen.call_s else 0.0
    if slower * 100 > TIME_TOLERANCE_PERCENT:
        return f"{slower:.0%} slower" if slower < 1 else f"{slower + 1:.1f} times as slow"
    if _preference(selection) < _preference(chosen):
        return "slower than diffusers on its own, or than at lower quality"
    if selection.quality_rank > chosen.quality_rank:
        return "as fast, but lower quality"
    if selection.peak_bytes > chosen.peak_bytes:
        return "as fast, but more memory"  # what it saves by giving memory back aside
    if selection.num_strategies > chosen.num_strategies:
        return "as fast and as large, but more strategies"
    return "no better in time or memory"


def _preference(selection: Selection) -> tuple[float, ...]:
    """What decides between selections that are fast enough; the lower wins."""
    return (
        selection.quality_rank,
        selection.peak_bytes,
        selection.num_strategies,
        selection.call_s,
    )


def _identity(selection: Selection) -> tuple[str, ...]:
    return (selection.problem, *(c.key for c in selection.choices.values()))


def _nanoseconds(seconds: float) -> int:
    return round(seconds * NANOSECONDS_PER_S)


class _Columns:
    """Where a candidate's figures stand in its row; ``phases`` take the rest of the row."""

    time = slice(0, 1)
    host = slice(1, 2)
    pinned = slice(2, 3)
    num_strategies = slice(3, 4)
    quality = slice(4, 5)
    all_bytes = slice(5, 6)
    phases = slice(6, None)


_PREFERENCE = (_Columns.phases, _Columns.num_strategies, _Columns.time)
"""What decides, one after the other, between selections of one quality that are fast enough."""


@dataclass(frozen=True)
class _Box:
    """A problem as arrays, and the limits that a selection has to keep.

    The base is folded into the rows of the first component, so that sums of rows are totals. Any
    weighted sum of columns is bounded by the same sum of the limits: ``weights`` are such sums, at
    first the columns themselves, and every minimisation adds the ones that bounded it best.
    """

    problem: Problem
    names: tuple[str, ...]
    candidates: tuple[tuple[Candidate, ...], ...]
    rows: tuple[Array, ...]
    """Per component, one row a candidate."""
    limit: Array
    """Per column, the largest total allowed."""
    weights: Array

    def capped(self, columns: slice, most: float) -> _Box:
        """Return the box with its limit on *columns* lowered to *most*."""
        limit = self.limit.copy()
        limit[columns] = np.minimum(limit[columns], most)
        return replace(self, limit=limit)

    def keeping(self, masks: Sequence[npt.NDArray[np.bool_]]) -> _Box:
        """Return the box with only the candidates under *masks*."""
        if all(mask.all() for mask in masks):
            return self
        return replace(
            self,
            candidates=tuple(
                tuple(itertools.compress(c, m)) for c, m in zip(self.candidates, masks, strict=True)
            ),
            rows=tuple(r[m] for r, m in zip(self.rows, masks, strict=True)),
        )

    def choosing(self, position: int, indices: Sequence[int] | npt.NDArray[np.intp]) -> _Box:
        """Return the box with only *indices* of the candidates of one component."""
        masks = [np.ones(len(r), dtype=np.bool_) for r in self.rows]
        masks[position] = np.isin(np.arange(len(self.rows[position])), indices)
        return self.keeping(masks)

    def num_selections(self) -> int:
        """Return how many selections the candidates make, within the limits or not."""
        return math.prod(len(r) for r in self.rows)

    def bounds(self, largest: Array) -> Array:
        """Return the largest total allowed per weighted sum; *largest* sums set the rounding."""
        limited = np.isfinite(self.limit)
        bounds: Array = self.limit[limited] @ self.weights[limited]
        bounds[(self.weights[~limited] > 0).any(axis=0)] = np.inf
        bounds[len(self.limit) :] += ROUNDING * largest[len(self.limit) :]
        return bounds

    def reduced(self) -> _Box:
        """Return the box without the candidates that no selection inside the limits uses."""
        sizes = np.array([len(r) for r in self.rows])
        if not sizes.all():
            return self
        ends = sizes.cumsum()
        sums = np.concatenate(self.rows) @ self.weights
        bounds = self.bounds(np.maximum.reduceat(np.abs(sums), ends - sizes).sum(axis=0))
        finite = np.isfinite(bounds)
        sums, bounds = sums[:, finite], bounds[finite]
        kept, left = np.ones(len(sums), dtype=np.bool_), sizes
        while left.all():
            starts = left.cumsum() - left
            least = np.minimum.reduceat(sums, starts)
            most = least + (bounds - least.sum(axis=0))
            fits = (sums <= most.repeat(left, axis=0)).all(axis=1)
            if fits.all():
                break
            kept[kept] = fits
            sums, left = sums[fits], np.add.reduceat(fits, starts, dtype=np.intp)
        return self.keeping(np.split(kept, ends[:-1]))


def _boxes(problems: Sequence[Problem], limits: Limits) -> list[_Box]:
    return [_box(p, limits) for p in sorted(problems, key=lambda p: p.name)]


def _box(problem: Problem, limits: Limits) -> _Box:
    width = 6 + len(problem.phases)
    names = tuple(sorted(problem.components))
    candidates = tuple(tuple(sorted(problem.components[n], key=lambda c: c.key)) for n in names)
    rows = tuple(
        np.array([_row(c) for c in group], dtype=np.float64).reshape(-1, width)
        for group in candidates
    )
    limit = np.full(width, np.inf)
    limit[_Columns.phases] = problem.budgets(limits.budget_bytes)
    for columns, most in (
        (_Columns.host, limits.ram_bytes),
        (_Columns.pinned, limits.pinnable_bytes),
    ):
        if most is not None:
            limit[columns] = most
    base = np.zeros(width)
    base[_Columns.time] = _nanoseconds(problem.base_s)
    base[_Columns.phases] = problem.base_bytes
    box = _Box(problem, names, candidates, rows, limit, np.eye(width))
    box = box.keeping([_not_dominated(r) for r in rows])
    return replace(box, rows=(box.rows[0] + base, *box.rows[1:]))


def _row(candidate: Candidate) -> tuple[int, ...]:
    total_bytes = sum(candidate.phase_bytes) + candidate.host_bytes + candidate.pinned_bytes
    return (
        _nanoseconds(candidate.call_s),
        candidate.host_bytes,
        candidate.pinned_bytes,
        candidate.num_strategies,
        candidate.quality_rank,
        total_bytes,
        *candidate.phase_bytes,
    )


def _not_dominated(rows: Array) -> npt.NDArray[np.bool_]:
    """Mark the rows that no other row beats or equals in every column; of equals the first stays.

    A dominated candidate can be exchanged for the one that dominates it without any rule of
    :func:`search` getting worse, whatever the other components do.
    """
    ranked = rows[np.argsort(rows.sum(axis=1), kind="stable")]
    beats = np.ones((len(rows), len(rows)), dtype=np.bool_)
    for column in np.ascontiguousarray(ranked.T):
        beats &= column[:, None] <= column
    mask = np.empty(len(rows), dtype=np.bool_)
    mask[np.argsort(rows.sum(axis=1), kind="stable")] = ~np.triu(beats, 1).any(axis=0)
    return mask


def _no_slower_than_stock(
    boxes: Sequence[_Box], problems: Sequence[Problem], limits: Limits
) -> Sequence[_Box]:
    """Return the boxes capped to the best time of a stock selection of their quality."""
    if not boxes:
        return boxes
    rank = max(float(r[:, _Columns.quality].max()) for box in boxes for r in box.rows)
    stock_ns, _ = _least(_boxes(list(_stock(problems, rank)), limits), _Columns.time)
    return _no_slower(boxes, stock_ns)


def _no_slower(boxes: Sequence[_Box], most_ns: float) -> Sequence[_Box]:
    """Return the boxes capped to *most_ns*, without those in which nothing is as fast."""
    capped = [box.capped(_Columns.time, most_ns).reduced() for box in boxes]
    return [b for b in capped if _minimise(b, _Columns.time, enough=math.inf)[0] is not None]


def _stock(problems: Sequence[Problem], rank: float) -> Iterator[Problem]:
    """Yield *problems* with only what diffusers offers on its own, once for each of its ways.

    Candidates of a worse quality than *rank* are left out.
    """
    for problem in problems:
        groups = {
            name: [c for c in group if c.quality_rank <= rank]
            for name, group in problem.components.items()
        }
        for way in sorted({c.stock for group in groups.values() for c in group if c.stock}):
            yield replace(problem, components={n: _in_way(c, way) for n, c in groups.items()})


def _in_way(candidates: Sequence[Candidate], way: str) -> Sequence[Candidate]:
    """Return the *candidates* of that stock way; those of others, or all, where it has none."""
    stock = [c for c in candidates if c.stock]
    return [c for c in stock if c.stock == way] or stock or candidates


def _fastest(boxes: Sequence[_Box]) -> list[_Box]:
    """Return the boxes capped to what counts as the best time, without those that are slower."""
    within_ns = math.inf
    found: list[tuple[float, _Box]] = []
    for box in boxes:
        best_ns, box = _minimise(box.capped(_Columns.time, within_ns), _Columns.time)
        if best_ns is not None:
            within_ns = min(within_ns, best_ns * (100 + TIME_TOLERANCE_PERCENT) // 100)
            found.append((best_ns, box))
    return [
        box.capped(_Columns.time, within_ns).reduced()
        for best_ns, box in found
        if best_ns <= within_ns
    ]


def _best_quality(boxes: Sequence[_Box]) -> Sequence[_Box]:
    """Keep, of the candidates, those of the best quality with which a selection exists."""
    ranks = {float(rank) for box in boxes for r in box.rows for rank in r[:, _Columns.quality].flat}
    for rank in sorted(ranks)[:-1]:
        left = [
            box.keeping(
                [np.all(r[:, _Columns.quality] <= rank, axis=1) for r in box.rows]
            ).reduced()
            for box in boxes
        ]
        left = [
            box for box in left if _minimise(box, _Columns.time, enough=math.inf)[0] is not None
        ]
        if left:
            return left
    return boxes


def _least(boxes: Sequence[_Box], columns: slice) -> tuple[float, list[_Box]]:
    """Return the least possible largest total of *columns*, and the boxes that reach it."""
    least = math.inf
    found: list[tuple[float, _Box]] = []
    for box in boxes:
        value, box = _minimise(box.capped(columns, least), columns)
        if value is not None:
            least = value
            found.append((value, box))
    return least, [box.capped(columns, least).reduced() for value, box in found if value == least]


def _least_in_turn(boxes: Sequence[_Box], *order: slice) -> Sequence[_Box]:
    """Return what is left of the boxes by the least of one after the other of the columns."""
    for columns in order:
        if sum(box.num_selections() for box in boxes) > 1:
            _, boxes = _least(boxes, columns)
    return boxes


def _first_by_name(boxes: Sequence[_Box]) -> Selection | None:
    """Return, of selections that are equal in everything else, the one whose names come first."""
    if not boxes:
        return None
    box = boxes[0]
    while box.num_selections() > 1:
        position = next(i for i, rows in enumerate(box.rows) if len(rows) > 1)
        box = next(
            fixed
            for index in range(len(box.rows[position]))
            if (fixed := box.choosing(position, [index]).reduced()).num_selections()
            and _minimise(fixed, _Columns.time, enough=math.inf)[0] is not None
        )
    return select(box.problem, {n: c[0] for n, c in zip(box.names, box.candidates, strict=True)})


def _minimise(box: _Box, columns: slice, *, enough: float = -math.inf) -> tuple[float | None, _Box]:
    """Return the least possible largest total of *columns* in *box*; None if the box is empty.

    The box comes back with one more weighted sum to bound it by, where one was needed. The search
    stops at the first total that is at most *enough*.
    """
    if all(len(r) for r in box.rows):
        largest = np.sum([r.max(axis=0) for r in box.rows], axis=0)
        capped = box.capped(columns, largest[columns].max())
    else:
        return None, box
    best, weights = math.inf, None
    stack = [capped]
    while stack and (math.isinf(best) or best > enough):
        node = stack.pop().capped(columns, best - 1).reduced()
        if node.num_selections() > MAX_ENUMERATED:
            first, (weights, met) = weights is None, _multipliers(node, columns, weights)
            best = min(best, met)
            if first:
                box = replace(box, weights=np.column_stack([box.weights, weights]))
            node = replace(node, weights=np.column_stack([box.weights, weights]))
            node = node.capped(columns, best - 1).reduced()
        if node.num_selections() > MAX_ENUMERATED:
            stack += _halves(node)
        elif node.num_selections():
            best = min(best, _least_enumerated(node, columns))
    return (None if math.isinf(best) else best), box


def _halves(box: _Box) -> list[_Box]:
    """Return the box cut in two at its largest component, the better half last."""
    position = max(range(len(box.rows)), key=lambda i: len(box.rows[i]))
    ranking = (box.rows[position] @ box.weights[:, -1]).argsort(kind="stable")
    middle = len(ranking) // 2
    return [box.choosing(position, ranking[half]) for half in (slice(middle, None), slice(middle))]


def _multipliers(box: _Box, columns: slice, start: Array | None) -> tuple[Array, float]:
    """Return the weights that bound the objective well, and the best total met on the way.

    Subgradient ascent with Polyak's step on the Lagrangian dual of the linear relaxation (Held,
    Wolfe and Crowder, "Validation of subgradient optimization", Mathematical Programming 6, 1974):
    the objective's columns share the weight 1, every limited column gets a weight >= 0. Any such
    weights bound; the better ones only prune more.
    """
    rows = _padded(box.rows)
    spread = (rows.max(axis=1) - rows.min(axis=1)).sum(axis=0)
    is_goal = np.zeros(len(box.limit), dtype=np.bool_)
    is_goal[columns] = True
    used = np.flatnonzero(is_goal | (np.isfinite(box.limit) & (spread > 0)))
    rows, most, goal = rows[:, :, used], box.limit[used], is_goal[used]
    scale = np.where(spread > 0, spread, 1.0)[used]
    scale[goal] = goal_scale = scale[goal].max()
    scaled, limit = rows / scale, np.where(goal, 0.0, most / scale)
    weights = goal / goal.sum()
    if start is not None:
        weights = start[used] * scale
        weights /= weights[goal].sum()
    ceiling = float(most[goal].max())
    least, best_bound, best_weights = math.inf, -math.inf, weights
    share, num_stalled = 1.0, 0
    every = np.arange(len(rows))
    for _ in range(DUAL_ITERATIONS):
        totals = rows[every, (scaled @ weights).argmin(axis=1)].sum(axis=0)
        if (totals <= most).all():
            least = min(least, float(totals[goal].max()))
            ceiling = min(ceiling, least)
        slope = totals / scale - limit
        bound, norm = float(slope @ weights), float(slope @ slope)
        gap = ceiling / goal_scale - bound
        if bound > best_bound:
            best_bound, best_weights, num_stalled = bound, weights, 0
        else:
            num_stalled += 1
        if gap < GOOD_GAP or norm == 0.0:
            break
        if num_stalled == PATIENCE:
            share, num_stalled, weights = share / 2, 0, best_weights
            continue
        weights = np.maximum(weights + share * gap / norm * slope, 0.0)
        weights[goal] = 1.0 if goal.sum() == 1 else _on_simplex(weights[goal])
    multipliers = np.zeros(len(box.limit))
    multipliers[used] = best_weights / scale
    return multipliers, least


def _padded(rows: Sequence[Array]) -> Array:
    """Return the components' rows as one array, the shorter ones filled with their first row."""
    height = max(len(r) for r in rows)
    filled = np.empty((len(rows), height, rows[0].shape[1]))
    for target, source in zip(filled, rows, strict=True):
        target[: len(source)] = source
        target[len(source) :] = source[0]
    return filled


def _on_simplex(point: Array) -> Array:
    """Return the nearest weights that are not negative and add up to one."""
    descending = np.sort(point)[::-1]
    excess = (np.cumsum(descending) - 1.0) / np.arange(1, len(point) + 1)
    nearest: Array = np.maximum(point - excess[descending > excess][-1], 0.0)
    return nearest


def _least_enumerated(box: _Box, columns: slice) -> float:
    """Return the least possible largest total of *columns*, infinite if there is none.

    Partial selections grow by one component at a time, whole arrays of them at once; those over
    any bound are dropped. Sums count from the least possible total, so one array of bounds serves
    every depth.
    """
    rows = sorted(box.rows, key=len)
    sums = [r @ box.weights for r in rows]
    largest = np.sum([np.abs(s).max(axis=0) for s in sums], axis=0)
    least_totals = np.sum([s.min(axis=0) for s in sums], axis=0)
    room, width = box.bounds(largest) - least_totals, len(box.limit)
    extras = [(s - s.min(axis=0))[s[:, -1].argsort(kind="stable")] for s in sums]
    best = math.inf
    stack = [(0, np.zeros((1, len(room))))]
    while stack:
        depth, used = stack.pop()
        counts = np.searchsorted(extras[depth][:, -1], room[-1] - used[:, -1], side="right")
        ends = counts.cumsum()
        stop = max(1, int(ends.searchsorted(MAX_PARTIALS, side="right")))
        if stop < len(used):
            stack.append((depth, used[stop:]))
        counts, ends = counts[:stop], ends[:stop]
        parents = np.arange(len(counts)).repeat(counts)
        children = np.arange(ends[-1]) - (ends - counts).repeat(counts)
        totals = used[parents] + extras[depth][children]
        totals = totals[(totals <= room).all(axis=1)]
        if len(totals) and depth + 1 < len(extras):
            stack.append((depth + 1, totals[totals[:, -1].argsort(kind="stable")]))
        elif len(totals):
            whole = (totals + least_totals)[:, :width]
            best = float(whole[:, columns].max(axis=1).min())
            room = box.capped(columns, best - 1).bounds(largest) - least_totals
    return best
