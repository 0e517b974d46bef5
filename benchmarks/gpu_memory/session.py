"""Runs cases in fresh processes, one on the GPU at a time, and stops in time.

Each row is on disk before the next begins. A process that dies or hangs costs its row; the cases
after it are handed to another.
"""

from __future__ import annotations

import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu_memory.cases import Case, finished
from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.serial import to_json
from pipefit.errors import InvalidRequest

ROOT = Path(__file__).parents[2]

WORKER_COMMAND = (sys.executable, "-m", "benchmarks.gpu_memory.worker")

PREPARE_LIMIT_S = 120.0
"""After this a process that is still preparing is given up; a cold trace takes up to 6 s of one
core (benchmarks/results/trace_speed_2core_2026-11.md), imports as much again."""

LEAST_LIMIT_S = 60.0
"""What a row may take at least, however short it was expected to be."""

LIMIT_FACTOR = 4.0
"""How many times its estimate a row may take before it counts as hanging."""

CLOSING_S = 5.0
"""Kept back at the end, for the report."""

RECENT_ROWS = 9
"""Rows from which the pace of a machine is taken: the median of what they took over what was
expected; few, because the kinds of rows follow each other."""

CORES_PER_WORKER = 4
"""Cores that one process keeps busy while it prepares, imports and all."""

MOST_AHEAD = 4


class RowFile:
    """Rows as JSON lines, each written whole or not at all as far as a reader can see."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._by_key: dict[str, dict[str, Any]] = {}
        kept = []
        lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue  # cut off while it was written
            if line.endswith("\n"):
                self._by_key[row["key"]] = row
                kept.append(line)
        if len(kept) < len(lines):
            path.write_text("".join(kept), "utf-8")

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row a key, the latest."""
        return list(self._by_key.values())

    def add(self, row: Mapping[str, Any]) -> None:
        """Append one row; it replaces an earlier one of its key."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._by_key[row["key"]] = dict(row)


class Worker:
    """A process that prepares *cases* from the moment it is made."""

    def __init__(
        self,
        cases: Sequence[Case],
        *,
        gpu: Gpu,
        device: str,
        log: IO[str],
        command: Sequence[str] = WORKER_COMMAND,
    ) -> None:
        self.cases = list(cases)
        self.prepared: dict[str, dict[str, Any]] = {}
        self.software: dict[str, str] | None = None
        source = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": source, **self.cases[0].environment}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            encoding="utf-8",
            cwd=ROOT,
            env=environment,
        )
        self._said: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()
        cases_json = [to_json(case) for case in cases]
        self._tell({"cases": cases_json, "gpu": to_json(gpu), "device": device})

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._said.put(json.loads(line))
        self._said.put(None)

    def _tell(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has died; whoever waits for its answer learns that

    def _hear(self, limit_s: float) -> dict[str, Any] | None:
        """Return the next message, None once the process has ended.

        Raises:
            TimeoutError: if there is none within *limit_s*.
        """
        try:
            return self._said.get(timeout=max(0.0, limit_s))
        except queue.Empty:
            raise TimeoutError from None

    def wait_until_ready(self, limit_s: float) -> str | None:
        """Wait for the preparation; return what went wrong, or None."""
        end_s = time.monotonic() + limit_s
        while self.software is None:
            try:
                message = self._hear(end_s - time.monotonic())
            except TimeoutError:
                return f"It was not prepared within {limit_s:.0f} s."
            if message is None:
                return f"The process ended while it prepared ({self._exit()})."
            if "ready" in message:
                self.software = message["ready"]
            else:
                self.prepared[message.pop("prepared")] = message
        return None

    def measure(self, case: Case, limit_s: float) -> dict[str, Any]:
        """Have *case* measured; ends the process if it takes longer than *limit_s*."""
        self._tell({"measure": case.key, "limit_s": limit_s})
        start_s = time.monotonic()
        try:
            message = self._hear(limit_s)
        except TimeoutError:
            self.end()
            return _failed("stopped", f"It took longer than {limit_s:.0f} s.", limit_s)
        if message is None:
            took_s = time.monotonic() - start_s
            return _failed(
                "error", f"The process ended while it measured ({self._exit()}).", took_s
            )
        del message["row"]
        return message

    def end(self) -> None:
        """End the process and wait until what it held on the GPU is free."""
        self._process.kill()
        self._exit()

    def _exit(self) -> str:
        code = self._process.wait()
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def _failed(outcome: str, error: str, took_s: float) -> dict[str, Any]:
    return {
        "outcome": outcome,
        "measured": None,
        "error": error,
        "took_s": took_s,
        "is_broken": True,
    }


def _unprepared(error: str) -> dict[str, Any]:
    return {"outcome": "error", "measured": None, "error": error, "took_s": 0.0}


class Pace:
    """Learns how long this machine takes, relative to the estimates."""

    def __init__(self) -> None:
        self._ratios: deque[float] = deque(maxlen=RECENT_ROWS)

    def expected_s(self, estimate_s: float) -> float:
        """Return what *estimate_s* means here."""
        return estimate_s * (statistics.median(self._ratios) if self._ratios else 1.0)

    def learn(self, estimate_s: float, took_s: float) -> None:
        """Take a measured row into account."""
        if estimate_s > 0:
            self._ratios.append(took_s / estimate_s)


def batches(cases: Iterable[Case]) -> deque[list[Case]]:
    """Return neighbours of one batch together, in their order."""
    found: deque[list[Case]] = deque()
    for case in cases:
        if found and found[-1][0].batch == case.batch:
            found[-1].append(case)
        else:
            found.append([case])
    return found


def workers_ahead() -> int:
    """Return how many processes may prepare beside the one that measures."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(MOST_AHEAD, (cores or 1) // CORES_PER_WORKER))


def run(
    cases: Sequence[Case],
    rows: RowFile,
    *,
    gpu: Gpu,
    device: str,
    limit_s: float,
    log: IO[str],
    ahead: int | None = None,
    command: Sequence[str] = WORKER_COMMAND,
    say: Callable[[str], None] = lambda text: None,
    started: Callable[[dict[str, str]], None] = lambda software: None,
) -> list[str]:
    """Measure what *rows* lack of *cases* within *limit_s*; return the keys left for another run.

    *started* is told the versions of the libraries before the first row is written, and may refuse
    them by raising.
    """
    end_s = time.monotonic() + limit_s - CLOSING_S
    done = finished(rows.rows)
    waiting = batches(case for case in cases if case.key not in done)
    preparing: deque[Worker] = deque()
    pace = Pace()
    try:
        while (waiting or preparing) and time.monotonic() < end_s:
            while waiting and len(preparing) <= (workers_ahead() if ahead is None else ahead):
                batch = waiting.popleft()
                preparing.append(Worker(batch, gpu=gpu, device=device, log=log, command=command))
            worker = preparing.popleft()
            try:
                left = _run_batch(worker, rows, pace, end_s, say, started)
            finally:
                worker.end()
            if left:
                waiting.appendleft(left)
    finally:
        for worker in preparing:
            worker.end()
    done = finished(rows.rows)
    return [case.key for case in cases if case.key not in done]


def _run_batch(
    worker: Worker,
    rows: RowFile,
    pace: Pace,
    end_s: float,
    say: Callable[[str], None],
    started: Callable[[dict[str, str]], None],
) -> list[Case]:
    """Measure the cases of one process; return those that are left because it died."""
    time_left_s = end_s - time.monotonic()
    failure = worker.wait_until_ready(min(PREPARE_LIMIT_S, time_left_s))
    if failure is not None:
        if time.monotonic() < end_s:
            unprepared = [c for c in worker.cases if c.key not in worker.prepared]
            culprit = (unprepared or worker.cases)[0]
            rows.add(_row(culprit, _unprepared(failure)))
            return [case for case in worker.cases if case is not culprit]
        return []
    assert worker.software is not None
    started(worker.software)
    for number, case in enumerate(worker.cases):
        prepared = worker.prepared[case.key]
        if "failed" in prepared:
            rows.add(_row(case, _unprepared(prepared["failed"])))
            continue
        estimate_s = prepared.pop("estimate_s")
        expected_s = pace.expected_s(estimate_s)
        time_left_s = end_s - time.monotonic()
        if expected_s > time_left_s:
            say(f"{case.key}: no time left ({expected_s:.0f} s)")
            continue
        allowed_s = min(time_left_s, max(LEAST_LIMIT_S, LIMIT_FACTOR * expected_s))
        found = worker.measure(case, allowed_s)
        is_broken = found.pop("is_broken")
        if found["outcome"] == "stopped" and allowed_s < time_left_s:
            found["outcome"] = "error"  # it hung; the run's own time was not over
        rows.add(_row(case, {"estimate_s": estimate_s, **prepared, **found}))
        say(f"{case.key}: {found['outcome']} in {found['took_s']:.1f} s")
        if found["outcome"] == "measured":
            pace.learn(estimate_s, found["took_s"])
        if is_broken:
            return worker.cases[number + 1 :]
    return []


def _row(case: Case, found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "key": case.key,
        "kind": case.kind,
        "parameters": dict(case.parameters),
        "environment": dict(case.environment),
        **found,
    }


def check_same(folder: Path, described: Mapping[str, Any]) -> None:
    """Write what the rows in *folder* were measured on, or hold it to what is there.

    Raises:
        InvalidRequest: if the rows there are of another GPU or of other libraries.
    """
    path = folder / "machine.json"
    if not path.exists():
        path.write_text(json.dumps(described, indent=1) + "\n", "utf-8")
        return
    before = json.loads(path.read_text("utf-8"))
    for part in ("gpu_name", "driver", "software"):
        if before[part] != described[part]:
            raise InvalidRequest(
                f"The rows in {folder} were measured with {part} {before[part]}, but here it is "
                f"{described[part]}: give another folder."
            )
