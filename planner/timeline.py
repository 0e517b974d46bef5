"""What a rehearsal did when, in a form that browsers show.

The file is JSON in the Trace Event Format
(https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU): open it in
https://ui.perfetto.dev or chrome://tracing. Each GPU is a process with a row for each stream and a
graph of its memory; the host is a process whose row shows the components' calls. Times are those of
the virtual clock.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipefit.cost_models.clock import Span
from pipefit.errors import InvalidRequest

MERGE_GAP_S = 1e-6
"""Spans of one row and name with less than this between them are shown as one."""

HOST = -1
"""The host among the processes; GPUs have their index."""

_US = 1e6


class Timeline:
    """Collects spans and memory in the order in which they are asked for."""

    def __init__(self) -> None:
        self._spans: list[list[Any]] = []
        self._last: dict[tuple[int, int], list[Any]] = {}
        self._memory: dict[int, list[tuple[float, int, int]]] = {}

    def span(self, place: int, row: int, name: str, span: Span, num_bytes: int = 0) -> None:
        """Note that *name* ran on a stream (*row*) of the GPU *place*, or on the host."""
        last = self._last.get((place, row))
        if last is not None and last[2] == name and span.begin_s - last[4] < MERGE_GAP_S:
            last[4] = max(last[4], span.end_s)
            last[5] += num_bytes
            return
        entry = [place, row, name, span.begin_s, span.end_s, num_bytes]
        self._last[place, row] = entry
        self._spans.append(entry)

    def memory(self, place: int, at_s: float, allocated_bytes: int, reserved_bytes: int) -> None:
        """Note what the allocator of a GPU holds; of one moment the highest is kept."""
        samples = self._memory.setdefault(place, [])
        if samples and samples[-1][0] == at_s:
            _, allocated_before, reserved_before = samples.pop()
            allocated_bytes = max(allocated_bytes, allocated_before)
            reserved_bytes = max(reserved_bytes, reserved_before)
        samples.append((at_s, allocated_bytes, reserved_bytes))

    def to_json(self) -> dict[str, Any]:
        """Return the timeline in the Trace Event Format, moments in microseconds."""
        events: list[dict[str, Any]] = []
        for place, row in sorted(self._last):
            streams = "calls" if place == HOST else f"stream {row}"
            events += [
                _label("process_name", place, row, "host" if place == HOST else f"GPU {place}"),
                _label("thread_name", place, row, streams),
            ]
        for place, row, name, begin_s, end_s, num_bytes in self._spans:
            event = {"ph": "X", "pid": place + 1, "tid": row, "name": name}
            event |= {"ts": begin_s * _US, "dur": (end_s - begin_s) * _US}
            events.append(event | ({"args": {"bytes": num_bytes}} if num_bytes else {}))
        for place, samples in self._memory.items():
            for at_s, allocated_bytes, reserved_bytes in samples:
                held = {"allocated": allocated_bytes, "cached": reserved_bytes - allocated_bytes}
                event = {"ph": "C", "pid": place + 1, "name": "memory, bytes", "ts": at_s * _US}
                events.append(event | {"args": held})
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def write(self, file: Path) -> None:
        """Write the timeline to *file*.

        Raises:
            InvalidRequest: if that cannot be done.
        """
        try:
            file.write_text(json.dumps(self.to_json()), encoding="utf-8")
        except OSError as error:
            raise InvalidRequest(
                f"The file {str(file)!r} cannot be written ({error.strerror}): name another."
            ) from error


def _label(kind: str, place: int, row: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": place + 1, "tid": row, "name": kind, "args": {"name": name}}
