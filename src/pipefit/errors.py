"""Every error pipefit raises on purpose. A message is one sentence: asked, found, what to do.

PipefitError
├── InvalidRequest        input not understood: a budget, a name, a call argument, a value
│   └── UnknownName       a pipeline, GPU, strategy, component or argument that does not exist
├── UnsupportedPipeline   the pipeline object cannot be planned for, and why
├── TraceError            the pipeline's own call failed while it was executed symbolically
├── NoPlanFits            nothing fits; carries the smallest budget that works, per quality
├── PlanMismatch          a saved plan belongs to another pipeline
└── ApplyFailed           applying failed and was undone
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class PipefitError(Exception):
    """Base of every error that pipefit raises on purpose; ``exit_code`` is the command's."""

    exit_code = 1


class InvalidRequest(PipefitError, ValueError):
    """What was asked cannot be understood; nothing was changed."""

    exit_code = 2


class UnknownName(InvalidRequest):
    """A name that does not exist; the message offers the closest known ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self.kind = kind
        self.name = name
        self.known = tuple(known)
        folded = {candidate.casefold(): candidate for candidate in self.known}
        matches = difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.5)
        close = [folded[match] for match in matches]
        hint = (
            f"did you mean {' or '.join(close)}?"
            if close
            else (f"known are {', '.join(self.known[:12])}{' …' if len(self.known) > 12 else ''}.")
        )
        super().__init__(f"There is no {kind} called {name!r}: {hint}")


class UnsupportedPipeline(PipefitError):
    """The pipeline cannot be planned for; the message says why and what to do."""

    exit_code = 2


class TraceError(PipefitError):
    """The pipeline's own call failed while pipefit executed it without data."""


class NoPlanFits(PipefitError):
    """No combination of the allowed strategies stays within the budget.

    ``smallest_budget_bytes`` maps each quality, from the one asked for downwards, to the smallest
    budget with which a plan exists.
    """

    exit_code = 3

    def __init__(
        self, message: str, *, budget_bytes: int, smallest_budget_bytes: Mapping[str, int]
    ) -> None:
        self.budget_bytes = budget_bytes
        self.smallest_budget_bytes = dict(smallest_budget_bytes)
        super().__init__(message)


class PlanMismatch(PipefitError):
    """A saved plan was made for another pipeline, or for another state of this one."""

    exit_code = 2


class ApplyFailed(PipefitError):
    """Applying a plan failed; what had been applied was undone."""

    exit_code = 4
