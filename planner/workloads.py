"""From what the user has (a pipeline, a name, a folder) and a call to traced workloads.

How weights are stored changes the whole trace, so each way of it is a workload of its own: as they
are, cast to 16 bits, and, where the quality allows it, in fewer bits on the denoisers or on all
that take it. Which of four components take it is not chosen one by one: that would be 16 traces.

Nothing here imports torch until something has to be traced: a plan for a catalogue pipeline whose
trace is in the cache is made without it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.serial import to_json
from pipefit.cost_models.units import format_bytes
from pipefit.cost_models.workload import Component, Workload
from pipefit.errors import InvalidRequest, TraceError, UnknownName
from pipefit.planner.catalog import pipeline_entry
from pipefit.planner.options import Parts, check_required, compute_variants, computing
from pipefit.planner.policy import Policy
from pipefit.planner.trace_cache import (
    cached_trace,
    library_versions,
    remembered,
    whole_code_version,
)
from pipefit.strategies import BUILT_IN, conflict_of, quality_of, strategy, traits_of
from pipefit.strategies.fused_qkv import FUSED_LAYERS
from pipefit.strategies.latent_output import DECODE_LATER_NOTE
from pipefit.strategies.live import CHUNKING_ATTRIBUTES, DEFAULTED
from pipefit.strategies.prompt_first import ONLY_WHILE_LOADING, drops
from pipefit.strategies.strategy import Imitated, Option

Progress = Callable[[str], None]

DENOISE = "denoise"
"""The phase, as :func:`pipefit.planner.trace.phase_name` has it, that most of the time goes to."""

MAX_ATTRIBUTE_DEPTH = 3
"""How deep attributes of a live module are followed when it is recognised again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """A workload, and the options that turned the user's pipeline into it (a cast, a storage)."""

    workload: Workload
    load_options: tuple[Option, ...] = ()
    """Each with its reason, where it stores weights in fewer bits."""
    held_bytes: Mapping[str, int] = field(default_factory=dict)
    """By component, RAM that the load options hold beside its weights."""


def observe(
    subject: Any,
    call: Mapping[str, Any] | None,
    *,
    gpu: Gpu,
    policy: Policy,
    dtype: Mapping[str, str] | str | None = None,
    progress: Progress | None = None,
) -> list[Observed]:
    """Return the workloads to plan with: as the pipeline is, in 16 bits where that is open, and
    in fewer where the quality allows it.

    What a load strategy is asked for is in all of them. *subject* is a live pipeline, a catalogue
    name or a folder with ``model_index.json``.

    Raises:
        UnknownName: for a name that is none of these, or an argument that the call does not take.
        InvalidRequest: for a load strategy that a component refuses where it was asked for.
        TraceError: if the pipeline's own call fails.
    """
    say = progress or (lambda text: None)
    source = source_of(subject, dtype)

    ends: tuple[Option, ...] = ()

    def traced(options: Sequence[Option]) -> Workload:
        return _trace(source, call or {}, gpu, policy, (*options, *ends), say)

    is_loaded = not source.is_ours
    if drops(policy.required):
        _check_drop(source, call or {}, policy)
    plain = traced(())
    ends = _ends(plain, policy, gpu)
    asked = _asked(plain, policy)
    casts = _offered("precision", plain, gpu, policy)
    joined = _offered("fused_qkv", plain, gpu, policy)
    found = []
    for options in [asked, (*casts, *asked)] if casts else [asked]:
        try:
            workload = traced(options) if options or ends else plain
        except TraceError:
            if options == asked:
                raise
            # What cannot be cast (an autoencoder that overflows) is handed tensors of the others,
            # and not every pipeline converts them.
            say(f"{source.name} does not run once cast: its dtypes stay as they are")
            casts = ()
            continue
        _check_offload(workload, options, policy)
        found.append(_observed(workload, options, plain, policy, is_loaded=is_loaded))
    storages = _storages(plain, gpu, policy, is_loaded=is_loaded)
    for stored in [*([joined] if joined else []), *storages]:
        options = (*casts, *stored, *asked)
        if any(
            conflict_of([o for o in options if o.component == c.name]) for c in plain.components
        ):
            continue
        try:
            workload = traced(options)
        except (InvalidRequest, TraceError):
            continue  # only offered: what is asked for may not go with it, or the call
        if _meets(plain, workload, options, policy):
            found.append(_observed(workload, options, plain, policy, is_loaded=is_loaded))
    notes = _unoffered(plain, gpu, policy, is_loaded=is_loaded)
    return [
        replace(
            one,
            workload=replace(one.workload, assumptions=(*one.workload.assumptions, *notes)),
        )
        for one in found
    ]


def _ends(workload: Workload, policy: Policy, gpu: Gpu) -> tuple[Option, ...]:
    """Return what ends the call before its end, if the policy requires it.

    Raises:
        InvalidRequest: if it goes on no component, or the call cannot end there.
    """
    found = tuple(option for option in policy.required if option.strategy == "latent_output")
    if found:
        check_required(workload, replace(policy, required=found), gpu)
    return found


def _observed(
    workload: Workload,
    options: tuple[Option, ...],
    plain: Workload,
    policy: Policy,
    *,
    is_loaded: bool,
) -> Observed:
    """Return *workload* with what there is to say of the *options* that made it of *plain*."""
    pairs = {
        str(o.component): (plain.component(str(o.component)), workload.component(str(o.component)))
        for o in options
    }
    held = {
        str(o.component): one.held_bytes(
            *pairs[str(o.component)], is_loaded=is_loaded and one.goes_on_loaded(o.parameters)
        )
        for o in options
        if isinstance(one := strategy(o.strategy), Imitated)
    }
    return Observed(
        workload=replace(
            workload,
            # A plan belongs to the pipeline as the user has it, before the cast.
            fingerprint=plain.fingerprint,
            assumptions=(
                *workload.assumptions,
                *_notes(options, plain, workload, is_loaded=is_loaded),
            ),
        ),
        load_options=tuple(
            replace(o, reason=_stored_reason(o, *pairs[str(o.component)], policy)) for o in options
        ),
        held_bytes={name: num_bytes for name, num_bytes in held.items() if num_bytes},
    )


def _stored_reason(option: Option, before: Component, after: Component, policy: Policy) -> str:
    """Say what *option* makes of a component's weight, and what it needs; empty for a cast."""
    one = strategy(option.strategy)
    if one.name == "fused_qkv":
        joined = (t for t in after.tensors if not set(FUSED_LAYERS).isdisjoint(t.path.split(".")))
        more = format_bytes(sum(tensor.num_bytes for tensor in joined))
        return f"Queries, keys and values in one launch, with {more} of joined weights."
    if one.name == "step_cache":
        return "Asked for: some steps are extrapolated from those before."
    if not isinstance(one, Imitated):
        return ""
    is_asked = any(option.strategy == asked.strategy for asked in policy.required)
    weight, whole = format_bytes(after.weight_bytes), format_bytes(before.weight_bytes)
    missing = one.missing_package(option.parameters)
    share = after.weight_bytes / before.weight_bytes
    return (
        f"{'Asked for: ' if is_asked else ''}{after.name} weighs {weight} this way, {share:.2f} of "
        f"{whole}.{f' Needs `pip install {missing}`.' if missing else ''}"
    )


def _asked(workload: Workload, policy: Policy) -> tuple[Option, ...]:
    """Return what the policy requires of load strategies, component by component, to be applied."""
    named = {c.name: c for c in workload.components}
    found = []
    for one in (one for one in BUILT_IN if one.kind == "load"):
        for option in (option for option in policy.required if option.strategy == one.name):
            if option.component is not None and option.component not in named:
                raise UnknownName("component", option.component, list(named))
            for name in [option.component] if option.component else list(named):
                refusal = one.refusal(named[name], option.parameters)
                if refusal and option.component:
                    raise InvalidRequest(f"Strategy {one.name} cannot go on {name}: {refusal}")
                if not refusal and not _is_so_already(named[name], option):
                    found.append(replace(option, component=name))
    for name in named:
        reason = conflict_of([option for option in found if option.component == name])
        if reason:
            raise InvalidRequest(f"On {name}, {reason}")
    return tuple(found)


def _check_drop(source: Source, call: Mapping[str, Any], policy: Policy) -> None:
    """Refuse to drop text encoders that this call cannot do without.

    Raises:
        InvalidRequest: with the reason.
    """
    if not source.is_ours:
        raise InvalidRequest(ONLY_WHILE_LOADING)
    placed = any(option.strategy == "device_map" for option in policy.required)
    if len(policy.budget_bytes) > 1 or placed:
        raise InvalidRequest(
            "prompt_first:drop=true was asked for over several GPUs, but loads for one: plan for "
            "one, or leave drop=true out."
        )

    def refusal() -> str:
        from pipefit.planner.build import quietly
        from pipefit.planner.call import default_inputs
        from pipefit.planner.prompt import prompt_calls

        with quietly():
            pipe, entry = source.get()
            try:
                prompt_calls(pipe, default_inputs(pipe, entry, call), in_place=True)
            except InvalidRequest as error:
                return str(error)
        return ""

    reason = remembered(
        json.loads(json.dumps({**source.key, "drop": described_call(call)}, default=str)),
        refusal,
        name="refusal",
        to_json=str,
        from_json=str,
        code=whole_code_version(),
    )
    if reason:
        raise InvalidRequest(reason)


def _check_offload(workload: Workload, options: Sequence[Option], policy: Policy) -> None:
    """Refuse an offload of the whole pipeline that weights stored by *options* do not survive."""
    for asked in policy.required:
        one = strategy(asked.strategy)
        for option in options if one.kind == "pipeline_placement" else ():
            refusal = one.refusal(workload.component(str(option.component)), asked.parameters)
            if refusal:
                raise InvalidRequest(f"Strategy {one.name} cannot be had: {refusal}")


def _notes(
    options: Sequence[Option], plain: Workload, workload: Workload, *, is_loaded: bool
) -> tuple[str, ...]:
    """Return what predictions of the *workload* that *options* made of *plain* leave out."""
    notes = (
        one.note(
            option.parameters,
            plain.component(name),
            workload.component(name),
            is_loaded=is_loaded,
        )
        for option in options
        if isinstance(one := strategy(option.strategy), Imitated)
        and (name := str(option.component))
    )
    return tuple(note for note in notes if note)


def _is_so_already(component: Component, option: Option) -> bool:
    """Whether *option* asks for the dtype that the component has, or for one where it has none."""
    return option.strategy == "precision" and component.traits.get("dtype") in (
        None,
        option.parameters.get("dtype"),
    )


def _offered(name: str, workload: Workload, gpu: Gpu, policy: Policy) -> tuple[Option, ...]:
    """Return load strategy *name* on all that take it, if allowed and none was asked for."""
    one = strategy(name)
    taken = {option.strategy for option in policy.required}
    if name in taken or name in policy.forbidden or one.quality.rank > policy.quality.rank:
        return ()
    return tuple(
        Option(strategy=name, component=component.name, parameters=parameters)
        for component in workload.components
        for parameters in list(one.options(component, workload, gpu))[:1]
    )


def _storages(
    workload: Workload, gpu: Gpu, policy: Policy, *, is_loaded: bool
) -> list[tuple[Option, ...]]:
    """Return the ways to store weights in fewer bits that the quality allows.

    Each on the denoisers alone and on all that take it. None where one is asked for: how weights
    are stored is decided then. Of a pipeline that *is_loaded* only what can be put in force on it
    here and now, of one that will be loaded at once only what can be loaded here.
    """
    storing = [one for one in BUILT_IN if isinstance(one, Imitated)]
    if {one.name for one in storing} & {option.strategy for option in policy.required}:
        return []
    denoisers = {phase.component for phase in workload.phases if phase.name == DENOISE}
    ways: dict[str, list[Option]] = {}
    for one in storing:
        if one.name in policy.forbidden:
            continue
        for component in workload.components:
            for parameters in one.options(component, workload, gpu):
                if is_loaded and not one.goes_on_loaded(parameters):
                    continue
                if (is_loaded or policy.installed_only) and one.missing_package(parameters):
                    continue
                option = Option(strategy=one.name, component=component.name, parameters=parameters)
                if quality_of(option).rank <= policy.quality.rank:
                    ways.setdefault(repr((one.name, parameters)), []).append(option)
    found: list[tuple[Option, ...]] = []
    for everywhere in ways.values():
        for options in ([o for o in everywhere if o.component in denoisers], everywhere):
            if options and tuple(options) not in found:
                found.append(tuple(options))
    return found


def _meets(plain: Workload, workload: Workload, options: Sequence[Option], policy: Policy) -> bool:
    """Whether what the policy requires goes wherever it did, with weights stored by *options*."""
    for asked in policy.required:
        one = strategy(asked.strategy)
        for component in workload.components if one.kind != "load" else ():
            own = [o for o in options if o.component == component.name]
            if asked.component not in (None, component.name) or (
                asked.component is None
                and one.kind != "pipeline_placement"
                and one.refusal(plain.component(component.name), asked.parameters)
            ):
                continue
            if one.refusal(component, asked.parameters) or conflict_of([*own, asked]):
                return False
    return True


def _unoffered(workload: Workload, gpu: Gpu, policy: Policy, *, is_loaded: bool) -> tuple[str, ...]:
    """Say what the quality allows and the pipeline cannot be given here."""
    notes = []
    anywhere = replace(policy, installed_only=None)
    here = is_loaded or policy.installed_only
    for options in _storages(workload, gpu, anywhere, is_loaded=False) if here else ():
        one, parameters = strategy(options[0].strategy), options[0].parameters
        assert isinstance(one, Imitated)
        missing = one.missing_package(parameters)
        told = ",".join(f"{key}={value}" for key, value in parameters.items())
        if is_loaded and not one.goes_on_loaded(parameters):
            notes.append(
                f"{one.name}:{told} is not offered: the pipeline is loaded already, and the "
                "library does it while it loads; pipefit.load can."
            )
        elif missing:
            notes.append(f"{one.name}:{told} is not offered: it needs `pip install {missing}`.")
    return tuple(dict.fromkeys(notes))


@dataclass(frozen=True)
class Source:
    """Where a pipeline comes from: how to recognise it again, and how to get it."""

    name: str
    key: Mapping[str, Any]
    get: Callable[[], tuple[Any, Mapping[str, Any] | None]]
    """Returns the pipeline and its catalogue entry."""
    is_ours: bool
    """pipefit built it, so that tracing may convert it in place."""


def source_of(subject: Any, dtype: Mapping[str, str] | str | None) -> Source:
    """Return where *subject*, a live pipeline, a catalogue name or a folder, comes from.

    Raises:
        UnknownName: for a name that is neither. UnsupportedPipeline, InvalidRequest: see
            :func:`pipefit.planner.apply.check_pipeline`.
    """
    if isinstance(subject, (str, Path)):
        return _named(subject, dtype)
    return _live(subject)


def _named(subject: str | Path, dtype: Mapping[str, str] | str | None) -> Source:
    def get() -> tuple[Any, Mapping[str, Any] | None]:
        from pipefit.planner.build import build_pipeline

        pipe, info = build_pipeline(subject, dtype=dtype)
        return pipe, info.entry

    folder = Path(subject)
    if folder.is_dir():
        content: dict[str, str | int] = {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*.json"))
        }
        content |= {
            str(path.relative_to(folder)): path.stat().st_size
            for pattern in ("*/*.safetensors", "*/*.bin")
            for path in sorted(folder.glob(pattern))
        }
        return Source(folder.name, {"folder": content, "dtype": dtype}, get, True)
    try:
        entry = pipeline_entry(str(subject))
    except UnknownName:
        get()  # says what it is instead: a missing folder, a hub id, a misspelt name
        raise
    return Source(entry["name"], {"entry": entry, "dtype": dtype}, get, True)


def _live(pipe: Any) -> Source:
    from pipefit.planner.apply import check_pipeline

    check_pipeline(pipe)
    key = {"live": type(pipe).__name__, "state": state_digest(pipe)}
    return Source(type(pipe).__name__, key, lambda: (pipe, None), False)


def state_digest(pipe: Any) -> str:
    """Return a hash of everything about a live pipeline that its trace depends on.

    Classes, tensor geometry, and plain attributes of every module: flags such as ``use_tiling``,
    processors, configurations. Not the weights' values.
    """
    import torch

    digest = hashlib.sha256()

    def add(*values: Any) -> None:
        digest.update(repr(values).encode())

    def plain(value: Any, depth: int = 0) -> Any:
        if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
            return value
        if depth < MAX_ATTRIBUTE_DEPTH:
            if isinstance(value, (set, frozenset)):  # whose order differs between processes
                return sorted(repr(plain(v, depth + 1)) for v in value)
            if isinstance(value, (list, tuple)):
                return [plain(v, depth + 1) for v in value]
            if isinstance(value, Mapping):
                own = ((k, v) for k, v in value.items() if k != DEFAULTED)
                return [(str(k), plain(v, depth + 1)) for k, v in own]
            if isinstance(value, functools.partial):
                return [plain(v, depth + 1) for v in (value.func, value.args)]
            if hasattr(value, "__dict__") and not isinstance(value, (type, torch.nn.Module)):
                # Attention processors, configurations: small objects that decide what is computed.
                return [type(value).__qualname__, plain(vars(value), depth + 1)]
        return f"{type(value).__module__}.{type(value).__qualname__}"

    add(plain(dict(pipe.config)))
    # Sizes that the pipeline worked out for itself; what starts with _ changes with every call.
    add(plain({k: v for k, v in vars(pipe).items() if k[0] != "_" and k not in pipe.components}))
    for name, part in sorted(pipe.components.items()):
        config = getattr(part, "config", None)
        add(name, type(part).__name__, plain(dict(config)) if isinstance(config, Mapping) else None)
        if isinstance(part, torch.nn.Module):
            for path, module in part.named_modules():
                # What starts with _ changes with every call, these excepted.
                own = {
                    key: value
                    for key, value in vars(module).items()
                    if not key.startswith("_") or key in CHUNKING_ATTRIBUTES
                }
                add(path, type(module).__name__, plain(own))
            for path, tensor in (*part.named_parameters(), *part.named_buffers()):
                add(path, tuple(tensor.shape), tensor.stride(), tensor.dtype)
        elif hasattr(part, "model_max_length"):
            add(part.model_max_length)
    return digest.hexdigest()


def _trace(
    source: Source,
    call: Mapping[str, Any],
    gpu: Gpu,
    policy: Policy,
    load_options: Sequence[Option],
    say: Progress,
) -> Workload:
    """Return the workload, from the cache where it is there."""

    def make() -> Workload:
        on: dict[str, list[str]] = {}
        for option in load_options:
            on.setdefault(option.strategy, []).append(option.component or "the pipeline")
        after = " and ".join(f"{name} on {', '.join(parts)}" for name, parts in on.items())
        say(f"tracing {source.name}{f' after {after}' if after else ''} …")
        return _execute(source, call, gpu, policy, load_options)

    key = {
        **source.key,
        "call": described_call(call),
        "load_options": to_json(tuple(load_options)),
        "compute_capability": gpu.compute_capability,
        "architecture": gpu.architecture,
        # Levels that allow the same of these share their traces.
        "compute": computing(policy),
        "required": to_json([o for o in policy.required if strategy(o.strategy).kind == "compute"]),
    }
    return cached_trace(json.loads(json.dumps(key, default=str)), make)


def _execute(
    source: Source,
    call: Mapping[str, Any],
    gpu: Gpu,
    policy: Policy,
    load_options: Sequence[Option],
) -> Workload:
    """Get the pipeline, complete the call and trace it with all variants worth considering."""
    from pipefit.planner.build import quietly
    from pipefit.planner.call import default_inputs, resolve_call_defaults
    from pipefit.planner.trace import GPU, trace

    def load(twin: Any) -> None:
        for option in load_options:
            one = strategy(option.strategy)
            if isinstance(one, Imitated):
                one.imitate(twin, option.component, option.parameters)
            else:
                one.apply(twin, option.component, option.parameters, GPU)

    with quietly():
        pipe, entry = source.get()
        arguments = default_inputs(pipe, entry, call)
        shown = resolve_call_defaults(pipe, arguments)
        workload = trace(
            pipe,
            arguments,
            name=source.name,
            traits=traits_of,
            variants=lambda traced: _possible_with(
                load_options,
                compute_variants(replace(traced, call={**traced.call, **shown}), gpu, policy),
            ),
            apply_variant=_apply_parts,
            is_required=lambda parts: {option.strategy for option in policy.required} >= set(parts),
            prepare=load,
            compute_capability=gpu.compute_capability or (8, 9),
            in_place=source.is_ours,
        )
    given = {name: workload.call[name] for name in call if name in workload.call}
    versions = {name: found for name, found in library_versions().items() if found}
    is_cut = any(option.strategy == "latent_output" for option in load_options)
    return replace(
        workload,
        call={**shown, **given},
        versions=versions,
        assumptions=(*workload.assumptions, *([DECODE_LATER_NOTE] if is_cut else [])),
    )


def _possible_with(
    load_options: Sequence[Option], variants: Mapping[str, Sequence[Parts]]
) -> dict[str, list[Parts]]:
    """Return *variants* without those that what was done to a component rules out."""
    return {
        name: [
            parts
            for parts in choices
            if not conflict_of(
                [
                    *(option for option in load_options if option.component == name),
                    *(Option(strategy=key, parameters=parts[key]) for key in parts),
                ]
            )
        ]
        for name, choices in variants.items()
    }


def described_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return *call* as a cache key tells it from others."""
    return {name: _described(value) for name, value in call.items()}


def _described(value: Any) -> Any:
    """Return a call argument as the cache tells it from others: sizes for pictures and tensors."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_described(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _described(v) for k, v in value.items()}
    for attribute in ("shape", "size"):
        size = getattr(value, attribute, None)
        if isinstance(size, tuple):
            kind = getattr(value, "dtype", getattr(value, "mode", ""))
            return [type(value).__name__, list(size), str(kind)]
    return type(value).__name__


def _apply_parts(pipe: Any, component: str, parts: Parts) -> Callable[[], None]:
    """Put compute strategies in force on the weightless twin; return how to take them back."""
    from pipefit.planner.trace import GPU

    with ExitStack() as undo:
        for name, parameters in parts.items():
            undo.callback(strategy(name).apply(pipe, component, parameters, GPU))
        return undo.pop_all().close
