"""Encode a prompt once: the next call with it finds what ``encode_prompt`` returned.

The text encoders then rest wherever their placement leaves them. Only asked for, because what it
saves depends on the next prompt. Adapters must not be changed while it is in force, as under every
plan: what was encoded with the earlier ones would come back.

With ``drop=true``, only while a pipeline is loaded, the prompt is encoded before anything but the
text encoders is read, and they are gone afterwards: see :mod:`pipefit.planner.prompt`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.workload import Component, Workload
from pipefit.errors import InvalidRequest, UnsupportedPipeline
from pipefit.strategies.live import wrap_method
from pipefit.strategies.parameters import not_a_flag, unknown_parameter
from pipefit.strategies.strategy import Kind, Option, Quality, Undo

ENCODE_PROMPT = "encode_prompt"
"""The phase, and the method of a pipeline that most have."""

PROMPT_NOTE = "Later calls repeat a prompt; with another one each takes as long as the first."

ONLY_WHILE_LOADING = (
    "prompt_first:drop=true cannot be undone, so it goes only on a pipeline that is being loaded: "
    "use pipefit.load, or leave drop=true out."
)

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
        return unknown_parameter(self.name, parameters, ("drop",)) or not_a_flag(
            self.name, parameters, ("drop",)
        )

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
            UnsupportedPipeline: the pipeline has no such method. InvalidRequest: text encoders are
                dropped by loading, not here.
        """
        if parameters.get("drop"):
            raise InvalidRequest(ONLY_WHILE_LOADING)
        if not callable(getattr(pipe, ENCODE_PROMPT, None)):
            raise UnsupportedPipeline(
                f"{type(pipe).__name__} has no encode_prompt whose result could be remembered: "
                "leave prompt_first out."
            )
        return wrap_method(pipe, ENCODE_PROMPT, Remembered())


def drops(options: Iterable[Option]) -> bool:
    """Whether *options* drop the text encoders once they have encoded the prompt."""
    return any(o.strategy == "prompt_first" and o.parameters.get("drop") for o in options)


class Remembered:
    """What ``encode_prompt`` returned, and for which arguments; a copy begins empty."""

    def __init__(self) -> None:
        self.results: list[tuple[Mapping[str, Any], Any, Any]] = []
        self.is_all = False
        """The text encoders are gone: what is not here cannot be had."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Remembered:
        return self if self.is_all else Remembered()

    def __call__(self, encode: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what *encode* returns, for the same arguments without calling it again."""
        import torch

        bound = inspect.signature(encode).bind(*args, **kwargs)
        bound.apply_defaults()
        devices = [v for v in bound.arguments.values() if isinstance(v, torch.device)]
        given = {k: v for k, v in bound.arguments.items() if not isinstance(v, torch.device)}
        # Some pipelines ask themselves instead of an argument.
        given["guidance"] = _or_none(encode, "do_classifier_free_guidance")
        for earlier, result, device in self.results:
            if same_values(earlier, given):
                return _copied(result, devices[0] if devices else device)
        if self.is_all:
            if _has_text(given):
                raise InvalidRequest(self._is_gone(given))
            try:
                return encode(*args, **kwargs)
            except Exception as error:  # it wants an encoder beside the embeddings that it is given
                raise InvalidRequest(self._is_gone(given)) from error
        result = encode(*args, **kwargs)
        if not any(isinstance(value, torch.Generator) for value in given.values()):
            kept = (_snapshot(given), _copied(result, "cpu"), _device_of(result))
            self.results = [*self.results[1 - MAX_REMEMBERED :], kept]
        return result

    def _is_gone(self, given: Mapping[str, Any]) -> str:
        """Say in what a call differs from the nearest of those that were encoded."""
        name, earlier = min(
            (
                ([key for key in given if not same_values(earlier.get(key), given[key])], earlier)
                for earlier, _, _ in self.results
            ),
            key=lambda found: len(found[0]),
        )
        what = "prompt" if "prompt" in name else name[0]
        return (
            f"The text encoders were dropped after encoding {earlier.get(what)!r} ({what}), and "
            f"this call gives {given.get(what)!r}: load again for it, or without drop=true."
        )


def _has_text(given: Mapping[str, Any]) -> bool:
    """Whether a prompt has to be encoded: without one, there are embeddings in its place."""
    for name, value in given.items():
        texts = value if isinstance(value, (list, tuple)) else [value]
        if "prompt" in name and any(isinstance(text, str) for text in texts):
            return True
    return False


def _or_none(method: Any, name: str) -> Any:
    """Return an attribute of the pipeline that *method* is of, if it has it by now."""
    try:
        return getattr(getattr(method, "__self__", None), name, None)
    except AttributeError:  # a property of what the call has not set
        return None


def _device_of(value: Any) -> Any:
    from accelerate.utils import find_device

    return find_device(value) or "cpu"


def _copied(value: Any, device: Any) -> Any:
    """Return copies of the tensors in *value*, so that nobody writes to what is remembered."""
    from accelerate.utils import recursively_apply

    return recursively_apply(lambda tensor: tensor.to(device, copy=True), value)


def _snapshot(value: Any) -> Any:
    """Return an argument as it is now, in host memory, whatever the caller does to it later."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _snapshot(one) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_snapshot, value))
    return copy.copy(value)


def same_values(one: Any, other: Any) -> bool:
    """Return whether arguments or outputs are equal, with all that is in them; NaN equals NaN."""
    import torch

    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        one, other = one.cpu(), other.cpu()
        return torch.equal(one, other) or bool(
            ((one == other) | (one.isnan() & other.isnan())).all()
        )
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        is_float = np.issubdtype(one.dtype, np.floating)
        return np.array_equal(one, other, equal_nan=is_float)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same_values(one[key], other[key]) for key in one)
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same_values, one, other))
    try:
        return bool(np.all(one == other))
    except ValueError:  # arrays of different shapes
        return False
