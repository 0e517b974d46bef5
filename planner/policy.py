"""What a plan may use: parses budgets and strategy specifications, and holds them as a value.

A budget bounds *process* memory on one GPU: what other processes hold never counts towards it. What
a reader would get wrong: a budget above the GPU's total is not an error. People write "24GiB" for a
24 GB card of which the driver hands out 23.6; the plan is made for the total, and says so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from pipefit.cost_models import serial
from pipefit.cost_models.machine import Gpu, Machine
from pipefit.cost_models.units import KIB, format_bytes, parse_bytes
from pipefit.errors import InvalidRequest, UnknownName
from pipefit.strategies.strategy import Option, Quality

Size = str | int | float
"""As ``parse_bytes`` reads it: a number of bytes, ``"8GB"``, ``"7.5GiB"``, ``"80%"``."""

BudgetRequest = Size | Mapping[int, Size] | Sequence[Size] | None
"""One size for every GPU, sizes by device index or in the order of the GPUs, or what is free."""

ParameterValue = str | int | float | bool | None

_WORDS: Mapping[str, bool | None] = {"true": True, "false": False, "none": None}
_BY_INDEX = re.compile(r"\s*(\d+)\s*=\s*(.+)")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The bounds a plan has to keep and the wishes it has to honour."""

    budget_bytes: Mapping[int, int]
    """Bound on process memory by device index; a GPU that is not named is not used."""
    ram_bytes: int | None = None
    """Bound on host RAM; None: what is available."""
    disk_allowed: bool = False
    quality: Quality = Quality.HIGH
    """The lowest level a plan may go to."""
    required: tuple[Option, ...] = ()
    forbidden: tuple[str, ...] = ()
    compile_allowed: bool = False
    notes: tuple[str, ...] = field(default=())
    """What was made of the request where that is not what it says, one sentence each."""
    installed_only: bool | None = field(default=None, metadata={serial.OMITTED: True})
    """Offer no storage whose package is missing here; else the plan says what it needs."""


def parse_budget(value: BudgetRequest, machine: Machine) -> dict[int, int]:
    """Return the budget in bytes by device index; at most each GPU's total.

    A single size holds for every GPU, a list for the GPUs in their order; a mapping, or a text like
    ``"0=8GB,1=12GB"``, for those that it names; None is what is free now.

    Raises:
        InvalidRequest: if a size is not one, or names a GPU that is not there.
    """
    asked = _asked_bytes(value, machine)
    totals = {gpu.index: gpu.total_bytes for gpu in machine.gpus}
    return {index: min(num_bytes, totals[index]) for index, num_bytes in asked.items()}


def budget_notes(value: BudgetRequest, machine: Machine) -> tuple[str, ...]:
    """Return a sentence for every GPU whose budget :func:`parse_budget` cut to the GPU's total."""
    asked = _asked_bytes(value, machine)
    return tuple(
        f"The budget of {format_bytes(asked[gpu.index])} is more than GPU {gpu.index} "
        f"({gpu.name}) has: planned for its {format_bytes(gpu.total_bytes)}."
        for gpu in machine.gpus
        if asked.get(gpu.index, 0) > gpu.total_bytes
    )


def _asked_bytes(value: BudgetRequest, machine: Machine) -> dict[int, int]:
    gpus = {gpu.index: gpu for gpu in machine.gpus}
    if not gpus:
        raise InvalidRequest(
            "A VRAM budget needs a GPU, and none was found: plan for one of the catalogue (--gpu "
            'rtx-4060), or let the CPU stand for it (--device cpu, device="cpu").'
        )
    if value is None:
        return {index: gpu.free_bytes for index, gpu in gpus.items()}
    by_index = _by_index(value, machine)
    if by_index is None:
        return {index: _size_bytes(value, gpu) for index, gpu in gpus.items()}
    if not by_index:
        raise InvalidRequest("The VRAM budget names no GPU: write at least one size.")
    for index in by_index:
        if isinstance(index, bool) or index not in gpus:
            there = ", ".join(str(i) for i in gpus)
            raise InvalidRequest(
                f"The VRAM budget names GPU {index!r}, which is not there: the machine has {there}."
            )
    return {index: _size_bytes(size, gpus[index]) for index, size in by_index.items()}


def _by_index(value: BudgetRequest, machine: Machine) -> Mapping[int, object] | None:
    """Return the sizes that *value* gives to single GPUs; None when it is one size for all."""
    if isinstance(value, str):
        if "=" not in value:
            return None
        parts = [_BY_INDEX.fullmatch(part) for part in value.split(",")]
        indices = [int(part.group(1)) for part in parts if part]
        if None in parts or len(set(indices)) < len(parts):
            raise InvalidRequest(
                f"The VRAM budget {value!r} was not understood: "
                'write each GPU once, like "0=8GB,1=12GB".'
            )
        return {int(part.group(1)): part.group(2) for part in parts if part}
    if isinstance(value, Mapping):
        return value
    if isinstance(value, Sequence):
        if len(value) > len(machine.gpus):
            raise InvalidRequest(
                f"{len(value)} VRAM budgets were given for {len(machine.gpus)} GPU: "
                "give at most one for each."
            )
        if any(isinstance(size, str) and "=" in size for size in value):
            return _by_index(",".join(str(size) for size in value), machine)
        if len(value) == 1:
            return {gpu.index: value[0] for gpu in machine.gpus}
        return {gpu.index: size for gpu, size in zip(machine.gpus, value, strict=False)}
    return None


def _size_bytes(size: object, gpu: Gpu) -> int:
    if not isinstance(size, (str, int, float)):
        raise InvalidRequest(
            f"The VRAM budget {size!r} was not understood: "
            'write a number of bytes, a text like "8GB", or either by GPU index.'
        )
    num_bytes = parse_bytes(size, total_bytes=gpu.total_bytes)
    if num_bytes < KIB and not (isinstance(size, str) and re.search(r"[a-zA-Z%]", size)):
        raise InvalidRequest(
            f'The VRAM budget {size!r} is a number of bytes: write "{num_bytes}GB" for gigabytes.'
        )
    return num_bytes


def parse_quality(text: str) -> Quality:
    """Return the quality called *text*.

    Raises:
        UnknownName: if there is no such level.
    """
    try:
        return Quality(text)
    except ValueError:
        raise UnknownName("quality", str(text), [q.value for q in Quality]) from None


def check_strategy_name(name: str, strategies: Collection[str]) -> str:
    """Return *name* if there is such a strategy.

    Raises:
        UnknownName: if there is none; the message offers the closest.
    """
    if name not in strategies:
        raise UnknownName("strategy", name, strategies)
    return name


def parse_strategy_spec(
    text: str, *, strategies: Collection[str], components: Collection[str] | None = None
) -> list[Option]:
    """Return the options that ``STRATEGY[:key=value,...][@component,...]`` stands for.

    One option for each component named; without any, one with ``component=None``, which means every
    component where the strategy applies. *components* None: they are not known yet, any name goes.

    >>> [o] = parse_strategy_spec("vae_tiling:tile_px=512@vae", strategies=["vae_tiling"])
    >>> o.strategy, o.component, o.parameters
    ('vae_tiling', 'vae', {'tile_px': 512})

    Raises:
        UnknownName: if the strategy or a component does not exist.
        InvalidRequest: if the text does not follow the grammar.
    """
    head, at, tail = text.partition("@")
    name, colon, assignments = head.strip().partition(":")
    if not _NAME.fullmatch(name) or (colon and not assignments) or (at and not tail):
        raise InvalidRequest(
            f"The strategy {text!r} was not understood: "
            "write NAME, NAME:key=value,key=value or NAME:key=value@component."
        )
    check_strategy_name(name, strategies)
    parameters = dict(_parameter(pair, text) for pair in assignments.split(",") if colon)
    if not at:
        return [Option(strategy=name, parameters=parameters)]
    named = [part.strip() for part in tail.split(",")]
    for component in named:
        if components is not None and component not in components:
            raise UnknownName("component", component, components)
        if not _NAME.fullmatch(component):
            raise InvalidRequest(
                f"The strategy {text!r} names no component after '@': write NAME@transformer."
            )
    return [Option(strategy=name, component=c, parameters=parameters) for c in named]


def _parameter(pair: str, text: str) -> tuple[str, ParameterValue]:
    key, equals, value = (part.strip() for part in pair.partition("="))
    if not equals or not value or not _NAME.fullmatch(key):
        raise InvalidRequest(
            f"The parameter {pair!r} of the strategy {text!r} was not understood: write key=value."
        )
    return key, parse_value(value)


def parse_value(text: str) -> ParameterValue:
    """Return the value a person means: true, false, none, a whole or real number, or the text.

    >>> [parse_value(t) for t in ("true", "none", "12", "0.5", "leaf_level")]
    [True, None, 12, 0.5, 'leaf_level']
    """
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for number in (int, float):
        try:
            value = number(text)
        except ValueError:
            continue
        return value if math.isfinite(value) else text
    return text
