"""A workload's routines written out: what the tests compare."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipefit.cost_models.workload import Workload


def timeline(workload: Workload) -> Iterator[tuple[Any, ...]]:
    """Yield every allocation, free and launch of the call in order, subroutines written out.

    ``("a", bytes, identity)``, ``("f", bytes, identity)``, ``("k", kernel)``, ``("w", component,
    bytes)``.
    """
    counter = 0

    def run(events: Any, outside: list[Any], returns: Any) -> Iterator[Any]:
        nonlocal counter
        mine: dict[int, tuple[int, int]] = {}
        for event in events:
            kind = event[0]
            if kind == "a":
                counter += 1
                mine[event[1]] = (event[2], counter)
                yield ("a", *mine[event[1]])
            elif kind == "f":
                yield ("f", *mine.pop(event[1]))
            elif kind == "x":
                yield ("f", *outside[event[1]])
            elif kind == "k":
                yield ("k", workload.kernels[event[1]])
            elif kind == "w":
                yield event
            else:
                routine = workload.routines[event[1]]
                given = [mine.pop(n) if n >= 0 else outside[-1 - n] for n in event[4]]
                back = yield from run(routine.events, given, routine.returns)
                mine.update(zip(event[3], back, strict=True))
        return [mine.pop(n) for n in returns] if returns is not None else list(mine.values())

    yield from run(workload.root, [], None)


def peak_bytes(workload: Workload) -> int:
    """Return the largest sum of live allocations; weights are not in it."""
    live = peak = 0
    for event in timeline(workload):
        if event[0] == "a":
            live += event[1]
            peak = max(peak, live)
        elif event[0] == "f":
            live -= event[1]
    return peak
