"""Stop a call where it would decode, and decode later: ``pipe(...)`` returns :class:`Undecoded`.

Between calls the denoiser then need not make room for the decoder. Only asked for, because it
changes what a call returns. How a pipeline goes from latents to a picture is its own affair, so
decoding runs its ``__call__`` once more: until ``decode`` it is given tensors of the shapes that
its ``encode_prompt`` and its components had returned, ``decode`` is given what it would have been
given, and the rest is as ever. That is right only if nothing after ``decode`` looks at what came
before it; so what comes after runs for two different fillings of those tensors, and must come out
the same.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.workload import Component, Workload
from pipefit.errors import InvalidRequest, PipefitError, UnsupportedPipeline
from pipefit.strategies.live import (
    ENTRY_METHODS,
    Restore,
    device_restorer,
    execution_device,
    have_weights_brought,
    module_components,
    without_progress_bar,
    wrap_method,
)
from pipefit.strategies.parameters import unknown_parameter
from pipefit.strategies.prompt_first import ENCODE_PROMPT, same_values
from pipefit.strategies.strategy import Kind, Quality, Undo

DECODE = "decode"
"""The phase, and the entry of a component."""

DECODE_LATER_NOTE = (
    "The call ends where it would decode; what decoding later takes is not in this prediction."
)
"""Marks workloads that were traced under this strategy."""

CALLBACKS = ("callback", "callback_on_step_end")
"""Arguments of calls: the user's functions, which have been called when it is time to decode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentOutput:
    """The pipeline's class is a subclass of its own, whose calls end at ``decode``."""

    name: str = "latent_output"
    kind: Kind = "process"
    quality: Quality = Quality.EXACT

    def traits(self, module: Any) -> dict[str, Any]:
        """Nothing: what decodes is known once it is called."""
        return {}

    def options(
        self, component: Component, workload: Workload, gpu: Gpu
    ) -> Sequence[Mapping[str, Any]]:
        """None: a call that returns no picture has to be asked for."""
        return ()

    def refusal(self, component: Component, parameters: Mapping[str, Any]) -> str | None:
        """Parameters."""
        return unknown_parameter(self.name, parameters, ())

    def unfit(
        self, component: Component, parameters: Mapping[str, Any], workload: Workload, gpu: Gpu
    ) -> str | None:
        """Calls that decode nothing, or more than once."""
        count = sum(len(phase.calls) for phase in workload.phases if phase.entry == DECODE)
        if count == 1 or DECODE_LATER_NOTE in workload.assumptions:
            return None
        if count == 0:
            return f"{workload.pipeline_class} decodes nothing in this call."
        return (
            f"{workload.pipeline_class} decodes {count} times in this call, and what lies between "
            "needs the first result."
        )

    def placement(self, parameters: Mapping[str, Any]) -> None:
        """Weights stay where they are."""

    def apply(
        self, pipe: Any, component: str | None, parameters: Mapping[str, Any], device: Any
    ) -> Undo:
        """Give this one pipeline another ``__call__``; undo gives it its class back."""
        cls = type(pipe)

        @functools.wraps(cls.__call__)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return _until_decode(cls, self, args, kwargs)

        pipe.__class__ = _subclass(cls, call)

        def undo() -> None:
            pipe.__class__ = cls

        return undo


@dataclass(frozen=True, kw_only=True, eq=False)
class Undecoded:
    """What a call would have decoded, in host memory, and what it takes to go on from there.

    Arguments that are tensors are kept where the caller has them.
    """

    pipeline_class: type
    call: Mapping[str, Any] = field(repr=False)
    returned: Mapping[tuple[str, str], Sequence[bytes]] = field(repr=False)
    """(component, entry) -> what each call returned, without the tensors' values; of the pipeline
    itself, which has no name, for its ``encode_prompt``."""
    decoder: str
    """The component whose ``decode`` comes next."""
    latents: Sequence[Any] = field(repr=False)
    """The tensors among the arguments of ``decode``."""
    dtype: Any = field(repr=False)
    """The decoder's at that time; under another plan it may have another."""
    changes: Sequence[Mapping[str, Any]] = field(repr=False)
    """What the user's callback changed of the pipeline, step by step."""

    def decode(self, pipe: Any) -> Any:
        """Return what the call would have returned; *pipe* may be under another plan by now.

        Decoding is on the GPU beside whatever *pipe* has there, and in no plan's prediction: a
        decoder that the plan left on the CPU comes for that long.

        Raises:
            InvalidRequest: *pipe* is of another class.
            UnsupportedPipeline: what it does after decoding needs more than what is decoded.
            torch.OutOfMemoryError: it does not fit beside the rest; undone, the plan is not in the
                way.
        """
        import torch

        if not isinstance(pipe, self.pipeline_class):
            raise InvalidRequest(
                f"A call of {self.pipeline_class.__name__} cannot be decoded by a "
                f"{type(pipe).__name__}: give the pipeline that was called."
            )
        device = execution_device(pipe)
        devices = [device] if device.type == "cuda" else []
        undo = contextlib.ExitStack()
        undo.callback(without_progress_bar(pipe))
        try:
            undo.callback(_brought(module_components(pipe)[self.decoder], device))
            # Noise is drawn again, and the caller's next call must not notice.
            with torch.random.fork_rng(devices):
                first = _Decoding(self, pipe, device, fill=0)
                output = first.run()
                second = _Decoding(self, pipe, device, fill=1, decoded=first.decoded)
                is_same = same_values(output, second.run())
        except (PipefitError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the pipeline raises, in its own words
            raise UnsupportedPipeline(
                f"{type(pipe).__name__} cannot go on from its latents ({type(error).__name__}: "
                f"{error}): undo the plan and decode again, or leave latent_output out."
            ) from error
        finally:
            undo.close()
        if not is_same:
            raise UnsupportedPipeline(
                f"What {type(pipe).__name__} returns depends on more than what it decodes: leave "
                "latent_output out."
            )
        return output


def _brought(module: Any, device: Any) -> Restore:
    """Bring *module* to *device* unless hooks do that; the result puts it back."""
    restore = device_restorer(module)
    if not have_weights_brought(module):
        module.to(device)
    return restore


class _Stop(Exception):
    """The call has come to ``decode`` of this component; not an error."""


def _until_decode(cls: Any, pipe: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Call *pipe* as its class *cls* does; return what is left to decode, if anything is."""
    signature = inspect.signature(cls.__call__)
    bound = signature.bind(pipe, *args, **kwargs)
    given = dict(list(bound.arguments.items())[1:])
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    kept = {name: _at_this_state(v) for name, v in given.items() if name not in CALLBACKS}
    returned: dict[tuple[str, str], list[bytes]] = {}
    latents: list[Any] = []
    changes: list[Mapping[str, Any]] = []
    if given.get("callback_on_step_end") is not None:
        kept["callback_on_step_end"] = None
        given = {**given, **_watched_callback(given["callback_on_step_end"], changes)}
    for name in CALLBACKS:
        if given.get(name) is not None:
            given = {**given, name: functools.partial(_outside, given[name])}

    def answer(name: str, entry: str, function: Any, args: Any, kwargs: Any) -> Any:
        if entry == DECODE:
            _each_tensor((args, kwargs), lambda tensor: latents.append(tensor.to("cpu", copy=True)))
            raise _Stop(name)
        output = function(*args, **kwargs)
        returned.setdefault((name, entry), []).append(_packed(output, []))
        return output

    modules = module_components(pipe)
    dtypes = {name: getattr(module, "dtype", None) for name, module in modules.items()}
    try:
        with _answering(pipe, answer):
            return cls.__call__(pipe, **given)
    except _Stop as stop:
        (decoder,) = stop.args
    dtype_then = getattr(modules[decoder], "dtype", None)
    # What a call does when it is through: some cast their autoencoder for decoding, and back.
    for name, dtype in dtypes.items():
        if dtype is not None and modules[name].dtype != dtype:
            modules[name].to(dtype=dtype)
    pipe.maybe_free_model_hooks()
    return Undecoded(
        pipeline_class=cls,
        call=kept,
        returned=returned,
        decoder=decoder,
        latents=latents,
        dtype=dtype_then,
        changes=changes,
    )


def _watched_callback(callback: Any, changes: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Return call arguments that call *callback* and note in *changes* what it sets on the pipe."""

    def watched(pipe: Any, *args: Any) -> Any:
        before = dict(vars(pipe))
        result = callback(pipe, *args)
        changes.append(
            {
                name: value
                for name, value in vars(pipe).items()
                if isinstance(value, (bool, int, float)) and value != before.get(name)
            }
        )
        return result

    # Pipelines ask the library's own callbacks, which are objects, for the tensors they need.
    wanted = getattr(callback, "tensor_inputs", None)
    return {
        "callback_on_step_end": watched,
        **({} if wanted is None else {"callback_on_step_end_tensor_inputs": wanted}),
    }


class _Decoding:
    """One run of a pipeline's ``__call__`` that computes from ``decode`` on."""

    def __init__(
        self,
        undecoded: Undecoded,
        pipe: Any,
        device: Any,
        *,
        fill: int,
        decoded: tuple[bytes, list[Any]] | None = None,
    ) -> None:
        self.undecoded, self.pipe, self.device, self.fill = undecoded, pipe, device, fill
        self.decoded = decoded
        """What ``decode`` returned, its tensors in host memory; given: it is not called."""
        self._counts: dict[tuple[str, str], int] = {}
        self._is_past = False

    def run(self) -> Any:
        call = {name: _at_this_state(value) for name, value in self.undecoded.call.items()}
        if "callback_on_step_end" in call:
            changes = iter(self.undecoded.changes)

            def repeat(pipe: Any, *_: Any) -> dict[str, Any]:
                vars(pipe).update(next(changes, {}))
                return {}

            call["callback_on_step_end"] = repeat
        with _answering(self.pipe, self._answer):
            return self.undecoded.pipeline_class.__call__(self.pipe, **call)

    def _answer(self, name: str, entry: str, function: Any, args: Any, kwargs: Any) -> Any:
        import torch

        if entry == DECODE:
            if self._is_past:
                raise UnsupportedPipeline(
                    f"{type(self.pipe).__name__} decodes more than once, and only what it decodes "
                    "first was kept: leave latent_output out."
                )
            self._is_past = True
            if self.decoded is None:
                latents = iter(self.undecoded.latents)
                dtype = getattr(module_components(self.pipe)[name], "dtype", None)

                def kept(tensor: Any) -> Any:
                    found = next(latents)
                    is_its = found.dtype == self.undecoded.dtype
                    return found.to(tensor.device, dtype if is_its else None)

                args, kwargs = _each_tensor((args, kwargs), kept)
                result = function(*args, **kwargs)
                tensors: list[Any] = []
                self.decoded = (_packed(result, tensors), [t.to("cpu") for t in tensors])
                del result, tensors  # beside their copies
            packed, values = self.decoded
            return _unpacked(packed, lambda number, *_: values[number].to(self.device, copy=True))
        if self._is_past:
            return function(*args, **kwargs)
        seen = self.undecoded.returned[name, entry]
        ordinal = self._counts[name, entry] = self._counts.get((name, entry), -1) + 1

        def filled(number: int, shape: Any, stride: Any, dtype: Any) -> Any:
            tensor = torch.empty_strided(shape, stride, dtype=dtype, device=self.device)
            return tensor.fill_(self.fill)

        # The user may have interrupted the call, which is not repeated.
        return _unpacked(seen[min(ordinal, len(seen) - 1)], filled)


# -- what a pipeline asks of its components

_ANSWER: ContextVar[Callable[..., Any] | None] = ContextVar("_ANSWER", default=None)


@contextlib.contextmanager
def _answering(pipe: Any, answer: Callable[[str, str, Any, Any, Any], Any]) -> Iterator[None]:
    """Let *answer* return what *pipe* gets of its components, but not what these get of others.

    Its ``encode_prompt`` counts as one, because a call may find a prompt encoded that another call
    has to encode. Components have another class meanwhile, because a wrapped ``forward`` would be
    in the way of hooks that come and go, and of what was compiled.
    """
    names = {id(module): name for name, module in module_components(pipe).items()}
    names[id(pipe)] = ""

    def outermost(module: Any, entry: str, function: Any, args: Any, kwargs: Any) -> Any:
        return _outside(answer, names[id(module)], entry, function, args, kwargs)

    def restore_class(module: Any, cls: type) -> None:
        module.__class__ = cls

    with contextlib.ExitStack() as undo:
        if callable(getattr(pipe, ENCODE_PROMPT, None)):
            wrapper = functools.partial(_entered, ENCODE_PROMPT, pipe)
            undo.callback(wrap_method(pipe, ENCODE_PROMPT, wrapper))
        for module in {id(m): m for m in module_components(pipe).values()}.values():
            for entry in ENTRY_METHODS:
                if callable(getattr(module, entry, None)):
                    wrapper = functools.partial(_entered, entry, module)
                    undo.callback(wrap_method(module, entry, wrapper))
            undo.callback(restore_class, module, type(module))
            module.__class__ = _answered_class(type(module))
        token = _ANSWER.set(outermost)
        undo.callback(_ANSWER.reset, token)
        yield


def _entered(entry: str, module: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
    answer = _ANSWER.get()
    if answer is None:
        return method(*args, **kwargs)
    return answer(module, entry, method, args, kwargs)


def _outside(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call what is not the pipeline's own: what it asks components for is its own affair."""
    token = _ANSWER.set(None)
    try:
        return function(*args, **kwargs)
    finally:
        _ANSWER.reset(token)


@functools.cache
def _answered_class(cls: type) -> type:
    """Return *cls* with calls that may be answered; one for all, or compiled code is outdated."""

    @functools.wraps(cls.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        answer, function = _ANSWER.get(), functools.partial(cls.__call__, self)
        if answer is None:
            return function(*args, **kwargs)
        return answer(self, "forward", function, args, kwargs)

    return _subclass(cls, call)


def _subclass(cls: type, call: Any) -> type:
    """Return *cls* with another ``__call__``, by the same name."""
    names = {"__call__": call, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), {**names, "__doc__": cls.__doc__})


# -- tensors in what components take and return


def _at_this_state(value: Any) -> Any:
    """Return a call argument as it is now: generators are copied, the rest nobody moves on."""
    if isinstance(value, list):
        return [_at_this_state(one) for one in value]
    return value.clone_state() if hasattr(value, "clone_state") else value


def _each_tensor(values: Any, function: Callable[[Any], Any]) -> Any:
    from accelerate.utils import recursively_apply

    return recursively_apply(function, values)


class _Writer(pickle.Pickler):
    # Not within a function: a class refers to itself, and what it encloses outlives the call.
    def __init__(self, stream: Any, tensors: list[Any]) -> None:
        super().__init__(stream)
        self.tensors = tensors

    def persistent_id(self, one: Any) -> Any:
        import torch

        if not isinstance(one, torch.Tensor):
            return None
        self.tensors.append(one)
        return (len(self.tensors) - 1, tuple(one.shape), one.stride(), one.dtype)


class _Reader(pickle.Unpickler):
    def __init__(self, stream: Any, make: Callable[..., Any]) -> None:
        super().__init__(stream)
        self.make = make

    def persistent_load(self, spec: Any) -> Any:
        return self.make(*spec)


def _packed(value: Any, tensors: list[Any]) -> bytes:
    """Describe *value*, whatever holds its tensors; append these to *tensors*."""
    stream = io.BytesIO()
    _Writer(stream, tensors).dump(value)
    return stream.getvalue()


def _unpacked(packed: bytes, make: Callable[..., Any]) -> Any:
    """Return the value that *packed* describes, with what *make* returns for each tensor."""
    return _Reader(io.BytesIO(packed), make).load()
