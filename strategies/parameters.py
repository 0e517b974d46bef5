"""Checks of strategy parameters that every strategy would write alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def unknown_parameter(
    strategy: str, parameters: Mapping[str, Any], known: Sequence[str]
) -> str | None:
    """Say which parameter *strategy* does not have; None where all are known."""
    for name in parameters:
        if name not in known:
            has = f"it knows {', '.join(known)}" if known else "it takes none"
            return f"{strategy} has no parameter {name!r}; {has}."
    return None


def not_a_flag(strategy: str, parameters: Mapping[str, Any], flags: Sequence[str]) -> str | None:
    """Say which of *flags* is neither true nor false; None where all are."""
    for name in flags:
        if not isinstance(parameters.get(name, False), bool):
            return f"{strategy}:{name} is true or false, but was {parameters[name]!r}."
    return None
