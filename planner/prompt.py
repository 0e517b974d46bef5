"""Encode the prompt of a call while nothing but the text encoders is there.

Which arguments a pipeline gives its ``encode_prompt`` nobody knows better than its own call: that
is executed on weightless copies. While it runs, the text encoders are there inside
``encode_prompt`` alone, and everything else outside alone, so that what does not go without the
other is found before a weight is read.

A reader would give ``None`` in place of the others to ``encode_prompt``, too. Some pipelines cast
embeddings to the dtype of the denoiser there, or ask for its configuration: that much is kept.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from pipefit.errors import InvalidRequest, TraceError
from pipefit.planner.rehearsals import REHEARSED_STEPS
from pipefit.planner.signatures import GPU
from pipefit.planner.trace import trace
from pipefit.strategies import strategy
from pipefit.strategies.live import module_components, wrap_method
from pipefit.strategies.prompt_first import ENCODE_PROMPT, Remembered, drops
from pipefit.strategies.strategy import Imitated, Option
from pipefit.strategies.text_encoder_on_cpu import reads_tokens

ADVICE = "leave drop=true out"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptCall:
    """One call of ``encode_prompt``, as the pipeline makes it."""

    arguments: Mapping[str, Any]
    state: Mapping[str, Any]
    """What the pipeline's own call had noted on itself by then, as ``_guidance_scale``, and what it
    says of the components that are not there."""


def text_encoders(pipe: Any) -> tuple[str, ...]:
    """Return the components that are dropped once the prompt is encoded."""
    return tuple(n for n, module in module_components(pipe).items() if reads_tokens(module))


def prompt_calls(
    pipe: Any,
    call: Mapping[str, Any],
    *,
    prepare: Callable[[Any], Any] = lambda twin: None,
    in_place: bool = False,
) -> list[PromptCall]:
    """Return how ``pipe(**call)`` calls ``encode_prompt``, if the text encoders can be dropped.

    *pipe* needs no weights. *prepare* and *in_place* are as in :func:`pipefit.planner.trace.trace`.

    Raises:
        InvalidRequest: they cannot, and why.
    """
    name = type(pipe).__name__
    if not callable(getattr(pipe, ENCODE_PROMPT, None)) or not text_encoders(pipe):
        raise InvalidRequest(f"{name} has no text encoders behind an encode_prompt: {ADVICE}.")
    _check_not_shared(pipe)
    found: list[PromptCall] = []

    def divide(twin: Any) -> None:
        prepare(twin)
        idle, rest = divided(twin)

        def encode(method: Any, *args: Any, **kwargs: Any) -> Any:
            bound = inspect.signature(method).bind(*args, **kwargs)
            for argument, value in bound.arguments.items():
                _check_known(name, argument, value)
            noted = {k: v for k, v in vars(twin).items() if k[:1] == "_" and _is_plain(v)}
            said = {k: v for k, v in vars(idle).items() if isinstance(v, SimpleNamespace)}
            found.append(PromptCall(arguments=dict(bound.arguments), state={**noted, **said}))
            vars(idle).update(noted)
            return getattr(type(twin), ENCODE_PROMPT)(idle, *args, **kwargs)

        vars(twin).update(vars(rest))
        wrap_method(twin, ENCODE_PROMPT, encode)

    parameters = inspect.signature(type(pipe).__call__).parameters
    short = dict(call)
    if "output_type" in parameters:
        short["output_type"] = "latent"  # nothing of a decoder is in question here
    steps = short.get("num_inference_steps", REHEARSED_STEPS)
    if "num_inference_steps" in parameters and not {"timesteps", "sigmas", "strength"} & set(short):
        short["num_inference_steps"] = min(steps, REHEARSED_STEPS)
    try:
        trace(pipe, short, prepare=divide, in_place=in_place)
    except TraceError as error:
        cause = error.__cause__
        raise InvalidRequest(
            f"{name} cannot do with its text encoders dropped "
            f"({type(cause).__name__}: {cause}): {ADVICE}."
        ) from error
    if not found:
        raise InvalidRequest(f"{name} encodes no prompt in this call: {ADVICE}.")
    return found


def as_loaded(options: Sequence[Option], twin: Any) -> None:
    """Give a weightless *twin* what a load under *options* gives a pipeline.

    Dtypes among it, which some pipelines hand ``encode_prompt``.
    """
    for option in options:
        one = strategy(option.strategy)
        if isinstance(one, Imitated) and is_imitated(option):
            one.imitate(twin, str(option.component), option.parameters)
        elif one.name == "precision":
            one.apply(twin, option.component, option.parameters, GPU)


def is_imitated(option: Option) -> bool:
    """Whether a weightless twin is given the effect of *option*, as before a trace."""
    one = strategy(option.strategy)
    return isinstance(one, Imitated) and not one.is_rehearsed


def alone(pipe: Any, kept: Mapping[str, Any]) -> Any:
    """Return a view of *pipe* with the modules *kept*, and of others only what they say."""
    view = copy.copy(pipe)
    for name, module in module_components(pipe).items():
        if name not in kept:
            vars(view)[name] = SimpleNamespace(
                config=getattr(module, "config", None), dtype=getattr(module, "dtype", None)
            )
    vars(view).update(kept)
    return view


def divided(pipe: Any) -> tuple[Any, Any]:
    """Return views of *pipe*: one with its text encoders alone, one with all but them."""
    encoders = {name: getattr(pipe, name) for name in text_encoders(pipe)}
    rest = copy.copy(pipe)
    vars(rest).update(dict.fromkeys(encoders))
    return alone(pipe, encoders), rest


def divided_options(
    options: Sequence[Option], encoders: Collection[str]
) -> tuple[list[Option], list[Option]]:
    """Return what of *options* is applied to the *encoders* while the prompt is encoded, and later.

    What is for the whole process or pipeline is for both.
    """
    left = [option for option in options if not drops([option])]
    return (
        [option for option in left if option.component is None or option.component in encoders],
        [option for option in left if option.component not in encoders],
    )


def encoded(pipe: Any, calls: Sequence[PromptCall], device: torch.device) -> Remembered:
    """Return what *pipe*, of which only the text encoders are there, makes of *calls*.

    Nothing of the result refers to *pipe*.
    """
    found = Remembered()
    for call in calls:
        vars(pipe).update(call.state)
        arguments = {
            name: device if isinstance(value, torch.device) else value
            for name, value in call.arguments.items()
        }
        method = getattr(pipe, ENCODE_PROMPT)
        if arguments.get("device", device) is None:
            arguments["device"] = device
        bound = inspect.signature(method).bind_partial()
        bound.arguments.update(arguments)
        with torch.no_grad():  # what needs a gradient would keep the weights
            found(method, *bound.args, **bound.kwargs)
    found.is_all = True
    return found


def _check_known(pipeline: str, argument: str, value: Any) -> None:
    """Refuse what may need weights to be made, or cannot be compared with what a later call gives.

    Raises:
        InvalidRequest: naming it.
    """
    if isinstance(value, torch.Tensor):
        what = "a tensor"
    elif isinstance(value, torch.Generator):
        what = "a random generator"
    else:
        inner = list(value.values()) if isinstance(value, Mapping) else value
        for one in inner if isinstance(inner, (list, tuple)) else ():
            _check_known(pipeline, argument, one)
        return
    raise InvalidRequest(
        f"{pipeline} gives encode_prompt {what} ({argument}), so its prompt cannot be encoded "
        f"before the rest is loaded: {ADVICE}."
    )


def _check_not_shared(pipe: Any) -> None:
    """Refuse text encoders that have a weight in common with what stays."""
    modules, encoders = module_components(pipe), text_encoders(pipe)
    weights = {n: {id(t) for t in (*m.parameters(), *m.buffers())} for n, m in modules.items()}
    for one in encoders:
        for other in modules.keys() - set(encoders):
            if weights[one] & weights[other]:
                raise InvalidRequest(
                    f"{one} shares weights with {other}, which stays when the text encoders are "
                    f"dropped: {ADVICE}."
                )


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if type(value) is dict:  # not the pipeline's own configuration, which is a FrozenDict
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, (bool, int, float, str))
