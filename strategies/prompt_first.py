"""Encode a prompt once: the next call with it finds what ``encode_prompt`` returned.

The text encoders then rest, and where :func:`pipefit.load` loads the pipeline they are not even
there any more: it reads them first, encodes the prompt of the call, drops them, and reads the rest.
Only asked for, because what it saves depends on the next prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.workload import Component, Workload
from pipefit.errors import InvalidRequest, UnsupportedPipeline
from pipefit.strategies.live import wrap_method
from pipefit.strategies.parameters import unknown_parameter
from pipefit.strategies.strategy import Kind, Quality, Undo

ENCODE_PROMPT = "encode_prompt"
"""The phase, and the method of a pipeline that most have."""

PROMPT_NOTE = "Later calls repeat a prompt; with another one each takes as long as the first."

MAX_REMEMBERED = 8
"""Results that are kept: prompts and negative prompts, in host memory. Our choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFirst:
    """``pipe.encode_prompt``, remembered by its arguments."""

    name: str = "prompt_first"
    kind: Kind = "process"
    quality: Quality = Quality.EXACT

    def traits(self, module: Any) -> dict[str, Any]:
        """Nothing: it is the pipeline's method."""
        return {}

    def options(
        self, component: Component, workload: Workload, gpu: Gpu
    ) -> Sequence[Mapping[str, Any]]:
        """None: whether the next call has the same prompt nobody knows."""
        return ()

    def refusal(self, component: Component, parameters: Mapping[str, Any]) -> str | None:
        """Parameters."""
        return unknown_parameter(self.name, parameters, ())

    def unfit(
        self, component: Component, parameters: Mapping[str, Any], workload: Workload, gpu: Gpu
    ) -> str | None:
        """Calls without a prompt to encode."""
        if any(phase.name == ENCODE_PROMPT for phase in workload.phases):
            return None
        return f"{workload.pipeline_class} encodes no prompt in this call."

    def placement(self, parameters: Mapping[str, Any]) -> None:
        """Weights stay where they are."""

    def apply(
        self, pipe: Any, component: str | None, parameters: Mapping[str, Any], device: Any
    ) -> Undo:
        """Wrap ``encode_prompt``; undo takes the wrapper off and forgets.

        Raises:
            UnsupportedPipeline: the pipeline has no such method.
        """
        return remember_prompts(pipe, Remembered())


class Remembered:
    """What ``encode_prompt`` returned, and for which arguments; a copy begins empty."""

    def __init__(self, *, is_all: bool = False) -> None:
        self.results: list[tuple[Mapping[str, Any], Any]] = []
        self.is_all = is_all
        """The text encoders are gone: what is not here cannot be had."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Remembered:
        return Remembered()

    def __call__(self, encode: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what *encode* returns.

        Raises:
            InvalidRequest: that cannot be known any more.
        """
        bound = inspect.signature(encode).bind(*args, **kwargs)
        bound.apply_defaults()
        for given, (result, device) in self.results:
            if _same(given, bound.arguments):
                return _copied(result, device)
        if self.is_all:
            raise InvalidRequest(
                "The pipeline was loaded with prompt_first for another prompt, and its text "
                "encoders are gone: load it for this prompt, or without prompt_first."
            )
        result = encode(*args, **kwargs)
        self.add(bound.arguments, result)
        return result

    def add(self, arguments: Mapping[str, Any], result: Any) -> None:
        """Keep *result*, in host memory, for those *arguments*."""
        kept = (dict(arguments), (_copied(result, "cpu"), _device_of(result)))
        self.results = [*self.results[1 - MAX_REMEMBERED :], kept]


def remember_prompts(pipe: Any, remembered: Remembered) -> Undo:
    """Let *pipe* ask *remembered* before it encodes a prompt; the result takes that back.

    Raises:
        UnsupportedPipeline: the pipeline has no ``encode_prompt``.
    """
    if not callable(getattr(pipe, ENCODE_PROMPT, None)):
        raise UnsupportedPipeline(
            f"{type(pipe).__name__} has no encode_prompt whose result could be remembered: leave "
            "prompt_first out."
        )
    return wrap_method(pipe, ENCODE_PROMPT, remembered)


def _device_of(value: Any) -> Any:
    from accelerate.utils import find_device

    return find_device(value) or "cpu"


def _copied(value: Any, device: Any) -> Any:
    """Return copies of the tensors in *value*, so that nobody writes to what is remembered."""
    from accelerate.utils import recursively_apply

    return recursively_apply(lambda tensor: tensor.to(device, copy=True), value)


def _same(one: Any, other: Any) -> bool:
    import torch

    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.device == other.device and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and type(one) is type(other):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or bool(type(one) is type(other) and one == other)
